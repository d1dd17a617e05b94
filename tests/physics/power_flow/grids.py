"""Grids for tests: the embedded cases, tiny ones made by hand, and what pandapower makes of its cases."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from datamodules.readers.matpower import read_case
from physics.power_flow import Grid, Scenarios
from tests.physics.power_flow.reference.make import BRANCH_COLUMNS, BUS_COLUMNS, GEN_COLUMNS, projected

EMBEDDED = Path(__file__).parents[3] / "datamodules" / "embedded" / "grids"
REFERENCE = Path(__file__).parent / "reference"
F64 = torch.float64


@functools.cache
def embedded(name: str) -> Grid:
    """A case that comes with the program."""
    return Grid.from_matpower(read_case(EMBEDDED / f"{name}.m"))


def table(columns: dict[str, list[float]], rows: int, width: int, defaults: dict[int, float]) -> np.ndarray:
    out = np.zeros((rows, width))
    for column, value in defaults.items():
        out[:, column] = value
    for place, values in columns.items():
        out[:, int(place)] = values
    return out


def tiny_case(**changes: Any) -> dict[str, Any]:
    """Slack 1, PV 2 and PQ 3 in a triangle, with numbers that are not consecutive, on 100 MVA; keys replace tables."""
    bus = table(
        {"0": [10, 20, 30], "1": [3, 2, 1], "2": [0, 20, 90], "3": [0, 5, 30], "4": [0, 0, 2], "5": [0, 0, 10]},
        3, 13, {7: 1.0, 9: 110.0, 11: 1.1, 12: 0.9},
    )  # fmt: skip
    gen = table({"0": [10, 20], "1": [0, 50], "3": [99, 60], "4": [-99, -40], "5": [1.02, 1.01]}, 2, 10, {7: 1.0})
    branch = table(
        {"0": [10, 20, 10], "1": [20, 30, 30], "2": [0.01, 0.02, 0.01], "3": [0.1, 0.2, 0.15], "4": [0.02, 0.05, 0.0],
         "5": [200, 120, 0], "8": [0, 0.98, 0], "9": [0, 0, 5]},
        3, 13, {10: 1.0, 11: -360, 12: 360},
    )  # fmt: skip
    return {"name": "tiny", "base_mva": 100.0, "bus": bus, "gen": gen, "branch": branch} | changes


def two_buses(r: float, x: float, p: float, q: float, v: float = 1.0) -> Grid:
    """A slack of voltage ``v`` and a load ``p + jq`` (per unit of 1 MVA) behind a line."""
    bus = table({"0": [1, 2], "1": [3, 1], "2": [0, p], "3": [0, q]}, 2, 13, {7: 1.0, 9: 20.0, 11: 1.1, 12: 0.9})
    gen = table({"0": [1], "5": [v]}, 1, 10, {7: 1.0})
    branch = table({"0": [1], "1": [2], "2": [r], "3": [x]}, 1, 13, {10: 1.0})
    return Grid.from_matpower({"name": "two buses", "base_mva": 1.0, "bus": bus, "gen": gen, "branch": branch})


def noisy(grid: Grid, count: int, sigma: float = 0.05, swing: float = 0.0, seed: int = 0) -> Scenarios:
    """Independent noise on all loads, with a common swing over 96 steps of loads and generators."""
    generator = torch.Generator().manual_seed(seed)
    day = 1 + swing * torch.sin(2 * torch.pi * torch.arange(count, dtype=F64) / 96)
    p, q = (
        load[:, None] * day * (1 + sigma * torch.randn(grid.num_buses, count, generator=generator, dtype=F64))
        for load in (grid.p_load_mw, grid.q_load_mvar)
    )
    return Scenarios.from_power(grid, p, q, grid.gen_p_mw[:, None] * day)


class Reference(NamedTuple):
    """What pandapower computed: a stand-in for its net, admittances, voltages."""

    net: Any
    product: np.ndarray
    probe: np.ndarray
    largest: float
    voltage: np.ndarray


class StandInNet(dict):
    """What `Grid.from_pandapower` reads of a net, from stored tables."""

    __getattr__ = dict.__getitem__


def reference(name: str) -> Reference:
    stored = dict(np.load(REFERENCE / f"{name}.npz"))
    if (more := REFERENCE / f"{name}_branches.npz").exists():
        stored |= dict(np.load(more))
    n, branches = stored["bus"].shape[1], stored["branch"].shape[1]
    bus, branch, gen = np.zeros((n, 18)), np.zeros((branches, 26)), np.zeros((stored["gen"].shape[1], 26))
    bus[:, 0], bus[:, list(BUS_COLUMNS)] = np.arange(n), stored["bus"].T
    bus[:, 7] = np.abs(stored["voltage"])
    branch[:, :2], branch[:, list(BRANCH_COLUMNS)] = stored["ends"].T, stored["branch"].T
    gen[:, list(GEN_COLUMNS)] = stored["gen"].T
    tables = {"bus": bus, "branch": branch, "gen": gen, "baseMVA": stored["base_mva"], "V": stored["voltage"]}
    tables["branch_is"] = np.ones(branches, dtype=bool)
    empty = {
        "load": pd.DataFrame({"p_mw": [], "q_mvar": [], "in_service": np.array([], dtype=bool)}),
        "sgen": pd.DataFrame({"p_mw": [], "q_mvar": [], "in_service": np.array([], dtype=bool)}),
        "gen": pd.DataFrame({"p_mw": [], "vm_pu": [], "in_service": np.array([], dtype=bool)}),
    }
    net = StandInNet(
        name=name,
        bus=pd.DataFrame({"name": [None] * n}),
        _ppc={"internal": tables},
        _pd2ppc_lookups={"bus": np.arange(n), "branch": {}},
        **empty,
    )
    rng = np.random.default_rng(0)
    probe = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    return Reference(net, stored["product"], probe, float(stored["largest"]), stored["voltage"])


__all__ = ["embedded", "noisy", "projected", "reference", "table", "tiny_case", "two_buses"]
