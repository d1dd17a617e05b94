"""Measurements: what is known of what, first guesses, files, and what wrong input says."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from datamodules.grid_measurements import GridMeasurements
from datamodules.grid_sources import load_grid
from physics.power_flow import Scenarios, solve
from physics.power_flow.identification import Unknown, Unknowns
from physics.power_flow.measurements import simulate


def ready(**options) -> GridMeasurements:
    data = GridMeasurements(**{"num_train": 5, "num_val": 3, "num_test": 2} | options)
    data.setup()
    return data


def everything(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_parts_are_different_scenarios():
    data = ready()
    parts = [everything(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [part["scenario"].tolist() for part in parts] == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]
    assert set(parts[0]) == set(GridMeasurements.batch_keys)
    assert parts[0]["measured"].shape == (5, 4 * 14 + 4 * 20)


def test_exact_values_are_those_of_the_true_grid():
    data = ready(quantities=["vm", "p_from"], noise=1e-3)
    batch = everything(data.train_dataloader())
    assert data.truth.x.equal(load_grid("case14").x)
    s = torch.complex(batch["p_mw"], batch["q_mvar"]).mT / 100
    solution = solve(data.truth, Scenarios(s, batch["vm_pu"].mT), "newton", tol=1e-11)
    expected = torch.cat(list(simulate(data.truth, solution.vm, solution.va).values())).mT
    torch.testing.assert_close(batch["exact"], expected, rtol=0, atol=1e-8)
    there = batch["measured"].isfinite()
    assert there.sum() == 5 * (14 + 20) and there[:, :14].all() and not there[:, 14:56].any()
    error = (batch["measured"] - batch["exact"])[there]
    assert 0.5e-3 < float(error.std()) < 2e-3


def test_the_first_guess_is_wrong_where_it_should_be():
    data = ready(unknown={"x": None, "tap": None}, start_error={"x": 0.1})
    true = load_grid("case14")
    assert (data.grid.x != true.x).all() and torch.equal(data.grid.r, true.r)
    assert 0.03 < float((data.grid.x / true.x).log().std()) < 0.2
    changed = data.grid.tap != true.tap
    assert torch.equal(changed, true.tap != 1) and float((data.grid.tap - true.tap).abs().max()) < 0.1
    some = ready(unknown={"x": [true.branch_names[4]]})
    assert (some.grid.x != true.x).nonzero()[:, 0].tolist() == [4]


def test_unknown_loads_are_assumed_wrong_in_every_scenario():
    """With the true values put in, the injections are those that the true grid was solved with."""
    data = ready(unknown={"p_load_mw": ["Bus 9 LV"], "q_load_mvar": ["Bus 9 LV"]})
    batch = everything(data.train_dataloader())
    at = data.grid.bus_names.index("Bus 9 LV")
    parts = [Unknown(f, torch.tensor([at]), getattr(data.grid, f)[[at]]) for f in ("p_load_mw", "q_load_mvar")]
    true = torch.stack([data.truth.p_load_mw[at], data.truth.q_load_mvar[at]])
    raw = (true / torch.cat([part.start for part in parts])).log()
    _, ds = Unknowns(parts).apply(data.grid, raw)
    s = torch.complex(batch["p_mw"], batch["q_mvar"]).mT / 100 + ds[:, None]
    found = solve(data.truth, Scenarios(s, batch["vm_pu"].mT), "newton", tol=1e-11)
    torch.testing.assert_close(found.vm.mT, batch["exact"][:, :14], rtol=0, atol=1e-9)


def test_values_get_lost():
    data = ready(missing=0.4, quantities=["vm", "va", "p_from", "q_from", "p_to", "q_to"], num_train=100)
    share = everything(data.train_dataloader())["measured"][:, [*range(28), *range(56, 136)]].isnan().double().mean()
    assert float(share) == pytest.approx(0.4, abs=0.02)


def test_noise_of_single_quantities():
    assert ready(noise_of={"va": 1e-3}).sigma_of == {"vm": 1e-5, "va": 1e-3}


def test_seeds():
    one, other, again = (everything(ready(seed=seed).train_dataloader()) for seed in (0, 1, 0))
    assert torch.equal(one["measured"].nan_to_num(), again["measured"].nan_to_num())
    assert not torch.equal(one["p_mw"], other["p_mw"])


def test_measurements_from_files(tmp_path):
    grid = load_grid("case14")
    pd.DataFrame({"Bus 3 HV": [90.0] * 4}).to_csv(tmp_path / "load.csv", index=False)
    pd.DataFrame({"Bus 3 HV": [1.0, 1.01, None, 1.02]}).to_csv(tmp_path / "vm.csv", index=False)
    pd.DataFrame({"Bus 3 HV": [-12.0] * 4}).to_csv(tmp_path / "va.csv", index=False)
    pd.DataFrame({grid.branch_names[1]: [50.0] * 4}).to_csv(tmp_path / "p.csv", index=False)
    data = ready(
        data_dir=str(tmp_path), num_train=2, num_val=1, num_test=1, files={"p_load_mw": "load.csv"},
        measurements={"vm": "vm.csv", "va": "va.csv", "p_from": "p.csv"},
    )  # fmt: skip
    batch = everything(data.train_dataloader())
    assert data.truth is None and torch.equal(data.grid.x, grid.x)
    assert batch["exact"].isnan().all() and batch["measured"].isfinite().sum() == 2 * 3
    assert batch["measured"][:, 2].tolist() == [1.0, 1.01]
    assert float(batch["measured"][0, 14 + 2]) == pytest.approx(-12 * torch.pi / 180)
    assert batch["measured"][0, 4 * 14 + 1] == 0.5
    assert everything(data.val_dataloader())["measured"][0, 2].isnan()
    with pytest.raises(ValueError, match=r"load\.csv: 4 rows, but data\.num_train \+ num_val \+ num_test = 5"):
        ready(
            data_dir=str(tmp_path), num_train=3, num_val=1, num_test=1, files={"p_load_mw": "load.csv"},
            measurements={"vm": "vm.csv"},
        )  # fmt: skip


def test_the_table_of_parameters():
    data = ready(unknown={"x": None, "p_load_mw": ["Bus 9 LV"]})
    values = {f"parameter_{name}": torch.linspace(1, 2, 21) for name in ("start", "found", "true", "std")}
    found = data.parameter_table(values)
    assert found["element"].tolist() == [*data.grid.branch_names, "Bus 9 LV"]
    assert found["parameter"].tolist() == ["x"] * 20 + ["p_load_mw"] and (found["relative_error"] == 0).all()
    unknown = values | {"parameter_true": torch.full((21,), torch.nan)}
    assert "true" not in data.parameter_table(unknown)


MISTAKES = {
    "unknown": ({"unknown": {"y": None}}, r"data\.unknown names 'y'; choose from r, x"),
    "nothing unknown": ({"unknown": {}}, r"data\.unknown is empty"),
    "quantity": ({"quantities": ["i"]}, r"data\.quantities names 'i'; choose from vm, va"),
    "no quantity": ({"quantities": []}, r"data\.quantities is empty"),
    "noise": ({"noise": -1.0}, r"data\.noise=-1\.0: must not be negative"),
    "missing": ({"missing": 1.0}, r"data\.missing=1\.0: must be from 0 to below 1"),
    "scenarios": ({"num_val": 0}, r"data\.num_val=0: must be at least 1"),
    "spread": ({"sigma": -0.1}, r"data\.sigma=-0\.1: must not be negative"),
    "no loads": ({"measurements": {"vm": "vm.csv"}}, r"data\.measurements needs the loads"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_name_the_key(what):
    options, text = MISTAKES[what]
    with pytest.raises(ValueError, match=text):
        GridMeasurements(**options)


def test_names_that_the_grid_lacks():
    with pytest.raises(ValueError, match=r"data\.unknown: case14 has no branch nowhere to identify x of"):
        ready(unknown={"x": ["nowhere"]})
    with pytest.raises(ValueError, match=r"data\.unknown\.shift: no element of case14 has it"):
        ready(unknown={"shift": None})


def test_loads_without_a_solution_are_reported():
    with pytest.raises(ValueError, match=r"scenarios have no power flow: .*; use a smaller data\.sigma"):
        ready(sigma=40.0)
