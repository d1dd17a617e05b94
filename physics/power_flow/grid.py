"""An electric grid as tensors: buses, branches, generators, in per unit on one base power.

Model and conventions are MATPOWER's: a branch is a pi section behind an ideal transformer of complex ratio
``tap * exp(j shift)`` at its *from* end. The asymmetric terms, zero in MATPOWER's files, are those of pandapower's
T-model of transformers, whose two halves differ.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from physics.power_flow.topology import components

_log = logging.getLogger(__name__)

# Below this |r + jx| (per unit) a branch is no branch but one bus.
LEAST_IMPEDANCE = 1e-9
# A set-point outside is hardly meant, per unit.
USUAL_SET_POINTS = (0.5, 1.5)
# Generators of a bus may differ by the rounding of their file, per unit.
SAME_SET_POINT = 1e-6

# Names of the fields that `admittances` reads, and through which gradients flow.
BRANCH_PARAMETERS = ("r", "x", "g", "b", "r_asym", "x_asym", "g_asym", "b_asym", "tap", "shift")


_OF_BRANCHES = (*BRANCH_PARAMETERS, "status", "rate_mva")


class BusType(IntEnum):
    """What is given at a bus, with MATPOWER's numbers."""

    PQ = 1  # active and reactive power
    PV = 2  # active power and voltage magnitude
    SLACK = 3  # voltage magnitude and angle


@dataclass(frozen=True, eq=False)
class Grid:
    """Buses ``[n]``, branches ``[L]`` and generators ``[G]``. Real tensors share one dtype; all share one device.

    Args:
        name: For messages and figures.
        base_mva: Base power.
        bus_names: Names of the buses.
        bus_type: `BusType` of every bus, int64.
        vn_kv: Nominal voltage.
        vm: Voltage magnitude, per unit: the set-point at slack and PV buses, a first guess at PQ buses.
        va: Voltage angle, rad: given at slack buses, a first guess elsewhere.
        g_shunt, b_shunt: Shunt admittance, per unit.
        p_load_mw, q_load_mvar: What is drawn at the bus.
        vm_min, vm_max: Limits of the voltage magnitude, per unit.
        branch_names: Names of the branches.
        from_bus, to_bus: Indices of their ends, int64.
        r, x: Series impedance, per unit.
        g, b: Total charging conductance and susceptance, half at each end, per unit.
        r_asym, x_asym, g_asym, b_asym: What the *to* side has on top of the four before.
        tap: Ratio of the ideal transformer at the *from* end; 1 for a line.
        shift: Its phase shift, rad.
        status: 1 in service, 0 out; multiplies the whole branch.
        rate_mva: Thermal limit; infinite where there is none.
        gen_names: Names of the generators.
        gen_bus: Index of their bus, int64.
        gen_p_mw, gen_q_mvar: What they feed in. Reactive power counts at PQ buses only.
        gen_vm: Their set-point, per unit.
        gen_q_min_mvar, gen_q_max_mvar: Limits of the reactive power.
        gen_status: 1 in service, 0 out.
        slack_weights: If given, ``[n]``: shares in which buses take up the imbalance of active power (distributed
            slack); they sum to 1. Otherwise the slack buses take up all of it.
    """

    name: str
    base_mva: float
    bus_names: tuple[str, ...]
    bus_type: Tensor
    vn_kv: Tensor
    vm: Tensor
    va: Tensor
    g_shunt: Tensor
    b_shunt: Tensor
    p_load_mw: Tensor
    q_load_mvar: Tensor
    vm_min: Tensor
    vm_max: Tensor
    branch_names: tuple[str, ...]
    from_bus: Tensor
    to_bus: Tensor
    r: Tensor
    x: Tensor
    g: Tensor
    b: Tensor
    r_asym: Tensor
    x_asym: Tensor
    g_asym: Tensor
    b_asym: Tensor
    tap: Tensor
    shift: Tensor
    status: Tensor
    rate_mva: Tensor
    gen_names: tuple[str, ...]
    gen_bus: Tensor
    gen_p_mw: Tensor
    gen_q_mvar: Tensor
    gen_vm: Tensor
    gen_q_min_mvar: Tensor
    gen_q_max_mvar: Tensor
    gen_status: Tensor
    slack_weights: Tensor | None = None

    # ------------------------------------------------------------------------------------------------------- building

    @classmethod
    def from_matpower(cls, case: Mapping[str, Any], isolated: Literal["drop", "refuse"] = "refuse") -> Grid:
        """Build from a case in MATPOWER's format.

        Branches and generators that are out of service stay, with status 0. Buses of type 4 (isolated) go, with a
        message, together with what is attached to them. A PV bus without a generator becomes PQ.

        Args:
            case: ``name``, ``base_mva``, the float64 arrays ``bus``, ``gen``, ``branch`` with MATPOWER's columns, and
                optionally ``bus_names`` (one per row of ``bus``).
            isolated: What to do with buses that no branch in service connects to a slack: drop them with a message,
                or refuse the case.

        Raises:
            ValueError: What `check` finds; generators of one bus that contradict each other; unknown buses.
        """
        return _from_matpower(case, isolated)

    @classmethod
    def from_pandapower(cls, net: Any) -> Grid:
        """Build from a pandapower net (package ``pandapower``, optional), in the order of its internal bus table.

        Out-of-service elements are those that pandapower leaves out. Three-winding transformers are three branches.

        Args:
            net: A ``pandapowerNet``; it is run once if it has not been.
        """
        from physics.power_flow.pandapower_import import from_pandapower

        return from_pandapower(net)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Grid:
        """The same grid elsewhere, or in another real dtype."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def map(self, change: Callable[[Tensor], Tensor]) -> Grid:
        """The same grid with every tensor changed."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Grid(**{name: change(value) if isinstance(value, Tensor) else value for name, value in fields.items()})

    def replace(self, **fields: Any) -> Grid:
        """The same grid with other fields, for instance ``grid.replace(x=x)`` with ``x`` that needs a gradient."""
        return dataclasses.replace(self, **fields)

    # -------------------------------------------------------------------------------------------------------- reading

    @property
    def num_buses(self) -> int:
        """``n``."""
        return len(self.bus_names)

    @property
    def num_branches(self) -> int:
        """``L``, those out of service included."""
        return len(self.branch_names)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.vm.device

    @property
    def dtype(self) -> torch.dtype:
        """Real dtype of the tensors."""
        return self.vm.dtype

    @property
    def slack(self) -> Tensor:
        """Indices of the slack buses."""
        return (self.bus_type == BusType.SLACK).nonzero()[:, 0]

    @property
    def pv(self) -> Tensor:
        """Indices of the PV buses."""
        return (self.bus_type == BusType.PV).nonzero()[:, 0]

    @property
    def pq(self) -> Tensor:
        """Indices of the PQ buses."""
        return (self.bus_type == BusType.PQ).nonzero()[:, 0]

    def s_bus(self) -> Tensor:
        """Complex power that loads and generators feed into every bus, per unit, ``[n]``; differentiable."""
        p = (-self.p_load_mw).index_add(0, self.gen_bus, self.gen_status * self.gen_p_mw)
        q = (-self.q_load_mvar).index_add(0, self.gen_bus, self.gen_status * self.gen_q_mvar)
        return torch.complex(p, q) / self.base_mva

    def generation_mva(self) -> Tensor:
        """Complex power of the generators of every bus, MW and MVAr, ``[n]``."""
        none = torch.zeros_like(self.vm)
        p = none.index_add(0, self.gen_bus, self.gen_status * self.gen_p_mw)
        return torch.complex(p, none.index_add(0, self.gen_bus, self.gen_status * self.gen_q_mvar))

    def bus_index(self, name: str) -> int:
        """Index of a bus.

        Raises:
            ValueError: If there is none of that name.
        """
        return _index(self.bus_names, name, "bus", self.name)

    def branch_index(self, name: str) -> int:
        """Index of a branch.

        Raises:
            ValueError: If there is none of that name.
        """
        return _index(self.branch_names, name, "branch", self.name)

    # ------------------------------------------------------------------------------------------------------- checking

    def check(self) -> Grid:
        """Return the grid if it can be computed with.

        Raises:
            ValueError: No slack, isolated buses, branches without impedance, values that are not finite; the message
                names the elements.
        """
        _check(self)
        return self


def _index(names: Sequence[str], name: str, kind: str, grid: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"{grid}: there is no {kind} {name!r}; there are {shown}") from None


def called(kind: str, names: Sequence[str], most: int = 10) -> str:
    """Elements for a message: ``bus 4, 5``, or ``Bus 4, Bus 5`` where names say what they are."""
    telling = all(name.lower().startswith(kind) for name in names)
    return listed(names, most) if telling else f"{kind} {listed(names, most)}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names for a message, the first few of many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _check(grid: Grid) -> None:
    if not len(grid.slack):
        raise ValueError(
            f"{grid.name}: no slack bus; give one bus the type {BusType.SLACK.value} (reference), best one with a "
            "large generator"
        )
    for field in dataclasses.fields(grid):
        value = getattr(grid, field.name)
        if not isinstance(value, Tensor) or not value.is_floating_point() or field.name.startswith(("rate", "gen_q_m")):
            continue
        bad = (~value.detach().isfinite()).nonzero()[:, 0].tolist()
        if bad:
            kind = "generator" if field.name.startswith("gen_") else "branch" if field.name in _OF_BRANCHES else "bus"
            names = {"generator": grid.gen_names, "branch": grid.branch_names, "bus": grid.bus_names}[kind]
            places = called(kind, [names[i] for i in bad])
            raise ValueError(f"{grid.name}: {field.name} is not a finite number at {places}")
    on = grid.status.detach() != 0
    short = (torch.hypot(grid.r, grid.x).detach() < LEAST_IMPEDANCE) & on
    if short.any():
        names = [grid.branch_names[i] for i in short.nonzero()[:, 0].tolist()]
        raise ValueError(
            f"{grid.name}: {called('branch', names)} has no impedance (|r + jx| < {LEAST_IMPEDANCE:g} per unit); merge "
            "its two buses, or give it a small reactance such as 1e-5"
        )
    ends = grid.from_bus[on].cpu().numpy(), grid.to_bus[on].cpu().numpy()
    part = components(grid.num_buses, *ends)
    alone = ~np.isin(part, part[grid.slack.cpu().numpy()])
    if alone.any():
        names = [grid.bus_names[i] for i in np.flatnonzero(alone)]
        raise ValueError(
            f"{grid.name}: no branch in service connects {called('bus', names)} to a slack bus; connect them, or drop "
            "them (isolated='drop')"
        )
    low, high = USUAL_SET_POINTS
    held = (grid.bus_type != BusType.PQ) & ((grid.vm.detach() < low) | (grid.vm.detach() > high))
    if held.any():
        places = [f"{grid.bus_names[i]} ({float(grid.vm[i]):g})" for i in held.nonzero()[:, 0].tolist()]
        _log.warning("%s: voltage set-points outside %g-%g per unit at %s", grid.name, low, high, called("bus", places))


def _from_matpower(case: Mapping[str, Any], isolated: str) -> Grid:
    name = str(case.get("name", "case"))
    if isolated not in ("drop", "refuse"):
        raise ValueError(f"isolated={isolated!r}: choose 'drop' or 'refuse'")
    bus, gen, branch = (np.atleast_2d(np.asarray(case[key], dtype=np.float64)) for key in ("bus", "gen", "branch"))
    numbers = bus[:, 0].astype(np.int64)
    names = np.array(case.get("bus_names") or [str(number) for number in numbers], dtype=object)
    if len(names) != len(bus):
        raise ValueError(f"{name}: {len(names)} bus_names for {len(bus)} buses")
    if len(set(numbers.tolist())) != len(numbers):
        twice = sorted({n for n in numbers.tolist() if (numbers == n).sum() > 1})
        raise ValueError(f"{name}: bus number {listed([str(n) for n in twice])} is given twice")
    row = {number: i for i, number in enumerate(numbers.tolist())}

    def rows(table: np.ndarray, column: int, kind: str) -> np.ndarray:
        wanted = table[:, column].astype(np.int64).tolist()
        if unknown := sorted({str(n) for n in wanted if n not in row}):
            raise ValueError(f"{name}: a {kind} is at bus {listed(unknown)}, which is not among the buses")
        return np.array([row[n] for n in wanted], dtype=np.int64)

    gen_bus, from_bus, to_bus = rows(gen, 0, "generator"), rows(branch, 0, "branch"), rows(branch, 1, "branch")
    kind = bus[:, 1].astype(np.int64)
    branch_on, gen_on = branch[:, 10] > 0, gen[:, 7] > 0
    keep = kind != 4
    if isolated == "drop":
        on = branch_on & keep[from_bus] & keep[to_bus]
        part = components(len(bus), from_bus[on], to_bus[on])
        keep &= np.isin(part, part[(kind == BusType.SLACK) & keep])
        if not keep.any():  # no slack at all: `check` tells
            keep = kind != 4
    if not keep.all():
        _log.warning("%s: %s is isolated and left out", name, called("bus", [str(n) for n in names[~keep]]))
        new = np.cumsum(keep) - 1
        there = keep[from_bus] & keep[to_bus]
        branch, branch_on, from_bus, to_bus = (a[there] for a in (branch, branch_on, from_bus, to_bus))
        there = keep[gen_bus]
        gen, gen_on, gen_bus = gen[there], gen_on[there], gen_bus[there]
        from_bus, to_bus, gen_bus = new[from_bus], new[to_bus], new[gen_bus]
        bus, kind, names = bus[keep], kind[keep], names[keep]

    vm = bus[:, 7].copy()
    with_gen = np.zeros(len(bus), dtype=bool)
    with_gen[gen_bus[gen_on]] = True
    kind[(kind == BusType.PV) & ~with_gen] = BusType.PQ
    gen_names = numbered([f"gen at {called('bus', [str(names[i])])}" for i in gen_bus])
    _set_points(name, vm, kind, gen[:, 5], gen_bus, gen_on, gen_names)
    tap = np.where(branch[:, 8] == 0, 1.0, branch[:, 8])
    rate = np.where(branch[:, 5] == 0, math.inf, branch[:, 5])
    base = float(case["base_mva"])
    none = np.zeros(len(branch))
    tensors = {
        "bus_type": kind, "vn_kv": bus[:, 9], "vm": vm, "va": np.deg2rad(bus[:, 8]),
        "g_shunt": bus[:, 4] / base, "b_shunt": bus[:, 5] / base, "p_load_mw": bus[:, 2], "q_load_mvar": bus[:, 3],
        "vm_min": bus[:, 12], "vm_max": bus[:, 11],
        "from_bus": from_bus, "to_bus": to_bus, "r": branch[:, 2], "x": branch[:, 3], "g": none, "b": branch[:, 4],
        "r_asym": none, "x_asym": none, "g_asym": none, "b_asym": none, "tap": tap,
        "shift": np.deg2rad(branch[:, 9]), "status": branch_on.astype(np.float64), "rate_mva": rate,
        "gen_bus": gen_bus, "gen_p_mw": gen[:, 1], "gen_q_mvar": gen[:, 2], "gen_vm": gen[:, 5],
        "gen_q_min_mvar": gen[:, 4], "gen_q_max_mvar": gen[:, 3], "gen_status": gen_on.astype(np.float64),
    }  # fmt: skip
    return Grid(
        name=name,
        base_mva=base,
        bus_names=tuple(str(n) for n in names),
        branch_names=numbered([f"{names[i]}-{names[k]}" for i, k in zip(from_bus, to_bus, strict=True)]),
        gen_names=gen_names,
        **{key: torch.tensor(value) for key, value in tensors.items()},
    ).check()


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Names made unique: the second of the same becomes ``name (2)``."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(unique)


def _set_points(
    name: str,
    vm: np.ndarray,
    kind: np.ndarray,
    gen_vm: np.ndarray,
    gen_bus: np.ndarray,
    gen_on: np.ndarray,
    gen_names: Sequence[str],
) -> None:
    """Write the generators' set-points into ``vm``; those of one bus must agree."""
    first: dict[int, int] = {}
    for g in np.flatnonzero(gen_on & (kind[gen_bus] != BusType.PQ)).tolist():
        other = first.setdefault(int(gen_bus[g]), g)
        if abs(gen_vm[g] - gen_vm[other]) > SAME_SET_POINT:
            raise ValueError(
                f"{name}: {gen_names[other]} holds {gen_vm[other]:g} per unit and {gen_names[g]} {gen_vm[g]:g}; give "
                "the generators of one bus the same set-point"
            )
        vm[gen_bus[g]] = gen_vm[other]
