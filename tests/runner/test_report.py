"""What the console says about energy at the end of a run."""

from __future__ import annotations

import json

import pytest

from callbacks.energy.record import Counts
from runner import report
from tests.callbacks.energy.finished_runs import channel, finish, record


def test_energy_of_a_run_that_was_resumed_or_interrupted(tmp_path):
    counts = Counts({"fit/train": 100}, {"fit/train": 10})
    finish(tmp_path, [record(tmp_path / "energy" / "a.jsonl", {channel("cpu"): 60.0}, counts=counts)], counts)
    once = report.summary({"run_dir": str(tmp_path), "metrics": {}}).splitlines()
    (total,) = [line for line in once if line.startswith("energy ")]
    assert total.startswith("energy           5220 J (0.00145 kWh, 0.696 g CO2), 100 % measured")
    assert not [line for line in once if "before" in line]
    path = tmp_path / "results.json"
    result = json.loads(path.read_text())
    result["energy"]["earlier_kwh"] = 1e-3
    path.write_text(json.dumps(result))
    resumed = report.summary({"run_dir": str(tmp_path), "metrics": {}}).splitlines()
    (before,) = [line for line in resumed if "before" in line]
    assert before == "  before, J      3600 in the parts before the resume, not included above"
    lines = report.interrupted(tmp_path).splitlines()
    assert total in lines and before in lines and lines[-1].startswith("interrupted; resume: ")
    path.unlink()  # a run that was interrupted before it had begun
    assert report.interrupted(tmp_path).startswith("\ninterrupted; resume: ")


SENT = {"inter_node_bytes": 2.5e6, "intra_node_bytes": 4e6, "blocked_s": 1.25, "steps": 7, "local_size": 2}


@pytest.mark.parametrize(
    ("changed", "processes", "expected"),
    [
        ({}, 4, "2.5 MB between nodes, 4 MB within; 1.25 s waited for, in 7 steps"),
        ({"inter_node_bytes": 0.0, "local_size": 4}, 4,
         "4 MB within the one node (cluster.local_size makes several); 1.25 s waited for, in 7 steps"),
        ({"inter_node_bytes": 0.0, "local_size": 4, "group_size": 2, "between_groups_bytes": 3e6}, 4,
         "4 MB within the one node (cluster.local_size makes several), of these 3 MB between groups of 2; "
         "1.25 s waited for, in 7 steps"),
    ],
)  # fmt: skip
def test_what_processes_sent_to_each_other(tmp_path, changed, processes, expected):
    """A single node sends nothing between nodes, whatever the strategy."""
    (tmp_path / "results.json").write_text(json.dumps({"communication": SENT | changed, "world_size": processes}))
    lines = report.summary({"run_dir": str(tmp_path), "metrics": {}}).splitlines()
    assert f"communication    {expected}" in lines


def test_a_checkpoint_without_a_metric_is_the_last(tmp_path):
    """Its file is best.ckpt all the same: what a run is evaluated with."""
    for monitor, word in ((None, "last"), ("val/loss", "best")):
        config = {"callbacks": {"checkpoint": {"monitor": monitor}}}
        record_ = {"best_checkpoint": str(tmp_path / "checkpoints/best.ckpt"), "config": config}
        (tmp_path / "results.json").write_text(json.dumps(record_))
        (line,) = [
            line
            for line in report.summary({"run_dir": str(tmp_path), "metrics": {}}).splitlines()
            if line.endswith("best.ckpt")
        ]
        assert line.startswith(f"{word} checkpoint  ")
