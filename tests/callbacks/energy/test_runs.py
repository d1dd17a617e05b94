"""Energy of whole runs as a user starts them: deaths, signals, ranks, machines."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from callbacks.energy.callback import EnergyCallback
from callbacks.energy.record import read_folder, read_records
from callbacks.energy.recorder import Recorder
from callbacks.energy.summary import TRAIN
from callbacks.run_record import RunRecord
from tests import cli
from tests.callbacks.energy.sources import Source
from tests.callbacks.energy.test_callback import Module, loader, trainer
from tests.cli import TINY

WATTS, PERIOD = 100.0, 0.1
WALL = "callbacks.energy.extra_meters={wall:{_target_:callbacks.energy.meters.constant.ConstantMeter,watts:100}}"
METERED = (
    WALL,
    "callbacks.energy.meters=[]",
    f"callbacks.energy.period_s={PERIOD}",
    "callbacks.energy.codecarbon=false",
)
SLOW = ("model.fault=slow", "trainer.max_epochs=1000")


def energy_file(folder: Path) -> Path:
    (path,) = (folder / "energy").glob("*.jsonl")
    return path


def start_of(path: Path) -> float:
    """Time of day at which recording began."""
    return next(r["unix_time"] for r in read_records(path) if r["kind"] == "start")


def true_energy(folder: Path) -> float:
    """Of the wall meter, by the time of day, from the first to the last line of the record."""
    path = energy_file(folder)
    return WATTS * (path.stat().st_mtime - start_of(path))


def started(folder: Path, *more: str) -> cli.Started:
    """A run that has come to its training steps."""
    run = cli.Started(*TINY, *METERED, *SLOW, f"model.mark={folder}/mark", f"hydra.run.dir={folder}", *more, cwd=folder)
    run.wait_for(folder / "mark.0")
    return run


def test_sigkill_in_training_keeps_the_last_summary(tmp_path):
    run = started(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while "energy" not in cli.results(tmp_path) and time.monotonic() < deadline:  # an epoch ends, and the next
            time.sleep(0.05)
        run.signal(signal.SIGKILL)
        run.end()
    finally:
        run.kill()
    (host,) = read_folder(tmp_path / "energy")
    found = sum(tally.total_j for tally in host.tallies.values())
    assert host.status == "killed" and host.tallies[TRAIN].total_j > 0
    assert 0 < cli.results(tmp_path)["energy"]["it_j"] <= found  # what was known at the last end of an epoch


@pytest.mark.parametrize("stage", ["startup", "fit/train", "fit/val", "test", "predict"])
def test_sigkill_at_any_moment_loses_at_most_one_period(tmp_path, stage, late_s=0.2):
    """``late_s``: a busy machine may wake the thread that reads late; `test_4_deaths` allows a quiet one nothing."""
    seed = int(os.environ.get("WATTLIGHT_TEST_SEED", time.time_ns() % 10**9))
    wait, period = random.Random(seed).uniform(0.0, 3.0), 1.0  # the program's own period
    print(f"killed {wait:.3f} s after {stage} began; again with WATTLIGHT_TEST_SEED={seed}")
    long = f"{{_target_:tests.callbacks.energy.long_stage.LongStage,stage:{stage},mark:{tmp_path}/there}}"
    run = cli.Started(
        *TINY, *METERED, f"callbacks.energy.period_s={period}", f"callbacks.long={long}", "predict=true",
        f"hydra.run.dir={tmp_path}", cwd=tmp_path,
    )  # fmt: skip
    try:
        run.wait_for(tmp_path / "there")
        time.sleep(wait)
        killed = time.time()
        run.signal(signal.SIGKILL)
        run.end()
    finally:
        run.kill()
    (host,) = read_folder(tmp_path / "energy")
    true = WATTS * (killed - start_of(energy_file(tmp_path)))
    found = sum(tally.total_j for tally in host.tallies.values())
    print(f"lost {(true - found) / WATTS:.3f} s of energy, a period is {period} s")
    assert true - (period + late_s) * WATTS <= found <= true + 0.05 * WATTS
    assert host.status == "killed"
    if wait > 2 * period:
        assert host.tallies[stage].total_j > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_signals_close_the_record(tmp_path, number):
    run = started(tmp_path)
    try:
        time.sleep(0.5)
        run.signal(number)
        code, output = run.end()
    finally:
        run.kill()
    assert code == 128 + number
    (host,) = read_folder(tmp_path / "energy")
    assert host.status == "interrupted"
    record = cli.results(tmp_path)
    assert record["status"] == record["energy"]["status"] == "interrupted"
    assert record["energy"]["it_j"] == pytest.approx(true_energy(tmp_path), abs=PERIOD * WATTS)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert record["energy"]["stages"][TRAIN]["updates"] == saved["global_step"] > 0
    assert "energy: other estimated (constant (100 W))" in output
    assert f"{record['energy']['it_j']:.4g} J (" in output  # what it has cost until then


def test_a_failure_keeps_its_exit_code_and_its_energy(tmp_path):
    done = cli.run(*TINY, *METERED, "model.fault=raise", f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 1 and "boom" in done.stderr
    record = cli.results(tmp_path)
    assert record["status"] == record["energy"]["status"] == "failed"
    assert record["energy"]["stages"][TRAIN]["it_j"] > 0
    assert record["energy"]["it_j"] == pytest.approx(true_energy(tmp_path), abs=PERIOD * WATTS)


def test_energy_alone_among_the_callbacks_is_stopped_by_lightning(tmp_path):
    """Without the callback that ends runs in order, SIGTERM is Lightning's, and its exit code that of SIGTERM."""
    run = started(tmp_path, "callbacks=energy")
    try:
        run.signal(signal.SIGTERM)
        code, _ = run.end()
    finally:
        run.kill()
    assert code == 128 + signal.SIGTERM
    record = cli.results(tmp_path)
    assert record["status"] == record["energy"]["status"] == "interrupted"
    assert record["energy"]["it_j"] == pytest.approx(true_energy(tmp_path), abs=PERIOD * WATTS)


def test_two_ranks_are_one_machine(tmp_path):
    done = cli.ok(*TINY, *METERED, "trainer=multi_cpu", "trainer.devices=2", f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    record = cli.results(tmp_path)
    energy = record["energy"]
    assert len(energy["hosts"]) == 1
    assert energy["it_j"] == pytest.approx(WATTS * energy["duration_s"], rel=0.02)
    train = energy["stages"][TRAIN]
    # 53 samples, global batches of 8: 6 steps of 4 samples on each of two ranks, three epochs.
    assert (train["samples"], train["updates"], train["device_updates"]) == (144, 18, 36)
    assert energy["stages"]["test"]["samples"] == 13
    assert train["device_hours"] == pytest.approx(2 * train["duration_s"] / 3600)
    assert done.stdout.count("by stage, J") == 1


def two_machines(folder: str) -> dict:
    """On each rank: a run of two ranks that believe to be on different machines."""
    rank = os.environ["RANK"]
    before = dict(os.environ)
    os.environ |= {"WATTLIGHT_HOST_ID": f"machine{rank}", "LOCAL_RANK": "0", "NODE_RANK": rank, "LOCAL_WORLD_SIZE": "1"}
    try:
        record = RunRecord(folder, {})
        callback = EnergyCallback(
            f"{folder}/energy", meters=[], extra_meters={"wall": Source(100.0 if rank == "0" else 40.0)},
            codecarbon=False, carbon_intensity=1.0, figures=[], period_s=0.05,
        )  # fmt: skip
        running = trainer(record, callback, strategy="ddp", num_nodes=2, devices=1, num_sanity_val_steps=0)
        running.fit(Module(), loader(40), loader(20))
        callback.end_run()
        return callback.summary
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_two_machines_add_up(ranks2, tmp_path):
    summary, other = ranks2(two_machines, str(tmp_path))
    assert not other
    assert len(summary["hosts"]) == 2 and len(list((tmp_path / "energy").glob("*.jsonl"))) == 2
    train = summary["stages"][TRAIN]
    assert train["it_j"] == pytest.approx(140 * train["node_hours"] / 2 * 3600, rel=0.05)
    assert train["samples"] == 80  # two epochs of 40 samples, whoever trained on them
    assert train["updates"] == 10
    hosts = read_folder(tmp_path / "energy")
    assert sum(t.total_j for host in hosts for t in host.tallies.values()) == pytest.approx(summary["it_j"], rel=0.05)


def test_codecarbon_runs_beside_without_a_network(tmp_path, monkeypatch):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    summaries = []
    for name, pue in (("first", 1.0), ("one", 1.0), ("more", 1.5)):  # imports and caches are the first one's
        folder = tmp_path / name
        callback = EnergyCallback(
            folder / "energy", meters=[], extra_meters={"wall": Source(100.0)}, country="DEU", pue=pue, period_s=0.2,
            figures=[],
        )  # fmt: skip
        running = trainer(callback, max_epochs=20)
        running.fit(Module(0.01), loader(40), loader(8))
        running.test(Module(), loader(8), verbose=False)
        callback.end_run()
        summaries.append(callback.summary)
        stored = json.loads((folder / "energy" / "summary.json").read_text())["codecarbon"]
        assert stored["cpu_j"] > 0 and stored["ram_j"] > 0 and stored["status"] == "ok"
    assert not attempts
    assert not [name for name in os.listdir(tempfile.gettempdir()) if "codecarbon.lock" in name]
    for summary, pue in zip(summaries, (1.0, 1.0, 1.5), strict=True):
        assert summary["it_j"] == pytest.approx(100 * summary["duration_s"], rel=1e-6)
        assert summary["facility_kwh"] == pytest.approx(pue * summary["it_kwh"], rel=1e-12)
        grams = summary["carbon_intensity_g_per_kwh"]
        assert summary["co2_kg"] == pytest.approx(pue * summary["it_kwh"] * grams / 1000, rel=1e-12)
    # codecarbon's own totals know nothing of the building.
    rates = [summary["codecarbon"]["ram_j"] / summary["duration_s"] for summary in summaries]
    assert rates[2] == pytest.approx(rates[1], rel=0.25)


def test_hostile_configuration_of_codecarbon_changes_nothing(tmp_path, monkeypatch):
    hostile = (
        "[codecarbon]\npue=9\nforce_cpu_power=5000\nforce_ram_power=5000\nmeasure_power_secs=0.001\n"
        "output_dir=/nonexistent\nsave_to_api=true\nallow_multiple_runs=false\ntracking_mode=nonsense\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    for folder in (home, tmp_path):
        (folder / ".codecarbon.config").write_text(hostile)
    done = cli.ok(
        *TINY, "callbacks.energy.codecarbon=true", "callbacks.energy.meters=estimates", "trainer.max_epochs=30",
        "model.fault=slow", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path,
        HOME=str(home), CODECARBON_PUE="7", CODECARBON_FORCE_CPU_POWER="9000", CODECARBON_LOG_LEVEL="debug",
    )  # fmt: skip
    energy = cli.results(tmp_path / "run")["energy"]
    watts = {part: energy["codecarbon"][f"{part}_j"] / energy["duration_s"] for part in ("cpu", "ram")}
    assert 0 < watts["cpu"] < 4.5 * os.cpu_count()  # 4 W a thread; a PUE of 7 or 9, or 5000 W, would be far beyond
    assert 0 < watts["ram"] < 70
    assert energy["facility_kwh"] == energy["it_kwh"]
    assert "[codecarbon" not in done.stdout + done.stderr
    assert not (tmp_path / "emissions.csv").exists() and not (tmp_path / "run" / "emissions.csv").exists()


def test_no_thread_is_left_after_a_stage_fails(tmp_path):
    class Failing(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            raise KeyboardInterrupt

    callback = EnergyCallback(
        tmp_path / "energy", meters=[], extra_meters={"wall": Source(1.0)}, codecarbon=False, carbon_intensity=1.0,
        figures=[],
    )  # fmt: skip
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(callback, Failing()).fit(Module(), loader(8), loader(8))
    (host,) = read_folder(tmp_path / "energy")
    assert host.status in ("interrupted", "failed")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("energy")]


def test_tasks_of_codecarbon_would_lose_energy(tmp_path):
    """Why stages are not codecarbon's tasks: a task resets its clock, and what came since the last tick is gone."""
    import logging

    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = OfflineEmissionsTracker(
        country_iso_code="DEU", measure_power_secs=3, output_methods=[], allow_multiple_runs=True,
        log_level="critical", force_ram_power=10, force_cpu_power=10, output_dir=str(tmp_path),
    )  # fmt: skip
    recorder = Recorder([Source(10.0)], period_s=3.0)
    tracker.start()
    begin = time.perf_counter()
    recorder.start("before")
    time.sleep(0.6)  # a period is long enough for no tick to come between, however busy the machine
    tracker.start_task("stage")
    recorder.switch("stage")
    time.sleep(0.6)
    tracker.stop_task("stage")
    recorder.switch("after")
    time.sleep(0.2)
    recorder.stop()
    true = 10.0 * (time.perf_counter() - begin)
    tracker.stop()
    ours = sum(tally.total_j for tally in recorder.tallies().values())
    theirs = tracker._total_ram_energy.kWh * 3.6e6
    assert ours == pytest.approx(true, rel=0.02)
    assert theirs < 0.85 * true
