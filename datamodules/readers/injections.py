"""Loads and generation over time from tables: a row per step, a column per bus or generator."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

QUANTITIES = ("p_load_mw", "q_load_mvar", "gen_p_mw", "vm_pu")
"""What a file may hold: load of buses, generation of generators, voltage set-points of buses."""


class InjectionTable(NamedTuple):
    """Values of some elements over time.

    Attributes:
        values: ``(step, element)`` float64.
        elements: Number of each column's element in the grid, int64.
        times: Time stamps as they stand in the file, or None.
    """

    values: np.ndarray
    elements: np.ndarray
    times: list[str] | None


def read_injections(
    path: Path | str,
    names: Sequence[str],
    *,
    time_column: str | None = None,
    aliases: Mapping[str, int] | None = None,
    allow_missing: bool = False,
) -> InjectionTable:
    """Read one quantity.

    Args:
        path: CSV (also compressed) or Parquet.
        names: Names of the grid's elements, which the columns carry; elements without a column keep their value.
        time_column: Column of the time stamps; None: there is none.
        aliases: Other names for elements.
        allow_missing: Whether empty cells become NaN, as of meters that were out.

    Raises:
        FileNotFoundError: Names the file.
        ValueError: Names file, column, line and element.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".m":
        raise ValueError(
            f"{path}: tables are read from CSV or Parquet; change tables of MATPOWER by data=power_grid alone"
        )
    parquet = path.suffix in (".parquet", ".pq")
    # Empty lines count: one of a file with a single column is a missing value.
    frame = pd.read_parquet(path) if parquet else pd.read_csv(path, encoding="utf-8-sig", skip_blank_lines=False)
    times = None
    if time_column is not None:
        if time_column not in frame.columns:
            raise ValueError(
                f"{path}: no column {time_column!r} (data.time_column); it has {', '.join(map(str, frame.columns))}"
            )
        times = [str(time) for time in frame.pop(time_column)]
    if not len(frame):
        raise ValueError(f"{path}: the file has no rows")
    number = {name: i for i, name in enumerate(names)}
    known = {**(aliases or {}), **number}
    elements = []
    for column in map(str, frame.columns):
        if column not in known:
            close = difflib.get_close_matches(column, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}, column {column!r}: the grid has no such element.{hint}")
        elements.append(known[column])
    if len(set(elements)) < len(elements):
        twice = next(c for i, c in enumerate(frame.columns) if elements[i] in elements[:i])
        raise ValueError(f"{path}, column {str(twice)!r}: another column names the same element")
    values = np.empty(frame.shape)
    for i, column in enumerate(frame.columns):
        values[:, i] = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~np.isfinite(values[:, i])
        if allow_missing:
            wrong &= frame[column].notna().to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            where = f"row {row + 1}" if parquet else f"line {row + 2}"
            cell = frame[column].iloc[row]
            shown = repr(cell) if isinstance(cell, str) else str(cell)
            raise ValueError(f"{path}, column {str(column)!r}, {where}: {shown} is not a finite number")
    return InjectionTable(values, np.array(elements, dtype=np.int64), times)
