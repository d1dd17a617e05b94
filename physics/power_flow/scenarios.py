"""What differs between the cases of a batch: injections, set-points, branches out of service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from physics.power_flow.admittance import BranchAdmittances
from physics.power_flow.grid import BusType, Grid, called, listed


@dataclass(frozen=True, eq=False)
class Scenarios:
    """``B`` scenarios, one a column: bus rows, scenario columns, so that one sparse product serves all.

    Args:
        s: Complex injections, per unit, ``[n, B]``; the imaginary part counts at PQ buses only, nothing at a slack.
        vm: Voltage set-points, per unit, ``[n, B]``; rows of PQ buses are not read. None: those of the grid.
        status: Weights of the branches, 1 in service and 0 out, ``[L, B]``. None: those of the grid.
        names: Of the scenarios, for messages and tables.
        admittances: Of the branches, ``[L, B]`` each, status included, where scenarios differ in more than that; they
            replace those of the grid, and ``status`` must be None.
    """

    s: Tensor
    vm: Tensor | None = None
    status: Tensor | None = None
    names: tuple[str, ...] = ()
    admittances: BranchAdmittances | None = None

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(f"scenario {b}" for b in range(self.s.shape[1])))

    @classmethod
    def base(cls, grid: Grid, name: str = "base") -> Scenarios:
        """The grid's own injections as the only scenario."""
        return cls(grid.s_bus()[:, None], names=(name,))

    @classmethod
    def from_power(
        cls,
        grid: Grid,
        p_load_mw: Tensor,
        q_load_mvar: Tensor,
        gen_p_mw: Tensor | None = None,
        vm: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> Scenarios:
        """From loads of the buses ``[n, B]`` and active power of the generators ``[G, B]`` (None: the grid's).

        Raises:
            ValueError: If a value is nan or infinite; the message names load or generator and scenario.
        """
        count = p_load_mw.shape[1]
        names = tuple(names) or tuple(f"scenario {b}" for b in range(count))
        gen_p = grid.gen_p_mw[:, None].expand(-1, count) if gen_p_mw is None else gen_p_mw
        for what, value, element in (
            ("active power (MW)", p_load_mw, _load_name),
            ("reactive power (MVAr)", q_load_mvar, _load_name),
            ("active power (MW)", gen_p, lambda grid, i: grid.gen_names[i]),
        ):
            _refuse_nan(grid, what, value, element, names)
        on = grid.gen_status[:, None]
        p = (-p_load_mw).index_add(0, grid.gen_bus, on * gen_p)
        q = (-q_load_mvar).index_add(0, grid.gen_bus, (on * grid.gen_q_mvar[:, None]).expand(-1, count))
        return cls(torch.complex(p, q) / grid.base_mva, vm, None, names)

    @property
    def num_scenarios(self) -> int:
        """``B``."""
        return self.s.shape[1]

    def __len__(self) -> int:
        return self.num_scenarios

    def select(self, columns: Tensor | Sequence[int] | slice) -> Scenarios:
        """Some of the scenarios, in the order asked for."""
        if isinstance(columns, slice):
            columns = range(*columns.indices(len(self)))
        index = torch.as_tensor(columns, device=self.s.device)
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]

        def picked(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[:, index]

        names = tuple(self.names[b] for b in index.tolist())
        y = self.admittances and BranchAdmittances(*(value[:, index] for value in self.admittances))
        return Scenarios(self.s[:, index], picked(self.vm), picked(self.status), names, y)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Scenarios:
        """The same scenarios elsewhere, or in another real dtype."""

        def moved(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.to(device=device, dtype=dtype.to_complex() if dtype and value.is_complex() else dtype)

        y = self.admittances and BranchAdmittances(*(moved(value) for value in self.admittances))
        return Scenarios(moved(self.s), moved(self.vm), moved(self.status), self.names, y)

    def check(self, grid: Grid) -> Scenarios:
        """Return the scenarios if they fit the grid.

        Raises:
            ValueError: Wrong shapes; values that are not finite, named by bus and scenario; branches out of service
                that leave a bus without a slack are found by `physics.power_flow.contingencies`, not here.
        """
        wanted = {"s": (grid.num_buses, len(self)), "vm": (grid.num_buses, len(self))}
        wanted["status"] = (grid.num_branches, len(self))
        given = {key: getattr(self, key) for key in wanted}
        if self.admittances is not None:
            if self.status is not None:
                raise ValueError(f"{grid.name}: scenarios have admittances, which include the status; leave status out")
            wanted |= {f"admittances.{key}": wanted["status"] for key in BranchAdmittances._fields}
            given |= {f"admittances.{key}": value for key, value in self.admittances._asdict().items()}
        for key, shape in wanted.items():
            value = given[key]
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"{grid.name}: {key} has shape {tuple(value.shape)}, not {shape} (elements, scenarios)"
                )
        if len(self.names) != len(self):
            raise ValueError(f"{grid.name}: {len(self.names)} names for {len(self)} scenarios")
        _refuse_nan(grid, "injection", self.s, _bus_name, self.names)
        if self.vm is not None:
            held = torch.where((grid.bus_type == BusType.PQ)[:, None], 1.0, self.vm.detach())
            _refuse_nan(grid, "voltage set-point", held, _bus_name, self.names)
        return self


def _bus_name(grid: Grid, index: int) -> str:
    return called("bus", [grid.bus_names[index]])


def _load_name(grid: Grid, index: int) -> str:
    return f"load at {_bus_name(grid, index)}"


def _refuse_nan(
    grid: Grid, what: str, value: Tensor, element: Callable[[Grid, int], str], names: Sequence[str]
) -> None:
    value = value.detach()
    if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):  # the sum alone is much faster
        bad = (~value.isfinite()).nonzero()
        places = [f"{element(grid, i)} in {names[b]}" for i, b in bad.tolist()]
        raise ValueError(f"{grid.name}: {what} is not a finite number: {listed(places)}")
