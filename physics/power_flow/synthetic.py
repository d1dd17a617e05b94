"""Grids of any size from small ones: copies with ties, feeders attached to a transmission grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from physics.power_flow.grid import BusType, Grid, numbered

Ties = Literal["no_connections", "total_random", "linear_random", "pairwise_random"]
TieAdmittance = Literal["realistic", "paper"]

# Ties of ``total_random`` per copy, of the others per pair of copies; the paper's.
_TOTAL_TIES, _PAIR_TIES = 20, 3
# Range of realistic ties, per unit; base of the paper's, which are resistive.
_REALISTIC_TIE, _PAPER_TIE = (1.0, 10.0), 1.515e-5
# Buses among which the end of a realistic tie is the one whose voltage is most like that of the other end.
_CANDIDATES = 200

_BUS_FIELDS = (
    "bus_type", "vn_kv", "vm", "va", "g_shunt", "b_shunt", "p_load_mw", "q_load_mvar", "vm_min", "vm_max",
)  # fmt: skip
_BRANCH_FIELDS = (
    "r", "x", "g", "b", "r_asym", "x_asym", "g_asym", "b_asym", "tap", "shift", "status", "rate_mva",
)  # fmt: skip
_GEN_FIELDS = (
    "gen_p_mw", "gen_q_mvar", "gen_vm", "gen_q_min_mvar", "gen_q_max_mvar", "gen_status",
)  # fmt: skip
_INDEX_FIELDS = ("from_bus", "to_bus", "gen_bus")


def copies(
    grid: Grid, count: int, ties: Ties = "linear_random", admittance: TieAdmittance = "realistic", seed: int = 0
) -> Grid:
    """``count`` copies of a grid in one, each with its slack, joined by random ties.

    Args:
        grid: What to copy; its voltages should be those of its solution if ties are realistic.
        count: How often.
        ties: ``no_connections``; ``total_random``: 20 ``count`` ties between any two buses; ``linear_random``: 3
            between copies that follow each other; ``pairwise_random``: 3 between every two copies.
        admittance: ``paper``: the conductance ``1.515e-5 (1 + k)`` per unit of the ``k``-th tie of a group;
            ``realistic``: reactances of 1 to 10 per unit of admittance between buses of like voltage, since no
            solution exists where such a tie joins buses of very different angles.
        seed: Of the choice of buses.

    Raises:
        ValueError: Unknown ties or admittance, fewer than one copy.
    """
    if ties not in ("no_connections", "total_random", "linear_random", "pairwise_random"):
        raise ValueError(
            f"ties={ties!r}: choose 'no_connections', 'total_random', 'linear_random' or 'pairwise_random'"
        )
    if admittance not in ("realistic", "paper"):
        raise ValueError(f"admittance={admittance!r}: choose 'realistic' or 'paper'")
    if count < 1:
        raise ValueError(f"count={count}: give at least one copy")
    joined = join([grid] * count, [f"copy {k + 1}: " for k in range(count)], f"{grid.name} x {count}")
    generator = torch.Generator().manual_seed(seed)
    n = grid.num_buses
    pairs: list[tuple[int, int, int]] = []  # copies of the ends, number in its group
    if ties == "total_random" and count > 1:
        ends = torch.randint(count, (_TOTAL_TIES * count, 2), generator=generator).tolist()
        pairs = [(one, two, k) for k, (one, two) in enumerate(ends)]
    elif ties in ("linear_random", "pairwise_random"):
        of = combinations(range(count), 2) if ties == "pairwise_random" else ((k, k + 1) for k in range(count - 1))
        pairs = [(one, two, k) for one, two in of for k in range(_PAIR_TIES)]
    if not pairs:
        return joined
    ends, values = [], []
    voltage = torch.polar(grid.vm, grid.va).cpu()
    for one, two, k in pairs:
        first = int(torch.randint(n, (1,), generator=generator))
        others = torch.randint(n, (_CANDIDATES,), generator=generator)
        others = others[others != first] if one == two else others
        second = int(others[0])
        if admittance == "realistic":
            second = int(others[(voltage[others] - voltage[first]).abs().argmin()])
            low, high = _REALISTIC_TIE
            y = low + (high - low) * float(torch.rand(1, generator=generator))
        else:
            y = _PAPER_TIE * (1 + k)
        ends.append((one * n + first, two * n + second))
        values.append((0.0, 1 / y) if admittance == "realistic" else (1 / y, 0.0))
    return with_branches(joined, ends, values, [f"tie {k + 1}" for k in range(len(ends))])


def attach(
    grid: Grid,
    feeders: Sequence[tuple[Grid, str]],
    share: float = 1.0,
    transformer_x: float = 0.1,
    transformer_mva: float | None = None,
) -> Grid:
    """Attach feeders at PQ buses: a joint grid of transmission and distribution.

    A feeder's slack bus becomes a PQ bus behind a transformer; its generators there go.

    Args:
        grid: Transmission.
        feeders: Distribution grids, each with the name of the bus that feeds it.
        share: What loads and generation of the feeders are multiplied by.
        transformer_x: Reactance of the transformers, per unit of their rating.
        transformer_mva: Their rating; None: 1.5 times the feeder's load.

    Raises:
        ValueError: A bus that does not exist or is not PQ, a feeder without exactly one slack.
    """
    parts, prefixes, ends, values = [grid], [""], [], []
    offset = grid.num_buses
    for number, (feeder, bus) in enumerate(feeders, 1):
        place = grid.bus_index(bus)
        if int(grid.bus_type[place]) != BusType.PQ:
            raise ValueError(f"{grid.name}: bus {bus!r} is not a PQ bus; attach feeders to PQ buses")
        if len(feeder.slack) != 1:
            raise ValueError(f"{feeder.name}: a feeder needs exactly one slack bus, it has {len(feeder.slack)}")
        source = int(feeder.slack[0])
        load = float(torch.hypot(feeder.p_load_mw.sum(), feeder.q_load_mvar.sum())) * share
        rating = transformer_mva or 1.5 * max(load, 1e-3)
        parts.append(_without_source(rebased(feeder, grid.base_mva), share))
        prefixes.append(f"feeder {number}: ")
        ends.append((place, offset + source))
        values.append((0.0, transformer_x * grid.base_mva / rating))
        offset += feeder.num_buses
    joined = join(parts, prefixes, f"{grid.name} with {len(feeders)} feeders")
    names = [f"transformer of feeder {number + 1}" for number in range(len(feeders))]
    return with_branches(joined, ends, values, names)


def rebased(grid: Grid, base_mva: float) -> Grid:
    """The same grid in per unit on another base power."""
    up = base_mva / grid.base_mva
    z, y = ("r", "x", "r_asym", "x_asym"), ("g", "b", "g_asym", "b_asym", "g_shunt", "b_shunt")
    scaled = {name: getattr(grid, name) * up for name in z} | {name: getattr(grid, name) / up for name in y}
    return grid.replace(base_mva=base_mva, **scaled)


def _without_source(feeder: Grid, share: float) -> Grid:
    """A feeder whose slack bus is PQ, with scaled loads and generation."""
    source = int(feeder.slack[0])
    kept = feeder.gen_bus != source
    kind = feeder.bus_type.clone()
    kind[source] = BusType.PQ
    gens = {name: getattr(feeder, name)[kept] for name in ("gen_bus", *_GEN_FIELDS)}
    gens["gen_p_mw"], gens["gen_q_mvar"] = gens["gen_p_mw"] * share, gens["gen_q_mvar"] * share
    names = tuple(name for name, keep in zip(feeder.gen_names, kept.tolist(), strict=True) if keep)
    loads = {"p_load_mw": feeder.p_load_mw * share, "q_load_mvar": feeder.q_load_mvar * share}
    return feeder.replace(bus_type=kind, gen_names=names, **loads, **gens)


def join(grids: Sequence[Grid], prefixes: Sequence[str], name: str) -> Grid:
    """Grids side by side in one, without connections.

    Args:
        grids: With one base power.
        prefixes: What their names begin with.
        name: Of the whole.

    Raises:
        ValueError: If base powers differ.
    """
    base = grids[0].base_mva
    if any(grid.base_mva != base for grid in grids):
        raise ValueError(f"{name}: the base powers differ; bring the grids to one with `rebased`")
    fields: dict[str, Tensor | tuple[str, ...]] = {}
    for field in (*_BUS_FIELDS, *_BRANCH_FIELDS, *_GEN_FIELDS):
        fields[field] = torch.cat([getattr(grid, field) for grid in grids])
    sizes = [grid.num_buses for grid in grids]
    offsets = [sum(sizes[:k]) for k in range(len(grids))]
    for field in _INDEX_FIELDS:
        fields[field] = torch.cat([getattr(grid, field) + o for grid, o in zip(grids, offsets, strict=True)])
    for field in ("bus_names", "branch_names", "gen_names"):
        fields[field] = tuple(p + n for grid, p in zip(grids, prefixes, strict=True) for n in getattr(grid, field))
    return Grid(name=name, base_mva=base, **fields)


def with_branches(
    grid: Grid, ends: Sequence[tuple[int, int]], impedances: Sequence[tuple[float, float]], names: Sequence[str]
) -> Grid:
    """A grid with further branches, plain series impedances without limits.

    Args:
        grid: The grid.
        ends: Indices of the buses.
        impedances: ``(r, x)``, per unit.
        names: Of the branches.
    """
    count = len(ends)
    both = torch.tensor(ends, dtype=torch.int64, device=grid.device).view(count, 2)
    z = torch.tensor(impedances, dtype=grid.dtype, device=grid.device).view(count, 2)
    zero, one = torch.zeros_like(z[:, 0]), torch.ones_like(z[:, 0])
    new = dict.fromkeys(_BRANCH_FIELDS, zero) | {
        "r": z[:, 0], "x": z[:, 1], "tap": one, "status": one, "rate_mva": one * math.inf,
        "from_bus": both[:, 0], "to_bus": both[:, 1],
    }  # fmt: skip
    fields = {name: torch.cat([getattr(grid, name), value]) for name, value in new.items()}
    return dataclasses.replace(grid, branch_names=numbered([*grid.branch_names, *names]), **fields)
