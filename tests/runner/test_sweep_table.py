"""The table of a sweep: overrides x metrics x status."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runner.sweep_table import SweepTable, job_row, write_tables


def job(folder: Path, number: int, **record) -> dict:
    run_dir = folder / str(number)
    run_dir.mkdir()
    if record:
        (run_dir / "results.json").write_text(json.dumps(record))
    return job_row(run_dir, [f"model.lr=0.{number}", f"name=a=b{number}"], str(number))


def test_rows_of_all_kinds(tmp_path):
    rows = [
        job(tmp_path, 1, status="completed", world_size=2, seconds={"total": 3.5}, metrics={"test/mae": 0.123456789}),
        job(tmp_path, 2, status="failed", error="boom | bang\nsecond line", metrics={"val/mae": 1.0}),
        job(tmp_path, 3),
        job(tmp_path, 4, status="running", metrics={}),
    ]
    assert [row["status"] for row in rows] == ["completed", "failed", "failed", "failed"]
    write_tables(rows, tmp_path)
    stored = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["model.lr"] for row in stored] == ["0.1", "0.2", "0.3", "0.4"]
    assert stored[0]["name"] == "a=b1" and float(stored[0]["test/mae"]) == 0.123456789
    assert stored[1]["error"] == "boom | bang" and stored[2]["error"] and stored[0]["error"] == ""
    assert float(stored[1]["val/mae"]) == 1.0 and stored[0]["val/mae"] == ""
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.replace("\\|", "").count("|") for line in lines} == {lines[0].count("|")}
    assert "0.12346" in lines[2] and "boom" in lines[3]


def test_a_second_table_replaces_the_first(tmp_path):
    rows = [job(tmp_path, 1, status="completed", metrics={"test/a": 1.0})]
    write_tables(rows, tmp_path)
    write_tables([*rows, job(tmp_path, 2, status="completed", metrics={"test/b": 2.0})], tmp_path)
    stored = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["test/b"] for row in stored] == ["", "2.0"]
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "table.csv", "table.md"}


def test_what_all_jobs_share_is_said_once(tmp_path):
    rows = [job_row(tmp_path, ["experiment=x", f"seed={seed}"], str(seed)) | {"test/mae": 1.0} for seed in (1, 2)]
    write_tables(rows, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("all jobs: ") and "experiment=x" in lines[0]
    assert "experiment" not in lines[2] and "seed" in lines[2] and "status" in lines[2]


def test_groups_and_costs_are_shown(tmp_path):
    """A variant of an experiment has a slash in its key, as metrics have; what a job cost is not lost among metrics."""
    rows = []
    for number, variant in enumerate(("load", "load_inference")):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        metrics = {f"test/m_{i}": 1.0 for i in range(20)} | {"val/loss": 2.0}
        stage = "fit/train" if number == 0 else "predict"
        costs = {"energy/total_it_kwh": 1.25e-4, f"energy/{stage}/j_per_sample": 0.5, "energy/co2_kg": 1e-5}
        costs |= {"energy/earlier_kwh": 2e-4} if number == 0 else {}  # a second try went on where the first one failed
        record = {"status": "completed", "metrics": metrics, "energy": {"costs": costs}}
        (run_dir / "results.json").write_text(json.dumps(record))
        rows.append(job_row(run_dir, ["trainer=cpu", f"experiment/energy_measurement={variant}"], str(number)))
    write_tables(rows, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "all jobs: trainer=cpu"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    first, second = (dict(zip(table[0], row, strict=True)) for row in table[2:])
    assert first["experiment/energy_measurement"] == "load"
    assert second["experiment/energy_measurement"] == "load_inference"
    assert first["energy/total_it_kwh"] == "0.000125"
    assert (first["energy/earlier_kwh"], second["energy/earlier_kwh"]) == ("0.0002", "")
    assert (first["energy/fit/train/j_per_sample"], second["energy/fit/train/j_per_sample"]) == ("0.5", "")
    assert (first["energy/predict/j_per_sample"], second["energy/predict/j_per_sample"]) == ("", "0.5")
    assert "energy/co2_kg" not in first and "val/loss" not in first and "test/m_0" in first


def test_what_a_training_sent_is_shown_with_its_time(tmp_path):
    """Metrics have the bytes of the last epoch; jobs that send nothing have neither."""
    sent = {"inter_node_bytes": 6e6, "intra_node_bytes": 2e6, "steps": 10}
    seconds = {"total": 9.0, "fit": 7.5}
    rows = [
        job(tmp_path, 1, status="completed", seconds=seconds, metrics={"comm/inter_node_bytes": 1e6, "test/a": 1.0},
            communication=sent),
        job(tmp_path, 2, status="completed", seconds=seconds, metrics={"test/a": 1.0}),
    ]  # fmt: skip
    write_tables(rows, tmp_path)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in
             (tmp_path / "table.md").read_text().splitlines()[-4:]]  # fmt: skip
    first, second = (dict(zip(table[0], row, strict=True)) for row in table[2:])
    assert (first["comm/total_inter_node_bytes"], first["time/fit_s"]) == ("6e+06", "7.5")
    assert (second["comm/total_inter_node_bytes"], second["time/fit_s"]) == ("", "")
    assert "comm/inter_node_bytes" not in first and rows[0]["comm/total_intra_node_bytes"] == 2e6


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Hydra's side of a sweep of one job in ``tmp_path``; returns a function that runs it and then shows the table."""
    for name, value in (("folder", None), ("rows", []), ("running", None), ("epilogue", None)):
        monkeypatch.setattr(SweepTable, name, value)

    def run(check=False, epilogue=None, **record):
        from types import SimpleNamespace

        from hydra.types import RunMode

        (tmp_path / "0").mkdir()
        hydra = OmegaConf.create(
            {"runtime": {"output_dir": str(tmp_path / "0")}, "sweep": {"subdir": "0"}, "overrides": {"task": ["a=1"]},
             "job": {"num": 0}}
        )  # fmt: skip
        settings = SimpleNamespace(
            mode=RunMode.MULTIRUN, runtime=hydra.runtime, sweep=hydra.sweep, overrides=hydra.overrides, job=hydra.job
        )
        monkeypatch.setattr("runner.sweep_table.HydraConfig.get", lambda: settings)
        table = SweepTable(epilogue)
        table.on_job_start(OmegaConf.create({"check": check}))
        if record:
            (tmp_path / "0" / "results.json").write_text(json.dumps(record))
        table.on_job_end(OmegaConf.create({"check": check}), None)
        SweepTable.show()

    return run


def test_a_check_has_no_table(sweep, tmp_path, capsys):
    sweep(check=True)
    assert capsys.readouterr().out == "" and not (tmp_path / "table.md").exists()


def headline(folder: Path) -> str:
    return f"all of {folder.name}"


def test_what_comes_below_the_table(sweep, tmp_path, capsys):
    sweep(epilogue=f"{__name__}.headline", status="completed", metrics={"test/a": 1.0})
    out = capsys.readouterr().out
    assert "test/a" in out and out.endswith(f"all of {tmp_path.name}\n")


def test_nothing_comes_below_the_table_of_failures(sweep, capsys):
    sweep(epilogue=f"{__name__}.headline", status="failed", error="boom")
    assert "boom" in (out := capsys.readouterr().out) and "all of" not in out
