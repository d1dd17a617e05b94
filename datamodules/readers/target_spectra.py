"""Wanted spectra from CSV and JSON files, whole or in parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from physics.thin_film.robustness import restore_sum
from physics.thin_film.targets import Target

CHANNELS = ("R", "A", "T")
TOLERANCE = 1e-3  # of values outside of [0, 1], and of R + A + T = 1


@dataclass(frozen=True)
class SpectrumTable:
    """One spectrum of a file.

    Attributes:
        name: Of the target.
        wavelength_nm: ``(n,)``, rising.
        values: R, A, T ``(3, n)``; NaN where nothing is asked for.
        weight: ``(n,)``.
        where: File and target, for messages.
    """

    name: str
    wavelength_nm: np.ndarray
    values: np.ndarray
    weight: np.ndarray
    where: str


def read_target_spectra(path: str | Path) -> list[SpectrumTable]:
    """Read the targets of a file.

    CSV: a header and a row per wavelength: ``nm``, any of ``R``, ``A`` and ``T`` in [0, 1], optionally ``weight``, and
    ``target``, a name, where the file holds several. Empty cells ask for nothing. JSON: an object, or a list of
    objects, with the same names as keys, each a list, and ``name``.

    Raises:
        ValueError: Names file, target, column and wavelength of what is wrong.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return [_table(columns, name, path) for name, columns in _json(path)]
    return [_table(columns, name, path) for name, columns in _csv(path)]


def _csv(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    import pandas as pd

    try:
        frame = pd.read_csv(path, skipinitialspace=True, comment="#")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no CSV table ({error})") from error
    frame.columns = [str(c).strip() for c in frame.columns]
    if "target" not in frame:
        yield path.stem, dict(frame)
        return
    for name, rows in frame.groupby("target", sort=False):
        yield str(name), dict(rows.drop(columns="target"))


def _json(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: no JSON ({error.msg})") from error
    targets = content if isinstance(content, list) else [content]
    for i, target in enumerate(targets):
        if not isinstance(target, dict):
            raise ValueError(f'{path}: must be an object such as {{"nm": [...], "R": [...]}}, or a list of them')
        name = str(target.get("name", path.stem if len(targets) == 1 else f"{path.stem}_{i}"))
        yield name, {key: value for key, value in target.items() if key != "name"}


def _table(columns: Mapping[str, Any], name: str, path: Path) -> SpectrumTable:
    where = f"{path}, target {name}"
    known = ("nm", *CHANNELS, "weight")
    if unknown := [key for key in columns if key not in known]:
        raise ValueError(f"{where}: unknown column {unknown[0]!r}; there may be {', '.join(known)} and target")
    if "nm" not in columns or not any(c in columns for c in CHANNELS):
        raise ValueError(f"{where}: needs a column nm and at least one of R, A, T; it has {', '.join(columns)}")
    found = {key: _numbers(values, key, where) for key, values in columns.items()}
    lengths = {key: len(values) for key, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: columns of different lengths: {lengths}")
    order = found["nm"].argsort(kind="stable")
    nm = found["nm"][order]
    if not len(nm) or not np.isfinite(nm).all() or (nm <= 0).any():
        raise ValueError(f"{where}: nm must hold positive numbers")
    if (repeated := nm[1:][np.diff(nm) == 0]).size:
        raise ValueError(f"{where}: {repeated[0]:g} nm occurs more than once")
    values = np.stack([found[c][order] if c in found else np.full(len(nm), np.nan) for c in CHANNELS])
    if not np.isfinite(values).any():
        raise ValueError(f"{where}: there is no value")
    weight = np.nan_to_num(found["weight"][order]) if "weight" in found else np.ones(len(nm))
    if (weight < 0).any():
        raise ValueError(f"{where}: weight must not be negative; at {nm[weight < 0][0]:g} nm it is")
    return SpectrumTable(name, nm, values, weight, where)


def _numbers(values: Any, key: str, where: str) -> np.ndarray:
    """A column as numbers, NaN for empty cells; infinite ones are refused."""
    try:
        numbers = np.array([np.nan if v is None else v for v in values], dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: column {key} holds something that is no number ({error})") from error
    if np.isinf(numbers).any():
        raise ValueError(f"{where}: column {key} is infinite in row {int(np.isinf(numbers).argmax()) + 1}")
    return numbers


def on_grid(table: SpectrumTable, grid_nm: np.ndarray, interpolate: bool = False, repair: bool = False) -> Target:
    """The target on the wavelengths of a network.

    Wavelengths of the grid that the table lacks, and channels without a value, have weight 0; nothing is extrapolated.
    Where two channels are given the third follows from R + A + T = 1 and counts too. What is not asked for is filled,
    since a network needs a whole spectrum: transmittance takes the residue before absorptance, other wavelengths
    continue the nearest given ones.

    Args:
        table: The spectrum.
        grid_nm: ``(W,)``.
        interpolate: Whether values between the wavelengths of the table are interpolated linearly; otherwise all of
            them must lie on the grid.
        repair: Whether values outside of [0, 1] are cut, and sums other than 1 restored, instead of refused.

    Raises:
        ValueError: Names target, wavelength and remedy.
    """
    values, weight = _sampled(table, grid_nm, interpolate)
    _check_range(table, grid_nm, values, repair)
    values = values.clip(0, 1)
    given = np.isfinite(values)
    values = _completed(table, grid_nm, values, given, repair)
    two = given.sum(0) == 2
    counts = given | two
    spectrum = torch.from_numpy(_filled(values, given.any(0)))
    spectrum = restore_sum(spectrum) if repair else spectrum / spectrum.sum(0)
    return Target(table.name, spectrum, torch.from_numpy(counts * weight))


def _sampled(table: SpectrumTable, grid: np.ndarray, interpolate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(3, W)``, NaN where there are none, and weights ``(W,)``."""
    values, weight = np.full((3, len(grid)), np.nan), np.zeros(len(grid))
    if interpolate:
        inside = (grid >= table.wavelength_nm[0]) & (grid <= table.wavelength_nm[-1])
        for c in range(3):  # a gap (NaN) stays one
            values[c, inside] = np.interp(grid[inside], table.wavelength_nm, table.values[c])
        weight[inside] = np.interp(grid[inside], table.wavelength_nm, table.weight)
    else:
        place = np.searchsorted(grid, table.wavelength_nm - 1e-6).clip(max=len(grid) - 1)
        off = np.abs(grid[place] - table.wavelength_nm) > 1e-6
        if off.any():
            raise ValueError(
                f"{table.where}: {table.wavelength_nm[off][0]:g} nm is not on the grid of {grid[0]:g} to {grid[-1]:g} "
                f"nm, step {grid[1] - grid[0]:g}; set data.interpolate=true (nothing is extrapolated), or give values "
                "on the grid"
            )
        values[:, place], weight[place] = table.values, table.weight
    if not (np.isfinite(values).any(0) & (weight > 0)).any():
        raise ValueError(f"{table.where}: no value with a weight lies between {grid[0]:g} and {grid[-1]:g} nm")
    return values, weight


def _check_range(table: SpectrumTable, grid: np.ndarray, values: np.ndarray, repair: bool) -> None:
    wrong = (values < -TOLERANCE) | (values > 1 + TOLERANCE)
    if wrong.any() and not repair:
        c, w = np.argwhere(wrong)[0]
        percent = " (are these percent?)" if np.nanmax(values) > 2 else ""
        raise ValueError(
            f"{table.where}: {CHANNELS[c]}={values[c, w]:g} at {grid[w]:g} nm is outside of [0, 1]{percent}; "
            "data.repair=true cuts such values"
        )


def _completed(
    table: SpectrumTable, grid: np.ndarray, values: np.ndarray, given: np.ndarray, repair: bool
) -> np.ndarray:
    """Fill channels from the others where any is given."""
    values, total = values.copy(), np.where(given, values, 0.0).sum(0)
    whole = given.all(0)
    wrong = np.where(whole, np.abs(total - 1) > TOLERANCE, total > 1 + TOLERANCE)
    if wrong.any() and not repair:
        w = int(wrong.argmax())
        names = " + ".join(c for c, g in zip(CHANNELS, given[:, w], strict=True) if g)
        raise ValueError(
            f"{table.where}: {names} = {total[w]:.4f} at {grid[w]:g} nm, but R + A + T = 1; correct the values, or set "
            "data.repair=true"
        )
    left = (1 - total).clip(min=0)
    for c in (2, 0, 1):  # the residue is transmitted, where that is open
        missing = ~given[c] & given.any(0) & np.isnan(values[c])
        values[c, missing] = left[missing]
        left = np.where(missing, 0.0, left)
    return values


def _filled(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Continue the nearest known wavelengths."""
    places = np.flatnonzero(known)
    nearest = places[np.abs(np.arange(len(known))[:, None] - places).argmin(1)]
    return values[:, nearest]
