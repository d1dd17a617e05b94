"""Compact and sparse tickets compute what the masked dense network computes, with less."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from networks.bayes import SampleContext, to_bayesian
from networks.lottery.compact import SparseBayesLinear, SparseLinear, compact, sparse
from networks.masks import install_masks
from networks.mlp import MLP


def ticket(density: float, bayesian: bool, hidden=(40, 30), seed: int = 0, dead: bool = True) -> MLP:
    """A perceptron in evaluation, with random masks, some units without incoming or outgoing weights."""
    torch.manual_seed(seed)
    net = MLP(hidden=hidden)
    if bayesian:
        to_bayesian(net)
    for weight in install_masks(net):
        mask = torch.rand(weight.mu.shape) < density
        if dead:
            mask[3] = False  # no incoming weights
            mask[:, 5] = False  # a unit before has no outgoing weights
        weight.set_mask(mask)
        if bayesian:
            with torch.no_grad():
                weight.log_sigma.normal_(-2.0, 0.5)
    return net.eval()


def samples(number: int, batch: int, **options) -> SampleContext:
    return SampleContext(range(number), number, batch=batch, seed=3, **options)


@pytest.mark.parametrize("density", [0.5, 0.08, 0.01, 0.0])
@pytest.mark.parametrize("bayesian", [False, True])
def test_the_function_is_the_same(density, bayesian):
    net = ticket(density, bayesian)
    image = torch.randn(7, 1, 8, 8)
    for smaller in (compact(net, noise="dense"), sparse(net, max_density=0.6, noise="dense")):
        with torch.no_grad():
            torch.testing.assert_close(smaller(image), net(image), rtol=0, atol=1e-5)
            if bayesian:
                with samples(5, 7):
                    expected = net(image)
                with samples(5, 7):
                    found = smaller(image)
                assert found.shape == (35, 10)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_dead_units_go():
    net = ticket(0.3, bayesian=False)
    smaller = compact(net)
    first, second, _ = smaller.layers
    # Row 3 of the first layer is constant, its unit 5 unused; the same in the second: 3 is constant, nobody lost.
    used = net.layers[1].weight_mask.any(0)
    varies = net.layers[0].weight_mask.any(1)
    assert first.out_features == int((used & varies).sum()) <= 38
    assert second.in_features == first.out_features and second.out_features == 29
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in net.parameters())


def test_constants_travel_through_several_layers():
    """The first layer is empty: everything is constant, and only biases are left of it."""
    net = ticket(0.9, bayesian=False, dead=False)
    net.layers[0].weight_mask[:] = False
    smaller = compact(net)
    image = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(smaller(image), net(image), rtol=0, atol=1e-5)
    assert len(smaller.layers[0].pattern.rows) == 0


def test_random_biases_keep_their_units():
    """A Gaussian unit without incoming weights stays; one without outgoing weights goes."""
    net = ticket(0.3, bayesian=True)
    smaller = compact(net)
    assert 3 in smaller.layers[0].pattern.rows and 5 not in smaller.layers[0].pattern.rows


def test_only_weights_alive_draw_noise():
    net = ticket(0.05, bayesian=True, dead=False)
    layer = sparse(net).layers[0]
    assert isinstance(layer, SparseBayesLinear)
    drawn = []
    context = samples(4, 7)
    original = context.noise
    context.noise = lambda shape, like: drawn.append(tuple(shape)) or original(shape, like)
    with context, torch.no_grad():
        layer(torch.randn(7, 64))
    assert drawn == [(int(net.layers[0].weight_mask.sum()) + 40,)]  # and the biases


def test_sparse_layers_are_made_of_what_is_alive_alone():
    """No allocation and no draw beyond the values: the global generator stays where it is."""
    net = ticket(0.05, bayesian=True, hidden=(200, 150), dead=False)
    allocated: list[int] = []
    before = torch.get_rng_state()
    with Allocations(allocated):
        small = sparse(net, max_density=0.2)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(small.layers[1], SparseBayesLinear)
    largest = max(m.numel() for m in (net.layers[0].weight_mask, net.layers[1].weight_mask))
    assert max(allocated) <= largest  # nnz x in_features would be 7 times as many


class Allocations(TorchFunctionMode):
    """Notes the numbers of entries of what functions of torch return."""

    def __init__(self, found: list[int]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.found.append(out.numel())
        return out


def test_samples_have_the_right_moments():
    """Noise of weights alive alone: mean and variance over samples are those of the masked dense layer."""
    net = ticket(0.05, bayesian=True, dead=False)
    layer = sparse(net).layers[0]
    x = torch.randn(1, 64)
    with SampleContext(range(60), 60, batch=1, seed=0), torch.no_grad():
        out = torch.cat([layer(x), *(_again(layer, x, seed) for seed in range(1, 40))])
    dense = net.layers[0]
    mean = x @ dense.mean_weight().mT + dense.bias_mu
    variance = x.square() @ dense.weight_sigma().square().mT + dense.bias_log_sigma.exp().square()
    error = variance.sqrt() / len(out) ** 0.5
    assert ((out.mean(0) - mean).abs() < 4.5 * error).all()
    torch.testing.assert_close(out.var(0), variance[0].detach(), rtol=0.15, atol=0)


def _again(layer: nn.Module, x: torch.Tensor, seed: int) -> torch.Tensor:
    with SampleContext(range(60), 60, batch=1, seed=seed):
        return layer(x)


def test_divergence_is_that_of_the_weights_alive():
    net = ticket(0.05, bayesian=True, dead=False).double()
    small = sparse(net, max_density=0.2)
    for i in (0, 1):
        torch.testing.assert_close(small.layers[i].kl(), net.layers[i].kl(), rtol=1e-12, atol=0)
        assert small.layers[i].fan_in == net.layers[i].fan_in


@pytest.mark.parametrize("bayesian", [False, True])
def test_gradients_are_those_of_the_masked_layer(bayesian):
    net = ticket(0.08, bayesian, dead=False).double()
    small = sparse(net, noise="dense")
    image = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    for network in (net, small):
        if bayesian:
            with samples(3, 7):
                network(image).square().sum().backward()
        else:
            network(image).square().sum().backward()
    for i in (0, 1):
        dense, few = net.layers[i], small.layers[i]
        alive = dense.weight_mask
        if bayesian:
            torch.testing.assert_close(few.weight_mu.grad, dense.weight_mu.grad[alive])
            torch.testing.assert_close(few.weight_log_sigma.grad, dense.weight_log_sigma.grad[alive])
        else:
            assert isinstance(few, SparseLinear)
            torch.testing.assert_close(few.values.grad, dense.weight.grad[alive])


def test_tokens_and_folded_rows():
    torch.manual_seed(0)
    net = to_bayesian(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))).eval()
    for weight in install_masks(net):
        weight.set_mask(torch.rand(weight.mu.shape) < 0.4)
    small = sparse(net, max_density=1.0, noise="dense")
    x = torch.randn(2, 7, 6)
    with torch.no_grad():
        with samples(3, 2):
            expected = net(x)
        with samples(3, 2):
            torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="sparse executes the linear layers of any network"):
        compact(nn.Sequential(nn.Linear(3, 3)))
    layer = sparse(ticket(0.05, bayesian=True)).layers[0]
    with pytest.raises(ValueError, match="noise='some' is unknown"):
        SparseBayesLinear(ticket(0.05, bayesian=True).layers[0], noise="some")
    with samples(2, 3, estimator="lrt"), pytest.raises(ValueError, match=r"use model\.estimator=weight"):
        layer(torch.randn(3, 64))
    with pytest.raises(RuntimeError, match="in training without weight samples"):
        layer.train()(torch.randn(3, 64))
    assert "alive=" in repr(layer)
