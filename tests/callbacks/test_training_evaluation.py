"""Scores of the training set after every epoch, and validation on random views."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from hydra.utils import instantiate

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


def test_what_is_evaluated_are_the_images_as_they_are(tmp_path):
    """Against a pass over the training images by hand, with the weights of the last checkpoint."""
    train(tmp_path, "callbacks=training_evaluation", "trainer.devices=1", "data.augment=true", "data.padding=2")
    logged = rows(tmp_path)["train_eval/accuracy"].dropna().tolist()[-1]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    config = composed(*QUICK, "trainer.devices=1", "data.augment=true", "data.padding=2", run_dir=tmp_path)
    module, data = (instantiate(config[name]) for name in ("model", "data"))
    module.load_state_dict(saved)
    module.eval()
    data.prepare_data()
    data.setup("fit")
    right = 0
    with torch.no_grad():
        for batch in data.train_eval_dataloader():
            right += int((module(data.normalized(batch)["image"]).argmax(1) == batch["label"]).sum())
    assert logged == pytest.approx(right / IMAGES, abs=1e-6)


def test_phases_of_a_step_do_not_contain_it(tmp_path):
    """One image at a time it lasts longer than the training, and would be the largest phase."""
    one = ("data.eval_batch_size=1", "trainer.max_epochs=3", "trainer.limit_val_batches=1")
    train(tmp_path, "callbacks=training_evaluation", "trainer.devices=1", *one)
    result = json.loads((tmp_path / "results.json").read_text())
    seconds = 3600 * result["energy"]["stages"][STAGE]["device_hours"] / 3
    for phase in ("loading", "transfer"):
        assert result["phases"][phase] * (IMAGES // 16) < 0.3 * seconds, (result["phases"], seconds)


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
