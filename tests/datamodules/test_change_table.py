"""Loads over time from change tables of MATPOWER."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.grid_sources import load_case
from datamodules.power_grids import PowerGrids
from datamodules.readers.change_table import read_load_changes

HEAD = """function chgtab = mine
% a comment with a [ and a ;
define_constants;
% label prob table row col chgtype newval
"""


def written(folder: Path, *rows: str) -> Path:
    path = folder / "mine.m"
    path.write_text(HEAD + "chgtab = [\n" + "".join(f"\t{row};\n" for row in rows) + "];\n")
    return path


def case(areas=(1, 1, 2, 2)) -> dict:
    """Four buses with loads in two areas and zones 7 and 8; the first has none."""
    bus = np.zeros((5, 13))
    bus[:, 0], bus[:, 6], bus[:, 10] = (9, 10, 20, 30, 40), (areas[0], *areas), (7, 7, 7, 8, 8)
    bus[1:, 2], bus[1:, 3] = (10.0, 30.0, 5.0, 0.0), (1.0, 3.0, 2.0, 4.0)
    return {"bus": bus, "bus_names": [f"bus {n:g}" for n in bus[:, 0]]}


def test_loads_of_an_area_keep_their_shares(tmp_path):
    path = written(
        tmp_path,
        "11 0 CT_TAREALOAD 1 CT_LOAD_ALL_P CT_REP 80",
        "11 0 CT_TAREALOAD 2 CT_LOAD_ALL_PQ CT_REL 2",
        "12 0 CT_TLOAD 20 CT_LOAD_FIX_PQ CT_ADD 15 % more",
        "13 0 8 0 -4 1 90",
    )
    found = read_load_changes(path, case())
    assert found.numbered_by == "area" and found.p_load_mw.times == ["change 11", "change 12", "change 13"]
    assert found.p_load_mw.elements.tolist() == found.q_load_mvar.elements.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(found.p_load_mw.values, [[20, 60, 10, 0], [10, 45, 5, 0], [20, 60, 10, 0]], rtol=1e-14)
    np.testing.assert_allclose(found.q_load_mvar.values, [[1, 3, 4, 8], [1, 4.5, 2, 4], [1, 3, 2, 4]], rtol=1e-14)


def test_changes_of_a_set_follow_each_other_wherever_they_stand(tmp_path):
    rows = ("1 0 CT_TAREALOAD 1 CT_LOAD_ALL_P CT_REP 80", "2 0 CT_TLOAD 30 CT_LOAD_ALL_P CT_REP 1")
    found = read_load_changes(written(tmp_path, *rows, "1 0 CT_TLOAD 10 CT_LOAD_ALL_P CT_ADD 5"), case())
    np.testing.assert_allclose(found.p_load_mw.values, [[25, 60, 5, 0], [10, 30, 1, 0]])


def test_zones_stand_for_areas_where_only_they_are_there(tmp_path):
    path = written(tmp_path, "1 0 CT_TAREALOAD 8 CT_LOAD_ALL_P CT_REP 50")
    found = read_load_changes(path, case(areas=(1, 1, 1, 1)))
    assert found.numbered_by == "zone"
    np.testing.assert_allclose(found.p_load_mw.values, [[10, 30, 50, 0]])


WRONG = {
    "outage": ("1 0 CT_TBRCH 1 BR_STATUS CT_REP 0", r"line 7: CT_TBRCH is not read; .* data\.kind=contingencies"),
    "dispatchable": ("1 0 CT_TLOAD 10 CT_LOAD_DIS_P CT_REP 0", r"line 7: CT_LOAD_DIS_P is not read"),
    "short": ("1 0 CT_TLOAD 10 CT_LOAD_ALL_P CT_REP", r"line 7: 6 entries; a change has 7"),
    "number": ("1 0 CT_TLOAD 10 CT_LOAD_ALL_P CT_REP many", r"line 7: could not convert string to float: 'many'"),
    "infinite": ("1 0 CT_TLOAD 10 CT_LOAD_ALL_P CT_REP inf", r"line 7: inf is not a finite number"),
    "bus": ("1 0 CT_TLOAD 9 CT_LOAD_ALL_P CT_REP 3", r"line 7: bus 9 of the case has no load"),
    "area": ("1 0 CT_TAREALOAD 5 CT_LOAD_ALL_P CT_REP 3", r"line 7: area 5 of the case has no load"),
    "nothing to scale": ("1 0 CT_TLOAD 40 CT_LOAD_ALL_P CT_REP 3", r"line 7: no active load to scale to 3 MW"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_name_file_and_line(what, tmp_path):
    row, text = WRONG[what]
    path = written(tmp_path, "1 0 CT_TLOAD 10 CT_LOAD_ALL_P CT_REP 3", row)
    with pytest.raises(ValueError, match=rf"mine\.m, {text}"):
        read_load_changes(path, case())


def test_files_without_changes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.m: no rows of a change table"):
        read_load_changes(written(tmp_path), case())
    with pytest.raises(FileNotFoundError, match=r"other\.m"):
        read_load_changes(tmp_path / "other.m", case())


def test_a_series_of_an_embedded_case(tmp_path):
    """As the hours of a year for case_ACTIVSg200 are written: by zone, active power alone."""
    totals = {2: 412.8, 3: 144.2, 4: 204.5, 5: 208.2, 6: 64.2, 7: 228.5}
    rows = [
        f"{hour} 0 CT_TAREALOAD {zone} CT_LOAD_ALL_P CT_REP {total * (1 + 0.1 * hour):.4f}"
        for hour in (1, 2, 3)
        for zone, total in totals.items()
    ]
    written(tmp_path, *rows)
    options = {"grid": "case_ACTIVSg200", "kind": "series", "data_dir": str(tmp_path), "num_scenarios": None}
    data = PowerGrids(**options, files={"p_load_mw": "mine.m"})
    data.setup()
    assert data.count == 3 and data.scenario_name(1) == "change 2"
    batch, grid = data.batch(np.arange(3)), data.grid
    zone = load_case("case_ACTIVSg200")["bus"][:, 10]
    fed = np.zeros(200)
    np.add.at(fed, grid.gen_bus.numpy(), (grid.gen_p_mw * grid.gen_status).numpy())
    load = fed - batch["p_mw"].numpy()
    for number, total in totals.items():
        np.testing.assert_allclose(
            load[:, zone == number].sum(1), [total * (1 + 0.1 * h) for h in (1, 2, 3)], atol=1e-3
        )
    assert np.ptp(batch["q_mvar"].numpy(), axis=0).max() < 1e-12
    for key, more in (
        ("q_load_mvar", {"files": {"q_load_mvar": "mine.m"}}),
        ("p_load_mw", {"files": {"p_load_mw": "mine.m"}, "copies": 2}),
    ):
        with pytest.raises(ValueError, match=rf"data\.files\.{key}=mine\.m: a change table "):
            PowerGrids(**options | more).setup()
