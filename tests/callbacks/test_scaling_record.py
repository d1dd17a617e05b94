"""What results.json and loggers say of the size of a training."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from callbacks.scaling_record import LOGGED
from physics.energy_cost.records import read_runs
from runner import job
from tests.composing import composed, plain

IMAGES = 1293
QUICK = (
    "num_threads=1", "logger=csv", "test=false", "callbacks.energy.figures=[]", "callbacks.energy.codecarbon=false",
    "model.net.width=0.0625", "trainer.limit_val_batches=1", "model.scheduler_monitor=train/loss",
)  # fmt: skip


def train(folder, devices, *overrides):
    found = ("experiment=energy_scaling/simulated", f"trainer.devices={devices}", *QUICK, *overrides)
    result = job.run(plain(composed(*found, run_dir=folder)))
    assert result["status"] == "completed", result.get("error")


def contents(folder):
    scaling = json.loads((folder / "results.json").read_text())["scaling"]
    (path,) = folder.rglob("metrics.csv")
    rows = pd.read_csv(path)
    return scaling, {name: rows[f"scaling/{name}"].dropna().tolist() for name in LOGGED.values()}


def test_a_training_that_ends_within_an_epoch(tmp_path):
    """Steps of 16 with two batches each: U = 25 of 40 in an epoch, that is 0.625 epochs."""
    train(tmp_path, 1, "data.local_batch_size=16", "trainer.max_steps=25", "trainer.accumulate_grad_batches=2")
    scaling, logged = contents(tmp_path)
    assert scaling["num_samples"] == IMAGES and scaling["epochs"] == pytest.approx(50 / 80)
    assert (scaling["local_batch_size"], scaling["global_batch_size"]) == (32, 32)
    assert (scaling["updates"], scaling["device_updates"], scaling["samples"]) == (25, 25, 25 * 32)
    assert scaling["kappa_kw"] == pytest.approx(scaling["energy_kwh"] / scaling["device_hours"])
    assert logged == {name: [pytest.approx(scaling[key])] for key, name in LOGGED.items()}
    (record,), skipped = read_runs(tmp_path)
    assert not skipped
    assert (record.num_samples, record.epochs, record.local_batch_size) == (IMAGES, 50 / 80, 32)


def on_two(folder):
    train(folder, 2, "data.local_batch_size=16", "trainer.max_epochs=1")


def test_two_processes(tmp_path, ranks2):
    ranks2(on_two, tmp_path)
    scaling, logged = contents(tmp_path)
    steps = IMAGES // 32
    assert (scaling["devices"], scaling["nodes"], scaling["updates"], scaling["device_updates"]) == (
        2,
        1,
        steps,
        2 * steps,
    )
    assert (scaling["local_batch_size"], scaling["global_batch_size"], scaling["samples"]) == (16, 32, 32 * steps)
    assert (scaling["num_samples"], scaling["epochs"]) == (IMAGES, 1.0)
    assert logged["gbs"] == [32] and logged["n"] == [2] and logged["kappa_kw"][0] > 0
    (record,), _ = read_runs(tmp_path)
    assert (record.devices, record.local_batch_size, record.num_samples) == (2, 16, IMAGES)
