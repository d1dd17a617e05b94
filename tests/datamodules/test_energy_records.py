"""Runs and plans of the scaling study, and what is refused with which words."""

from __future__ import annotations

import csv

import pytest

from datamodules.energy_records import EnergyRecords
from runner import job
from tests.callbacks.test_energy_scaling import write_sweep
from tests.composing import composed, plain

METRIC = "test/accuracy"
QUIET = ("experiment=energy_scaling/analysis", "logger=none", "~callbacks.energy", "model.draws=10")
PLAN = {"devices": 64, "local_batch_size": 128, "num_samples": 1281167, "epochs": 90}


def analysed(folder, *overrides):
    """Result of the experiment, and the rows of its plans (None: nothing was predicted)."""
    result = job.run(plain(composed(*QUIET, *overrides, run_dir=folder)))
    path = folder / "energy_scaling" / "plans.csv"
    if not path.is_file():
        return result, None
    with path.open() as file:
        return result, list(csv.DictReader(file))


def test_the_analysis_of_ones_own_sweep_predicts_nothing_that_was_not_planned(tmp_path):
    write_sweep(tmp_path / "sweep", METRIC)
    own = (f"data.source={tmp_path / 'sweep'}", f"data.metric={METRIC}")
    result, plans = analysed(tmp_path / "own", *own)
    assert (result["status"], plans) == ("completed", None), result.get("error")
    assert (tmp_path / "own" / "energy_scaling" / "scaling.html").is_file()
    named = "data.plans=[{devices: 4, local_batch_size: 32, num_samples: 8192, epochs: 2}]"
    result, plans = analysed(tmp_path / "planned", *own, named)
    assert result["status"] == "completed", result.get("error")
    assert [plan["devices"] for plan in plans] == ["4"]


def test_published_runs_have_plans_unless_none_are_wanted(tmp_path):
    result, plans = analysed(tmp_path / "none", "data.plans=[]")
    assert (result["status"], plans) == ("completed", None), result.get("error")
    data = EnergyRecords(plans=None, published_plans=[PLAN])
    assert [plan.devices for plan in data.plans] == [64]
    assert not EnergyRecords(source=["published", "mine.csv"], published_plans=[PLAN]).plans
    assert EnergyRecords(plans=[PLAN | {"devices": 8}], published_plans=[PLAN]).plans[0].devices == 8
    with pytest.raises(ValueError, match=r"data\.plans is empty: name trainings"):
        EnergyRecords().predict_dataloader()
