"""What the console says about energy at the end of a run."""

from __future__ import annotations

import json

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
