"""Generators of tiny files in the formats that the readers know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd


def hourly_values(num_days: int, num_series: int = 1, *, cycle_length: int = 24, seed: int = 0) -> np.ndarray:
    """Values with a day, a week and noise, ``(time, series)``."""
    rng = np.random.default_rng(seed)
    t = np.arange(num_days * cycle_length)
    day = np.sin(2 * np.pi * t / cycle_length)
    weekend = (t // cycle_length) % 7 >= 5
    base = 10 + 3 * day - 2 * weekend
    return base[:, None] * (1 + np.arange(num_series)) + rng.normal(size=(len(t), num_series))


def write_wide(
    path: Path,
    values: np.ndarray,
    *,
    start: str = "2024-01-01",
    freq: str = "1h",
    names: Sequence[str] | None = None,
    stamps: Sequence[str] | pd.DatetimeIndex | None = None,
) -> Path:
    """Write a column per series; ``stamps`` replaces the uniform axis."""
    columns = names or (["y"] if values.shape[1] == 1 else [f"y{i}" for i in range(values.shape[1])])
    frame = pd.DataFrame(values, columns=list(columns))
    frame.insert(0, "ts", pd.date_range(start, periods=len(values), freq=freq) if stamps is None else stamps)
    _write(frame, path)
    return path


def write_long(path: Path, values: np.ndarray, names: Sequence[str], *, start: str = "2024-01-01") -> Path:
    """Write a row per value, the series interleaved; columns time, sensor, load."""
    stamps = pd.date_range(start, periods=len(values), freq="1h")
    frame = pd.DataFrame(values, columns=list(names), index=stamps.rename("time"))
    _write(frame.rename_axis(columns="sensor").stack().rename("load").reset_index(), path)
    return path


def edit_lines(path: Path, changes: Mapping[int, str | None]) -> Path:
    """Replace lines of a text file by their number (from 1); None removes the line."""
    lines = path.read_text().splitlines()
    edited = [changes.get(number, line) for number, line in enumerate(lines, start=1)]
    path.write_text("\n".join(line for line in edited if line is not None) + "\n")
    return path


def _write(frame: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)


def write_images(folder: Path, images: Mapping[str, np.ndarray]) -> list[Path]:
    """Write grey ``(height, width)`` or colour ``(height, width, 3)`` images of 0 to 255; the suffix is the format."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(np.asarray(pixels).astype(np.uint8)).save(folder / name)
    return [folder / name for name in images]


def write_idx(path: Path, values: np.ndarray) -> Path:
    """Write uint8 ``(image, row, column)`` or ``(label,)`` as MNIST is; compressed if the name ends in .gz."""
    import gzip

    magic = {3: 2051, 1: 2049}[values.ndim]
    content = np.array([magic, *values.shape], dtype=">u4").tobytes() + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def zip_folder(folder: Path, path: Path) -> Path:
    """Write all files of a folder into an archive, in an order that is not sorted."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def case_text(
    *,
    version: int = 2,
    base: str = "100",
    separator: str = "\t",
    row_end: str = ";\n",
    line_end: str = "\n",
    comments: bool = False,
    continued: bool = False,
    extra: int = 0,
    units: bool = False,
    names: Sequence[str] | None = None,
    tail: str = "",
) -> str:
    """A MATPOWER case of three buses (10 slack, 20 PQ, 30 PV) and three branches, in one of the styles that exist.

    Args:
        version: 1 returns bare tables with fewer columns.
        base: Of ``baseMVA``.
        separator: Between the numbers of a row.
        row_end: Between rows.
        line_end: Of the file.
        comments: Put comments behind and between rows.
        continued: Break rows with ``...``.
        extra: Columns of an earlier solution behind the others.
        units: End with the statements that convert kW and ohms.
        names: Of the buses.
        tail: Further statements.
    """
    tables = {
        "bus": [
            "10 3 0 0 0 0 1 1 0 110 1 1.1 0.9",
            "20 1 80 40 0 0 1 1 0 110 1 1.1 0.9",
            "30 2 10 5 0 19 1 1 0 110 1 1.1 0.9",
        ],
        "gen": ["10 0 0 99 -99 1.02 100 1 200 0", "30 50 0 50 -50 1.01 100 1 100 0"],
        "branch": [
            "10 20 0.01 0.1 0.03 0 0 0 0 0 1 -360 360",
            "20 30 0.02 0.2 0.05 120 0 0 0.98 0 1 -360 360",
            "10 30 0.01 0.15 0 0 0 0 0 -1.5 1 -360 360",
        ],
    }  # fmt: skip
    if version == 1:
        kept = {"bus": 13, "gen": 6, "branch": 11}
        tables = {name: [" ".join(row.split()[: kept[name]]) for row in rows] for name, rows in tables.items()}
    owner = "mpc." if version == 2 else ""
    head = "function mpc = tiny" if version == 2 else "function [baseMVA, bus, gen, branch] = tiny"
    lines = [
        head,
        "% a grid of three buses",
        f"{owner}version = '2';" if version == 2 else "",
        f"{owner}baseMVA = {base};",
    ]
    if not comments:
        lines.append("")
    else:
        lines.append("% [ brackets; in comments ] are no tables")
    for name, rows in tables.items():
        written = []
        for i, row in enumerate(rows):
            cells = [*row.split(), *["0"] * extra]
            if continued:
                cells.insert(4, "...\n")
            text = separator.join(cells).replace(f"...\n{separator}", "...\n").replace(f"{separator}...", " ...")
            last = i == len(rows) - 1
            end = "" if last and row_end == "; " else row_end if not comments else f";  % row {i}; 1 2 3]\n% between\n"
            written.append(text + end)
        closing = "];" if "".join(written).endswith("\n") else "\n];"
        lines += [f"{owner}{name} = [", *("".join(written) + closing).split("\n")]
    if names is not None:
        quoted = ["'{}';".format(name.replace("'", "''")) for name in names]
        lines += [f"{owner}bus_name = {{", *quoted, "};"]
    if units:
        lines += [
            "[PQ, PV, REF, NONE, BUS_I, BUS_TYPE, PD, QD, GS, BS, BUS_AREA, VM, ...",
            "    VA, BASE_KV] = idx_bus;",
            "Vbase = mpc.bus(1, BASE_KV) * 1e3;      %% in Volts",
            "Sbase = mpc.baseMVA * 1e6;              %% in VA",
            "mpc.branch(:, [BR_R BR_X]) = mpc.branch(:, [BR_R BR_X]) / (Vbase^2 / Sbase);",
            "mpc.bus(:, [PD, QD]) = mpc.bus(:, [PD, QD]) / 1e3;",
        ]
    return line_end.join([*lines, *tail.splitlines(), ""])
