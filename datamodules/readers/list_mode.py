"""Hits in list mode as files: CSV with one hit a row, or the arrays of `physics.pet.hits.Hits` as NPZ."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from physics.pet.hits import NO_DECAY, Hits

NEEDED = ("crystal", "step")
DEFAULTS = {"sample": 0, "decay": NO_DECAY, "true_step": -1, "energy_kev": 511.0, "scattered": False}
"""What files may leave out, and what is taken for it; without ``sample`` steps count through the whole file."""
TYPES = {"energy_kev": np.float64, "scattered": np.bool_}


def read_hits(path: str | Path, *, num_crystals: int, num_steps: int) -> Hits:
    """Read hits and put them into the order of sample and step.

    A CSV has a header with ``crystal`` and ``step``, in any order, and may have ``sample``, ``decay``, ``true_step``,
    ``energy_kev`` and ``scattered``. Without ``sample`` the file is one stream, which is cut every ``num_steps`` steps.

    Args:
        path: ``.csv`` or ``.npz``.
        num_crystals: Crystals of the scanner.
        num_steps: Steps of a sample.

    Raises:
        FileNotFoundError: Names the file.
        ValueError: Names the file, the column or line, and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} (data.file) does not exist")
    if path.suffix == ".csv":
        columns = _csv_columns(path)
    elif path.suffix == ".npz":
        with np.load(path) as stored:
            columns = {name: stored[name] for name in stored.files}
    else:
        raise ValueError(f"{path}: hits are read from .csv and .npz")
    if missing := [name for name in NEEDED if name not in columns]:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(columns)}")
    count = len(columns["crystal"])
    if not count:
        raise ValueError(f"{path} holds no hit")
    if "sample" not in columns:
        stream = columns["step"].astype(np.int64)
        columns |= {"sample": stream // num_steps, "step": stream % num_steps}
        if "true_step" in columns:
            columns["true_step"] = columns["true_step"].astype(np.int64) - columns["sample"] * num_steps
    values = {}
    for name in Hits.columns():
        given = columns.get(name)
        kind = TYPES.get(name, np.int64)
        values[name] = np.full(count, DEFAULTS[name], kind) if given is None else np.asarray(given).astype(kind)
    hits = Hits(
        **values, num_samples=int(values["sample"].max()) + 1, num_crystals=num_crystals, num_steps=num_steps
    ).sorted()
    try:
        return hits.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error} (scanner of {num_crystals} crystals, data.num_steps={num_steps})") from error


def _csv_columns(path: Path) -> dict[str, np.ndarray]:
    with path.open() as file:
        names = [name.strip() for name in file.readline().split(",")]
        known = {*NEEDED, *DEFAULTS}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{path}, line 1: column {unknown[0]!r} is unknown; use {', '.join(sorted(known))}")
        rows = []
        for number, line in enumerate(file, start=2):
            if not line.strip():
                continue
            parts = line.split(",")
            if len(parts) != len(names):
                raise ValueError(f"{path}, line {number}: {len(parts)} values for {len(names)} columns")
            try:
                rows.append([float(part) for part in parts])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    table = np.array(rows, dtype=float).reshape(len(rows), len(names))
    for i, name in enumerate(names):
        whole = name not in ("energy_kev",)
        if whole and len(table) and not np.array_equal(table[:, i], np.rint(table[:, i])):
            line = int((table[:, i] != np.rint(table[:, i])).argmax()) + 2
            raise ValueError(f"{path}, line {line}: {name} {table[line - 2, i]} is no whole number")
    return {name: table[:, i] for i, name in enumerate(names)}


def write_hits(hits: Hits, path: str | Path) -> None:
    """Write hits as ``.csv`` or ``.npz``, so that `read_hits` gives the same; the file appears when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    columns = {name: getattr(hits, name) for name in Hits.columns()}
    if path.suffix == ".npz":
        np.savez_compressed(unfinished, **columns)
    elif path.suffix == ".csv":
        with unfinished.open("w") as file:
            file.write(",".join(columns) + "\n")
            for row in zip(*(values.tolist() for values in columns.values()), strict=True):
                file.write(",".join(repr(v) if isinstance(v, float) else str(int(v)) for v in row) + "\n")
    else:
        raise ValueError(f"{path}: hits are written as .csv and .npz")
    unfinished.replace(path)
