"""MATPOWER case files: what is read, what is filled in, and what errors say."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from datamodules.readers.matpower import BRANCH, BUS, GEN, read_case, write_case
from tests.datamodules.files import case_text, edit_lines

EMBEDDED = Path(__file__).parents[2] / "datamodules" / "embedded" / "grids"


def written(tmp_path, **options) -> Path:
    path = tmp_path / "tiny.m"
    path.write_text(case_text(**options))
    return path


def test_a_plain_case(tmp_path):
    case = read_case(written(tmp_path))
    assert case["name"] == "tiny" and case["base_mva"] == 100
    assert case["bus"].shape == (3, len(BUS)) and case["gen"].shape == (2, len(GEN))
    assert case["branch"].shape == (3, len(BRANCH)) and case["branch"].dtype == np.float64
    assert case["bus"][:, 0].tolist() == [10, 20, 30]
    assert case["bus_names"] == ["bus 10", "bus 20", "bus 30"]
    assert case["branch"][1].tolist() == [20, 30, 0.02, 0.2, 0.05, 120, 0, 0, 0.98, 0, 1, -360, 360]


STYLES = {
    "comments in rows": {"comments": True},
    "commas": {"separator": ", "},
    "rows without semicolons": {"row_end": "\n"},
    "all rows on one line": {"row_end": "; "},
    "continued lines": {"continued": True},
    "columns of results": {"extra": 4},
    "windows line ends": {"line_end": "\r\n"},
}


@pytest.mark.parametrize("style", STYLES)
def test_styles_of_writing_change_nothing(style, tmp_path):
    plain = read_case(written(tmp_path))
    other = read_case(written(tmp_path, **STYLES[style]))
    for table in ("bus", "gen", "branch"):
        np.testing.assert_array_equal(plain[table], other[table])


def test_version_one_lacks_columns(tmp_path):
    """Tables are the results of the function, without the limits of angles, set-points' base and costs."""
    case = read_case(written(tmp_path, version=1))
    assert case["bus"].shape == (3, len(BUS)) and case["base_mva"] == 100
    assert case["branch"][:, 10].tolist() == [1, 1, 1] and case["branch"][:, 11].tolist() == [-360] * 3
    assert case["gen"][:, 6].tolist() == [100, 100] and case["gen"][:, 8].tolist() == [np.inf] * 2


def test_names(tmp_path):
    names = ["North  400", "it's 100 % south", "North  400"]
    case = read_case(written(tmp_path, names=names))
    assert case["bus_names"] == ["North 400 (10)", "it's 100 % south", "North 400 (30)"]


def test_units_are_converted_as_the_file_says(tmp_path):
    """The arithmetic at the end of MATPOWER's distribution cases: kW and ohms."""
    case = read_case(written(tmp_path, units=True))
    plain = read_case(written(tmp_path))
    np.testing.assert_allclose(case["bus"][:, 2:4], plain["bus"][:, 2:4] / 1e3, rtol=1e-15)
    ohms = (110e3) ** 2 / 100e6
    np.testing.assert_allclose(case["branch"][:, 2:4], plain["branch"][:, 2:4] / ohms, rtol=1e-14)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("mpc.bus(:, QD) = mpc.bus(:, PD) * sin(acos(0.85));", 80 * np.sin(np.arccos(0.85))),
        ("pf = 0.85;\nmpc.bus(:, QD) = mpc.bus(:, PD) .* pf ^ 2 - -1;", 80 * 0.85**2 + 1),
        ("mpc.bus(2, 4) = (1 + 2) * 3 / 2;", 4.5),
        ("mpc.bus(2:3, QD) = 7;", 7),
        ("x = 3; if x == 4\n mpc.bus(2, QD) = 1;\nend", 40),
        ("if 1 < 2\n mpc.bus(2, QD) = 1;\nend", 1),
        ("k = find(isinf(mpc.gen(:, PMAX))); mpc.dcline(:, 1) = k;", 40),
        ("%{\nmpc.bus(2, QD) = 1;\n%}", 40),
        ("mpc.bus(2, QD) = ... a comment may follow\n  9;", 9),
    ],
)
def test_statements(statement, expected, tmp_path):
    case = read_case(written(tmp_path, tail=statement))
    assert case["bus"][1, 3] == pytest.approx(expected, rel=1e-14)


def test_base_power_may_be_a_fraction(tmp_path):
    assert read_case(written(tmp_path, base="50/3"))["base_mva"] == 50 / 3


def test_a_written_case_is_read_back_to_the_last_bit(tmp_path):
    case = read_case(written(tmp_path, names=["a", "it's", "c"]))
    rng = np.random.default_rng(0)
    case["bus"][:, 2:4] = rng.normal(size=(3, 2)) * 1e3
    case["branch"][:, 2:5] = rng.random((3, 3)) / 7
    case["gen"][0, 3] = np.inf
    write_case(case, tmp_path / "again.m", "made up\nfor a test")
    again = read_case(tmp_path / "again.m")
    for table in ("bus", "gen", "branch"):
        np.testing.assert_array_equal(case[table], again[table])
    assert again["bus_names"] == case["bus_names"] and again["base_mva"] == case["base_mva"]


# Line of the plain file (tests.datamodules.files.case_text) -> what stands there instead, and what the error says.
MISTAKES = {
    "no number": ({7: "10 3 0 O 0 0 1 1 0 110 1 1.1 0.9;"}, r"line 7, column Qd: 'O' in bus is not a number"),
    "nan": ({8: "20 1 NaN 40 0 0 1 1 0 110 1 1.1 0.9;"}, r"line 8, column Pd: nan in bus"),
    "short row": ({8: "20 1 80 40 0 0 1 1 0 110 1 1.1;"}, r"line 8: a row of bus has 12 values, the first one .* 13"),
    "bus twice": ({8: "10 1 80 40 0 0 1 1 0 110 1 1.1 0.9;"}, r"line 8, column bus_i: bus 10 is there .*line 7"),
    "type": ({8: "20 7 80 40 0 0 1 1 0 110 1 1.1 0.9;"}, r"line 8, column type: type 7: use 1 \(PQ\)"),
    "number of a bus": ({8: "0 1 80 40 0 0 1 1 0 110 1 1.1 0.9;"}, r"line 8, column bus_i: 0 is no number of a bus"),
    "unknown bus of a branch": ({17: "10 99 0.01 0.1 0 0 0 0 0 0 1 -360 360;"}, r"line 17, column tbus: branch .* 99"),
    "unknown bus of a generator": ({12: "40 60 0 99 -99 1.02 100 1 200 0;"}, r"line 12, column bus: gen names bus 40"),
    "no end": ({19: None}, r"line 15: the table branch has no end"),
    "base": ({4: "mpc.baseMVA = 0;"}, r"baseMVA=0 must be above 0"),
    "transposed": ({19: "]';"}, r"line 19: \"';\" behind the table branch is not understood; save the case"),
    "no table": ({4: None}, r"this is no MATPOWER case: it has no baseMVA"),
    "beyond our arithmetic": (
        {19: "]; mpc.bus = my_function(mpc.bus);"},
        r"line 19: 'my_function' .* is not known; save the case",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_name_file_line_and_column(what, tmp_path):
    changes, text = MISTAKES[what]
    path = edit_lines(written(tmp_path), changes)
    with pytest.raises(ValueError, match=text) as error:
        read_case(path)
    assert str(path) in str(error.value)


def test_names_must_fit(tmp_path):
    with pytest.raises(ValueError, match=r"line 20: bus_name has 2 names for 3 buses"):
        read_case(written(tmp_path, names=["a", "b"]))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.m"
    path.write_text("x = 1;\n")
    with pytest.raises(ValueError, match=r"other\.m: this is no MATPOWER case: it has no bus"):
        read_case(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.m"):
        read_case(tmp_path / "missing.m")


# --------------------------------------------------------------------------------------------------- embedded grids

ROWS = re.findall(
    r"\| `(\w+\.m)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| `(\w+)` \|", (EMBEDDED / "SOURCE.md").read_text()
)


def test_the_source_names_every_file():
    assert {row[0] for row in ROWS} == {path.name for path in EMBEDDED.glob("*.m")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_embedded_files_are_what_the_source_says(row):
    name, buses, branches, generators, size, checksum = row
    content = (EMBEDDED / name).read_bytes()
    assert len(content) == int(size) < 200_000 and hashlib.sha256(content).hexdigest() == checksum
    case = read_case(EMBEDDED / name)
    assert [len(case[table]) for table in ("bus", "branch", "gen")] == [int(buses), int(branches), int(generators)]
    assert len(set(case["bus_names"])) == int(buses)
    assert (case["bus"][:, 1] == 3).sum() == 1
