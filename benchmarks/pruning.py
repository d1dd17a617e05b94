"""Pruning of Transformer forecasters: what removed channels, zeros and 8 bits save, beside the peers.

Claims of the paper (Kiefer et al., arXiv 2412.12883): structured pruning cuts multiplications up to 7.6 times but gives
no significant time saving. On a CPU at the paper's width it does; zeros in dense tensors save nothing. Widths, batch
and ratios are those of the design study, on one thread, with interleaved repeats.

Peers in the same process: torch-pruning 1.6.1 (how long it takes to find what goes together; DepGraph search over the
autograd graph), Lightning's ``ModelPruning`` (masks by ``torch.nn.utils.prune``: their latency while the
reparametrisation is on), dynamic quantisation to 8 bits, a dense network of the smaller width, DLinear.

torch-pruning takes minutes for Informer, Autoformer and FEDformer at d = 64; each search runs in a process of its own
that is ended after ``SEARCH_S`` seconds, and the ratio is then a lower bound.
"""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from benchmarks.measure import REPEATS, compare, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from networks.pruning.cost import macs, saved_bytes, sizes
from networks.pruning.groups import choose, shrink
from networks.pruning.quantization import quantized
from networks.pruning.unstructured import masks_for, scores
from networks.pruning.weights import apply_masks, num_real, prunable_weights, remove_masks
from networks.series.autoformer import Autoformer
from networks.series.crossformer import Crossformer
from networks.series.direct import Direct
from networks.series.dlinear import DLinear
from networks.series.fedformer import FEDformer
from networks.series.informer import Informer
from networks.series.transformer import Transformer

CLAIM: str = (
    "Removing three quarters of the channels makes the Transformer of the study at least 5 times faster on a CPU, half "
    "of them 2.3 times; zeros change nothing; declared groups are found at least 50 times faster than by torch-pruning."
)

STEPS, CHANNELS, BATCH = 96, 7, 8
SEARCH_S = 60.0
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "Transformer": Transformer,
    "Informer": Informer,
    "Autoformer": Autoformer,
    "FEDformer": FEDformer,
    "Crossformer": Crossformer,
}
# Width, hidden width, and the gains in time that the design study measured at ratios .5 and .75.
WIDTHS = {512: (2048, "3.2", "7.9"), 128: (512, "1.6", "2.1"), 64: (128, None, "1.2")}
BOUNDS = {(512, 0.5): 2.3, (512, 0.75): 5.0}


def windows(batch: int) -> dict[str, Tensor]:
    """Random windows with calendar marks."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "history": (batch, STEPS, CHANNELS),
        "history_marks": (batch, STEPS, 4),
        "forecast_marks": (batch, STEPS, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def network(name: str, width: int, hidden: int) -> nn.Module:
    """A forecaster 96 -> 96 of seven series."""
    torch.manual_seed(0)
    return Direct(NETWORKS[name](STEPS, STEPS, CHANNELS, d_model=width, feed_forward=hidden, heads=8)).eval()


@torch.no_grad()
def _call(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    model(batch)


def _structured(width: int, repeats: int) -> list[Row]:
    hidden, *earlier = WIDTHS[width]
    dense, batch = network("Transformer", width, hidden), windows(BATCH)
    small = {ratio: shrink(dense, choose(dense, ratio)) for ratio in (0.5, 0.75)}
    contestants = {"dense": dense} | {f"{ratio:.0%} of the channels gone": net for ratio, net in small.items()}
    if width == 512:
        masked = copy.deepcopy(dense)
        weights = prunable_weights(masked, CHANNELS)
        apply_masks(weights, masks_for(weights, scores("l1", weights), 0.1))
        remove_masks(masked)
        contestants["density 0.1, dense kernels"] = masked
        peer = copy.deepcopy(dense)
        layers = [(weight.module, "weight") for weight in prunable_weights(peer, CHANNELS)]
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.9)
        contestants["density 0.1, torch.nn.utils.prune"] = peer
        contestants["8 bits"] = quantized(dense)
        contestants["dense of a quarter of the width"] = network("Transformer", 128, 512)
        contestants["DLinear"] = Direct(DLinear(STEPS, STEPS, CHANNELS)).eval()
    timings = compare({name: partial(_call, net, batch) for name, net in contestants.items()}, repeats=repeats)
    what = f"forecast, Transformer d={width}, batch {BATCH}"
    rows = time_rows(what, timings)
    for (ratio, net), published in zip(small.items(), earlier, strict=True):
        name = f"{ratio:.0%} of the channels gone"
        bound = {"at_least": BOUNDS[width, ratio]} if (width, ratio) in BOUNDS else {}
        note = {"note": f"the design study measured {published}"} if published else {}
        rows.append(ratio_row(what, timings, "dense", name, **bound, **note))
        gain = macs(dense, batch) / macs(net, batch)
        rows.append({"what": "multiplications", "variant": f"d={width}, {name}", "value": gain, "unit": "times fewer"})
    if width == 512:
        rows.append(ratio_row(what, timings, "density 0.1, dense kernels", "dense", at_least=0.9, at_most=1.1))
        ratio = saved_bytes(contestants["8 bits"].state_dict()) / sizes(dense)["dense"]
        rows.append({"what": "file", "variant": "8 bits / dense", "value": ratio, "unit": "ratio", "at_most": 0.30})
        found = sizes(masked)
        ratio = found["sparse"] / found["dense"]
        rows.append({"what": "file", "variant": "density 0.1 without zeros / dense", "value": ratio, "unit": "ratio"})
    return rows


def _search(name: str, outbox: multiprocessing.Queue) -> None:
    """What torch-pruning does before it can remove anything: the graph, and all groups of it."""
    import torch_pruning

    torch.set_num_threads(1)
    backbone = network(name, 64, 128).backbone
    begin = time.process_time()
    graph = torch_pruning.DependencyGraph().build_dependency(backbone, tuple(windows(1).values()))
    number = len(list(graph.get_all_groups(root_module_types=[nn.Linear, nn.Conv1d])))
    outbox.put((time.process_time() - begin, number))


def _groups(name: str) -> list[Row]:
    model = network(name, 64, 128)
    begin = time.process_time()
    small = shrink(model, choose(model, 0.5, ["ff", "qk", "v", "heads", "stream"], "global"))
    ours = time.process_time() - begin
    context = multiprocessing.get_context("spawn")
    outbox = context.Queue()
    process = context.Process(target=_search, args=(name, outbox), daemon=True)
    process.start()
    note = f"{num_real(small):,} of {num_real(model):,} parameters left"
    begin = time.perf_counter()
    while process.is_alive() and outbox.empty() and time.perf_counter() - begin < SEARCH_S:
        time.sleep(0.1)
    if outbox.empty():
        theirs = time.perf_counter() - begin
        failed = not process.is_alive()
        note += "; torch-pruning fails" if failed else f"; torch-pruning was ended after {SEARCH_S:.0f} s"
    else:
        failed = False
        theirs = outbox.get()[0]
    process.kill()
    process.join()
    what = f"groups and removal, {name} d=64"
    rows: list[Row] = [{"what": what, "variant": "ours", "value": ours, "unit": "s", "at_most": 2.0, "note": note}]
    if not failed:
        rows.append({"what": what, "variant": "torch-pruning, groups alone", "value": theirs, "unit": "s"})
        bound = {} if name == "Crossformer" else {"at_least": 50.0}
        rows.append({"what": what, "variant": "torch-pruning / ours", "value": theirs / ours, "unit": "ratio"} | bound)
    return rows


def _together(rows: list[Row]) -> Row:
    """Seconds of both for all networks whose groups torch-pruning finds, or searches until it is ended."""
    theirs = {row["what"]: row["value"] for row in rows if row["variant"] == "torch-pruning, groups alone"}
    ours = sum(row["value"] for row in rows if row["variant"] == "ours" and row["what"] in theirs)
    return {
        "what": f"groups and removal, {len(theirs)} networks together, d=64",
        "variant": "torch-pruning / ours",
        "value": sum(theirs.values()) / ours,
        "unit": "ratio",
        "at_least": 50.0,
    }


def run(repeats: int = REPEATS) -> Result:
    """Time and size of smaller networks, seconds of finding groups."""
    rows: list[Row] = []
    with single_thread():
        for name in NETWORKS:
            rows += _groups(name)
        rows.append(_together(rows))
        for width in WIDTHS:
            rows += _structured(width, repeats)
    settings = {"steps": STEPS, "channels": CHANNELS, "batch": BATCH, "repeats": repeats, "threads": 1}
    return Result(rows, settings, packages=("torch-pruning",))
