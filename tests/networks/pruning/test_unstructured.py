from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from networks.masks import masked_weights
from networks.pruning.unstructured import (
    cubic_density,
    loss_gradients,
    masks_for,
    norms_of_inputs,
    num_kept,
    scores,
)
from networks.pruning.weights import (
    apply_masks,
    density,
    enforce,
    make_room,
    mask_gradients,
    masks_in,
    prunable_weights,
    remove_masks,
)
from networks.recycle import ReCycleTransformer
from networks.series.autoformer import Autoformer
from networks.series.direct import Direct
from networks.series.dlinear import DLinear
from networks.series.fedformer import FEDformer
from networks.series.informer import Informer
from networks.series.transformer import Transformer
from tests.networks.pruning.subjects import NETWORKS, build
from tests.networks.series.contract import CHANNELS, inputs


def batch(size: int = 3) -> dict[str, torch.Tensor]:
    return dict(zip(("history", "history_marks", "forecast_marks"), inputs(size), strict=True))


def random_network(generator: random.Random) -> nn.Module:
    width = [generator.randint(2, 40) for _ in range(4)]
    return nn.Sequential(nn.Linear(width[0], width[1]), nn.Conv1d(width[1], width[2], 3), nn.Linear(width[2], width[3]))


def test_the_kept_set_is_exact_and_torchs_own() -> None:
    """Section 8, line 1: 20 random networks and densities."""
    generator = random.Random(0)
    for seed in range(20):
        torch.manual_seed(seed)
        network, rho = random_network(generator), generator.uniform(0.01, 1)
        weights = prunable_weights(network, channels=1)
        masks = masks_for(weights, scores("l1", weights), rho)
        flat = np.concatenate([weight.tensor.detach().numpy().ravel() for weight in weights])
        kept = np.concatenate([masks[weight.name].numpy().ravel() for weight in weights])
        number = round(rho * len(flat))
        assert kept.sum() == number
        highest = np.argpartition(-np.abs(flat), number - 1)[:number] if number else []
        assert set(np.flatnonzero(kept)) == set(highest)
        peer = copy.deepcopy(network)
        layers = [(peer.get_submodule(weight.path), "weight") for weight in weights]
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=len(flat) - number)
        for weight, (layer, _) in zip(weights, layers, strict=True):
            assert torch.equal(layer.weight_mask.bool(), masks[weight.name])


def test_equal_scores_are_resolved_exactly() -> None:
    network = nn.Linear(10, 10)
    nn.init.constant_(network.weight, 0.5)
    weights = prunable_weights(network, 1)
    for scope in ("global", "layer", "row"):
        assert int(masks_for(weights, scores("l1", weights), 0.3, scope)["weight"].sum()) == 30


def test_the_set_of_the_study() -> None:
    network = build("fedformer")
    names = {weight.name for weight in prunable_weights(network, CHANNELS)}
    assert "projection.weight" not in names and "decoder.layers.0.trend_projection.weight" not in names
    assert not any("gate" in name or "kernel" in name or name.endswith("bias") for name in names)
    assert "encoder_embedding.value.weight" in names and "encoder.layers.0.attention.key_projection.weight" in names
    more = {weight.name for weight in prunable_weights(network, CHANNELS, include_complex=True)} - names
    assert len(more) == 3 and all(name.endswith("kernel") for name in more)
    assert "projection.weight" in {w.name for w in prunable_weights(network, CHANNELS, exclude_output=False)}


@pytest.mark.parametrize(
    ("network", "total", "share"),
    [
        (Transformer, 10_540_039, 0.997),
        (Informer, 11_328_007, 0.997),
        (Autoformer, 10_535_957, 0.998),
        (FEDformer, 22_070_295, 0.476),
    ],
)
def test_covered_shares_of_the_study(network: type[nn.Module], total: int, share: float) -> None:
    """Section 8, line 4: half of FEDformer is out of reach."""
    with torch.device("meta"):
        dense = network(96, 96, 7, label_length=48)
    found = density(dense, prunable_weights(dense, 7))
    assert found.total == total and found.covered == pytest.approx(share, abs=5e-4)


def test_complex_kernels_by_model_density() -> None:
    """Section 8, line 12: the density of the whole model is met to 1e-4."""
    network = build("fedformer", d_model=32, feed_forward=64)
    weights = prunable_weights(network, CHANNELS, include_complex=True)
    before = density(network, weights)
    uncovered = before.total - round(before.covered * before.total)
    target = 0.4
    masks = masks_for(weights, scores("l1", weights), target, kept_reals=round(target * before.total) - uncovered)
    apply_masks(weights, masks)
    assert density(network, weights).model == pytest.approx(target, abs=1e-4)
    kernel = next(weight for weight in weights if weight.paired)
    assert torch.equal((kernel.tensor == 0).all(-1), ~kernel.mask)
    nonzero = sum(int((p != 0).sum()) for p in network.parameters())
    assert nonzero <= density(network, weights).alive


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_masked_weights_stay_zero(optimizer: type[torch.optim.Optimizer]) -> None:
    """Section 8, line 2: 100 steps with momentum and weight decay, and a round trip through a checkpoint."""
    network = build("fedformer").train()
    weights = prunable_weights(network, CHANNELS, include_complex=True)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer([p for p in network.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-2, **options)
    for step in range(110):
        if step == 10:  # moments are full of what is about to go
            apply_masks(weights, masks_for(weights, scores("l1", weights), 0.3))
        loss = (network(*inputs()) - inputs()[0][:, :12]).square().mean()
        steps.zero_grad()
        loss.backward()
        mask_gradients(weights)
        steps.step()
        enforce(weights)
    assert all(torch.equal(w.tensor == 0, ~w.spread(w.mask)) for w in weights)
    other = build("fedformer", seed=5)
    make_room(other, network.state_dict())
    other.load_state_dict(network.state_dict())
    assert density(other, prunable_weights(other, CHANNELS, include_complex=True)) == density(network, weights)
    assert torch.equal(other(*inputs()), network.eval()(*inputs()))
    remove_masks(other)
    assert other.state_dict().keys() == build("fedformer").state_dict().keys()


def test_masks_are_those_of_the_rest_of_the_program() -> None:
    network = build("transformer")
    weights = prunable_weights(network, CHANNELS)
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.5))
    assert {weight.name for weight in masked_weights(network)} == {weight.name for weight in weights}
    assert masks_in(network).keys() == {weight.name for weight in weights}


@pytest.mark.parametrize("method", ["l1", "random", "taylor", "wanda"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_on_every_network(name: str, method: str) -> None:
    network = Direct(build(name))
    weights = prunable_weights(network, CHANNELS)
    target = batch()["history"][:, :12]
    gradients = norms = None
    if method == "taylor":
        gradients = loss_gradients(network, weights, [batch()], lambda b: (network(b) - target).square().mean())
    elif method == "wanda":
        norms = norms_of_inputs(network, weights, [batch(), batch()])
    values = scores(method, weights, torch.Generator().manual_seed(0), gradients, norms)
    apply_masks(weights, masks_for(weights, values, 0.5))
    found = density(network, weights)
    assert found.prunable == pytest.approx(0.5, abs=1e-3)
    assert network(batch()).isfinite().all()


def test_scores_by_their_definitions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    weights = prunable_weights(network, 1)
    x = torch.randn(7, 4)
    gradients = loss_gradients(network, weights, [x, 2 * x], lambda b: network(b).square().sum())
    (network(x).square().sum() + network(2 * x).square().sum()).backward()
    torch.testing.assert_close(gradients["0.weight"], network[0].weight.grad / 2)
    values = scores("taylor", weights, gradients=gradients)
    torch.testing.assert_close(values["0.weight"], (network[0].weight * gradients["0.weight"]).abs())
    values = scores("wanda", weights, input_norms=norms_of_inputs(network, weights, [x, x]))
    torch.testing.assert_close(values["0.weight"], network[0].weight.abs() * (2 * x.square().sum(0)).sqrt())
    convolution = nn.Conv1d(3, 4, 2)
    weights = prunable_weights(convolution, 1)
    series = torch.randn(2, 3, 9)
    norm = norms_of_inputs(convolution, weights, [series])["weight"]
    torch.testing.assert_close(norm, series.square().sum((0, 2)).sqrt())


def test_scopes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))
    with torch.no_grad():
        network[1].weight *= 100
    weights = prunable_weights(network, 1)
    values = scores("l1", weights)
    assert not masks_for(weights, values, 0.5)["0.weight"].all(1).any()
    by_layer = masks_for(weights, values, 0.5, "layer")
    assert [int(mask.sum()) for mask in by_layer.values()] == [24, 30]
    by_row = masks_for(weights, values, 0.5, "row")
    assert (by_row["0.weight"].sum(1) == 4).all() and (by_row["1.weight"].sum(1) == 3).all()
    pattern = masks_for(weights, values, 0.5, "2:4")
    assert (pattern["0.weight"].view(6, 2, 4).sum(2) == 2).all()
    assert (pattern["1.weight"][:, :4].sum(1) == 2).all() and pattern["1.weight"][:, 4:].all()


def test_what_is_gone_goes_first() -> None:
    torch.manual_seed(0)
    network = nn.Linear(20, 20)
    weights = prunable_weights(network, 1)
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.5))
    first = weights[0].mask.clone()
    drawn = scores("random", weights, torch.Generator().manual_seed(3))
    second = masks_for(weights, drawn, 0.25)["weight"]
    assert int(second.sum()) == 100 and bool((first | ~second).all())


def test_further_subjects() -> None:
    recycle = ReCycleTransformer(72, 24, 24)
    names = {weight.name for weight in prunable_weights(recycle, 1)}
    assert any(name.endswith("in_proj_weight") for name in names) and any(
        name.endswith("out_proj.weight") for name in names
    )
    assert len(prunable_weights(DLinear(24, 12, 5), 5)) == 2
    with pytest.raises(ValueError, match="no weight that may be pruned"):
        prunable_weights(nn.LayerNorm(4), 1)


def test_a_sparse_teacher_is_found() -> None:
    """Section 8, line 11: of 5 % non-zero weights, 6 % are enough."""
    torch.manual_seed(0)
    teacher = torch.zeros(24, 48)
    places = torch.randperm(teacher.numel())[: round(0.05 * teacher.numel())]
    teacher.view(-1)[places] = torch.randn(len(places)).sign() * (0.5 + torch.rand(len(places)))
    student = nn.Linear(48, 24)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, 48, generator=generator)
        return x, x @ teacher.T + 0.3 * torch.randn(size, 24, generator=generator)

    for step in range(600):
        if step == 400:
            optimizer.param_groups[0]["lr"] = 1e-3
        x, y = draw(256)
        loss = (student(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = draw(20_000)
    student.requires_grad_(False)
    before = float((student(x) - y).square().mean())
    weights = prunable_weights(student, 1)
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.06))
    after = float((student(x) - y).square().mean())
    assert after < 1.01 * before
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.03))
    assert float((student(x) - y).square().mean()) > 2 * before


def test_cubic_schedule() -> None:
    assert cubic_density(0.1, 0) == 1 and cubic_density(0.1, 1) == pytest.approx(0.1)
    assert cubic_density(0.1, 0.5) == pytest.approx(0.1 + 0.9 / 8)
    steps = [cubic_density(0.2, t / 10) for t in range(12)]
    assert steps == sorted(steps, reverse=True) and steps[-1] == steps[-2]


def test_wrong_input() -> None:
    network = Transformer(24, 12, 5, d_model=8, heads=2, feed_forward=8)
    weights = prunable_weights(network, 5)
    for rho in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="density="):
            num_kept(rho, 10)
    with pytest.raises(ValueError, match="scope='blocks'"):
        masks_for(weights, scores("l1", weights), 0.5, "blocks")
    with pytest.raises(ValueError, match="2:4"):
        masks_for(weights, scores("l1", weights), 0.4, "2:4")
    with pytest.raises(ValueError, match="method='obd'"):
        scores("obd", weights)
    with pytest.raises(ValueError, match="wanda"):
        scores("wanda", weights, input_norms={})
