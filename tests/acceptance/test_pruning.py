"""What the pruning study must achieve; the numbers are those of the acceptance list in docs/experiments/pruning.md.

Tests of a training on ETTh1 and of measured time are slow. Time ratios are measured with interleaved repeats in one
process on one thread, so that other work on the machine falls on both sides.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from callbacks.pruning import Pruning
from callbacks.pruning_table import LINEAR, NAIVE
from networks.pruning.budget import keep_for
from networks.pruning.cost import latencies, saved_bytes, sizes
from networks.pruning.groups import choose, dim_groups, shrink, zero_removed
from networks.pruning.quantization import quantized
from networks.pruning.unstructured import masks_for, scores
from networks.pruning.weights import (
    apply_masks,
    density,
    enforce,
    make_room,
    mask_gradients,
    num_real,
    prunable_weights,
)
from networks.series.autoformer import Autoformer
from networks.series.crossformer import Crossformer
from networks.series.direct import Direct
from networks.series.fedformer import FEDformer
from networks.series.informer import Informer
from networks.series.transformer import Transformer
from runner import job
from tests.composing import SERIES, composed, plain

NETWORKS: dict[str, type[nn.Module]] = {
    "transformer": Transformer,
    "informer": Informer,
    "autoformer": Autoformer,
    "fedformer": FEDformer,
    "crossformer": Crossformer,
}
SMALL = {"d_model": 64, "heads": 8, "feed_forward": 128}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name](history_length=96, horizon=96, channels=7, **sizes).eval()


def windows(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"history": (size, 96, 7), "history_marks": (size, 96, 4), "forecast_marks": (size, 96, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------- 1, 2: masks


def test_1_exact_counts_and_torchs_masks() -> None:
    generator = np.random.default_rng(0)
    for seed in range(20):
        torch.manual_seed(seed)
        rho, widths = float(generator.uniform(0.005, 1)), generator.integers(2, 60, 3)
        network = nn.Sequential(*(nn.Linear(int(a), int(b)) for a, b in itertools.pairwise(widths)))
        weights = prunable_weights(network, channels=1)
        masks = masks_for(weights, scores("l1", weights), rho)
        flat = np.concatenate([weight.tensor.detach().numpy().ravel() for weight in weights])
        kept = np.concatenate([masks[weight.name].numpy().ravel() for weight in weights])
        number = round(rho * len(flat))
        assert kept.sum() == number
        if 0 < number < len(flat):
            order = np.argpartition(np.abs(flat), len(flat) - number)
            assert set(order[-number:]) == set(np.flatnonzero(kept))
        peer = copy.deepcopy(network)
        layers = [(peer.get_submodule(weight.path), "weight") for weight in weights]
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=len(flat) - number)
        for weight, (layer, _) in zip(weights, layers, strict=True):
            assert torch.equal(layer.weight_mask.bool(), masks[weight.name])


def test_2_masked_weights_stay_zero() -> None:
    network = build("fedformer", **SMALL, modes=8).train()
    weights = prunable_weights(network, 7, include_complex=True)
    batch = windows(2)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 1e-3, 0.9, weight_decay=1e-2)
    for step in range(103):
        if step == 3:
            apply_masks(weights, masks_for(weights, scores("l1", weights), 0.134))
        loss = network(*batch.values()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        mask_gradients(weights)
        optimizer.step()
        enforce(weights)
    other = build("fedformer", **SMALL, modes=8)
    make_room(other, network.state_dict())
    other.load_state_dict(network.state_dict())
    for found in (weights, prunable_weights(other, 7, include_complex=True)):
        assert all(torch.equal(w.tensor == 0, ~w.spread(w.mask)) for w in found)


# ------------------------------------------------------------------------------------------ 3, 4, 5, 9: networks


@pytest.mark.parametrize("granularity", ["ff", "qk", "v", "heads", "stream"])
@pytest.mark.parametrize("name", NETWORKS)
def test_3_shrinking_is_exact(name: str, granularity: str) -> None:
    network = build(name, **SMALL).double()
    keep = choose(network, 0.5, [granularity])
    masked, small = copy.deepcopy(network), shrink(network, keep)
    zero_removed(masked, keep)
    batch = windows(2, torch.float64).values()
    with torch.no_grad():
        expected, found = masked(*batch), small(*batch)
    assert num_real(small) < num_real(network)
    assert (found - expected).abs().max() <= 1e-6


def test_4_parameters_and_shares() -> None:
    expected = {
        "transformer": (10_540_039, 0.997),
        "informer": (11_328_007, 0.997),
        "autoformer": (10_535_957, 0.998),
        "fedformer": (22_070_295, 0.476),
    }
    for name, (total, share) in expected.items():
        with torch.device("meta"):
            network = build(name)
        found = density(network, prunable_weights(network, 7))
        assert found.total == total
        assert found.covered == pytest.approx(share, abs=5e-4)
    network = build("transformer")
    assert num_real(shrink(network, choose(network, 0.5))) == 2_648_583
    assert num_real(shrink(network, choose(network, 0.75))) == 668_935


def test_5_the_transformer_is_that_of_torch() -> None:
    """The authors' code is held out; torch's own layers with copied weights are the same network.

    The other networks are compared with their definitions block by block in tests/networks/series; with the authors'
    programs they were compared once, outside the project (docs/experiments/pruning.md).
    """
    network = build("transformer", **SMALL, dropout=0.0)

    def attention(layer: nn.Module) -> dict[str, Tensor]:
        inputs = (layer.query_projection, layer.key_projection, layer.value_projection)
        return {
            "in_proj_weight": torch.cat([p.weight for p in inputs]),
            "in_proj_bias": torch.cat([p.bias for p in inputs]),
            "out_proj.weight": layer.out_projection.weight,
            "out_proj.bias": layer.out_projection.bias,
        }

    def copied(kind: type[nn.Module], layer: nn.Module, attentions: dict[str, str], norms: list[str]) -> nn.Module:
        torchs = kind(64, 8, 128, 0.0, activation="gelu", batch_first=True).eval()
        state = {f"{a}.{k}": v for a, own in attentions.items() for k, v in attention(getattr(layer, own)).items()}
        for place, linear in (("linear1", layer.feed_forward.expand), ("linear2", layer.feed_forward.contract)):
            state |= {f"{place}.weight": linear.weight, f"{place}.bias": linear.bias}
        for i, norm in enumerate(norms, 1):
            state |= {f"norm{i}.weight": getattr(layer, norm).weight, f"norm{i}.bias": getattr(layer, norm).bias}
        torchs.load_state_dict(state)
        return torchs

    batch = windows(3)
    history, past, ahead = batch.values()
    with torch.no_grad():
        tokens = network.encoder_embedding(history, past)
        for layer in network.encoder.layers:
            names = ["attention_norm", "feed_forward_norm"]
            tokens = copied(nn.TransformerEncoderLayer, layer, {"self_attn": "attention"}, names)(tokens)
        memory = network.encoder.norm(tokens)
        start = torch.cat([history[:, -48:], torch.zeros(3, 96, 7)], 1)
        tokens = network.decoder_embedding(start, torch.cat([past[:, -48:], ahead], 1))
        for layer in network.decoder.layers:
            attentions = {"self_attn": "self_attention", "multihead_attn": "cross_attention"}
            names = ["self_attention_norm", "cross_attention_norm", "feed_forward_norm"]
            mask = nn.Transformer.generate_square_subsequent_mask(144)
            tokens = copied(nn.TransformerDecoderLayer, layer, attentions, names)(tokens, memory, mask)
        expected = network.projection(network.decoder.norm(tokens))[:, -96:]
        assert (network(history, past, ahead) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_9_groups_and_shrinking_take_less_than_two_seconds(name: str) -> None:
    network = build(name, **SMALL)
    begin = time.process_time()
    keep = choose(network, 0.5, ["ff", "qk", "v", "heads", "stream"], "global")
    shrink(network, keep)
    assert time.process_time() - begin < 2


def test_9_torch_pruning_agrees_on_the_transformer() -> None:
    """What its search takes beside ours is in `benchmarks/pruning.py`, minutes for some of the networks."""
    torch_pruning = pytest.importorskip("torch_pruning")
    network = build("transformer", **SMALL)
    found = dim_groups(network)
    example = tuple(windows(1).values())
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=example)
    # What its graph couples to the hidden channels of a feed-forward block is what the network declares.
    layer = network.encoder.layers[0].feed_forward
    group = graph.get_pruning_group(layer.expand, torch_pruning.prune_linear_out_channels, idxs=[0, 1])
    coupled = {id(dep.target.module) for dep, _ in group} & {id(m) for m in network.modules()}
    declared = next(one for one in found if one.name == "encoder.0.ff")
    ours_modules = {id(part.module) for part in declared.slices}
    assert coupled == ours_modules


# --------------------------------------------------------------------------------------------- 6, 7: the experiment


def needs_etth1() -> Path:
    folder = Path(os.environ.get("WATTLIGHT_DATA", SERIES))
    folder = folder / "series" if (folder / "series").is_dir() else folder
    if not (folder / "ETTh1.csv").is_file():
        pytest.skip(f"no ETTh1.csv in WATTLIGHT_DATA ({folder})")
    return folder


LEAN = (
    "num_threads=1",
    "predict=false",
    "logger=none",
    "~callbacks.energy",
    "callbacks.pruning.energy_s=0",
    "callbacks.pruning.quantize=false",
    "callbacks.pruning.figures=[]",
    "callbacks.pruning.latency_batches=[1]",
    "callbacks.pruning.latency_repeats=1",
)


SEEDS = (0, 1, 2)


def errors_of(run_dir: Path, *overrides: str) -> dict[str, float]:
    """MSE of every network of a run, by its name."""
    result = job.run(plain(composed(*overrides, *LEAN, run_dir=run_dir)))
    assert result["status"] == "completed", result.get("error")
    return {name.split("/")[1]: v for name, v in result["metrics"].items() if name.endswith("/mse")}


@pytest.fixture(scope="module", params=["transformer", "informer"])
def by_seed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Errors of studies of a small network on ETTh1; random weights are pruned from the same dense networks."""
    found = [_study(request.param, seed, tmp_path_factory.mktemp(f"{request.param}_{seed}")) for seed in SEEDS]
    print(request.param, found)
    return found


@pytest.fixture(scope="module")
def of_etth1(by_seed: list[dict[str, float]]) -> dict[str, float]:
    """Means of three seeds.

    One seed tells little: the test errors of the dense Transformer go from 0.78 to 0.97, those of the Informer from
    0.82 to 0.94, of which fine-tuning betters 0.92 and 0.94 but not 0.82.
    """
    return {name: statistics.fmean(one[name] for one in by_seed) for name in by_seed[0]}


def _study(network: str, seed: int, folder: Path) -> dict[str, float]:
    base = ("experiment=pruning/etth1", f"model={network}_small", f"seed={seed}", f"data_dir={needs_etth1()}")
    found = errors_of(folder / "l1", *base, "callbacks.pruning.densities=[0.512,0.328]")
    drawn = errors_of(
        folder / "random",
        *base,
        "callbacks.pruning.method=random",
        "callbacks.pruning.densities=[0.512]",
        "callbacks.pruning.finetune_epochs=0",
        f"callbacks.pruning.dense={folder / 'l1'}",
    )
    assert drawn["dense"] == pytest.approx(found["dense"], rel=1e-6)
    return drawn | found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_6_half_of_the_weights_by_magnitude(of_etth1: dict[str, float]) -> None:
    assert of_etth1["l1_0.512"] <= 1.06 * of_etth1["dense"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_6_magnitude_beats_random(of_etth1: dict[str, float]) -> None:
    assert of_etth1["random_0.512"] >= 1.08 * of_etth1["dense"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_6_fine_tuned_at_a_third_no_worse_than_dense_and_control(of_etth1: dict[str, float]) -> None:
    assert of_etth1["l1_0.328_tuned"] <= of_etth1["dense"]
    assert of_etth1["l1_0.328_tuned"] <= of_etth1["control"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_6_fine_tuned_at_a_third_with_the_first_seed_alone(
    request: pytest.FixtureRequest, by_seed: list[dict[str, float]]
) -> None:
    if "informer" in request.node.name:
        reason = "fine-tuned 0.855 on the test part (better on the validation part), dense and control 0.824"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    assert by_seed[0]["l1_0.328_tuned"] <= by_seed[0]["dense"]
    assert by_seed[0]["l1_0.328_tuned"] <= by_seed[0]["control"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_6_a_fine_tuned_fedformer_needs_an_eighth_of_its_weights(tmp_path: Path) -> None:
    found = errors_of(
        tmp_path,
        "experiment=pruning/etth1",
        "model=fedformer_small",
        f"data_dir={needs_etth1()}",
        "callbacks.pruning.densities=[0.134]",
        "callbacks.pruning.control=false",
    )
    assert found["l1_0.134_tuned"] <= 1.05 * found["dense"]


def test_7_the_report_has_simple_forecasts_and_says_who_is_better(tmp_path: Path) -> None:
    overrides = (
        "experiment=pruning",
        "debug=fast",
        "callbacks.pruning.densities=[0.5]",
        "model.net.backbone.d_model=16",
    )
    found = errors_of(tmp_path, *overrides)
    report = (tmp_path / "pruning.md").read_text()
    assert NAIVE in report and LINEAR in report
    best = min(v for name, v in found.items() if name.startswith("l1_"))
    for name, words in ((NAIVE, "repeating the last day"), (LINEAR, "a linear model (DLinear)")):
        side = "worse" if best > found[name.replace(" ", "_")] else "better"
        assert any(side in line and words in line for line in report.splitlines()), (side, words)


# ------------------------------------------------------------------------------------------- 8, 10, 14: time, size


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_8_smaller_networks_are_faster_and_zeros_are_not() -> None:
    network = Direct(build("transformer"))
    masked = copy.deepcopy(network)
    weights = prunable_weights(masked, 7)
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.1))
    half, quarter = (shrink(network, choose(network, ratio)) for ratio in (0.5, 0.75))
    dense, of_half, of_quarter, of_masked = latencies([network, half, quarter, masked], windows(8), repeats=9)
    assert dense / of_quarter >= 5
    assert dense / of_half >= 2.3
    assert of_masked == pytest.approx(dense, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_10_half_of_the_latency() -> None:
    network = Direct(build("transformer", d_model=256, heads=8, feed_forward=1024))
    batch = windows(8)
    small = shrink(network, keep_for(network, 0.5, "latency", batch=batch))
    own, dense = latencies([small, network], batch, repeats=15)
    assert 0.40 <= own / dense <= 0.55


def test_14_eight_bits() -> None:
    """The file; what it does to the error of a trained network is a column of every table (see the next test)."""
    network = Direct(build("transformer"))
    assert saved_bytes(quantized(network).state_dict()) <= 0.30 * sizes(network)["dense"]


# ---------------------------------------------------------------------------------------------- 11, 12, 13: subjects


def test_11_a_sparse_linear_teacher() -> None:
    torch.manual_seed(0)
    teacher = torch.zeros(24, 96)
    places = torch.randperm(teacher.numel())[: round(0.05 * teacher.numel())]
    teacher.view(-1)[places] = torch.randn(len(places)).sign() * (0.5 + torch.rand(len(places)))
    student = nn.Linear(96, 24)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 96, generator=generator)
        return x, x @ teacher.T + 0.3 * torch.randn(size, 24, generator=generator)

    for step in range(800):
        if step == 500:
            optimizer.param_groups[0]["lr"] = 1e-3
        x, y = draw(256)
        loss = (student(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.requires_grad_(False)
    x, y = draw(20_000)
    before = float((student(x) - y).square().mean())
    weights = prunable_weights(student, 1)
    apply_masks(weights, masks_for(weights, scores("l1", weights), 0.06))
    assert float((student(x) - y).square().mean()) < 1.01 * before


def test_12_complex_kernels() -> None:
    network = build("fedformer", **SMALL)
    covered = density(network, prunable_weights(network, 7)).covered
    weights = prunable_weights(network, 7, include_complex=True)
    whole = density(network, weights)
    for target in (0.512, 0.134):
        uncovered = whole.total - round(whole.covered * whole.total)
        kept = round(target * whole.total) - uncovered
        apply_masks(weights, masks_for(weights, scores("l1", weights), target, kept_reals=kept))
        assert density(network, weights).model == pytest.approx(target, abs=1e-4)
    assert covered < 0.5


def test_12_the_warning_names_what_is_not_covered() -> None:
    pruning = Pruning()
    with torch.device("meta"):
        pruning.slot.full = build("fedformer")
    pruning.pruner = dataclasses.replace(pruning.pruner, channels=7)
    with pytest.warns(UserWarning, match=r"52\.4% of the parameters uncovered"):
        pruning._warn_of_uncovered()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_13_a_quarter_of_recycle(tmp_path: Path) -> None:
    config = plain(composed("experiment=pruning/recycle", "num_threads=1", "logger=none", run_dir=tmp_path))
    result = job.run(config)
    assert result["status"] == "completed", result.get("error")
    with (tmp_path / "pruning.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert int(rows["dense"]["parameters"]) == 28_632
    assert float(rows["l1_0.25_tuned"]["mae"]) <= 1.05 * float(rows["dense"]["mae"])
    for name in ("dense", "l1_0.25_tuned"):
        assert float(rows[name]["sparse_bytes"]) > 0 and float(rows[name]["joules"]) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_14_eight_bits_cost_less_than_a_percent(tmp_path: Path) -> None:
    """A Transformer of the study's width after one short epoch on the embedded series."""
    settings = ("experiment=pruning", "model=transformer", "trainer.max_epochs=1", "data.origin_stride=48")
    lean = ("callbacks.pruning.densities=[1.0]", "callbacks.pruning.finetune_epochs=0", "model.optimizer.lr=1e-4")
    config = plain(composed(*settings, *lean, *LEAN, "callbacks.pruning.quantize=true", run_dir=tmp_path))
    assert job.run(config)["status"] == "completed"
    with (tmp_path / "pruning.csv").open(newline="") as file:
        dense = next(csv.DictReader(file))
    assert float(dense["int8_bytes"]) <= 0.30 * float(dense["dense_bytes"])
    assert abs(float(dense["int8_mse"]) / float(dense["mse"]) - 1) < 0.01
