"""Loads and generation over time from files: which there are, and what follows from them for the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.grid_sources import Source, find_file, load_case, simbench_year
from datamodules.readers.change_table import read_load_changes
from datamodules.readers.injections import InjectionTable, read_injections
from physics.power_flow import Grid
from physics.power_flow.profiles import Injections

log = logging.getLogger(__name__)

Tables = dict[str, InjectionTable]


@dataclass(frozen=True)
class InjectionFiles:
    """Where the injections of a grid are stored; the attributes are arguments of `datamodules.power_grids.PowerGrids`.

    Attributes:
        files: File by quantity, or ``simbench``.
        grid_name: Name of the grid.
        grid_source: Where it comes from.
        data_dir: Folder of the files.
        time_column: Column of time stamps; None: there is none.
        load_scale: Multiplies what is in units of the case: change tables and the year of simbench.
        as_it_is: Whether the grid is the one that ``grid_name`` names, neither copied nor with feeders.
    """

    files: Mapping[str, str] | str
    grid_name: str
    grid_source: Source
    data_dir: str | None
    time_column: str | None
    load_scale: float
    as_it_is: bool

    def read(self, grid: Grid) -> Tables:
        """Tables by quantity, for the elements of the grid.

        Raises:
            ValueError: Names the file and what is wrong with it.
        """
        if isinstance(self.files, str):
            tables = simbench_year(self.grid_name, grid)
            scaled = {name: table._replace(values=self.load_scale * table.values) for name, table in tables.items()}
            return scaled if self.load_scale != 1 else tables
        tables = {}
        for quantity, file in self.files.items():
            if file.endswith(".m"):
                tables |= self._read_changes(grid, quantity, file)
                continue
            names = grid.gen_names if quantity == "gen_p_mw" else grid.bus_names
            aliases = _generators_by_bus(grid) if quantity == "gen_p_mw" else None
            path = Path(self.data_dir or ".") / file
            tables[quantity] = read_injections(path, names, time_column=self.time_column, aliases=aliases)
        rows = {quantity: len(table.values) for quantity, table in tables.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"data.files differ in length: {', '.join(f'{q} has {r} rows' for q, r in rows.items())}")
        return tables

    def _read_changes(self, grid: Grid, quantity: str, file: str) -> Tables:
        """Loads of a change table, for the buses of the grid."""
        if quantity != "p_load_mw" or "q_load_mvar" in self.files:
            raise ValueError(
                f"data.files.{quantity}={file}: a change table gives active and reactive loads; name it p_load_mw, "
                "without q_load_mvar"
            )
        if self.grid_source in ("pandapower", "simbench") or not self.as_it_is:
            raise ValueError(f"data.files.{quantity}={file}: a change table is of one MATPOWER case as it is")
        case = load_case(self.grid_name, self.grid_source, self.data_dir)
        found = read_load_changes(find_file(file, self.data_dir), case)
        place = {name: i for i, name in enumerate(grid.bus_names)}  # isolated ones may have been dropped
        tables = {}
        for name in ("p_load_mw", "q_load_mvar"):
            table: InjectionTable = getattr(found, name)
            here = [case["bus_names"][row] in place for row in table.elements]
            elements = np.array([place[case["bus_names"][row]] for row in table.elements[here]], dtype=np.int64)
            tables[name] = InjectionTable(self.load_scale * table.values[:, here], elements, table.times)
        log.info("%s: %d sets of loads by %s", file, len(table.values), found.numbered_by)
        return tables


def with_tables(case: Injections, tables: Tables, steps: np.ndarray, generation: Literal["case", "load"]) -> Injections:
    """Injections at some steps, (step, element) each.

    Args:
        case: Those of the case, (element,) each.
        tables: What files give; the rest keeps the value of the case, reactive power follows active power.
        steps: Rows of the tables.
        generation: Of generators that no table gives: that of the ``case``, or in proportion to the total ``load``.
    """
    p, q, gen = case
    values = {name: np.repeat(value[None], len(steps), axis=0) for name, value in case._asdict().items()}
    for quantity, table in tables.items():
        if quantity in values:
            values[quantity][:, table.elements] = table.values[steps]
    if "p_load_mw" in tables and "q_load_mvar" not in tables:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(p != 0, values["p_load_mw"] / p, 1.0)
        values["q_load_mvar"] = q * ratio
    if generation == "load":
        total = values["p_load_mw"].sum(1, keepdims=True) / p.sum()
        given = tables["gen_p_mw"].elements if "gen_p_mw" in tables else []
        others = np.setdiff1d(np.arange(len(gen)), given)
        values["gen_p_mw"][:, others] = gen[others] * total
    return Injections(**values)


def _generators_by_bus(grid: Grid) -> dict[str, int]:
    """Buses with a single generator name it too."""
    buses = grid.gen_bus.tolist()
    return {grid.bus_names[bus]: g for g, bus in enumerate(buses) if buses.count(bus) == 1}
