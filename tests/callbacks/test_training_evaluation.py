"""Scores of the training set after every epoch, and validation on random views."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from callbacks.training_evaluation import STAGE
from runner import job
from tests.composing import composed, plain

QUICK = (
    "experiment=energy_scaling", "num_threads=1", "logger=csv", "test=false", "trainer.max_epochs=2", "seed=3",
    "callbacks.energy.figures=[]", "callbacks.energy.codecarbon=false", "model.net.width=0.0625",
)  # fmt: skip
IMAGES = 1293


def train(folder, *overrides):
    result = job.run(plain(composed(*QUICK, *overrides, run_dir=folder)))
    assert result["status"] == "completed", result.get("error")


def rows(folder):
    (path,) = folder.rglob("metrics.csv")
    return pd.read_csv(path)


def test_scores_and_energy_of_the_training_set(tmp_path):
    """Without momentum and decay a rate of 0 leaves the weights as they are: both epochs score the same network."""
    still = ("model.optimizer.lr=0", "model.scheduler.warmup_lr=0", "trainer.devices=1", "data.eval_batch_size=100")
    train(tmp_path, "callbacks=training_evaluation", *still)
    found = rows(tmp_path)
    accuracy, loss = (found[f"train_eval/{name}"].dropna().tolist() for name in ("accuracy", "loss"))
    assert len(accuracy) == len(loss) == 2
    assert accuracy[0] * IMAGES == pytest.approx(round(accuracy[0] * IMAGES), abs=1e-4)  # every image once
    record = json.loads((tmp_path / "results.json").read_text())["energy"]["stages"]
    assert record[STAGE]["samples"] == 2 * IMAGES and record[STAGE]["it_kwh"] > 0
    assert record["fit/val"]["samples"] < IMAGES  # its own are not among them
    parts = [kwh["it_kwh"] for label, kwh in record.items() if label.startswith("fit/")]
    assert record["fit"]["it_kwh"] == pytest.approx(sum(parts))


def on_two(folder):
    train(folder, "callbacks=training_evaluation", "trainer.devices=2")


def test_two_processes_evaluate_every_image_once_together(tmp_path, ranks2):
    ranks2(on_two, tmp_path)
    record = json.loads((tmp_path / "results.json").read_text())["energy"]["stages"]
    assert record[STAGE]["samples"] == 2 * IMAGES
    (first, second) = rows(tmp_path)["train_eval/accuracy"].dropna()
    for accuracy in (first, second):
        assert accuracy * IMAGES == pytest.approx(round(accuracy * IMAGES), abs=1e-4)


def test_training_goes_on_as_without_it(tmp_path):
    ends = []
    for name, more in (("with", ["callbacks=training_evaluation"]), ("without", [])):
        train(tmp_path / name, *more, "trainer.devices=1", "data.augment=true")
        last = tmp_path / name / "checkpoints" / "last.ckpt"
        ends.append(torch.load(last, weights_only=True)["state_dict"])
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=0, msg=name)


def test_an_experiment_without_classes_is_refused(tmp_path):
    result = job.run(plain(composed("experiment=recycle", "callbacks=training_evaluation", run_dir=tmp_path)))
    assert result["status"] == "failed"
    assert "callbacks.training_evaluation evaluates classes of images, but model=ReCycle" in result["error"]
