from __future__ import annotations

import functools
import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.energy.__main__ import PROFILES, main, sweep_study
from callbacks.energy.callback import EnergyCallback
from callbacks.energy.findings import FAILS, HOLDS, UNKNOWN, number
from callbacks.energy.node import NodeProfile, read_profiles
from callbacks.energy.record import Counts
from callbacks.energy.report import markdown, study_sections
from callbacks.energy.runs import INFERENCE, TRAINING, train_inference_ratio
from callbacks.energy.study import Assumptions, StudyError, break_even, build, to_json
from datamodules.synthetic_xray import SyntheticXrayDataModule
from lightning_modules.workloads import XrayVGG
from networks.vgg import VGG
from tests.callbacks.energy.finished_runs import channel, cpu_run, finish, gpu_run, record
from tests.callbacks.energy.sources import Source
from tests.callbacks.energy.test_callback import trainer

SHIPPED = read_profiles(PROFILES)
GIVEN = Assumptions()
HERE_CPU, HERE_GPU = "Intel Xeon, 2 threads", "1 x NVIDIA A100-SXM4-40GB"
XRAY = {"name": "xray", "target": "lightning_modules.workloads.XrayClassifier", "parameters": 20_035_266}
# Busy and idle A100 of a GPU run.
BUSY = {"startup": 60.0, "fit/train": 300.0, "fit/val": 200.0, "test": 150.0}


def row(study: dict[str, Any], node: str, phase: str = TRAINING, workload: str = "load") -> dict[str, Any]:
    (found,) = [r for r in study["rows"] if (r["workload"], r["phase"], r["node"]) == (workload, phase, node)]
    return found


def verdicts(study: dict[str, Any], finding: str) -> dict[str, str]:
    return {f["basis"]: f["verdict"] for f in study["findings"] if f["finding"] == finding}


# ------------------------------------------------------------------------------------------------- rows from runs


def test_numbers_of_a_run(tmp_path):
    cpu_run(tmp_path / "0")
    study = build([tmp_path], [], Assumptions(tdp_w=110.0))
    train, test = (row(study, HERE_CPU, phase) for phase in (TRAINING, INFERENCE))
    assert train["energy_j"] == pytest.approx(55 * 60) and train["time_s"] == pytest.approx(60)
    assert train["mean_w"] == pytest.approx(55) and train["samples"] == 3000 and train["updates"] == 100
    assert train["j_per_sample"] == pytest.approx(1.1) and train["j_per_update"] == pytest.approx(33)
    assert train["samples_per_device_hour"] == pytest.approx(3000 * 60)
    assert test["j_per_sample"] == pytest.approx(55 * 20 / 3200) and test["j_per_update"] is None
    assert (train["basis"], train["kind"], train["device"], train["runs"]) == ("estimated", "here", "cpu", 1)
    assert train["idle_gpus_j"] == 0.0 and train["modelled_from"] is None
    assert train["tdp_x_time_error"] == pytest.approx(1.0)  # 110 W x time against 55 W
    (both,) = study["comparisons"]
    assert both["ratio"] == pytest.approx(train["j_per_sample"] / test["j_per_sample"])
    assert both["inferences_that_cost_the_training"] == pytest.approx(train["energy_j"] / test["j_per_sample"])


def test_repeated_runs_are_added_up(tmp_path):
    cpu_run(tmp_path / "0")
    cpu_run(tmp_path / "1", watts=75.0, measured=True)
    study = build([tmp_path], SHIPPED, GIVEN)
    train = row(study, HERE_CPU)
    assert (train["runs"], train["samples"]) == (2, 6000)
    assert train["energy_j"] == pytest.approx((55 + 80) * 60) and train["basis"] == "59 % measured"
    assert train["j_per_sample_range"] == pytest.approx([1.1, 1.6])
    # One training is one run's.
    assert study["comparisons"][0]["inferences_that_cost_the_training"] == pytest.approx(67.5 * 60 / (67.5 * 20 / 3200))


def inference_run(folder: Path, watts: float = 50.0, data: dict[str, int] | None = None, **options: Any) -> Path:
    """A job without training: a test that costs 10 W more, and a prediction of 30 s."""
    counts = Counts({"test": 500, "predict": 500})
    powers = {channel("cpu"): {"startup": 1.0, "test": watts + 10.0, "predict": watts}}
    plan = [("startup", 10.0), ("test", 10.0), ("predict", 30.0)]
    host = record(folder / "energy/a.jsonl", powers, plan, counts)
    return finish(folder, [host], counts, data=data, **({"name": "load_inference"} | options))


def test_training_and_inference_may_be_separate_jobs(tmp_path):
    counts = Counts({"fit/train": 1000}, {"fit/train": 10})
    host = record(tmp_path / "train/energy/a.jsonl", {channel("cpu"): 60.0}, [("fit/train", 100.0)], counts)
    finish(tmp_path / "train", [host], counts)
    inference_run(tmp_path / "infer")
    study = build([tmp_path], [], GIVEN)
    # What was predicted, without the errors that the test before it has computed.
    assert row(study, HERE_CPU, INFERENCE)["energy_j"] == pytest.approx(50 * 30)
    assert study["comparisons"][0]["ratio"] == pytest.approx(6.0 / 3.0)


def test_the_test_of_a_training_job_is_no_inference_beside_a_prediction(tmp_path):
    cpu_run(tmp_path / "0", test_s=1.0, data={"batch_size": 64, "eval_batch_size": 256})
    inference_run(tmp_path / "1", data={"batch_size": 64, "eval_batch_size": 64})
    study = build([tmp_path], [], GIVEN)
    inference = row(study, HERE_CPU, INFERENCE)
    assert (inference["samples"], inference["stage"], inference["batch_size"], inference["runs"]) == (
        500, "predict", 64, 1,
    )  # fmt: skip
    assert row(study, HERE_CPU)["batch_size"] == 64


def test_batch_sizes_are_kept_apart(tmp_path):
    for i, (size, seconds, watts) in enumerate(
        ((16, 60.0, 45.0), (32, 30.0, 55.0), (64, 20.0, 95.0), (64, 20.0, 95.0))
    ):
        cpu_run(tmp_path / str(i), train_s=seconds, watts=watts, data={"batch_size": size, "eval_batch_size": 256})
    study = build([tmp_path], SHIPPED, GIVEN)
    found = {r["batch_size"]: r for r in study["rows"] if r["phase"] == TRAINING and r["kind"] == "here"}
    assert {size: r["runs"] for size, r in found.items()} == {16: 1, 32: 1, 64: 2}
    assert found[32]["node"] == f"{HERE_CPU}, batches of 32" and found[32]["machine"] == HERE_CPU
    assert row(study, HERE_CPU, INFERENCE)["runs"] == 4
    ratios = {c["node"]: c["ratio"] for c in study["comparisons"] if c["kind"] == "here"}
    assert set(ratios) == {f"{HERE_CPU}, training in batches of {size}" for size in (16, 32, 64)}
    assert ratios[f"{HERE_CPU}, training in batches of 16"] == pytest.approx(
        found[16]["j_per_sample"] / row(study, HERE_CPU, INFERENCE)["j_per_sample"]
    )
    # 16 needs more of both than 32; 64 needs more energy and less time.
    assert {size["batch_size"]: size["on_front"] for size in study["batch_sizes"]} == {16: False, 32: True, 64: True}
    assert not [b for b in study["break_even"] if all(node.startswith(HERE_CPU) for node in b["nodes"])]
    text = markdown("t", study_sections(study))
    assert "## Batch sizes" in text and f"| load | training | {HERE_CPU} | 16 |" in text
    # What is modelled has one origin: the runs that saw most samples.
    assert row(study, "horeka_cpu")["batch_size"] == 64


def test_ratio_of_training_and_inference_of_one_run(tmp_path):
    cpu_run(tmp_path / "0", train_s=1600.0, test_s=500.0, samples=(1000, 1000), **XRAY)
    energy = json.loads((tmp_path / "0" / "results.json").read_text())["energy"]
    assert train_inference_ratio(energy) == pytest.approx(3.2)
    energy["stages"]["predict"] = energy["stages"]["test"] | {"it_j": 2 * energy["stages"]["test"]["it_j"]}
    assert train_inference_ratio(energy) == pytest.approx(1.6)
    energy["stages"].pop("test")
    energy["stages"].pop("predict")
    assert train_inference_ratio(energy) is None


class CpuTime(Source):
    """10 J for a second of this process on a processor: a load-proportional machine, which no neighbour disturbs."""

    def __init__(self) -> None:
        super().__init__(integral=lambda _: 10.0 * time.process_time())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", [{"depth": 11, "width": 0.25, "pool_stride": 2, "image_size": 64}])
def test_a_vgg_run_costs_two_to_six_times_as_much_in_training(tmp_path, settings):
    """Acceptance 9 on a run: the network, the views and the losses of experiment=energy_measurement/xray."""
    callback = EnergyCallback(
        tmp_path / "energy", meters=[], extra_meters={"cpu": CpuTime()}, codecarbon=False, carbon_intensity=1.0,
        figures=[], period_s=1.0,
    )  # fmt: skip
    data = SyntheticXrayDataModule(num_train=512, num_val=8, num_test=8, batch_size=32, predict_part="train", repeat=2)
    module = XrayVGG(VGG(**settings), functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True))
    running = trainer(callback, max_epochs=2, limit_val_batches=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        running.fit(module, datamodule=data)
        running.predict(module, datamodule=data, return_predictions=False)
    finally:
        torch.set_num_threads(threads)
        callback.end_run()
    stages = callback.summary["stages"]
    assert (stages["fit/train"]["samples"], stages["predict"]["samples"]) == (1024, 1024)
    assert 2 < train_inference_ratio(callback.summary) < 6


def test_workloads_are_kept_apart(tmp_path):
    cpu_run(tmp_path / "0")
    cpu_run(tmp_path / "1", **XRAY)
    assert {r["workload"] for r in build([tmp_path], [], GIVEN)["rows"]} == {"load", "xray"}
    # One experiment, two networks: a sweep over models.
    cpu_run(tmp_path / "2", **(XRAY | {"name": "load"}))
    assert {r["workload"] for r in build([tmp_path], [], GIVEN)["rows"]} == {
        "load (LoadForecaster, 9,841 parameters)", "load (XrayClassifier, 20,035,266 parameters)", "xray",
    }  # fmt: skip


def test_a_run_counts_once_however_often_its_folder_is_named(tmp_path):
    cpu_run(tmp_path / "0")
    study = build([tmp_path, tmp_path / "0", tmp_path / "." / "0"], [], GIVEN)
    assert row(study, HERE_CPU)["runs"] == 1


def test_runs_that_cannot_be_compared_are_listed(tmp_path):
    for status in ("failed", "interrupted", "running"):
        cpu_run(tmp_path / status, status=status)
    with pytest.raises(StudyError, match=r"none of 3 runs(.|\n)*failed: status 'failed': only completed runs"):
        build([tmp_path], [], GIVEN)
    cpu_run(tmp_path / "good")
    cpu_run(tmp_path / "empty", samples=(0, 0))
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "results.json").write_text('{"status": "completed", "config": {}}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "results.json").write_text('{"status": ')
    study = build([tmp_path], [], GIVEN)
    skipped = {name.rpartition("/")[2]: reason for name, reason in study["skipped"].items()}
    assert set(skipped) == {"failed", "interrupted", "running", "empty", "off", "torn"}
    assert "callbacks.energy was off" in skipped["off"] and "sample" in skipped["empty"]
    assert list(study["runs"]) == [f"{tmp_path.name}/good"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no results\.json in or below"):
        build([tmp_path / "none"], [], GIVEN)


def test_doubtful_numbers_have_notes(tmp_path):
    cpu_run(tmp_path / "0", test_s=1.5)
    study = build([tmp_path], [], GIVEN)
    assert study["runs"][f"{tmp_path.name}/0"]["notes"] == [
        "inference took 1.5 s, less than two readings of its meters"
    ]
    path = tmp_path / "0" / "results.json"
    resumed = json.loads(path.read_text())
    resumed["energy"]["earlier_kwh"] = 1e-3
    path.write_text(json.dumps(resumed))
    notes = build([tmp_path], [], GIVEN)["runs"][f"{tmp_path.name}/0"]["notes"]
    assert notes[1:] == ["resumed: 3600 J of the parts before are not in the numbers"]


def test_workloads_are_called_what_was_chosen(tmp_path):
    """All jobs of a sweep have the sweep's name; single runs have names of their own."""
    sweep = {"experiment": "energy_measurement", "trainer": "cpu"}
    variant = "experiment/energy_measurement"
    named = {"name": "energy_measurement"}
    cpu_run(tmp_path / "0", choices=sweep | {variant: "load"}, **named)
    inference_run(tmp_path / "1", choices=sweep | {variant: "load_inference"}, **named)
    cpu_run(tmp_path / "2", choices=sweep | {variant: "xray"}, **(XRAY | named))
    inference_run(
        tmp_path / "3",
        choices={"experiment": "energy_measurement/load_inference"},
        name="energy_measurement_load_inference",
    )
    cpu_run(tmp_path / "4", choices={"experiment": None}, name="mine")
    study = build([tmp_path], [], GIVEN)
    assert {Path(name).name: run["workload"] for name, run in study["runs"].items()} == {
        "0": "energy_measurement/load", "1": "energy_measurement/load", "2": "energy_measurement/xray",
        "3": "energy_measurement/load", "4": "mine",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- idle GPUs


def test_every_gpu_of_a_cpu_run_is_idle(tmp_path):
    cpu_run(tmp_path / "0", gpus={"gpu0": 60.0, "gpu1": 62.0})
    study = build([tmp_path], [], GIVEN)
    train = row(study, f"{HERE_CPU}, 2 GPUs idle")
    assert train["idle_gpus_j"] == pytest.approx(122 * 60) and train["device"] == "cpu"
    (finding,) = [f for f in study["findings"] if (f["finding"], f["workload"]) == ("2", "load")]
    assert finding["verdict"] == HOLDS
    assert finding["numbers"]["factors"][f"training, {HERE_CPU}, 2 GPUs idle"] == pytest.approx(177 / 55)


def test_idle_gpus_beside_a_busy_one_come_from_the_records(tmp_path):
    run = gpu_run(tmp_path / "0", gpus={"gpu0": 58.0, "gpu1": BUSY, "gpu2": 60.0})
    label = f"{HERE_GPU}, 2 idle"
    study = build([tmp_path], [], GIVEN)
    assert row(study, label)["idle_gpus_j"] == pytest.approx(118 * 6)
    assert row(study, label, INFERENCE)["idle_gpus_j"] == pytest.approx(118 * 8)
    shutil.rmtree(run / "energy")
    study = build([tmp_path], [], GIVEN)
    assert row(study, label)["idle_gpus_j"] is None
    assert [f["verdict"] for f in study["findings"] if (f["finding"], f["workload"]) == ("2", "load")] == [UNKNOWN]


# -------------------------------------------------------------------------------------------------------- what-ifs


def test_what_if_is_the_profile_times_the_scaled_time(tmp_path):
    cpu_run(tmp_path / "0")
    node = NodeProfile("mine", 1, 8, 100.0, 0.1, 5.0, 10.0, 2, 1, 20.0, 120.0, cpu_speed=8.0, gpu_speed=40.0)
    study = build([tmp_path], [node], Assumptions(0.5, 0.5))
    modelled = row(study, "mine")
    seconds = 60 * 2 / 40  # two threads here
    watts = 15 + 100 * (0.1 + 0.9 / 8) + 70 + 20
    assert (modelled["kind"], modelled["basis"], modelled["modelled_from"]) == ("what-if", "modelled", HERE_CPU)
    assert modelled["time_s"] == pytest.approx(seconds) and modelled["mean_w"] == pytest.approx(watts)
    assert modelled["energy_j"] == pytest.approx(watts * seconds)
    assert modelled["idle_gpus_j"] == pytest.approx(20 * seconds)
    assert modelled["tdp_x_time_error"] == pytest.approx(220 / watts - 1)
    assert modelled["samples_per_device_hour"] == pytest.approx(3000 / (seconds / 3600))
    assert study["profiles"]["mine"]["power_w"] == pytest.approx(watts)


def test_profiles_are_modelled_from_runs_on_the_same_device(tmp_path):
    cpu_run(tmp_path / "0")
    gpu_run(tmp_path / "1")
    study = build([tmp_path], SHIPPED, GIVEN)
    origins = {r["node"]: r["modelled_from"] for r in study["rows"] if r["kind"] == "what-if"}
    assert origins == {"horeka_cpu": HERE_CPU, "haicore_gpu_forced_cpu": HERE_CPU, "horeka_gpu": HERE_GPU}
    assert row(study, "horeka_gpu")["time_s"] == pytest.approx(6.0)  # a GPU here counts as the profile's
    assert row(study, "horeka_cpu")["time_s"] == pytest.approx(60 * 2 / 76)
    # Two threads of which 76 cores are made scale perfectly on paper only.
    assert row(study, "horeka_cpu")["lower_bound"] and not row(study, "horeka_gpu")["lower_bound"]
    lines = markdown("t", study_sections(study)).splitlines()
    cpu = next(line for line in lines if line.startswith("| horeka_cpu | modelled |"))
    assert "| ≥ 1.579 |" in cpu and cpu.count("≥") == 4 and cpu.count("≤") == 1
    gpu = next(line for line in lines if line.startswith("| horeka_gpu | modelled |"))
    assert "≥" not in gpu and "| 6 |" in gpu


def test_a_run_with_a_profile_knows_its_speed_and_tdp(tmp_path):
    node = asdict(next(p for p in SHIPPED if p.name == "horeka_cpu"))
    cpu_run(tmp_path / "0", node={"_target_": "callbacks.energy.node.NodeProfile", **node})
    study = build([tmp_path], SHIPPED, GIVEN)
    here = next(r for r in study["rows"] if r["kind"] == "here")
    assert here["node"] == f"horeka_cpu (here: {HERE_CPU})"
    assert here["tdp_x_time_error"] == pytest.approx(540 / 55 - 1)
    assert row(study, "horeka_cpu")["time_s"] == pytest.approx(here["time_s"])


def test_no_profile_says_how_fast_a_gpu_is(tmp_path):
    gpu_run(tmp_path / "0")
    cpu_node = [p for p in SHIPPED if p.name == "horeka_cpu"]
    assert {r["kind"] for r in build([tmp_path], cpu_node, GIVEN)["rows"]} == {"here"}
    assert {r["kind"] for r in build([tmp_path], SHIPPED, GIVEN)["rows"]} == {"here", "what-if"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cpu_load": 1.5}, "--cpu-load 1.5"), ({"gpu_utilisation": -1}, "--gpu-util"), ({"tdp_w": 0.0}, "--tdp 0.0")],
)
def test_impossible_assumptions(options, message):
    with pytest.raises(ValueError, match=message):
        Assumptions(**options)


# -------------------------------------------------------------------------------------------------------- findings


def test_findings_on_the_shipped_profiles(tmp_path):
    """Acceptance 9: one estimated run on a CPU; the profiles show findings 1 and 2, and 3 as far as they can."""
    cpu_run(tmp_path / "0")
    study = build([tmp_path], SHIPPED, GIVEN)
    assert verdicts(study, "1") == {"estimated": UNKNOWN, "modelled": HOLDS}
    assert verdicts(study, "2")["modelled"] == HOLDS
    assert verdicts(study, "3a") == {"estimated": HOLDS}
    assert verdicts(study, "3b") == {"estimated": UNKNOWN, "modelled": UNKNOWN}
    powers = {r["node"]: r["mean_w"] for r in study["rows"] if r["kind"] == "what-if" and r["phase"] == TRAINING}
    assert max(powers.values()) > 1.2 * min(powers.values())
    energies = {r["node"]: r["energy_j"] for r in study["rows"] if r["kind"] == "what-if" and r["phase"] == TRAINING}
    assert energies["haicore_gpu_forced_cpu"] >= 1.5 * energies["horeka_cpu"]


def test_findings_from_runs_on_two_devices(tmp_path):
    cpu_run(tmp_path / "0", measured=True)  # 1.1 J a sample in training, 0.34 in inference
    gpu_run(tmp_path / "1")  # 0.72 and 0.525
    study = build([tmp_path], [], GIVEN)
    assert verdicts(study, "1") == {"measured": HOLDS}
    assert verdicts(study, "3a") == {"measured": HOLDS}
    assert verdicts(study, "3b") == {"measured": HOLDS}
    (pair,) = study["break_even"]
    assert (pair["cheaper_first"], pair["cheaper_after"], pair["training_samples"]) == (HERE_GPU, HERE_CPU, 3000)
    there, here = (1.1 * 3000, 55 * 20 / 3200), (0.72 * 3000, 0.525)
    assert there[0] + pair["inferences"] * there[1] == pytest.approx(here[0] + pair["inferences"] * here[1])


def test_findings_that_do_not_hold(tmp_path):
    cpu_run(tmp_path / "0", measured=True, watts=355.0, test_s=60 * 3200 / 3000)
    gpu_run(tmp_path / "1", test_s=6.4, gpus={"gpu0": 300.0})  # the same power, and the same energy in both phases
    study = build([tmp_path], [], GIVEN)
    assert verdicts(study, "1") == {"measured": FAILS}
    assert verdicts(study, "3a") == {"measured": FAILS}
    assert verdicts(study, "3b") == {"measured": FAILS}  # the GPU wins both
    (pair,) = study["break_even"]
    assert (pair["cheaper_first"], pair["cheaper_after"], pair["inferences"]) == (HERE_GPU, None, None)


def test_modelled_devices_with_runs_of_both(tmp_path):
    cpu_run(tmp_path / "0")
    gpu_run(tmp_path / "1", train_s=0.05, test_s=8.0)
    study = build([tmp_path], SHIPPED, GIVEN)
    (finding,) = [f for f in study["findings"] if (f["finding"], f["basis"]) == ("3b", "modelled")]
    # The CPU node's energies are lower bounds, so that it may use more in inference too.
    assert finding["verdict"] == UNKNOWN and "these are lower bounds" in finding["text"]
    assert "cpu_speed were below" in finding["text"] and "horeka_gpu is cheaper up to" in finding["text"]


def test_a_gpu_that_wins_both_against_a_lower_bound_has_won(tmp_path):
    cpu_run(tmp_path / "0")
    gpu_run(tmp_path / "1", train_s=0.05, test_s=0.05)
    study = build([tmp_path], SHIPPED, GIVEN)
    assert verdicts(study, "3b")["modelled"] == FAILS


def test_a_verdict_needs_runs_that_agree(tmp_path):
    cpu_run(tmp_path / "0", measured=True, test_s=50.0)  # 1.1 J a sample in training, 0.86 in inference: 1.28
    study = build([tmp_path], [], GIVEN)
    (finding,) = [f for f in study["findings"] if f["finding"] == "3a"]
    assert finding["verdict"] == HOLDS and "one run each: no spread is known" in finding["text"]
    cpu_run(tmp_path / "1", measured=True, train_s=55.0, test_s=55.0)  # 1.01 and 0.95
    study = build([tmp_path], [], GIVEN)
    (finding,) = [f for f in study["findings"] if f["finding"] == "3a"]
    assert finding["verdict"] == UNKNOWN and "differ too much" in finding["text"] and "one run" not in finding["text"]
    low, high = study["comparisons"][0]["ratio_range"]
    assert (low, high) == pytest.approx((55 * 55 / 3000 / (55 * 55 / 3200), 55 * 60 / 3000 / (55 * 50 / 3200)))


def test_powers_that_overlap_tell_nothing(tmp_path):
    for i, watts in enumerate((200.0, 320.0)):
        cpu_run(tmp_path / f"cpu{i}", measured=True, watts=watts)
    for i, watts in enumerate((200.0, 400.0)):
        gpu_run(tmp_path / f"gpu{i}", watts=60.0, gpus={"gpu0": watts})
    study = build([tmp_path], [], GIVEN)
    assert verdicts(study, "1") == {"measured": UNKNOWN}
    for folder in ("cpu1", "gpu0"):
        shutil.rmtree(tmp_path / folder)
    study = build([tmp_path], [], GIVEN)
    assert verdicts(study, "1") == {"measured": HOLDS}


def test_what_profiles_say_of_themselves_is_said_once(tmp_path):
    """Power at the stated load is a constant of the profile, whatever was run."""
    cpu_run(tmp_path / "0")
    cpu_run(tmp_path / "1", **XRAY)
    study = build([tmp_path], SHIPPED, GIVEN)
    modelled = [f for f in study["findings"] if (f["finding"], f["basis"]) == ("1", "modelled")]
    assert [f["workload"] for f in modelled] == ["any"]
    powers = {r["mean_w"] for r in study["rows"] if r["kind"] == "what-if"}
    assert modelled[0]["numbers"]["e_per_t_ratio"]["any"] == pytest.approx(max(powers) / min(powers))


def test_break_even_of_profiles_with_one_origin_is_no_result(tmp_path):
    cpu_run(tmp_path / "0")
    study = build([tmp_path], SHIPPED, GIVEN)
    assert len(study["break_even"]) == 3 and all(b["assumed"] for b in study["break_even"])
    text = markdown("t", study_sections(study)).partition("## Break-even")[2].partition("##")[0]
    assert "Left out are 3 pairs of profiles" in text and "however many inferences" not in text
    gpu_run(tmp_path / "1", train_s=0.05, test_s=8.0)
    study = build([tmp_path], SHIPPED, GIVEN)
    assert [b["assumed"] for b in study["break_even"] if b["basis"] == "modelled"].count(True) == 1  # the two CPU nodes
    text = markdown("t", study_sections(study)).partition("## Break-even")[2].partition("##")[0]
    assert "Left out are 1 pairs of profiles" in text and "| horeka_gpu |" in text


@pytest.mark.parametrize(
    ("training", "inference", "expected"),
    [
        ((100.0, 300.0), (2.0, 1.0), (0, 200.0)),  # the first is cheaper up to 200 inferences
        ((300.0, 100.0), (1.0, 2.0), (1, 200.0)),
        ((100.0, 300.0), (1.0, 2.0), (0, None)),
        ((300.0, 100.0), (2.0, 1.0), (1, None)),
        ((100.0, 300.0), (1.0, 1.0), (0, None)),
        ((100.0, 100.0), (1.0, 2.0), (0, None)),
        ((100.0, 100.0), (2.0, 1.0), (1, None)),
        ((100.0, 100.0), (1.0, 1.0), (None, None)),
    ],
)
def test_break_even(training, inference, expected):
    assert break_even(training, inference) == expected


# ------------------------------------------------------------------------------------------- output, byte for byte


def two_nodes(folder: Path) -> None:
    """A sweep with runs on one and on two machines."""
    counts = Counts({"fit/train": 1500, "test": 1600}, {"fit/train": 100})
    hosts = []
    for host, watts in (("one", 60.0), ("two", 70.0)):
        powers = {channel("cpu"): watts, channel("gpu0"): BUSY}
        path = folder / "0/energy" / f"node-{host}.jsonl"
        hosts.append(record(path, powers, counts=counts, host=host, world_size=2))
    both = Counts({"fit/train": 3000, "test": 3200}, {"fit/train": 100})
    finish(folder / "0", hosts, both, world_size=2, accelerator="gpu", hardware={"cuda": ["NVIDIA A100-SXM4-40GB"]})
    cpu_run(folder / "1")
    cpu_run(folder / "2", **XRAY)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_recorded_trace_of_two_nodes_gives_the_same_bytes_twice(tmp_path, capsys):
    """Acceptance 11, for all files of the study, wherever the runs lie."""
    two_nodes(tmp_path / "a" / "sweep")
    shutil.copytree(tmp_path / "a" / "sweep", tmp_path / "b" / "sweep")
    printed = []
    for place in ("a", "b", "a"):
        assert main(["study", str(tmp_path / place / "sweep"), "--out", str(tmp_path / f"out_{place}")]) == 0
        printed.append(capsys.readouterr().out.partition("\nmd ")[0])
    first, second = files(tmp_path / "out_a"), files(tmp_path / "out_b")
    assert set(first) == {"study.md", "study.json", "study.html", "node_types.png", "energy_against_time.png"}
    assert first == second and printed[0] == printed[1] == printed[2]
    study = json.loads(first["study.json"])
    train = row(study, f"2 nodes, 2 x {HERE_GPU[4:]}")
    assert train["energy_j"] == pytest.approx((60 + 70 + 600) * 60) and train["idle_gpus_j"] == 0
    assert train["samples_per_device_hour"] == pytest.approx(3000 / (2 * 60 / 3600))
    assert first["study.json"].decode() == json.dumps(study, indent=2, sort_keys=True) + "\n"


def test_files_beside_the_runs_and_what_they_say(tmp_path, capsys):
    two_nodes(tmp_path)
    assert main(["study", str(tmp_path), "--tdp", "100"]) == 0
    out = capsys.readouterr().out
    text = (tmp_path / "energy_study" / "study.md").read_text()
    assert out.startswith(text) and str(tmp_path / "energy_study" / "study.html") in out
    for name in ("horeka_cpu", "horeka_gpu", "haicore_gpu_forced_cpu"):
        lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert sum("| modelled |" in line for line in lines) == 4  # two workloads, two phases
    page = (tmp_path / "energy_study" / "study.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<img") == 2
    assert not [word for word in ("http:", "https:", "<script", "<link", "url(") if word in page]
    assert main(["study", str(tmp_path), "--tdp", "100"]) == 0  # its own files do no harm
    assert capsys.readouterr().out == out


def test_a_sweep_ends_with_its_findings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_nodes(tmp_path)
    text = sweep_study(tmp_path)
    assert "3a  training and inference cost differently per sample (xray, estimated): HOLDS" in text
    assert f"study  {tmp_path}/energy_study/study.html" in text and (tmp_path / "energy_study" / "study.html").is_file()
    assert f"again  PYTHONPATH={PROFILES.parents[1]} python -m callbacks.energy study {tmp_path}" in text
    monkeypatch.chdir(PROFILES.parents[1])
    assert f"again  python -m callbacks.energy study {tmp_path}" in sweep_study(tmp_path)
    (tmp_path / "none").mkdir()
    assert sweep_study(tmp_path / "none").startswith("no energy study: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--cpu-load", "2"], "--cpu-load 2.0 is no share"),
        (["{run}", "--profiles", "{run}/nothing"], "no YAML files"),
        (["{run}/nothing"], "no results.json in or below"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, arguments, message):
    cpu_run(tmp_path)
    assert main(["study", *(a.replace("{run}", str(tmp_path)) for a in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "energy_study").exists()


def test_json_holds_no_nan(tmp_path):
    cpu_run(tmp_path / "0", samples=(3000, 0))
    study = build([tmp_path], SHIPPED, GIVEN)
    assert json.loads(to_json(study))["comparisons"] == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": math.nan})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12_345.6, "12,300"), (0.04567, "0.0457"), (7.891e-5, "7.89e-5"), (2e9, "2e9"), (None, "-")],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


# ---------------------------------------------------------------------------------------------------------- figures


def test_figures_show_every_row(tmp_path):
    from callbacks.figures.energy_study import energy_against_time, node_types

    two_nodes(tmp_path)
    study = build([tmp_path], SHIPPED, GIVEN)
    for plot, points in ((node_types, "j_per_sample"), (energy_against_time, "j_per_sample")):
        figure = plot(study)
        markers = [line for axes in figure.axes for line in axes.lines if line.get_marker() not in ("None", None)]
        assert len(markers) == len(study["rows"])
        hollow = sum(line.get_markerfacecolor() == "white" for line in markers)
        assert hollow == sum(r["kind"] == "what-if" for r in study["rows"])
        drawn = sorted(float(line.get_xdata()[0] if plot is node_types else line.get_ydata()[0]) for line in markers)
        assert drawn == pytest.approx(sorted(r[points] for r in study["rows"]))


def test_no_text_of_the_node_figure_overlaps(tmp_path):
    from callbacks.figures.energy_study import node_types

    two_nodes(tmp_path)
    cpu_run(tmp_path / "3", test_s=64.0)  # both phases at nearly the same place
    figure = node_types(build([tmp_path], SHIPPED, GIVEN))
    figure.savefig(tmp_path / "figure.png")
    for axes in figure.axes:
        texts = [*axes.texts, *axes.get_yticklabels(), axes.title, axes._left_title]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        for i, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[i + 1 :])
