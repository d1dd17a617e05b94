"""Which channels are kept, in every order of fusing, and what becomes of the special cases."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from networks.fusion import RedundancyWarning, concat, examined, importance, keep_best, output_scales, transplant
from networks.fusion.selection import best_of
from networks.fusion.transplantation import provenance
from networks.mlp import MLP
from tests.networks.fusion.nets import EXACT, example, members, no_bias


def mlps(count, hidden=(12, 10), seed=0):
    return members(lambda k: MLP(hidden=hidden), count, seed)


IMAGE = torch.zeros(2, 1, 8, 8)


def of(networks, **options):
    return transplant(networks, examined(networks, [IMAGE]), **options)


def test_importance_by_hand():
    """The sum over the row and the column of the squares, biases left out (paper, section 2.3)."""
    (network,) = mlps(1)
    groups = examined([network, network], [IMAGE])[0]
    weights = [layer.weight for layer in network.layers]
    want = weights[0].square().sum(1) + weights[1].square().sum(0)
    torch.testing.assert_close(importance(network, groups, 0), want)
    want = weights[1].abs().sum(1) + 0.25 * weights[2].abs().sum(0)
    torch.testing.assert_close(importance(network, groups, 1, p=1.0, scale=0.25), want)


def test_importance_sums_over_pixels_and_normalisations():
    build, shape = EXACT["convolution and flatten"]
    (network,) = members(build, 1)
    groups = examined([network, network], [example(shape)])[0]
    want = network.conv1.weight.flatten(1).square().sum(1) + network.bn.weight.square()
    want = want + network.conv2.weight.transpose(0, 1).flatten(1).square().sum(1)
    torch.testing.assert_close(importance(network, groups, 0), want)
    pixels = network.fc1.weight.view(24, 12, 4)  # every channel has four pixels
    want = network.conv2.weight.flatten(1).square().sum(1) + pixels.square().sum((0, 2))
    torch.testing.assert_close(importance(network, groups, 1), want)


def test_the_best_channels_of_all_are_kept():
    networks = mlps(3)
    groups = examined(networks, [IMAGE])
    scales = output_scales(groups)
    kept = keep_best(networks, groups, {0: 12, 1: 10}, scales)
    for g, count in ((0, 12), (1, 10)):
        scores = [importance(network, one, g, scale=1 / 3) for network, one in zip(networks, groups, strict=True)]
        threshold = torch.cat(scores).sort(descending=True).values[count - 1]
        for score, own in zip(scores, kept[g], strict=True):
            assert torch.equal(own, (score >= threshold).nonzero()[:, 0])


def test_ties_go_to_the_first():
    kept = best_of([torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 1.0])], 3, "layer")
    assert [own.tolist() for own in kept] == [[0, 1, 2], []]
    with pytest.raises(ValueError, match="layer: 6 channels are asked for, the members have 5"):
        best_of([torch.zeros(3), torch.zeros(2)], 6, "layer")


@pytest.mark.parametrize("count", range(2, 17))
def test_widths_are_exact(count):
    """A ratio of 1 - 1/m loses a channel for m = 3, 5, 6, 7, 10; a count does not."""
    networks = mlps(count, hidden=(32, 24))
    for order in ("joint", "prune_merge"):
        fused = of(networks, order=order)
        MLP(hidden=(32, 24)).load_state_dict(fused.network.state_dict(), strict=True)
        assert [len(channel) for _, channel in fused.origin.values()] == [32, 24]
        assert sum(fused.scales) == pytest.approx(1)


@pytest.mark.parametrize("name", ["lenet", "cnn", "convolution and flatten", "resnet18", "vit", "everything"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_fused_network_fits_its_class(name, count):
    build, shape = EXACT[name]
    networks = members(build, count)
    fused = transplant(networks, examined(networks, [example(shape)])).network
    again = build(0).eval()
    again.load_state_dict(fused.state_dict(), strict=True)
    x = example(shape, 3)
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))


def test_a_fused_weight_by_hand():
    """Blocks of the members, zeros between them, the last layer scaled, its bias averaged."""
    networks = mlps(2)
    fused = of(networks)
    (member0, channel0), (member1, channel1) = fused.origin[0], fused.origin[1]
    for i, j in itertools.product(range(10), range(12)):
        same = member1[i] == member0[j]
        want = networks[member1[i]].layers[1].weight[channel1[i], channel0[j]] if same else 0.0
        assert fused.network.layers[1].weight[i, j] == want
    for i in range(10):
        want = networks[member1[i]].layers[2].weight[:, channel1[i]] / 2
        assert torch.equal(fused.network.layers[2].weight[:, i], want)
    want = (networks[0].layers[2].bias + networks[1].layers[2].bias) / 2
    torch.testing.assert_close(fused.network.layers[2].bias, want)


def test_the_ends_of_the_fraction_are_the_members():
    networks = mlps(2)
    for r, network in ((0.0, networks[0]), (1.0, networks[1])):
        fused = of(networks, fraction=r)
        assert all(torch.equal(fused.network.state_dict()[k], v) for k, v in network.state_dict().items())
    fused = of(networks, fraction=0.25)
    assert provenance(examined(networks, [IMAGE])[0], fused.origin, 2) == {"layers.0": [9, 3], "layers.1": [8, 2]}
    with pytest.raises(ValueError, match=r"fraction=0\.5: is the part of the second of two members"):
        of(mlps(3), fraction=0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        of(networks, fraction=1.5)


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet18"])
def test_the_order_of_the_members_changes_the_order_of_the_channels_alone(name):
    build, shape = EXACT[name]
    networks = members(build, 3)
    x = example(shape, 4)
    outputs = []
    for order in ((0, 1, 2), (2, 0, 1)):
        chosen = [networks[k] for k in order]
        with torch.no_grad():
            outputs.append(transplant(chosen, examined(chosen, [example(shape)])).network(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_equal_members_are_redundant():
    (one,) = mlps(1)
    with pytest.warns(RedundancyWarning, match="6 channels were kept of two members that have them in common"):
        of([one, one])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RedundancyWarning)
        of(mlps(2))


def test_all_channels_are_the_concatenation():
    networks = mlps(3)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        got, want = of(networks, target_width=3.0).network(x), concat(networks, IMAGE)(x)
    assert torch.equal(got, want)
    small = of(networks, target_width=0.25).network
    assert [layer.out_features for layer in small.layers] == [3, 2, 10]
    with pytest.raises(ValueError, match=r"target_width=4.*use at most 3"):
        of(networks, target_width=4)


def test_fusing_one_after_the_other_forgets_the_first():
    networks = mlps(4, hidden=(32, 32))
    fused = of(networks, order="iterative")
    assert fused.scales == [0.125, 0.125, 0.25, 0.5]
    tree = of(networks, order="hierarchical")
    assert tree.scales == [0.25] * 4
    assert of(mlps(5), order="hierarchical").scales == pytest.approx([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6])
    assert of(mlps(6), order="hierarchical", base=3).scales == pytest.approx([1 / 6] * 6)
    for found in (fused, tree):
        state = found.network.state_dict()
        for g, (member, channel) in found.origin.items():  # every channel has the biases of where it comes from
            want = torch.stack([networks[k].layers[g].bias[c] for k, c in zip(member, channel, strict=True)])
            assert torch.equal(state[f"layers.{g}.bias"], want)
    counts = torch.bincount(fused.origin[1][0], minlength=4)
    assert counts[3] > counts[0]


def test_of_two_members_all_orders_but_the_shares_are_the_same():
    networks = mlps(2)
    want = of(networks).network.state_dict()
    for order in ("iterative", "hierarchical"):
        got = of(networks, order=order).network.state_dict()
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_members_of_other_widths():
    build, _ = EXACT["mlp of unequal widths"]
    networks = members(build, 3)
    fused = of(networks)
    assert fused.scales == pytest.approx([14 / 39, 13 / 39, 12 / 39])
    build(0).load_state_dict(fused.network.state_dict(), strict=True)


def test_wrong_arguments():
    networks = mlps(2)
    for options, message in (
        ({"order": "nope"}, "order='nope' is unknown"),
        ({"base": 4}, "base=4"),
        ({"target_width": 0}, "target_width=0"),
        ({"weighting": "nope"}, "weighting='nope' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            of(networks, **options)


def test_nothing_is_aligned_without_biases():
    networks = [no_bias(network) for network in mlps(2)]
    assert set(of(networks).network.state_dict()) == {f"layers.{i}.weight" for i in range(3)}
