"""PETEvents: batches say what the hits are, parts are apart, files take the place of simulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.pet_events import PETEvents
from datamodules.readers.list_mode import write_hits
from physics.pet.hits import concatenate, true_pairs

SMALL = {
    "scanner": "toy24", "num_train": 3000, "num_val": 20, "num_test": 30, "num_steps": 100, "rate": 2.0,
    "efficiency": 0.3, "delay_trials": 8, "batch_size": 8, "eval_batch_size": 16,
}  # fmt: skip


def made(**changes):
    data = PETEvents(**(SMALL | changes))
    data.setup()
    return data


@pytest.fixture(scope="module")
def data():
    return made()


def test_keys_and_shapes(data):
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch) == PETEvents.batch_keys and batch["sample"].shape == (8,)
    n, m = len(batch["hit_item"]), len(batch["label_item"])
    assert all(len(v) == (n if k.startswith("hit") else m) for k, v in batch.items() if k != "sample")
    assert (batch["hit_item"].diff() >= 0).all() and (batch["hit_step"] >= 0).all() and (batch["hit_step"] < 100).all()


def test_estimated_delays_bring_hits_to_the_step_of_their_decay(data):
    assert (data.calibration_errors() == 0).all()
    for batch in data.test_dataloader():
        assert torch.equal(batch["hit_aligned_step"], batch["hit_true_step"])
        for item, a, b, step in zip(*(batch[f"label_{k}"].tolist() for k in ("item", "a", "b", "step")), strict=True):
            at = (batch["hit_item"] == item) & (batch["hit_true_step"] == step)
            assert {a, b} <= set(batch["hit_crystal"][at].tolist())


def test_every_sample_and_label_once(data):
    seen, labels = [], 0
    for batch in data.test_dataloader():
        seen += batch["sample"].tolist()
        labels += len(batch["label_a"])
    assert sorted(seen) == list(range(30)) and labels == len(true_pairs(data.parts["test"]).first)


def test_parts_are_apart_and_seeded(data):
    again, other = made(), made(seed=1)
    assert np.array_equal(again.parts["val"].crystal, data.parts["val"].crystal)
    assert not np.array_equal(other.true_delays, data.true_delays)
    assert not np.array_equal(data.parts["val"].crystal[:30], data.parts["test"].crystal[:30])


def test_without_alignment():
    batch = next(iter(made(align="none").val_dataloader()))
    assert torch.equal(batch["hit_aligned_step"], batch["hit_step"])
    assert (made(align="true", num_train=5).calibration_errors() == 0).all()


def test_physics(caplog):
    caplog.set_level("INFO")
    data = made(kind="physics", scanner="safir2880", num_train=40, num_steps=1000, align="true")
    assert data.parts["test"].num_samples == 30 and len(data.parts["train"]) > 200
    batch = next(iter(data.train_dataloader()))
    late = batch["hit_aligned_step"] - batch["hit_true_step"]
    assert late.min() >= -1 and late.max() <= 2  # flight, jitter, floors
    assert data.lost_pairs == 0 or "across the border" in caplog.text


def test_files(tmp_path, data):
    hits = concatenate([data.parts["train"], data.parts["val"], data.parts["test"]])
    write_hits(hits, tmp_path / "hits.npz")
    from_file = made(kind="file", file="hits.npz", data_dir=str(tmp_path))
    for part in ("train", "val", "test"):
        assert np.array_equal(from_file.parts[part].step, data.parts[part].step)
    shift = from_file.delays - data.true_delays
    assert (shift == shift[0]).all() and from_file.delays.min() == 0  # a common delay cannot be known
    row = {"prediction": torch.tensor([[2.0, 3.0, 15.0, 40.0, 0.9, 1.0]])}
    assert from_file.prediction_table(row)["sample"].tolist() == [3022]  # as the file numbers them
    assert data.prediction_table(row)["sample"].tolist() == [2]
    with pytest.raises(ValueError, match="num_val"):
        made(kind="file", file="hits.npz", data_dir=str(tmp_path), num_test=4000)


def test_many_multiples_are_said(caplog):
    made(rate=300.0, num_train=50)
    assert "activity is too high" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "nope"}, "data.kind"),
        ({"align": "nope"}, "data.align"),
        ({"num_val": 0}, "data.num_val=0"),
        ({"kind": "file"}, "data.file"),
        ({"kind": "file", "file": "x.csv", "align": "true"}, "data.align=true"),
        ({"delay_trials": 200}, "data.delay_trials=200"),
        ({"efficiency": 2.0}, "data.efficiency"),
        ({"activity_bq": 0.0}, "data.activity_bq"),
        ({"scanner": "nope"}, "scanner='nope'"),
    ],
)
def test_wrong_values(changes, words):
    with pytest.raises(ValueError, match=words):
        PETEvents(**(SMALL | changes))
