from __future__ import annotations

import json

import pytest

from callbacks.energy.__main__ import main
from callbacks.energy.accounting import Tally
from callbacks.energy.meters.base import Channel
from callbacks.energy.record import Counts, HostEnergy
from callbacks.energy.summary import Facility, metrics_of, summarize
from tests.callbacks.energy.test_record import recorded

CPU = Channel("cpu", "cpu", "gauge", False, "model")
GPU = Channel("gpu0", "gpu", "counter", True, "nvml", device="GPU-1")


def tally(seconds: float, cpu: float, gpu: float) -> Tally:
    joules = {"cpu": cpu, "gpu0": gpu}
    return Tally(seconds, joules, dict.fromkeys(joules, seconds), cpu + gpu, cpu, seconds, (cpu + gpu) / seconds)


def host(name: str = "one") -> HostEnergy:
    tallies = {
        "startup": tally(10, 500, 0), "fit/train": tally(100, 9_000, 27_000), "fit/val": tally(20, 1_000, 3_000),
        "test": tally(30, 1_500, 6_000),
    }  # fmt: skip
    return HostEnergy(name, f"node-{name}", [CPU, GPU], tallies, world_size=4)


COUNTS = Counts({"fit/train": 1800, "test": 100}, {"fit/train": 90})


def test_numbers_of_a_run():
    summary = summarize([host()], COUNTS, Facility(1.5, 400.0, "here"))
    train, fit = summary["stages"]["fit/train"], summary["stages"]["fit"]
    assert list(summary["stages"]) == ["startup", "fit/train", "fit/val", "test", "fit"]
    assert train["it_j"] == 36_000 and train["it_kwh"] == pytest.approx(0.01)
    assert train["facility_kwh"] == pytest.approx(0.015)
    assert (train["cpu_kwh"], train["gpu_kwh"], train["dram_kwh"]) == (pytest.approx(0.0025), pytest.approx(0.0075), 0)
    assert train["j_per_sample"] == 20 and train["j_per_update"] == 400 and train["device_updates"] == 360
    assert train["device_hours"] == pytest.approx(400 / 3600) and train["node_hours"] == pytest.approx(100 / 3600)
    assert train["samples_per_device_hour"] == pytest.approx(1800 / (400 / 3600))
    assert train["updates_per_device_hour"] == pytest.approx(90 / (400 / 3600))
    assert train["mean_w"] == 360 and train["energy_delay_js"] == 3_600_000
    assert fit["it_j"] == 40_000 and fit["duration_s"] == 120
    assert summary["it_j"] == sum(s["it_j"] for name, s in summary["stages"].items() if name != "fit") == 48_000
    assert summary["estimated_fraction"] == pytest.approx(12_000 / 48_000)
    assert summary["coverage"] == 1
    assert summary["co2_kg"] == pytest.approx(48_000 / 3.6e6 * 1.5 * 0.4)
    assert summary["channels"]["gpu0"] == {
        "component": "gpu", "measured": True, "source": "nvml", "device": "GPU-1", "j": 36_000,
        "mean_w": pytest.approx(225),
    }  # fmt: skip


def test_machines_add_up_and_time_does_not():
    one, two = summarize([host()], COUNTS, Facility()), summarize([host(), host("two")], COUNTS, Facility())
    assert two["it_j"] == 2 * one["it_j"] and two["node_hours"] == 2 * one["node_hours"]
    assert two["duration_s"] == one["duration_s"] and two["device_hours"] == one["device_hours"]
    assert two["max_w"] == 2 * one["max_w"] and two["mean_w"] == 2 * one["mean_w"]
    assert set(two["channels"]) == {"node-one/cpu", "node-one/gpu0", "node-two/cpu", "node-two/gpu0"}


def test_a_stage_in_pieces_too_short_for_a_maximum_has_its_mean():
    pieces = host()
    for tally in pieces.tallies.values():
        tally.max_w = 0.0
    summary = summarize([pieces], COUNTS, Facility())
    assert summary["stages"]["fit/train"]["max_w"] == summary["stages"]["fit/train"]["mean_w"] == 360
    assert summary["max_w"] >= summary["mean_w"]


def test_pue_counts_once():
    plain, building = (summarize([host()], COUNTS, Facility(pue, 300.0)) for pue in (1.0, 1.5))
    assert building["it_j"] == plain["it_j"]
    assert building["facility_kwh"] == 1.5 * plain["facility_kwh"]
    assert building["co2_kg"] == pytest.approx(1.5 * plain["co2_kg"], rel=1e-12)


def test_names_in_loggers():
    metrics = metrics_of(summarize([host()], COUNTS, Facility()))
    assert metrics["energy/fit/train/j_per_sample"] == 20
    assert metrics["energy/test/it_kwh"] == pytest.approx(7_500 / 3.6e6)
    assert metrics["energy/total_it_kwh"] == pytest.approx(48_000 / 3.6e6)
    assert {"energy/co2_kg", "energy/estimated_fraction", "energy/coverage", "energy/total_max_w"} <= set(metrics)
    assert "energy/test/j_per_update" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())


def test_nothing_used_is_no_division_by_zero():
    empty = HostEnergy("a", "a", [], {"startup": Tally()})
    assert summarize([empty], Counts(), Facility())["it_j"] == 0
    assert summarize([], Counts(), Facility())["mean_w"] == 0


@pytest.mark.parametrize(("options", "message"), [((0.9,), "pue=0.9"), ((1.0, -5.0), "carbon_intensity=-5.0")])
def test_impossible_buildings(options, message):
    with pytest.raises(ValueError, match=message):
        Facility(*options)


def test_merging_files_twice_gives_the_same_bytes(tmp_path, capsys):
    recorded(tmp_path / "energy" / "a.jsonl", "one")
    recorded(tmp_path / "energy" / "b.jsonl", "two", 50.0, end=None)
    outputs = []
    for _ in range(2):
        assert main(["merge", str(tmp_path), "--pue", "1.2"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    merged = json.loads(outputs[0])
    assert merged["it_j"] == 750.0 and merged["facility_kwh"] == pytest.approx(1.2 * 750 / 3.6e6)
    assert [h["status"] for h in merged["hosts"].values()] == ["completed", "killed"]
    assert merged["stages"]["test"]["samples"] == 20 and merged["counts_exact"]
    (tmp_path / "energy" / "b.jsonl").unlink()  # two ranks on one machine: one of them recorded
    assert main(["merge", str(tmp_path)]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert merged["stages"]["test"]["samples"] == 20 and not merged["counts_exact"]
    assert main(["merge", str(tmp_path / "nothing")]) == 2
    assert "no energy/*.jsonl" in capsys.readouterr().err
