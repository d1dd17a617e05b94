"""Rivals of transplantation, fitting to the ensemble, statistics, and the function that runs all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks.fusion import (
    RedundancyWarning,
    average,
    examined,
    fuse,
    match_layers,
    match_weights,
    permuted,
    recalibrate_bn,
    reconstruct,
    trace,
    transplant,
)
from networks.fusion.methods import MeanOfOutputs
from networks.fusion.reconstruction import inputs_and_outputs
from networks.lenet import LeNet
from networks.mlp import MLP
from tests.networks.fusion.nets import EXACT, example, members

IMAGE = torch.zeros(2, 1, 8, 8)


def images(count=64, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def pair(count=2, hidden=(12, 10)):
    return members(lambda k: MLP(hidden=hidden), count)


# ----------------------------------------------------------------------------------------------------------- averaging


def test_the_average_by_hand():
    networks = pair(3)
    fused = average(networks, [0.5, 0.25, 0.25])
    want = sum(w * n.layers[1].weight for w, n in zip([0.5, 0.25, 0.25], networks, strict=True))
    torch.testing.assert_close(fused.layers[1].weight, want)
    with pytest.raises(ValueError, match=r"differ at layer layers\.0\.weight.*averaging needs equal widths"):
        average([MLP(hidden=(8, 8)), MLP(hidden=(9, 8))])


@pytest.mark.parametrize("match", [match_weights, match_layers])
@pytest.mark.parametrize("name", ["mlp", "lenet", "convolution and flatten", "resnet18", "vit"])
def test_a_permuted_copy_is_found_again(match, name):
    """Matching undoes any permutation, also of residual streams and heads."""
    build, shape = EXACT[name]
    (network,) = members(build, 1)
    groups = trace(network, example(shape))
    torch.manual_seed(3)
    order = {g: torch.randperm(groups.groups[g].width) for g in groups.free}
    other = permuted(network, groups, order)
    found = match(network, other, groups)
    back = permuted(other, groups, found)
    for key, value in back.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[key], rtol=0, atol=0)
    assert all(torch.equal(order[g][found[g]], torch.arange(len(own))) for g, own in order.items())


def test_matching_brings_weights_together():
    first, second = pair()
    groups = trace(first, IMAGE)

    def distance(other):
        pairs = zip(first.parameters(), other.parameters(), strict=True)
        return float(sum((a - b).detach().square().sum() for a, b in pairs))

    before = distance(second)
    for match in (match_weights, match_layers):
        moved = permuted(second, groups, match(first, second, groups))
        assert distance(moved) < before
        x = images(5)
        with torch.no_grad():
            torch.testing.assert_close(moved(x), second(x), rtol=1e-5, atol=1e-6)
    # Nothing better is near: no exchange of two units gains.
    best = match_weights(first, second, groups)
    least = distance(permuted(second, groups, best))
    for g in groups.free:
        for i in range(3):
            swapped = {k: v.clone() for k, v in best.items()}
            swapped[g][[i, i + 1]] = swapped[g][[i + 1, i]]
            assert distance(permuted(second, groups, swapped)) >= least - 1e-4


def test_transport_between_layers_is_the_cheapest():
    """Every permutation of four units, tried one by one, costs at least as much."""
    import itertools

    first, second = pair(hidden=(4,))
    groups = trace(first, IMAGE)
    found = match_layers(first, second, groups)[0]
    rows = [torch.cat([n.layers[0].weight, n.layers[0].bias[:, None]], 1) for n in (first, second)]
    cost = torch.cdist(*rows)
    least = min(cost[range(4), list(order)].sum() for order in itertools.permutations(range(4)))
    torch.testing.assert_close(cost[torch.arange(4), found].sum(), least)


# ------------------------------------------------------------------------------------------------- fitting to ensembles


def test_a_fit_solves_the_ridge_regression():
    """The first fitted layer against numpy's least squares on the stacked system, bias unpenalised."""
    networks = pair()
    groups = examined(networks, [IMAGE])
    x, ridge = images(200), 0.05
    found = transplant(networks, groups)
    before = copy.deepcopy(found.network)
    reconstruct(found.network, found.sources, found.scales, networks, groups, [x[:80], x[80:]], ridge)
    with torch.no_grad():
        hidden = before.layers[0](x.flatten(1)).relu().double()
        member, channel = found.origin[1]
        each = torch.stack([n.layers[1](n.layers[0](x.flatten(1)).relu()) for n in networks])
        wanted = each[member, :, channel].T.double()
        plain = before.layers[1](hidden.float()).double()
        rows = torch.cat([hidden, torch.ones(200, 1, dtype=torch.float64)], 1)
        penalty = (ridge * hidden.square().sum(0).mean()).sqrt() * torch.eye(12, 13, dtype=torch.float64)
        system = torch.cat([rows, penalty])
        change = torch.linalg.lstsq(system, torch.cat([wanted - plain, torch.zeros(12, 10).double()])).solution
    torch.testing.assert_close(found.network.layers[1].weight, before.layers[1].weight + change[:12].T.float())
    torch.testing.assert_close(found.network.layers[1].bias, before.layers[1].bias + change[12].float())
    assert torch.equal(found.network.layers[0].weight, before.layers[0].weight)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=2, padding=(0, 1)),
        nn.Conv2d(3, 4, 3, dilation=2, padding="same"),
        nn.Conv2d(3, 4, 5, padding="valid", bias=False),
    ],
)
def test_a_convolution_is_a_regression_on_patches(module):
    network = nn.Sequential(module, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 8, 8)
    network(x)
    layer = trace(network, x).layers[0]
    with torch.no_grad():
        rows, out = inputs_and_outputs(network, module, layer, x)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(rows @ module.weight.flatten(1).T + bias, out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, module(x).flatten(2).transpose(1, 2).reshape(-1, 4))


def error(network, networks, x):
    with torch.no_grad():
        want = sum(n(x) for n in networks) / len(networks)
        return float((network(x) - want).square().mean())


@pytest.mark.parametrize("name", ["mlp", "mlp without biases", "lenet", "cnn", "vit"])
def test_a_fit_comes_closer_to_the_ensemble(name):
    build, shape = EXACT[name]
    networks = members(build, 2)
    torch.manual_seed(5)
    x, fresh = example(shape, 128), example(shape, 64)
    plain = fuse(networks, "nt", [x[:2]], [x], recalibrate=True).model
    fitted = fuse(networks, "nt_r", [x[:2]], x.split(70)).model
    assert error(fitted, networks, fresh) < 0.75 * error(plain, networks, fresh)
    plain = fuse(networks, "rebasin", [x[:2]], [x], recalibrate=True).model
    fitted = fuse(networks, "rebasin_r", [x[:2]], x.split(70)).model
    assert error(fitted, networks, fresh) < error(plain, networks, fresh)


def test_what_was_kept_whole_stays_as_it_is():
    """Nothing is missing in the concatenation: there is nothing to fit."""
    networks = pair()
    groups = examined(networks, [IMAGE])
    found = transplant(networks, groups, target_width=2.0)
    before = copy.deepcopy(found.network.state_dict())
    reconstruct(found.network, found.sources, found.scales, networks, groups, [images()])
    for key, value in found.network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)


def test_equal_members_in_another_order_are_fitted_to_themselves():
    """Channels that are means of the same channel in all members: nothing is lost, nothing to fit."""
    (one,) = pair(1)
    groups = trace(one, IMAGE)
    torch.manual_seed(2)
    order = {g: torch.randperm(groups.groups[g].width) for g in groups.free}
    result = fuse([one, permuted(one, groups, order)], "rebasin_r", [IMAGE], [images()])
    for key, value in one.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[key], value, rtol=0, atol=1e-6)


def test_features_that_never_fire_do_not_matter():
    networks = pair()
    for network in networks:
        network.layers[0].weight.data.zero_()
        network.layers[0].bias.data.fill_(-1.0)
    groups = examined(networks, [IMAGE])
    with pytest.warns(RedundancyWarning):
        found = transplant(networks, groups)
    fused = reconstruct(found.network, found.sources, found.scales, networks, groups, [images()])
    assert all(bool(p.isfinite().all()) for p in fused.parameters())
    assert error(fused, networks, images(seed=1)) < 1e-10  # the biases do it all


def test_statistics_are_those_of_the_inputs():
    build, shape = EXACT["convolution and flatten"]
    (network,) = members(build, 1)
    batches = [example(shape, 16), example(shape, 16)]
    recalibrate_bn(network, batches)
    with torch.no_grad():
        made = [network.conv1(batch) for batch in batches]
    want = torch.stack([one.mean((0, 2, 3)) for one in made]).mean(0)
    torch.testing.assert_close(network.bn.running_mean, want)
    want = torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in made]).mean(0)
    torch.testing.assert_close(network.bn.running_var, want)
    assert network.bn.momentum == 0.1 and not network.training and int(network.bn.num_batches_tracked) == 2


def test_evaluation_changes_no_buffer():
    """The first evaluation of a fused network leaves statistics as they are."""
    networks = members(EXACT["resnet18"][0], 2)
    x = torch.randn(8, 3, 8, 8)
    for method in ("nt", "nt_r", "average"):
        fused = fuse(networks, method, [x[:2]], [x], recalibrate=True).model
        before = {name: b.clone() for name, b in fused.named_buffers()}
        with torch.no_grad():
            fused(torch.randn(8, 3, 8, 8))
        assert all(torch.equal(b, before[name]) for name, b in fused.named_buffers())


# ----------------------------------------------------------------------------------------------------------- interface


def test_every_method_leaves_the_members_alone():
    networks = pair(3)
    networks[1].train()
    before = [copy.deepcopy(n.state_dict()) for n in networks]
    x = images()
    worth = {id(n): k for k, n in enumerate(networks)}

    def score(network):
        return float(worth.get(id(network), 5))

    for method in ("average", "ot", "rebasin", "rebasin_r", "soup", "nt", "nt_r", "best", "ensemble"):
        result = fuse(networks, method, [IMAGE], [x], score)
        assert result.method == method and result.seconds > 0 and not result.model.training
        with torch.no_grad():
            assert result.model(x).shape == (64, 10)
            for p in result.model.parameters():
                p.zero_()
        assert bool(result.provenance) == (method in ("nt", "nt_r"))
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert [n.training for n in networks] == [False, True, False]


def test_best_soup_and_ensemble():
    networks = pair(3)
    worth = {id(n): value for n, value in zip(networks, (0.5, 0.9, 0.7), strict=True)}

    def score(network):
        return worth.get(id(network), 0.95 if close(network, [1, 2]) else 0.1)

    def close(network, chosen):
        want = average([networks[k] for k in chosen]).layers[0].weight
        return torch.allclose(network.layers[0].weight, want)

    best = fuse(networks, "best", [IMAGE], score=score)
    assert best.details["member"] == 1 and torch.equal(best.model.layers[0].weight, networks[1].layers[0].weight)
    soup = fuse(networks, "soup", [IMAGE], score=score)
    assert soup.details == {"members": [1, 2], "score": 0.95} and close(soup.model, [1, 2])
    x = images(4)
    with torch.no_grad():
        want = torch.stack([n(x) for n in networks]).mean(0)
        assert torch.equal(MeanOfOutputs(networks)(x), want)
    for method in ("best", "soup"):
        with pytest.raises(ValueError, match=f"method {method} chooses among the members and needs a score"):
            fuse(networks, method, [IMAGE])


def test_wrong_requests():
    networks = pair()
    with pytest.raises(ValueError, match="method='nope' is unknown; choose one of best"):
        fuse(networks, "nope", [IMAGE])
    with pytest.raises(ValueError, match=r"method ot takes no 'ridge'; it takes nothing"):
        fuse(networks, "ot", [IMAGE], ridge=1.0)
    with pytest.raises(ValueError, match="nt_r fits layers to the members on unlabelled inputs"):
        fuse(networks, "nt_r", [IMAGE])
    with pytest.raises(ValueError, match="at least two members"):
        fuse(networks[:1], "nt", [IMAGE])


def test_lenet_needs_pixels():
    with pytest.raises(ValueError, match=r"model\.net\.image_size=11"):
        LeNet(image_size=11)
    with pytest.raises(ValueError, match=r"model\.net\.channels=\[6\]"):
        LeNet(channels=[6])
    assert sum(p.numel() for p in LeNet().parameters()) == 62_006  # the usual count for CIFAR-10
