"""`results.json` is true at every moment."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from callbacks.run_record import RunRecord, git_state, hardware, versions, write_json
from runner import job
from tests.composing import ROOT, tiny


def read(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_completed(tmp_path):
    config = tiny(tmp_path, "predict=true", "validate=true")
    result = job.run(config)
    record = read(tmp_path)
    assert record["status"] == "completed" and record["metrics"] == result["metrics"]
    assert record["config"] == config and record["name"] == "tiny"
    assert (record["epoch"], record["global_step"], record["world_size"]) == (3, 18, 1)
    assert record["best_checkpoint"] == str(tmp_path / "checkpoints" / "best.ckpt")
    assert {"fit", "validate", "test", "predict", "total"} <= set(record["seconds"])
    parts = [v for k, v in record["seconds"].items() if k != "total"]
    assert 0 < sum(parts) <= record["seconds"]["total"] + 0.01
    assert record["metrics"]["val/loss_best"] <= record["metrics"]["val/loss"] + 1e-9
    assert record["earlier"] == []


def test_failed_keeps_what_was_reached(tmp_path):
    result = job.run(tiny(tmp_path, "model.fault=raise", "model.fault_step=8"))
    record = read(tmp_path)
    assert result["status"] == record["status"] == "failed"
    assert record["error"] == "RuntimeError: boom" and result["error"] == "RuntimeError: boom"
    assert "tiny_model.py" in result["trace"]
    assert "val/loss" in record["metrics"], "the first epoch was validated"
    assert record["global_step"] == 6


def test_mistake_in_a_value_has_no_trace(tmp_path):
    result = job.run(tiny(tmp_path, "model.width=0"))
    assert result["status"] == "failed" and result["trace"] == ""
    assert "model.width=0: must be at least 1" in result["error"]
    assert read(tmp_path)["status"] == "failed"


def test_running_while_it_runs(tmp_path):
    record = RunRecord(str(tmp_path), {"name": "x"})
    record.update(world_size=3)
    assert read(tmp_path)["status"] == "running" and read(tmp_path)["world_size"] == 3


def test_resumed_run_keeps_the_earlier_record(tmp_path):
    first = RunRecord(str(tmp_path), {"name": "x"})
    first.update(status="interrupted", wandb_run_id="abc")
    second = RunRecord(str(tmp_path), {"name": "x"})
    second.update(status="failed")
    third = RunRecord(str(tmp_path), {"name": "x"})
    third.update(status="completed")
    record = read(tmp_path)
    assert [e["status"] for e in record["earlier"]] == ["interrupted", "failed"]
    assert record["wandb_run_id"] == "abc"
    assert not any("earlier" in e or "config" in e for e in record["earlier"])


def test_a_refused_run_leaves_the_record_as_it_was(tmp_path):
    """What goes wrong before anything is computed is no news of the run in the folder."""
    job.run(tiny(tmp_path))
    before = read(tmp_path)
    for mistake in ("model.width=0", "trainer.precision=7"):
        assert job.run(tiny(tmp_path, mistake, "ckpt_path=last"))["status"] == "failed"
        assert read(tmp_path) == before and before["status"] == "completed"
    result = job.run(
        tiny(tmp_path, "ckpt_path=last", "trainer.max_epochs=4", "model.fault=raise", "model.fault_step=20")
    )
    assert result["status"] == read(tmp_path)["status"] == "failed", "this one had begun"
    assert read(tmp_path)["earlier"][0]["metrics"] == before["metrics"]


def test_a_damaged_record_does_not_stop_a_run(tmp_path):
    (tmp_path / "results.json").write_text("{half")
    RunRecord(str(tmp_path), {"name": "x"}).update()
    assert read(tmp_path)["earlier"] == []


def test_write_json_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_checkpoints_hold_the_configuration(tmp_path):
    config = tiny(tmp_path)
    job.run(config)
    for name in ("best", "last"):
        assert torch.load(tmp_path / f"checkpoints/{name}.ckpt", weights_only=True)["config"] == config


def test_git_state(tmp_path):
    assert git_state(tmp_path) == {}
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "new").touch()
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_surroundings():
    assert versions()["torch"] == torch.__version__ and hardware()["cores"] >= 1
    assert hardware()["threads"] == torch.get_num_threads()
    assert (ROOT / "callbacks/run_record.py").is_file()
