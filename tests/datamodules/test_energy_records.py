"""Runs and plans of the scaling study, and what is refused with which words."""

from __future__ import annotations

import csv
import re

import pytest

from datamodules.energy_records import PUBLISHED, EnergyRecords
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


def write_table(path, rows):
    """A table as a user would bring it."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def four_gpu_nodes(path):
    """A table of the published runs on full nodes alone."""
    with PUBLISHED.open() as file:
        return write_table(path, [row for row in csv.DictReader(file) if int(row["gpus"]) >= 4])


def test_a_plan_that_is_refused_leaves_the_others_alone(tmp_path):
    table = four_gpu_nodes(tmp_path / "full.csv")
    plans = ",".join(f"{{devices: {n}, local_batch_size: 128, num_samples: 320291, epochs: 90}}" for n in (64, 2))
    result, rows = analysed(tmp_path / "run", f"data.source={table}", f"data.plans=[{plans}]")
    assert result["status"] == "completed", result.get("error")
    good, bad = rows
    assert (good["devices"], bad["devices"]) == ("64", "2")
    assert float(good["energy_kwh"]) > 1 and not good["refused"]
    assert not bad["energy_kwh"] and "add a run on a partly filled node" in bad["refused"]
    for name in ("plans.md", "scaling.md", "scaling.html"):
        assert "add a run on a partly filled node" in (tmp_path / "run" / "energy_scaling" / name).read_text(), name


def test_plans_that_are_all_refused_end_with_one_line(tmp_path):
    table = four_gpu_nodes(tmp_path / "full.csv")
    plan = "{devices: 2, local_batch_size: 128, num_samples: 320291, epochs: 90}"
    result, rows = analysed(tmp_path / "run", f"data.source={table}", f"data.plans=[{plan}]")
    assert (result["status"], result["trace"]) == ("failed", "")
    assert result["error"].startswith("data.plans: the only plan is refused: 2 devices on 1 nodes")
    assert "\n" not in result["error"]
    assert "partly filled node" in rows[0]["refused"]
    assert (tmp_path / "run" / "energy_scaling" / "scaling.html").is_file()


def test_a_plan_without_a_step_names_its_setting():
    plan = {"devices": 64, "local_batch_size": 256, "num_samples": 100_000, "epochs": 0.01}
    with pytest.raises(ValueError, match=r"data\.plans\[1\]\.epochs=0\.01: .* an epoch has 7; give at least 0\.143"):
        EnergyRecords(plans=[PLAN, plan])
    assert EnergyRecords(plans=[plan | {"epochs": 0.143}]).plans[0].updates == 1


def test_a_mistyped_metric_is_told_with_those_that_there_are(tmp_path):
    write_sweep(tmp_path / "sweep", METRIC)
    with pytest.raises(ValueError, match=r"test/accuray: none of 9 runs has it; they have test/accuracy$"):
        EnergyRecords(str(tmp_path / "sweep"), "test/accuray").setup("test")
    data = EnergyRecords(["published", str(tmp_path / "sweep")], METRIC, hardware="GPU")
    data.setup("test")
    assert {record.metric for record in data.records} == {0.95, 0.948, 0.90}
    with pytest.raises(ValueError, match="none of 18 runs has it; they have no metrics at all; leave it out"):
        EnergyRecords(metric=METRIC).setup("test")
    result, _ = analysed(tmp_path / "run", f"data.source={tmp_path / 'sweep'}", "data.metric=test/accuray")
    assert (result["status"], result["trace"]) == ("failed", "")
    assert result["error"].startswith("data.metric=test/accuray")


def test_hardware_has_a_name_in_every_message(tmp_path):
    published = "NVIDIA A100-40 + 2 x Intel Xeon 8368"
    with pytest.raises(ValueError, match=f"no run has it; there are {re.escape(published)}$"):
        EnergyRecords(hardware="H100").setup("test")
    data = EnergyRecords(hardware="a100")
    data.setup("test")
    assert len(data.records) == 18 and {record.hardware for record in data.records} == {published}
    write_sweep(tmp_path / "sweep", METRIC)
    both = ["published", str(tmp_path / "sweep")]
    with pytest.raises(ValueError, match=rf"2 kinds of hardware \(GPU; {re.escape(published)}\)"):
        EnergyRecords(both).setup("test")
    with PUBLISHED.open() as file:
        rows = [row | {"hardware": ""} for row in csv.DictReader(file)]
    unnamed = write_table(tmp_path / "unnamed.csv", rows)
    with pytest.raises(ValueError, match=r"kinds of hardware \(GPU; hardware without a name \(column hardware"):
        EnergyRecords([both[1], str(unnamed)]).setup("test")


def test_a_part_of_a_name_that_two_kinds_share_is_refused(tmp_path):
    with PUBLISHED.open() as file:
        rows = [row | {"hardware": "NVIDIA A100-SXM4-80GB"} for row in csv.DictReader(file)]
    sources = ["published", str(write_table(tmp_path / "larger.csv", rows))]
    with pytest.raises(ValueError, match=r"2 kinds of hardware with data\.hardware=A100 \(NVIDIA A100-40 .*80GB\)"):
        EnergyRecords(sources, hardware="A100").setup("test")
    data = EnergyRecords(sources, hardware="SXM4-80GB")
    data.setup("test")
    assert len(data.records) == 18
