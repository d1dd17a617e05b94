"""The report at the end of a sweep, from results.json of jobs that nobody has to run."""

from __future__ import annotations

import csv
import json

import pytest

from callbacks.energy_scaling import sweep_report
from callbacks.scaling_traces import power_traces
from physics.energy_cost.records import read_runs

METRIC = {64: 0.95, 128: 0.948, 256: 0.90}  # by global batch size: if more is better, 128 is the last good one


def write_sweep(folder, metric, estimated=0.0, counts=(1, 2, 4), batches=(64, 128, 256), **config):
    job = 0
    for devices in counts:
        for batch in batches:
            epochs, samples = 2, 2 * 4096
            updates = samples // batch
            hours = 1e-6 * samples + 1e-5 * devices * updates
            joules = (
                0.069 * hours + 0.4525 * samples / 3.6e6 + 1.781 * devices * updates / 3.6e6 + 0.2153 * hours / devices
            )
            stage = {
                "it_kwh": joules, "device_hours": hours, "node_hours": hours / devices, "samples": samples,
                "updates": updates, "estimated_fraction": estimated,
            }  # fmt: skip
            result = {
                "status": "completed", "world_size": devices, "epoch": epochs,
                "hardware": {"cpu": "host", "cuda": devices * ["GPU"]}, "metrics": {metric: METRIC[batch]},
                "energy": {"stages": {"fit/train": stage}, "channels": {"node": {"source": "the meter"}}},
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
        ("val/loss", {}, 256),
        ("val/skill", {"callbacks": {"checkpoint": {"monitor": "val/skill", "mode": "min"}}}, 256),
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


def test_jobs_that_see_as_many_gpus_as_they_use_are_on_one_hardware(tmp_path):
    write_sweep(tmp_path, "val/accuracy")
    assert "costs: P_node" in sweep_report(tmp_path)
    assert {record.hardware for record in read_runs(tmp_path)[0]} == {"GPU"}
    write_sweep(tmp_path / "cpu", "val/accuracy", trainer={"accelerator": "cpu"})
    assert {record.hardware for record in read_runs(tmp_path / "cpu")[0]} == {"host"}


def test_what_was_not_measured_is_told_everywhere(tmp_path):
    write_sweep(tmp_path / "measured", "val/accuracy")
    assert "NOT MEASURED" not in sweep_report(tmp_path / "measured")
    write_sweep(tmp_path / "simulated", "val/accuracy", estimated=1.0)
    assert "100 % of the energy was NOT MEASURED: the meter" in sweep_report(tmp_path / "simulated")
    page = (tmp_path / "simulated" / "energy_scaling" / "scaling.html").read_text()
    assert "NOT MEASURED: the meter" in page


def test_a_fit_of_as_many_costs_as_runs_says_that_nothing_was_tested(tmp_path):
    write_sweep(tmp_path / "few", "val/accuracy", counts=(1, 8), batches=(64, 256))
    assert "nothing is tested" in sweep_report(tmp_path / "few")
    write_sweep(tmp_path / "more", "val/accuracy")
    assert "nothing is tested" not in sweep_report(tmp_path / "more")


def test_measured_and_estimated_runs_are_refused_together(tmp_path):
    write_sweep(tmp_path / "a", "val/accuracy")
    write_sweep(tmp_path / "b", "val/accuracy", estimated=0.45)
    assert "data.allow_mixed=true" in sweep_report(tmp_path)
    assert "costs:" in sweep_report(tmp_path, allow_mixed=True)


def write_power(folder, watts, machines=1):
    """Readings every second of counters that have taken so many watts since the last one, shared by the machines."""
    for machine in range(machines):
        lines, joules = [{"kind": "start"}], 0.0
        for second, power in enumerate([0.0, *watts]):
            joules += power / machines
            lines.append({"kind": "sample", "t": float(second), "total_j": joules})
        path = folder / "energy" / f"host{machine}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"kind": "sa')  # killed while it wrote


@pytest.mark.parametrize("machines", [1, 2])
def test_power_over_time_is_drawn(tmp_path, machines):
    write_sweep(tmp_path, "val/accuracy")
    expected = {}
    for job, path in enumerate(sorted(tmp_path.glob("*/results.json"))):
        expected[path.parent.name] = [100.0 + job, 200.0 + job, 150.0]
        write_power(path.parent, expected[path.parent.name], machines)
    records, _ = read_runs(tmp_path)
    traces = power_traces([tmp_path], records)
    assert len(traces) == 9
    for trace, record in zip(traces, records, strict=True):
        assert trace["watts"] == pytest.approx(expected[record.name])
        assert trace["time_s"] == [0.5, 1.5, 2.5]
        assert (trace["devices"], trace["local_batch_size"]) == (record.devices, record.local_batch_size)
    sweep_report(tmp_path)
    assert (tmp_path / "figures" / "power_traces.png").stat().st_size > 5000
    assert not power_traces([tmp_path / "elsewhere"], records)


def test_what_nothing_beats_is_recommended(tmp_path):
    write_sweep(tmp_path, "val/accuracy")
    sweep_report(tmp_path)
    text = (tmp_path / "energy_scaling" / "scaling.md").read_text()
    part = text.split("## Recommendation")[1].split("##")[0]
    analysis = json.loads((tmp_path / "energy_scaling" / "scaling.json").read_text())
    rows = [analysis["rows"][i] for i in analysis["front"]]
    assert part.count("\n| ") == len(rows) + 1  # and the head
    fastest = min(analysis["rows"], key=lambda row: row["hours"])
    thriftiest = min(analysis["rows"], key=lambda row: row["energy_kwh"])
    best = max(analysis["rows"], key=lambda row: row["metric"])
    for row in (fastest, thriftiest):
        assert f"{row['devices']} x {row['local_batch_size']} ({row['series']})" in part
    assert best["metric"] in [row["metric"] for row in rows]
    for row in rows:
        others = [other for other in analysis["rows"] if other is not row]
        keys = [(o["hours"], o["energy_kwh"], -o["metric"]) for o in others]
        own = (row["hours"], row["energy_kwh"], -row["metric"])
        assert not any(all(a <= b for a, b in zip(key, own, strict=True)) and key != own for key in keys)
