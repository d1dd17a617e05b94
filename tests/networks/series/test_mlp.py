from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.series.mlp import MLP


def test_without_hidden_layers_it_is_linear() -> None:
    net = MLP(21, 7, 24, 9, hidden_layers=0).double()
    first, second = (torch.randn(2, 21, 24, dtype=torch.float64) for _ in range(2))
    marks = torch.randn(2, 21, 9, dtype=torch.float64)
    mean = net((first + second) / 2, marks)
    torch.testing.assert_close(mean, (net(first, marks) + net(second, marks)) / 2)


@pytest.mark.parametrize("hidden_layers", [1, 8])
def test_hidden_layers_are_counted(hidden_layers: int) -> None:
    net = MLP(21, 7, 24, 9, d_model=32, hidden_layers=hidden_layers)
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert [module.out_features for module in linear] == [32] + [32] * hidden_layers + [7 * 24]
    assert sum(isinstance(module, nn.Tanh) for module in net.modules()) == hidden_layers


def test_embedding_is_left_out_where_the_width_fits() -> None:
    net = MLP(21, 7, 24, 9, d_model=33, hidden_layers=0).double()
    history, marks = torch.randn(2, 21, 24, dtype=torch.float64), torch.randn(2, 21, 9, dtype=torch.float64)
    flat = torch.cat([history, marks], dim=2).reshape(2, 21 * 33)
    last = net.head[1]
    torch.testing.assert_close(net(history, marks), (flat @ last.weight.T + last.bias).reshape(2, 7, 24))


def test_marks_reach_the_forecast() -> None:
    net = MLP(21, 7, 24, 9).double()
    history, marks = torch.randn(2, 21, 24, dtype=torch.float64), torch.randn(2, 21, 9, dtype=torch.float64)
    assert not torch.allclose(net(history, marks), net(history, marks + 1))
