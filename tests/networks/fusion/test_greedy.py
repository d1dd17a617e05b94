"""Channels chosen by what can be fitted to them."""

from __future__ import annotations

import pytest
import torch

from networks.fusion import examined, fuse
from networks.fusion.greedy import _blocks, _greedy, keep_fitting
from networks.fusion.members import without_biases
from networks.fusion.selection import keep_best
from networks.lenet import LeNet
from networks.mlp import MLP
from tests.networks.fusion.nets import EXACT, example, members


@pytest.mark.parametrize("size", [1, 3])
def test_every_step_takes_the_channel_that_explains_most(size):
    generator = torch.Generator().manual_seed(0)
    number, features = 7, 7 * size
    h = torch.randn(40, features, generator=generator, dtype=torch.float64)
    z = h @ torch.randn(features, 3, generator=generator, dtype=torch.float64)
    ridge = 1e-2
    penalty = ridge * (h.T @ h).diagonal().mean()

    def explained(chosen: list[int]) -> float:
        """Of a ridge regression on these channels: z^T H (H^T H + r)^-1 H^T z."""
        own = h.view(40, number, size)[:, chosen].flatten(1)
        inner = own.T @ own + penalty * torch.eye(own.shape[1], dtype=torch.float64)
        return float(((own.T @ z) * torch.linalg.solve(inner, own.T @ z)).sum())

    wanted: list[int] = []
    for _ in range(4):
        rest = [j for j in range(number) if j not in wanted]
        wanted.append(max(rest, key=lambda j: explained([*wanted, j])))
    assert _greedy(h.T @ h, h.T @ z, 4, ridge, size).tolist() == wanted
    assert _blocks(h.T @ h, h.T @ z, 4, penalty, size).tolist() == wanted


@pytest.mark.parametrize("biases", [True, False])
def test_it_fits_the_ensemble_better_than_norms_do(biases):
    torch.manual_seed(3)
    networks = [MLP(hidden=(32, 24)) if biases else without_biases(MLP(hidden=(32, 24))) for _ in range(4)]
    x, fresh = torch.randn(600, 1, 8, 8), torch.randn(200, 1, 8, 8)
    errors = {}
    with torch.no_grad():
        want = torch.stack([network(fresh) for network in networks]).mean(0)
        for channels in ("norms", "activations"):
            fused = fuse(networks, "nt_r", [x[:2]], [x], channels=channels).model
            errors[channels] = float((fused(fresh) - want).square().mean())
    assert errors["activations"] < 0.9 * errors["norms"]


def test_convolutions_are_chosen_by_their_pixels():
    """Half of the channels of both convolutions do nothing but have large weights."""
    torch.manual_seed(0)
    networks = [LeNet(image_size=16) for _ in range(2)]
    for network in networks:
        network.conv1.weight.data[::2] *= 3
        network.conv1.bias.data[::2] = -1e3  # never above zero
    x = torch.randn(200, 3, 16, 16)
    groups = examined(networks, [x[:2]])
    widths = {g: groups[0].groups[g].width for g in groups[0].free}
    kept = keep_fitting(networks, groups, widths, [0.5, 0.5], x.split(100))
    first, second = groups[0].free[:2]
    assert [own.tolist() for own in kept[first]] == [[1, 3, 5], [1, 3, 5]]
    assert sum(map(len, kept[second])) == widths[second]
    norms = keep_best(networks, groups, widths, [0.5, 0.5])
    assert all(set(own.tolist()) & {0, 2, 4} for own in norms[first])
    errors = {}
    fresh = torch.randn(200, 3, 16, 16)
    with torch.no_grad():
        want = torch.stack([network(fresh) for network in networks]).mean(0)
        for channels in ("norms", "activations"):
            fused = fuse(networks, "nt_r", [x[:2]], x.split(100), channels=channels).model
            errors[channels] = float((fused(fresh) - want).square().mean())
    assert errors["activations"] < 0.9 * errors["norms"]


def test_what_more_than_one_layer_reads_is_chosen_by_importance(monkeypatch):
    build, shape = EXACT["resnet18"]
    networks, x = members(build, 2), example(shape, 16)
    groups = examined(networks, [x[:2]])
    widths = {g: groups[0].groups[g].width for g in groups[0].free}
    read = {g: sum(slot.role == "reader" for slot in groups[0].groups[g].slots) for g in widths}
    norms = keep_best(networks, groups, widths, [0.5, 0.5])
    kept = keep_fitting(networks, groups, widths, [0.5, 0.5], [x])
    assert all(sum(map(len, kept[g])) == widths[g] for g in widths)
    assert all(all(map(torch.equal, kept[g], norms[g])) for g in widths if read[g] > 1)
    assert not all(all(map(torch.equal, kept[g], norms[g])) for g in widths if read[g] == 1)
    monkeypatch.setattr("networks.fusion.greedy._MOST_FEATURES", 0)  # too large to be fitted
    again = keep_fitting(networks, groups, widths, [0.5, 0.5], [x])
    assert all(all(map(torch.equal, again[g], norms[g])) for g in widths)


def test_what_it_cannot_do_is_refused():
    networks, x = [MLP(hidden=(8, 8)) for _ in range(2)], torch.randn(4, 1, 8, 8)
    with pytest.raises(ValueError, match="use order=joint"):
        fuse(networks, "nt_r", [x], [x], channels="activations", order="iterative")
    with pytest.raises(ValueError, match="choose norms or activations"):
        fuse(networks, "nt_r", [x], [x], channels="all")
