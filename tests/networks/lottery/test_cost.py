"""The cost account against the paper's table, multiplications against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.lottery.cost import multiplications, transplant_cost
from networks.masks import install_masks
from networks.vit import ViT


@pytest.mark.parametrize(
    ("deterministic", "bayesian", "saving"), [(12, 33, 0.61), (13, 72, 0.78), (9, 51, 0.78)], ids=["r20", "vgg", "vit"]
)
def test_savings_of_the_papers_table(deterministic, bayesian, saving):
    """Minutes per level of its Table 1; the text says up to 50 %."""
    cost = transplant_cost(20, deterministic, bayesian)
    assert cost.full == 21 * bayesian and cost.transplanted == 20 * deterministic + bayesian
    assert round(cost.saving, 2) == saving


def test_measured_seconds():
    cost = transplant_cost(2, [1.0, 2.0, 4.0], [10.0, 20.0, 30.0])
    assert (cost.full, cost.transplanted) == (60.0, 33.0) and cost.saving == pytest.approx(0.45)
    assert transplant_cost(2, [1.0, 2.0, 4.0], [10.0, 20.0, 30.0], trained=True).transplanted == 37.0
    assert transplant_cost(2, [1.0, 2.0, 4.0], [10.0, 20.0, 30.0], once=12.5).transplanted == 15.5
    assert transplant_cost(0, 5.0, 10.0).saving == 0


def test_mistakes():
    with pytest.raises(ValueError, match="seconds of 4 levels are needed, 3 were measured"):
        transplant_cost(3, 1.0, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="level=-1"):
        transplant_cost(-1, 1.0, 1.0)


def test_multiplications():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.Flatten())
    net.append(nn.Linear(6 * 9, 5))
    dense = 4 * 9 * 64 + 6 * 36 * 9 + 54 * 5
    example = torch.randn(2, 1, 8, 8)
    assert multiplications(net, example) == (dense, dense)
    first, _ = install_masks(net)
    mask = torch.zeros(4, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = True  # three weights
    first.set_mask(mask)
    assert multiplications(net, example) == (dense, dense - 33 * 64)
    assert net.training


def test_multiplications_count_tokens():
    net = ViT(10, 1, 8, 4, width=24, depth=1, heads=3, mlp_ratio=2.0)
    tokens = 5
    expected = 24 * 16 * 4 + tokens * 24 * (72 + 24 + 48 + 48) + 24 * 10
    assert multiplications(net, torch.randn(3, 1, 8, 8))[0] == expected
