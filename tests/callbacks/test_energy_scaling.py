"""The report at the end of a sweep, from results.json of jobs that nobody has to run."""

from __future__ import annotations

import csv
import json

import pytest

from callbacks.energy_scaling import sweep_report

METRIC = {64: 0.95, 128: 0.948, 256: 0.90}  # by global batch size: 128 is the last good one if more is better


def write_sweep(folder, metric, **config):
    job = 0
    for devices in (1, 2, 4):
        for batch in (64, 128, 256):
            epochs, samples = 2, 2 * 4096
            updates = samples // batch
            hours = 1e-6 * samples + 1e-5 * devices * updates
            joules = (
                0.069 * hours + 0.4525 * samples / 3.6e6 + 1.781 * devices * updates / 3.6e6 + 0.2153 * hours / devices
            )
            stage = {
                "it_kwh": joules, "device_hours": hours, "node_hours": hours / devices, "samples": samples,
                "updates": updates, "estimated_fraction": 0.0,
            }  # fmt: skip
            result = {
                "status": "completed", "world_size": devices, "epoch": epochs, "hardware": {"cpu": "one kind"},
                "energy": {"stages": {"fit/train": stage}}, "metrics": {metric: METRIC[batch]},
                "config": {"name": "mine", "seed": 0, "optimized_metric": metric, **config},
                "phases": {"loading": 1e-3, "forward": 1e-5 * batch / devices},
            }  # fmt: skip
            path = folder / str(job) / "results.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(result))
            job += 1


@pytest.mark.parametrize(
    ("metric", "config", "expected"),
    [
        ("val/accuracy", {}, 128),
        ("val/loss", {}, 64),
        ("val/skill", {"callbacks": {"checkpoint": {"monitor": "val/skill", "mode": "min"}}}, 64),
        ("val/skill", {"callbacks": {"checkpoint": {"monitor": "val/other", "mode": "min"}}}, 128),
    ],
)
def test_the_best_batch_is_where_the_metric_is_best(tmp_path, metric, config, expected):
    write_sweep(tmp_path, metric, **config)
    assert f"within 1 % of the best: {expected}" in sweep_report(tmp_path)


def test_the_command_line_of_the_report_has_the_last_word(tmp_path):
    write_sweep(tmp_path, "val/loss")
    assert "within 1 % of the best: 128" in sweep_report(tmp_path, metric_mode="max")


def test_phases_of_a_step_are_in_the_table_and_drawn(tmp_path):
    write_sweep(tmp_path, "val/accuracy")
    sweep_report(tmp_path)
    with (tmp_path / "energy_scaling" / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for row in rows:
        assert float(row["loading_s"]) == pytest.approx(1e-3)
        assert float(row["forward_s"]) == pytest.approx(1e-5 * int(row["local_batch_size"]))
    assert (tmp_path / "figures" / "step_phases.png").stat().st_size > 5000
