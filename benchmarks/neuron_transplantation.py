"""Neuron transplantation in seconds: beside the pruner that the paper uses, and beside optimal transport.

Two bias-free perceptrons 3072-h-h-10 are fused. *torch-pruning*: the same result by its dependency graph, concatenation
included. *transport as published*: distances between all pairs of rows by broadcasting all at once, an exact transport
by POT for every layer, the next layer's columns multiplied with it. It is written after the paper of Singh and Jaggi;
the reference code of neuron transplantation was measured at 27.8 s for 512 units, 0.021 s for ours. *ot* is ours.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import compare, ratio_row, single_thread, status_mib, time_rows
from benchmarks.record import Result, Row
from networks.fusion import concat, fuse
from networks.fusion.members import without_biases
from networks.mlp import MLP

CLAIM = (
    "Transplantation by gathering takes at most a quarter of the time of torch-pruning and 1/200 of that of optimal "
    "transport as published (512 units); beside the members it needs 1.3 times the memory of one."
)
WIDTHS = (128, 256, 512)
PEERS = {"torch-pruning": "torch_pruning", "POT": "ot"}
LARGE = 4096  # units of the networks whose memory is measured


def networks(width: int, count: int = 2) -> list[nn.Module]:
    """Perceptrons on images of 32 x 32 pixels in colour, without biases."""
    torch.manual_seed(width)
    return [without_biases(MLP(10, 3, 32, (width, width))).eval() for _ in range(count)]


def by_gathering(members: list[nn.Module]) -> nn.Module:
    """Ours, tracing included."""
    return fuse(members, "nt", [torch.zeros(1, 3, 32, 32)]).model


def by_torch_pruning(members: list[nn.Module]) -> nn.Module:
    """Concatenate all, then prune with a dependency graph."""
    import torch_pruning

    image = torch.zeros(1, 3, 32, 32)
    whole = concat(members, image)
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        whole,
        image,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=1 - 1 / len(members),
        ignored_layers=[last],
    )
    pruner.step()
    return whole


@torch.no_grad()
def by_published_transport(members: list[nn.Module]) -> nn.Module:
    """Optimal-transport fusion of two perceptrons by the distances of their weights (Singh and Jaggi, 2020).

    All differences of a layer's rows at once, as the published program makes them: at 512 units 6.5 GB.
    """
    import numpy as np
    import ot

    first, second = members
    fused = copy.deepcopy(first)
    before: Tensor | None = None
    pairs = list(zip(first.layers, second.layers, strict=True))
    for i, (one, other) in enumerate(pairs):
        a, b = one.weight, other.weight if before is None else other.weight @ before
        if i + 1 < len(pairs):
            distance = ((a[:, None] - b[None, :]) ** 2).sum(2).sqrt()
            mass = np.full(len(a), 1 / len(a))
            plan = torch.from_numpy(ot.emd(mass, mass, distance.double().numpy())).float() * len(a)
            b, before = plan @ b, plan.T
        fused.layers[i].weight.copy_((a + b) / 2)
    return fused


def extra_memory(width: int = LARGE) -> float:
    """Memory that a fusion of two networks takes beside them, over that of one network; in a process of its own."""
    code = f"from benchmarks.neuron_transplantation import _memory; print(_memory({width}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def _memory(width: int) -> float:
    by_gathering(networks(8))  # what is loaded and allocated once
    members = networks(width)
    size = sum(4 * p.numel() for p in members[0].parameters())
    before = status_mib("VmRSS")
    by_gathering(members)
    return (status_mib("VmHWM") - before) * 2**20 / size


def calls(width: int) -> dict[str, Callable[[], Any]]:
    """Every way to fuse that is installed."""
    members = networks(width)
    image = [torch.zeros(1, 3, 32, 32)]
    found: dict[str, Callable[[], Any]] = {"transplantation": lambda: by_gathering(members)}
    found["average"] = lambda: fuse(members, "average", image)
    found["rebasin"] = lambda: fuse(members, "rebasin", image)
    found["ot"] = lambda: fuse(members, "ot", image)
    if importlib.util.find_spec("torch_pruning"):
        found["torch-pruning"] = lambda: by_torch_pruning(members)
    if importlib.util.find_spec("ot"):
        found["transport as published"] = lambda: by_published_transport(members)
    return found


def run(repeats: int = 5, widths: Sequence[int] = WIDTHS, large: int = LARGE) -> Result:
    """Seconds, their ratios, and memory."""
    rows: list[Row] = []
    for width in widths:
        with single_thread():
            timings = compare(calls(width), repeats)
        what = f"two perceptrons 3072-{width}-{width}-10"
        rows += time_rows(what, timings)
        for peer, bound in (("torch-pruning", 4.0), ("transport as published", 200.0)):
            if peer in timings:
                bounds = {"at_least": bound} if peer == "torch-pruning" or width == max(WIDTHS) else {}
                rows.append(ratio_row(what, timings, peer, "transplantation", **bounds))
    rows.append(
        {
            "what": f"memory beside two perceptrons 3072-{large}-{large}-10",
            "variant": "transplantation",
            "value": extra_memory(large),
            "unit": "networks",
            "at_most": 2.2,
        }
    )
    packages = [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    return Result(rows, {"threads": 1, "repeats": repeats}, packages)
