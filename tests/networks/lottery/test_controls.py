"""Controls: which densities they keep, that they are random, and what they draw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from networks.lottery.controls import draw_weights, shuffled
from networks.masks import alive, density, layer_densities

MASKS = {
    "a": torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) < 0.03,
    "b": torch.rand(33, 64, generator=torch.Generator().manual_seed(1)) < 0.4,
    "c": torch.rand(5, generator=torch.Generator().manual_seed(2)) < 0.9,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("control", ["shuffle_global", "shuffle_even", "shuffle_layerwise"])
def test_a_shuffle_is_random_and_reproducible(control):
    one, same, other = (shuffled(MASKS, control, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in MASKS)
    assert not torch.equal(one["a"], other["a"]) and not torch.equal(one["a"], MASKS["a"])
    assert all(one[name].shape == MASKS[name].shape and one[name].dtype == torch.bool for name in MASKS)


def test_layerwise_keeps_the_density_of_every_layer():
    new = shuffled(MASKS, "shuffle_layerwise", generator())
    assert layer_densities(new) == layer_densities(MASKS)


def test_global_keeps_the_total():
    new = shuffled(MASKS, "shuffle_global", generator())
    assert alive(new) == alive(MASKS)
    assert layer_densities(new)["b"] == pytest.approx(density(MASKS), abs=0.03)


def test_even_gives_every_layer_the_global_density():
    new = shuffled(MASKS, "shuffle_even", generator())
    for mask in new.values():
        assert abs(int(mask.sum()) - density(MASKS) * mask.numel()) <= 1


def test_a_global_shuffle_may_empty_a_layer_without_a_crash():
    sparse = {"a": torch.zeros(1000, dtype=torch.bool), "b": torch.tensor([True, True])}
    new = shuffled(sparse, "shuffle_global", generator())
    assert alive(new) == 2 and not new["b"].any()


def test_reinit_keeps_the_mask():
    for control in ("none", "reinit"):
        new = shuffled(MASKS, control, generator())
        assert all(torch.equal(new[name], MASKS[name]) for name in MASKS)


def test_unknown_control():
    with pytest.raises(ValueError, match="control='shufle' is unknown; choose one of none, reinit"):
        shuffled(MASKS, "shufle", generator())


def test_draws():
    net = nn.Sequential(nn.Conv2d(3, 64, 5), nn.BatchNorm2d(64), nn.Linear(400, 300))
    draw_weights(net, "uniform", generator())
    for layer, fan_in in ((net[0], 75), (net[2], 400)):
        bound = 1 / math.sqrt(fan_in)
        assert layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    first = net[0].weight.detach().clone()
    draw_weights(net, "normal", generator())
    assert float(net[2].weight.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    draw_weights(net, "uniform", generator())
    assert torch.equal(net[0].weight, first)
    assert (net[1].weight == 1).all()
    with pytest.raises(ValueError, match="init='xavier' is unknown"):
        draw_weights(net, "xavier")
