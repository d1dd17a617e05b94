"""Optical constants n and k of materials: tables that ship with the program, and those of users."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EMBEDDED = Path(__file__).parent / "embedded"
COLUMNS = ("nm", "n", "k")
GROUPS: dict[str, tuple[str, ...]] = {
    "metals": ("Ag", "Al", "TiN"),
    "semiconductors": ("Ge", "ITO", "Si", "ZnO", "ZnS", "ZnSe"),
    "dielectrics": ("Al2O3", "AlN", "HfO2", "MgF2", "MgO", "Si3N4", "SiO2", "Ta2O5", "TiO2"),
}


class Table(NamedTuple):
    """Constants of a material at rising wavelengths, each ``(W,)`` float64."""

    wavelength_nm: np.ndarray
    n: np.ndarray
    k: np.ndarray


class MaterialCatalog:
    """Tables of n and k by name, linearly interpolated.

    Outside of a table its end values hold; the first time that this happens for a material a warning says so.

    Args:
        tables: By name of the material.

    Attributes:
        names: Of the materials.
    """

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._tables = dict(tables)
        self._warned: set[str] = set()
        self.names = tuple(self._tables)

    @classmethod
    def default(cls, folder: str | Path | None = None) -> MaterialCatalog:
        """The 18 materials that ship with the program; tables ``<name>.csv`` in ``folder`` replace or extend them."""
        catalog = cls(_read_folder(EMBEDDED))
        return catalog if folder is None else catalog.with_folder(folder)

    def with_folder(self, folder: str | Path) -> MaterialCatalog:
        """A catalog with the tables ``<name>.csv`` (columns nm, n, k) of a folder on top.

        Raises:
            ValueError: Names file, line and column of what is wrong.
        """
        return MaterialCatalog(self._tables | _read_folder(Path(folder)))

    def with_material(self, name: str, wavelength_nm: Tensor, index: Tensor) -> MaterialCatalog:
        """A catalog with one more material, from n + ik ``(W,)`` at rising wavelengths."""
        arrays = [part.double().cpu().numpy() for part in (wavelength_nm, index.real, index.imag)]
        return MaterialCatalog(self._tables | {name: _checked(Table(*arrays), name)})

    def table(self, name: str) -> Table:
        """The table of a material.

        Raises:
            ValueError: For an unknown one; lists those that are known.
        """
        if name not in self._tables:
            known = ", ".join(sorted(self.names))
            raise ValueError(f"unknown material {name!r}; known: {known}; add {name}.csv (nm,n,k) to your own folder")
        return self._tables[name]

    def index(self, name: str, wavelength_nm: Tensor) -> Tensor:
        """The refractive index n + ik at ``(W,)`` wavelengths, complex128.

        Raises:
            ValueError: For an unknown material; lists those that are known.
        """
        table = self.table(name)
        at = wavelength_nm.detach().double().cpu().numpy()
        low, high = table.wavelength_nm[[0, -1]]
        if len(at) and (at.min() < low or at.max() > high) and name not in self._warned:
            self._warned.add(name)
            message = f"{name} is tabulated from {low:g} to {high:g} nm; beyond that the values at the ends are used"
            warnings.warn(message, stacklevel=2)
        n, k = (np.interp(at, table.wavelength_nm, part) for part in (table.n, table.k))
        return torch.from_numpy(n + 1j * k).to(wavelength_nm.device)

    def indices(self, names: Iterable[str], wavelength_nm: Tensor) -> Tensor:
        """Refractive indices of several materials, ``(M, W)`` complex128."""
        return torch.stack([self.index(name, wavelength_nm) for name in names])

    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """`GROUPS` of what the catalog has; further materials of users are among the dielectrics."""
        known = {name for members in GROUPS.values() for name in members}
        found = {group: tuple(m for m in members if m in self._tables) for group, members in GROUPS.items()}
        found["dielectrics"] += tuple(name for name in self.names if name not in known)
        return found


def read_table(path: str | Path) -> Table:
    """Read a table with the columns nm, n, k: a line of these names, then numbers; ``#`` begins a comment.

    Raises:
        ValueError: Names file, line and column of what is wrong.
    """
    path = Path(path)
    rows: list[tuple[float, ...]] = []
    header = True
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        fields = [field.strip() for field in text.split(",")]
        where = f"{path}, line {number}"
        if header:
            header = False
            if tuple(field.lower() for field in fields) != COLUMNS:
                raise ValueError(f"{where}: the first line must be nm,n,k but is {text!r}")
            continue
        if len(fields) != len(COLUMNS):
            raise ValueError(f"{where}: {len(fields)} values instead of 3 (nm,n,k)")
        row = tuple(_number(field, f"{where}, column {name}") for field, name in zip(fields, COLUMNS, strict=True))
        if rows and row[0] <= rows[-1][0]:
            raise ValueError(f"{where}, column nm: {row[0]:g} does not rise above {rows[-1][0]:g} of the line before")
        if row[1] <= 0:
            raise ValueError(f"{where}, column n: {row[1]:g} must be above 0")
        if row[2] < 0:
            raise ValueError(f"{where}, column k: {row[2]:g} must not be below 0 (n + ik, k >= 0 absorbs)")
        rows.append(row)
    return _checked(Table(*np.array(rows, dtype=np.float64).reshape(-1, 3).T), str(path))


def write_table(path: str | Path, table: Table) -> None:
    """Write a table with the columns nm, n, k, six significant digits."""
    rows = [f"{nm:.8g},{n:.6g},{k:.6g}" for nm, n, k in zip(*table, strict=True)]
    Path(path).write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is no number") from None
    if not np.isfinite(value):
        raise ValueError(f"{where}: {text!r} is not finite")
    return value


def _checked(table: Table, where: str) -> Table:
    if not len(table.wavelength_nm):
        raise ValueError(f"{where}: no row of numbers; expected nm,n,k")
    if not all(np.isfinite(part).all() for part in table):
        raise ValueError(f"{where}: n and k must be finite")
    if not (np.diff(table.wavelength_nm) > 0).all() or table.wavelength_nm[0] <= 0:
        raise ValueError(f"{where}: wavelengths must be positive and rise")
    if not (table.n > 0).all() or not (table.k >= 0).all():
        raise ValueError(f"{where}: n must be above 0 and k not below 0 (n + ik, k >= 0 absorbs)")
    if table.wavelength_nm[-1] < 50:
        raise ValueError(f"{where}: wavelengths end at {table.wavelength_nm[-1]:g}; nm are expected, not micrometres")
    return table


def _read_folder(folder: Path) -> dict[str, Table]:
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"materials: {folder} is no folder with tables <name>.csv (nm,n,k)")
    return {path.stem: read_table(path) for path in files}
