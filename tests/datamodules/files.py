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
