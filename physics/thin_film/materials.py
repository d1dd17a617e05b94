"""Optical constants n and k of materials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

GROUPS: dict[str, tuple[str, ...]] = {
    "metals": ("Ag", "Al", "TiN"),
    "semiconductors": ("Ge", "ITO", "Si", "ZnO", "ZnS", "ZnSe"),
    "dielectrics": ("Al2O3", "AlN", "HfO2", "MgF2", "MgO", "Si3N4", "SiO2", "Ta2O5", "TiO2"),
}


class MaterialCatalog:
    """Tables of n and k by name, linearly interpolated; outside of a table its end values hold, with one warning.

    Attributes:
        names: Of the materials.
    """

    names: tuple[str, ...]

    @classmethod
    def default(cls, folder: str | Path | None = None) -> MaterialCatalog:
        """The 18 materials that ship with the program; tables ``<name>.csv`` in ``folder`` replace or extend them."""
        raise NotImplementedError

    def with_folder(self, folder: str | Path) -> MaterialCatalog:
        """A catalog with the tables ``<name>.csv`` (columns nm, n, k) of a folder on top.

        Raises:
            ValueError: Names file, line and column of what is wrong.
        """
        raise NotImplementedError

    def index(self, name: str, wavelength_nm: Tensor) -> Tensor:
        """n + ik at ``(W,)`` wavelengths, complex128.

        Raises:
            ValueError: For an unknown material; lists the known ones.
        """
        raise NotImplementedError

    def indices(self, names: Iterable[str], wavelength_nm: Tensor) -> Tensor:
        """n + ik of several materials, ``(M, W)`` complex128."""
        raise NotImplementedError

    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """`GROUPS`, further materials of users among the dielectrics."""
        raise NotImplementedError
