"""Gradients of chains of blocks: in which order, by whom, and that nobody hears of what comes later."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from networks.feedback import BlockChain, FeedbackWeights, Objective, Perceptron, TokenNetwork, blocks_of
from networks.feedback.diagnosis import alignments, cosine, mean_jacobians, norm, staleness


def chain_of(net: nn.Module, objective: str = "mse") -> BlockChain:
    return BlockChain(blocks_of(net), Objective(objective))


@pytest.fixture
def deep():
    torch.manual_seed(0)
    return Perceptron((5,), 3, depth=3, width=6).double()


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fixed(block: int, h: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(h) * (block + 1)


def test_backpropagation_is_autograds(deep):
    found = {}
    raw, loss = chain_of(deep).backpropagate(X, Y, found.__setitem__)
    wanted = nn.functional.mse_loss(deep(X), Y)
    assert torch.equal(raw, deep(X)) and torch.equal(loss, wanted) and not raw.requires_grad
    flat = [g for i in sorted(found) for g in found[i]]
    for one, other in zip(flat, torch.autograd.grad(wanted, list(deep.parameters())), strict=True):
        assert torch.equal(one, other)


def test_blocks_may_change_before_the_next_one_begins(deep):
    """What goes to the next block is from before the step."""
    chain = chain_of(deep)
    still = {}
    chain.in_forward(X, Y, fixed, still.__setitem__)
    order, moving = [], {}

    def apply(block, gradients):
        order.append(block)
        moving[block] = gradients
        with torch.no_grad():
            for p in chain.parameters[block]:
                p.add_(1.0)

    chain.in_forward(X, Y, fixed, apply)
    assert order == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for i in still for a, b in zip(still[i], moving[i], strict=True))


def test_both_schedules_give_the_same(deep):
    one, other = {}, {}
    raws = [chain_of(deep).in_forward(X, Y, fixed, one.__setitem__)[0]]
    raws.append(chain_of(deep).one_shot(X, Y, lambda raw: fixed, other.__setitem__)[0])
    assert torch.equal(*raws)
    assert all(torch.equal(a, b) for i in one for a, b in zip(one[i], other[i], strict=True))


def test_only_the_last_block_learns_without_feedback(deep):
    found = {}
    chain_of(deep).in_forward(X, Y, None, found.__setitem__)
    assert list(found) == [3]
    true = {}
    chain_of(deep).backpropagate(X, Y, true.__setitem__)
    assert all(map(torch.equal, found[3], true[3]))


def test_blocks_without_parameters_and_frozen_ones_are_passed(deep):
    for p in deep[3].parameters():
        p.requires_grad_(False)
    chain = BlockChain(blocks_of(deep), Objective("mse"))
    for run in (
        lambda found: chain.in_forward(X, Y, fixed, found.__setitem__),
        lambda found: chain.one_shot(X, Y, lambda raw: fixed, found.__setitem__),
        lambda found: chain.backpropagate(X, Y, found.__setitem__),
    ):
        found = {}
        run(found)
        assert sorted(found) == [0, 2, 3]


def test_targets_of_another_shape_are_refused(deep):
    with pytest.raises(ValueError, match=r"the network gives \(8, 3\), the targets are \(8, 1\)"):
        chain_of(deep).in_forward(X, Y[:, :1], None, lambda *_: None)


def test_sizes_are_those_of_the_boundaries():
    net = TokenNetwork(10, 1, 28, 7, 32, 4, 8, 64, 128)
    assert chain_of(net).sizes(torch.zeros(1, 1, 28, 28)) == [512] * 5


class TestDiagnosis:
    def test_cosine(self):
        a = [torch.tensor([1.0, 0.0]), None]
        assert cosine(a, [torch.tensor([2.0, 0.0]), None]) == pytest.approx(1)
        assert cosine(a, [torch.tensor([-1.0, 1.0]), None]) == pytest.approx(-math.sqrt(0.5))
        assert math.isnan(cosine(a, [torch.zeros(2), None])) and math.isnan(cosine([None], [None]))
        assert norm([torch.tensor([3.0]), None, torch.tensor([4.0])]) == pytest.approx(5)
        assert norm([None]) == 0

    def test_jacobians_of_a_linear_chain_are_the_products_of_later_weights(self):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)).double()
        found = mean_jacobians(chain_of(net), torch.randn(5, 4, dtype=torch.float64))
        w = [layer.weight for layer in net]
        for one, other in zip(found, [w[3] @ w[2] @ w[1], w[3] @ w[2], w[3]], strict=True):
            torch.testing.assert_close(one, other)
        matrices = FeedbackWeights("kaiming_uniform").draw(2, [4, 4, 4]).double()
        for matrix, jacobian in zip(matrices, found, strict=True):
            matrix.entries.copy_(-3 * jacobian)
        assert alignments(chain_of(net), matrices, torch.randn(5, 4, dtype=torch.float64)) == pytest.approx([1, 1, 1])

    def test_staleness(self):
        assert staleness(torch.ones(2, 3), torch.ones(2, 3)) == 0
        assert staleness(torch.zeros(2, 3), torch.ones(2, 3)) == pytest.approx(1)
