"""Concatenation is the ensemble; what is traced, gathered, permuted and refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks.fusion import (
    UnsupportedNetworkError,
    assemble,
    concat,
    examined,
    importance,
    output_scales,
    permuted,
    register_module,
    trace,
)
from networks.fusion.assembly import everything, tensors
from networks.fusion.layout import Axis, Part
from networks.mlp import MLP
from networks.resnet import ResNet
from tests.networks.fusion.nets import EXACT, SIMPLE_VIT, Encoder, Everything, example, members


def double(x):
    return x.double() if x.is_floating_point() else x


def mean_of(networks, scales, x):
    with torch.no_grad():
        return sum(scale * network(x) for network, scale in zip(networks, scales, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_the_concatenation_is_the_ensemble(name):
    """In double precision, where only a mistake is larger than the tolerance; in single: tests/acceptance."""
    build, shape = EXACT[name]
    count = 3
    networks = [network.double() for network in members(build, count)]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    x, one = double(example(shape, 4)), double(example(shape))
    for weighting in ("width", "equal") if "unequal" in name else ("width",):
        whole = concat(networks, one, weighting=weighting)
        scales = output_scales(examined(networks, [one]), how=weighting)
        assert sum(scales) == pytest.approx(1)
        if "unequal" not in name:
            assert scales == pytest.approx([1 / count] * count)
        with torch.no_grad():
            torch.testing.assert_close(whole.eval()(x), mean_of(networks, scales, x), rtol=0, atol=1e-12)
    for network, state in zip(networks, before, strict=True):  # members are read, not changed
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["mlp of unequal widths", "cnn", "resnet18", "vit", "everything"])
def test_the_concatenation_is_the_ensemble_in_training_too(name):
    """The normalisation of a batch is channel by channel, so statistics and gradients agree as well."""
    build, shape = EXACT[name]
    networks = members(build, 3)
    x = example(shape, 6)
    whole = concat(networks, example(shape), weighting="equal").train()
    got = whole(x)
    want = torch.stack([network.train()(x) for network in networks]).mean(0)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
    weights = torch.randn_like(got)
    first = next(name for name, p in networks[0].named_parameters() if name.endswith("weight"))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    grads = torch.cat([dict(network.named_parameters())[first].grad for network in networks])
    torch.testing.assert_close(dict(whole.named_parameters())[first].grad, grads, rtol=1e-3, atol=1e-5)


def test_what_acts_on_the_inputs_alone_cannot_be_concatenated():
    build, shape = SIMPLE_VIT
    networks = members(build, 2)
    with pytest.raises(ValueError, match=r"patch_embed\.0\.weight acts on the inputs"):
        concat(networks, example(shape))
    for name in ("weight", "bias"):  # the same factors everywhere: then it can
        getattr(networks[1].patch_embed[0], name).data.copy_(getattr(networks[0].patch_embed[0], name))
    x = example(shape, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            concat(networks, example(shape))(x), mean_of(networks, [0.5, 0.5], x), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", EXACT)
def test_a_permutation_of_channels_changes_nothing(name):
    """Every group is where the tracer says: all channels in another order compute the same function."""
    build, shape = EXACT[name]
    network = members(build, 1)[0].double()
    groups = trace(network, double(example(shape)))
    torch.manual_seed(1)
    order = {g: torch.randperm(groups.groups[g].width) for g in groups.free}
    if name == "everything":  # channels stay within their half, which is normalised together
        order[0] = torch.cat([torch.randperm(4), 4 + torch.randperm(4)])
    other = permuted(network, groups, order)
    x = double(example(shape, 4))
    with torch.no_grad():
        torch.testing.assert_close(other(x), network(x), rtol=0, atol=1e-11)
    for g in groups.free:  # and weigh what they weighed
        moved = importance(other, groups, g)
        torch.testing.assert_close(moved, importance(network, groups, g)[order[g]], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", EXACT)
def test_every_parameter_belongs_to_a_group_and_every_entry_once(name):
    build, shape = EXACT[name]
    (network,) = members(build, 1)
    groups = trace(network, example(shape))
    state = tensors(network)
    assert {n for n, _ in network.named_parameters()} <= groups.axes.keys()
    for tensor, axes in groups.axes.items():
        for dim, axis in axes.items():
            assert axis.length(groups.widths) == state[tensor].shape[dim], (tensor, dim)
            places = torch.cat([own.flatten() for _, own in axis.places(groups.widths)])
            assert torch.equal(places.sort().values, torch.arange(state[tensor].shape[dim]))
    assert [group.pinned for group in groups.groups].count(True) == 1
    again = assemble([network], [groups], everything([groups]), [1.0])
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())


def test_places_along_an_axis():
    """Queries, keys and values of two heads of three entries, then a part of another group."""
    axis = Axis((Part(0, 3), Part(1, 1)), outer=2)
    (first, heads), (second, others) = axis.places({0: 2, 1: 4})
    assert (first, second) == (0, 1)
    assert heads.tolist() == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]
    assert others.tolist() == [[6, 16], [7, 17], [8, 18], [9, 19]]


def test_residual_streams_and_heads_are_groups():
    groups = trace(ResNet(18, 10, 3, "cifar", 0.125), torch.zeros(2, 3, 8, 8))
    stream = next(group for group in groups.groups if group.name == "conv1")
    made = {slot.tensor for slot in stream.slots if slot.role == "maker"}
    assert made == {"conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight"}
    build, shape = EXACT["vit"]
    groups = trace(build(0), example(shape))
    heads = groups.groups[groups.heads["blocks.0.attn"]]
    assert heads.width == 2
    assert {s.tensor for s in heads.slots} == {f"blocks.0.attn.{n}" for n in ("qkv.weight", "qkv.bias", "proj.weight")}


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
            self.third, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.third.weight = self.second.weight

        def forward(self, x):
            x = self.second(self.first(x).relu()).relu()
            return self.last(self.third(x).relu())

    networks = members(lambda k: Tied(), 2)
    whole = concat(networks, torch.zeros(2, 4))
    assert whole.third.weight is whole.second.weight and whole.second.weight.shape == (12, 12)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), mean_of(networks, [0.5, 0.5], x), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_members_must_fit_together():
    one = MLP(hidden=(8, 8))
    with pytest.raises(ValueError, match="at least two"):
        examined([one], [torch.zeros(2, 1, 8, 8)])
    with pytest.raises(ValueError, match=r"differ at layer layers\.3\.weight"):
        examined([one, MLP(hidden=(8, 8, 8))], [torch.zeros(2, 1, 8, 8)])
    with pytest.raises(ValueError, match=r"differ at layer layers\.2\.weight.*outputs"):
        examined([one, MLP(hidden=(8, 8), num_classes=9)], [torch.zeros(2, 1, 8, 8)])
    with pytest.raises(ValueError, match="needs an example"):
        examined([one, MLP(hidden=(8, 8))], [])
    broken = MLP(hidden=(8, 8))
    broken.layers[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"member 1: layers\.1\.weight is not finite"):
        examined([one, broken], [torch.zeros(2, 1, 8, 8)])


def test_unknown_modules_are_named():
    with pytest.raises(UnsupportedNetworkError, match="LSTM"):
        trace(nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5)), torch.zeros(2, 7, 3))

    class Mixes(nn.Module):
        def forward(self, x):
            return torch.matmul(x, x.transpose(1, 2))

    with pytest.raises(UnsupportedNetworkError, match=r"Mixes \(1\) calls matmul"):
        trace(nn.Sequential(nn.Linear(3, 4), Mixes(), nn.Linear(4, 2)), torch.zeros(2, 4, 3))
    with pytest.raises(UnsupportedNetworkError, match="takes channels apart"):
        trace(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 2)), torch.zeros(5, 3))
    with pytest.raises(UnsupportedNetworkError, match="combined with its inputs, again"):

        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, x):
                return self.last(x + self.inner(x))

        trace(Skip(), torch.zeros(2, 4))
    with pytest.raises(UnsupportedNetworkError, match="convolution of 2 groups"):
        trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), torch.zeros(2, 3, 4, 4))


def test_a_module_can_be_taught():
    class Doubled(nn.Module):
        def forward(self, x):
            return x @ (2 * torch.eye(x.shape[-1]))

    network = nn.Sequential(nn.Linear(3, 4), Doubled(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedNetworkError, match="Doubled"):
        trace(network, torch.zeros(2, 3))
    from networks.fusion.tracer import _MODULES

    try:
        register_module(Doubled)(lambda tracer, path, module, result, x: tracer.value(x))
        others = [network, nn.Sequential(nn.Linear(3, 4), Doubled(), nn.Linear(4, 2))]
        x = torch.randn(5, 3)
        with torch.no_grad():
            torch.testing.assert_close(concat(others, torch.zeros(2, 3))(x), mean_of(others, [0.5, 0.5], x))
    finally:
        _MODULES.pop(Doubled)


def test_outputs_added_to_inputs_are_averaged():
    """Forecasting networks add the last value to what they give: weights of the mean add up to one."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return x + self.last(self.inner(x).relu())

    networks = members(lambda k: Residual(), 3)
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(concat(networks, x)(x), mean_of(networks, [1 / 3] * 3, x), rtol=0, atol=1e-6)


def test_heads_must_fill_the_tokens():
    networks = members(lambda k: Encoder(), 2)
    groups = examined(networks, [example((2, 5))])
    kept = everything(groups)
    heads = next(iter(groups[0].heads.values()))
    kept[heads] = [torch.tensor([0]), torch.tensor([], dtype=torch.int64)]
    with pytest.raises(ValueError, match="heads are 8 wide"):
        assemble(networks, groups, kept, [0.5, 0.5])


def test_group_normalisation_keeps_its_groups():
    networks = members(lambda k: Everything(), 2)
    groups = examined(networks, [torch.zeros(2, 3, 6, 6)])
    fused = assemble(networks, groups, everything(groups), [0.5, 0.5], separate=True)
    assert (fused.norm.num_groups, fused.norm.num_channels) == (4, 32) and fused.depthwise.groups == 16
