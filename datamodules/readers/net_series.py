"""Series of loads and generation that come with a pandapower net, such as the year of quarter-hours of simbench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.readers.injections import InjectionTable
from physics.power_flow import Grid

if TYPE_CHECKING:
    import pandas as pd

# Elements that draw or feed power at a bus: quantity of the grid, and how much of it is load.
_AT_BUSES = {
    ("load", "p_mw"): ("p_load_mw", 1.0),
    ("load", "q_mvar"): ("q_load_mvar", 1.0),
    ("sgen", "p_mw"): ("p_load_mw", -1.0),
    ("storage", "p_mw"): ("p_load_mw", 1.0),
}


def net_injections(
    net: Any, values: Mapping[tuple[str, str], pd.DataFrame], grid: Grid, times: Sequence[str] | None = None
) -> dict[str, InjectionTable]:
    """Sum series of elements up by bus, as `Grid.from_pandapower` sums up the elements.

    Elements without a series keep their power.

    Args:
        net: A ``pandapowerNet`` that was solved, so that it knows which buses are one.
        values: By table and column of the net (``("load", "p_mw")``), a column per element and a row per step.
        grid: Of this net.
        times: Names of the steps.

    Returns:
        Tables of ``p_load_mw``, ``q_load_mvar`` and ``gen_p_mw``, those of them that have series.

    Raises:
        ValueError: Names table, column and element where a value is not finite, or generators nobody can tell apart.
    """
    place = np.asarray(net._pd2ppc_lookups["bus"])
    names = None if times is None else [str(time) for time in times]
    found: dict[str, np.ndarray] = {}
    touched: dict[str, list[int]] = {}
    for (table, column), (quantity, sign) in _AT_BUSES.items():
        series = values.get((table, column))
        if series is None or not series.shape[1]:
            continue
        frame = _checked(net, table, column, series)
        bus = place[frame["bus"].to_numpy()]
        scale = sign * frame["scaling"].to_numpy(dtype=float) * frame["in_service"].to_numpy(dtype=float)
        there = (bus >= 0) & (bus < grid.num_buses)
        change = series.to_numpy(dtype=float) - frame[column].to_numpy(dtype=float)
        if quantity not in found:
            base = getattr(grid, quantity).numpy()
            found[quantity], touched[quantity] = np.repeat(base[None], len(series), axis=0), []
        np.add.at(found[quantity].T, bus[there], (change * scale)[:, there].T)
        touched[quantity] += bus[there].tolist()
    tables = {}
    for quantity, by_bus in found.items():
        elements = np.unique(np.array(touched[quantity], dtype=np.int64))
        tables[quantity] = InjectionTable(np.ascontiguousarray(by_bus[:, elements]), elements, names)
    series = values.get(("gen", "p_mw"))
    if series is not None and series.shape[1]:
        tables["gen_p_mw"] = _of_generators(net, series, grid, place, names)
    return tables


def _checked(net: Any, table: str, column: str, series: pd.DataFrame) -> pd.DataFrame:
    """Rows of the net's table for the columns of a series."""
    if unknown := [str(c) for c in series.columns if c not in net[table].index]:
        raise ValueError(f"net.{table} has no element {unknown[0]}, of which there is a series of {column}")
    wrong = ~np.isfinite(series.to_numpy(dtype=float))
    if wrong.any():
        row, element = np.argwhere(wrong)[0]
        raise ValueError(f"net.{table}.{column} of element {series.columns[element]}, step {row}: not a finite number")
    return net[table].loc[series.columns]


def _of_generators(
    net: Any, series: pd.DataFrame, grid: Grid, place: np.ndarray, names: list[str] | None
) -> InjectionTable:
    """Generators of the grid are known by their bus: where there are several, the first gets the sum."""
    frame = _checked(net, "gen", "p_mw", series)
    gen_bus = grid.gen_bus.numpy()
    elements, columns = [], []
    power = series.to_numpy(dtype=float) * frame["scaling"].to_numpy(dtype=float)
    bus = place[frame["bus"].to_numpy()]
    on = frame["in_service"].to_numpy(dtype=bool)
    for b in np.unique(bus[on & (bus >= 0) & (bus < grid.num_buses)]):
        mine, theirs = np.flatnonzero(gen_bus == b), on & (bus == b)
        if len(mine) != theirs.sum():
            raise ValueError(
                f"{grid.name}: bus {grid.bus_names[b]} has {len(mine)} generators, but series for {theirs.sum()}"
            )
        elements += mine.tolist()
        columns += [power[:, theirs].sum(1), *np.zeros((len(mine) - 1, len(series)))]
    return InjectionTable(np.stack(columns, 1), np.array(elements, dtype=np.int64), names)
