"""Tables of numbers in text files, separated by commas or semicolons, with a line of names."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def read_number_table(
    paths: Sequence[Path], target: Sequence[str], file_column: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read files with the same columns, one below the other.

    Args:
        paths: The files.
        target: Columns to predict.
        file_column: Name of a further feature, the number of the file that a row is of; None: there is none.

    Returns:
        Features ``(row, feature)`` and targets ``(row, len(target))``, float64, and the names of the features.

    Raises:
        ValueError: Names file, line and column where something is no number, or where names are missing or differ.
    """
    blocks, names = [], None
    for path in paths:
        found, values = _read(path)
        if names is not None and found != names:
            raise ValueError(f"{path} has other columns than {paths[0]}")
        names = found
        blocks.append(values)
    assert names is not None
    if missing := [name for name in target if name not in names]:
        raise ValueError(f"data.target: {paths[0]} has no column {missing[0]!r}; it has {', '.join(names)}")
    table = np.concatenate(blocks)
    is_target = [name in target for name in names]
    features = [name for name in names if name not in target]
    x, y = table[:, ~np.array(is_target)], table[:, [names.index(name) for name in target]]
    if file_column is not None:
        numbers = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
        x, features = np.column_stack([x, numbers]), [*features, file_column]
    return x, y, features


def _read(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        separator = ";" if head.count(";") > head.count(",") else ","
        names = next(csv.reader([head], delimiter=separator))
        rows = []
        for line in csv.reader(file, delimiter=separator):
            if not line:
                continue
            number = len(rows) + 2
            if len(line) != len(names):
                raise ValueError(f"{path}, line {number}: {len(line)} values for {len(names)} columns")
            try:
                rows.append([float(value) for value in line])
            except ValueError:
                column = next(n for n, value in zip(names, line, strict=True) if not _is_number(value))
                raise ValueError(f"{path}, line {number}: column {column!r} has no number") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return [name.strip() for name in names], np.array(rows, dtype=np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
