"""MATPOWER change tables (``.m``) with loads over time, such as the year of hours of the ACTIVSg cases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.readers.injections import InjectionTable

# Codes of the columns table, col and chgtype, as MATPOWER's idx_ct defines them.
_TABLES = {"CT_TLOAD": 7, "CT_TAREALOAD": 8}
_COLUMNS = {"CT_LOAD_ALL_PQ": 1, "CT_LOAD_FIX_PQ": 2, "CT_LOAD_ALL_P": 4, "CT_LOAD_FIX_P": 5}
_TYPES = {"CT_REP": 1, "CT_REL": 2, "CT_ADD": 3}
_WITH_REACTIVE = (1, 2)
_HEAD = re.compile(r"\s*(?:function\s+)?\w+\s*=")
_ENTRIES = 7
# Columns of the table of buses that may number areas.
_AREA, _ZONE = 6, 10


class LoadChanges(NamedTuple):
    """Loads of all buses after each set of changes.

    Attributes:
        p_load_mw: A row per set; columns are the rows of the case's table of buses that have load.
        q_load_mvar: The same.
        numbered_by: ``area`` or ``zone``: what the file means by areas.
    """

    p_load_mw: InjectionTable
    q_load_mvar: InjectionTable
    numbered_by: str


class _Change(NamedTuple):
    line: int
    step: int
    table: int
    row: int
    with_reactive: bool
    kind: int
    value: float


def read_load_changes(path: Path | str, case: Mapping[str, Any]) -> LoadChanges:
    """Read a change table whose changes are of loads; every set of changes begins at the case.

    What the table sets are sums over an area (``CT_TAREALOAD``) or loads of a bus (``CT_TLOAD``): loads there keep
    their shares. Reactive power follows where the column says ``PQ``, otherwise it stays. Where the file names areas
    that the case does not have, and its zones are all there, zones are meant, as the file of case_ACTIVSg200 says.

    Args:
        path: The file.
        case: As `datamodules.readers.matpower.read_case` returns it.

    Raises:
        FileNotFoundError: Names the file.
        ValueError: Names file and line, and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    changes, labels = _read(path)
    bus = case["bus"]
    areas, numbered_by = _areas(changes, bus)
    with_load = np.flatnonzero((bus[:, 2] != 0) | (bus[:, 3] != 0))
    p, q = (np.repeat(bus[None, with_load, column], len(labels), axis=0) for column in (2, 3))
    members: dict[tuple[int, int], np.ndarray] = {}
    for change in changes:
        key = change.table, change.row
        if key not in members:
            numbers = bus[with_load, 0] if change.table == _TABLES["CT_TLOAD"] else areas[with_load]
            members[key] = np.flatnonzero(numbers == change.row) if change.row else np.arange(len(with_load))
            if not len(members[key]):
                what = "bus" if change.table == _TABLES["CT_TLOAD"] else numbered_by
                raise ValueError(f"{path}, line {change.line}: {what} {change.row} of the case has no load")
        _apply(path, change, p[change.step], q[change.step], members[key])
    times = [f"change {label}" for label in labels]
    return LoadChanges(InjectionTable(p, with_load, times), InjectionTable(q, with_load, times), numbered_by)


def _read(path: Path) -> tuple[list[_Change], list[int]]:
    """Changes with the place of their set, and the labels of the sets, in the order of the file."""
    changes: list[_Change] = []
    step_of: dict[int, int] = {}
    for line, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        text = text.split("%")[0]
        if "[" in text and _HEAD.match(text):
            text = text.split("[", 1)[1]
        for row in text.split("]")[0].split(";"):
            words = row.replace(",", " ").split()
            if len(words) != _ENTRIES:
                if changes and words:
                    raise ValueError(f"{path}, line {line}: {len(words)} entries; a change has {_ENTRIES}")
                continue
            changes.append(_change(path, line, words, step_of))
    if not changes:
        raise ValueError(f"{path}: no rows of a change table (label prob table row col chgtype newval)")
    return changes, list(step_of)


def _change(path: Path, line: int, words: list[str], step_of: dict[int, int]) -> _Change:
    label, _, table, row, column, kind, value = words
    try:
        number, target, amount = int(label), int(row), float(value)
        codes = [_code(word, known) for word, known in ((table, _TABLES), (column, _COLUMNS), (kind, _TYPES))]
    except KeyError as error:
        raise ValueError(
            f"{path}, line {line}: {error.args[0]} is not read; change tables give loads here ({', '.join(_TABLES)} "
            f"with {', '.join(_COLUMNS)} and {', '.join(_TYPES)}), outages come from data.kind=contingencies"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from None
    if not np.isfinite(amount):
        raise ValueError(f"{path}, line {line}: {value} is not a finite number")
    step = step_of.setdefault(number, len(step_of))
    return _Change(line, step, codes[0], target, codes[1] in _WITH_REACTIVE, codes[2], amount)


def _code(word: str, known: dict[str, int]) -> int:
    """The number of a name, or of itself; negative ones scale costs too, which have no meaning here."""
    if word.lstrip("-") in known:
        return known[word.lstrip("-")]
    if word.lstrip("-").isdigit() and abs(int(word)) in known.values():
        return abs(int(word))
    raise KeyError(word)


def _areas(changes: list[_Change], bus: np.ndarray) -> tuple[np.ndarray, str]:
    """Area of every bus as the file counts them, and which column that is."""
    named = {change.row for change in changes if change.table == _TABLES["CT_TAREALOAD"]} - {0}
    known = {column: set(bus[:, column].astype(int).tolist()) for column in (_AREA, _ZONE)}
    if not named <= known[_AREA] and named <= known[_ZONE]:
        return bus[:, _ZONE], "zone"
    return bus[:, _AREA], "area"


def _apply(path: Path, change: _Change, p: np.ndarray, q: np.ndarray, members: np.ndarray) -> None:
    total = p[members].sum()
    wanted = {1: change.value, 2: change.value * total, 3: change.value + total}[change.kind]
    if total == 0:
        if wanted == 0:
            return
        raise ValueError(f"{path}, line {change.line}: no active load to scale to {wanted:g} MW")
    p[members] *= wanted / total
    if change.with_reactive:
        q[members] *= wanted / total
