"""What the platform promises, on ReCycle itself: devices, sweeps and kills as a user meets them."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path

import pytest

from runner import job
from tests import cli
from tests.composing import composed, plain

# Sums in another order round differently, and training amplifies that: float64 leaves the identity in sight. Dropout
# draws other masks on other processes.
EXACT = ("experiment=recycle", "trainer.precision=64-true", "model.net.dropout=0", "seed=1", "predict=false")
ALONE = ("callbacks=early_stopping", "logger=none")


def _trained(folder: str, *overrides: str) -> dict[str, float]:
    result = job.run(plain(composed(*EXACT, *ALONE, *overrides, run_dir=folder)))
    assert result["status"] == "completed", result.get("error")
    return result["metrics"]


def test_two_devices_give_the_test_metrics_of_one(ranks2, tmp_path):
    short = "trainer.max_epochs=3"
    one = _trained(str(tmp_path / "one"), short)
    two, _ = ranks2(_trained, str(tmp_path / "two"), short, "trainer=multi_cpu")
    assert one.keys() == {name for name in two if not name.startswith("comm/")} and "test/mae" in one
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-9), name


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_devices_give_the_test_metrics_of_one_after_a_whole_training(tmp_path):
    for devices in (1, 2):
        arguments = (*EXACT, "trainer=multi_cpu", f"trainer.devices={devices}", f"hydra.run.dir={tmp_path}/{devices}")
        cli.ok(*arguments, cwd=tmp_path, timeout=180)
    one, two = (cli.results(tmp_path / str(devices))["metrics"] for devices in (1, 2))
    for name in (name for name in one if name.startswith("test/")):  # of the best epoch; rounding grows until the last
        assert two[name] == pytest.approx(one[name], rel=1e-6), name


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_over_seeds_and_devices(tmp_path):
    arguments = ("-m", "experiment=recycle", "seed=1,2", "trainer=multi_cpu", "trainer.devices=1,2", "debug=tiny")
    cli.ok(*arguments, f"hydra.sweep.dir={tmp_path}/sweep", cwd=tmp_path, timeout=300)
    rows = list(csv.DictReader((tmp_path / "sweep" / "table.csv").open()))
    assert [(r["seed"], r["trainer.devices"], r["world_size"], r["status"]) for r in rows] == [
        (seed, devices, devices, "completed") for seed in "12" for devices in "12"
    ]
    assert all(float(row["test/mae"]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ("experiment=recycle", "trainer.max_epochs=12", "callbacks.early_stopping.patience=2")
    cli.ok(*arguments, f"hydra.run.dir={whole}", cwd=tmp_path)
    started = cli.Started(*arguments, f"hydra.run.dir={killed}", cwd=tmp_path)
    record = killed / "results.json"
    try:
        started.wait_for(killed / "checkpoints" / "last.ckpt")
        while (json.loads(record.read_text())["epoch"] or 0) < 3:
            time.sleep(0.02)
        started.signal(signal.SIGKILL)
        assert started.end()[0] == -signal.SIGKILL
    finally:
        started.kill()
    assert cli.results(killed)["status"] == "running"
    cli.ok(f"resume={killed}", cwd=tmp_path)
    assert cli.differences(whole, killed) == []
    assert _forecast(whole) == _forecast(killed)


def _forecast(folder: Path) -> str:
    return (folder / "predictions" / "forecast.csv").read_text()
