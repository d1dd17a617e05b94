"""Channels chosen by what can be fitted to them."""

from __future__ import annotations

import pytest
import torch

from networks.fusion import examined, fuse
from networks.fusion.greedy import _greedy, keep_fitting
from networks.fusion.members import without_biases
from networks.fusion.selection import keep_best
from networks.mlp import MLP
from tests.networks.fusion.nets import EXACT, example, members


def test_every_step_takes_the_feature_that_explains_most():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    z = h @ torch.randn(7, 3, generator=generator, dtype=torch.float64)
    ridge = 1e-2
    penalty = ridge * (h.T @ h).diagonal().mean() * torch.eye(7, dtype=torch.float64)

    def explained(chosen: list[int]) -> float:
        """Of a ridge regression on these features: z^T H (H^T H + r)^-1 H^T z."""
        own = h[:, chosen]
        inner = own.T @ own + penalty[: len(chosen), : len(chosen)]
        return float(((own.T @ z) * torch.linalg.solve(inner, own.T @ z)).sum())

    wanted: list[int] = []
    for _ in range(4):
        rest = [j for j in range(7) if j not in wanted]
        wanted.append(max(rest, key=lambda j: explained([*wanted, j])))
    assert _greedy(h.T @ h, h.T @ z, 4, ridge).tolist() == wanted


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


def test_what_more_than_a_linear_layer_reads_is_chosen_by_importance():
    build, shape = EXACT["cnn"]
    networks, x = members(build, 2), example(shape, 16)
    groups = examined(networks, [x[:2]])
    widths = {g: groups[0].groups[g].width for g in groups[0].free}
    kept = keep_fitting(networks, groups, widths, [0.5, 0.5], [x])
    norms = keep_best(networks, groups, widths, [0.5, 0.5])
    assert all(sum(map(len, kept[g])) == widths[g] for g in widths)
    first = groups[0].free[0]
    assert all(map(torch.equal, kept[first], norms[first]))


def test_what_it_cannot_do_is_refused():
    networks, x = [MLP(hidden=(8, 8)) for _ in range(2)], torch.randn(4, 1, 8, 8)
    with pytest.raises(ValueError, match="use order=joint"):
        fuse(networks, "nt_r", [x], [x], channels="activations", order="iterative")
    with pytest.raises(ValueError, match="choose norms or activations"):
        fuse(networks, "nt_r", [x], [x], channels="all")
