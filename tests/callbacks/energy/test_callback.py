"""The callback in real Trainers, with meters whose truth is known."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from callbacks.energy.__main__ import main
from callbacks.energy.callback import EnergyCallback, first_dimension
from callbacks.energy.meters.replay import ReplayMeter
from callbacks.energy.record import Counts, read_folder, read_records
from callbacks.energy.recorder import Recorder
from callbacks.energy.report import merge, run_page
from callbacks.energy.summary import LABELS, TRAIN, main_metrics_of
from callbacks.run_record import RunRecord
from tests.callbacks.energy.finished_runs import finish
from tests.callbacks.energy.sources import Clock, Source

POWER = {label: 50.0 + 40 * i for i, label in enumerate(LABELS)}


class Module(pl.LightningModule):
    """Steps that take ``pause_s``."""

    def __init__(self, pause_s: float = 0.002, fail_at: int | None = None) -> None:
        super().__init__()
        self.net, self.pause_s, self.fail_at = torch.nn.Linear(4, 1), pause_s, fail_at

    def _loss(self, batch: Any) -> torch.Tensor:
        time.sleep(self.pause_s)
        return self.net(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fail_at is not None and self.global_step >= self.fail_at:
            raise RuntimeError("boom")
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch)

    predict_step = test_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(samples: int, batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(samples, 4)), batch_size=batch_size)


def energy(folder: Path, power: Any = 75.0, **options: Any) -> EnergyCallback:
    defaults = {"meters": [], "codecarbon": False, "carbon_intensity": 400.0, "period_s": 0.05, "figures": []}
    source = power if isinstance(power, Source) else Source(power)
    return EnergyCallback(folder / "energy", extra_meters={"mine": source}, **(defaults | options))


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "accelerator": "cpu", "devices": 1, "enable_checkpointing": False,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


class Coded(Module):
    """Time passes in the hooks of the module alone, 0.2 s in each, and the module says what goes on: ``joules`` counts
    the energy of a device whose power is the code of the stage. The energy callback has no part in it.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(0.0)
        self.clock, self.joules, self.power = clock, 0.0, POWER["startup"]

    def passing(self, label: str, seconds: float = 0.2) -> None:
        self.power = POWER[label]
        self.clock.now += seconds
        self.joules += seconds * self.power

    def setup(self, stage: str) -> None:
        self.passing({"fit": "fit/other"}.get(stage, stage))

    def teardown(self, stage: str) -> None:
        self.passing("idle")

    def _in_validation(self) -> str:
        if self.trainer.state.fn == "validate":
            return "validate"
        return "fit/sanity" if self.trainer.sanity_checking else "fit/val"

    def on_validation_start(self) -> None:
        self.passing(self._in_validation())

    def on_validation_end(self) -> None:
        # The callback has closed a validation inside of training by now; its checkpoint comes next.
        self.passing("fit/other" if self._in_validation() == "fit/val" else self._in_validation())

    def on_train_start(self) -> None:
        self.passing("fit/other")

    def on_train_epoch_start(self) -> None:
        self.passing("fit/other")

    def on_train_epoch_end(self) -> None:
        self.passing("fit/other")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.passing("fit/train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.passing(self._in_validation())
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.passing("test")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.passing("predict")

    def on_test_end(self) -> None:
        self.passing("test")

    def on_predict_start(self) -> None:
        self.passing("predict")


@pytest.fixture
def clock(monkeypatch):
    """The recorder's time, which a test moves; its thread reads all the same."""
    clock = Clock()
    monkeypatch.setattr("callbacks.energy.callback.Recorder", functools.partial(Recorder, clock=clock))
    return clock


def test_the_mean_power_of_every_stage_is_the_code_that_the_module_gave_it(tmp_path, clock):
    """Acceptance 2, with its settings: a stage that gets a moment of another one has another mean power."""
    module = Coded(clock)
    callback = energy(tmp_path, Source(integral=lambda _: module.joules, clock=clock))
    fitting = trainer(callback, accumulate_grad_batches=2, val_check_interval=0.5, num_sanity_val_steps=2)
    begin = clock.now
    callback.begin_run()
    module.passing("startup")
    fitting.fit(module, loader(80), loader(40))
    fitting.validate(module, loader(40), verbose=False)
    fitting.test(module, loader(40), verbose=False)
    fitting.predict(module, loader(40))
    module.passing("idle")
    callback.end_run()
    stages = callback.summary["stages"]
    assert set(stages) == {*LABELS, "fit"}
    assert {label: stages[label]["mean_w"] for label in LABELS} == pytest.approx(POWER, rel=1e-9)
    parts = [values for label, values in stages.items() if label != "fit"]
    assert math.fsum(p["it_j"] for p in parts) == pytest.approx(callback.summary["it_j"], rel=1e-9)
    assert callback.summary["it_j"] == pytest.approx(module.joules, rel=1e-9)
    assert math.fsum(p["duration_s"] for p in parts) == pytest.approx(clock.now - begin, rel=1e-9)
    assert stages["fit/train"]["duration_s"] == pytest.approx(0.2 * 40)


def test_every_stage_gets_its_own_energy_and_nothing_is_left_over(tmp_path):
    callback = energy(tmp_path, period_s=0.5)
    module = Module()
    fitting = trainer(callback, accumulate_grad_batches=2, val_check_interval=0.5, num_sanity_val_steps=2)
    begin = time.perf_counter()
    callback.begin_run()
    time.sleep(0.02)
    fitting.fit(module, loader(80), loader(40))
    fitting.validate(module, loader(40), verbose=False)
    fitting.test(module, loader(40), verbose=False)
    fitting.predict(module, loader(40))
    time.sleep(0.02)
    callback.end_run()
    seconds = time.perf_counter() - begin
    stages = callback.summary["stages"]
    assert set(stages) == {*LABELS, "fit"}
    parts = [values for label, values in stages.items() if label != "fit"]
    assert math.fsum(p["it_j"] for p in parts) == pytest.approx(callback.summary["it_j"], rel=1e-9)
    assert callback.summary["it_j"] == pytest.approx(75.0 * callback.summary["duration_s"], rel=1e-9)
    assert math.fsum(p["duration_s"] for p in parts) == pytest.approx(callback.summary["duration_s"], rel=1e-9)
    assert callback.summary["duration_s"] == pytest.approx(seconds, abs=0.15)  # opening and closing
    assert {label: values["samples"] for label, values in stages.items() if values["samples"]} == {
        "fit/sanity": 8, "fit/train": 160, "fit/val": 160, "fit": 328, "validate": 40, "test": 40, "predict": 40,
    }  # fmt: skip
    assert stages["fit/train"]["updates"] == 20  # 2 epochs of 20 batches, two of them an update
    assert stages["fit/train"]["j_per_update"] == pytest.approx(stages["fit/train"]["it_j"] / 20)


TRACES = (
    # A node whose processor and GPU are read; and one with a wall meter, which is its total, beside its processor.
    {"cpu": lambda t: 60 + 4 * t, "gpu0": lambda t: 100 + 50 * (int(2 * t) % 3)},
    {"node": lambda t: 310 - t, "cpu": lambda t: 90.0},
)


class Replayed(Module):
    """Half a second passes in every step, and the meters are read."""

    def __init__(self, clock: Clock, callback: EnergyCallback) -> None:
        super().__init__(0.0)
        self.clock, self.callback = clock, callback

    def _loss(self, batch: Any) -> torch.Tensor:
        self.clock.now += 0.5
        self.callback._recorder.read()
        return super()._loss(batch)


def replay(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Two machines play their traces in a run each of one folder; all that can be said about it, as bytes."""
    for number, trace in enumerate(TRACES):
        path = folder / f"trace{number}.csv"
        times = [0.5 * i for i in range(41)]
        rows = [f"{t},{name},{power(t)}" for name, power in trace.items() for t in times]
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(["t_s,channel,value", *rows]) + "\n")
        with monkeypatch.context() as node:
            node.setenv("WATTLIGHT_HOST_ID", f"machine{number}")
            node.setenv("RANK", str(number))
            clock.now = 100.0 * (number + 1)
            callback = EnergyCallback(
                folder / "energy", meters=[], extra_meters={"trace": ReplayMeter(str(path), clock=clock)},
                codecarbon=False, carbon_intensity=400.0, period_s=1e6, figures=[],
            )  # fmt: skip
            module = Replayed(clock, callback)
            running = trainer(callback, max_epochs=2, num_sanity_val_steps=0)
            running.fit(module, loader(40), loader(12))
            running.test(module, loader(20), verbose=False)
            callback.end_run()
    records = {}
    for path in (folder / "energy").glob("*.jsonl"):
        lines = list(read_records(path))
        for line in lines:
            for stamp in ("unix_time", "pid"):
                line.pop(stamp, None)
        records[path.name] = json.dumps(lines).encode()
    (folder / "energy" / "summary.json").unlink()  # of the second machine alone
    merged = merge(folder)
    parts = {"merged": json.dumps(merged).encode(), "page": run_page(folder).encode()}
    hosts = read_folder(folder / "energy")
    counts = Counts({"fit/train": 160, "test": 40}, {"fit/train": 20})
    finish(folder, hosts, counts, world_size=2)
    assert main(["study", str(folder), "--out", str(folder / "study")]) == 0
    return records | parts | {path.name: path.read_bytes() for path in (folder / "study").iterdir()}


def test_a_recorded_trace_of_two_nodes_gives_the_same_report_twice(tmp_path, clock, monkeypatch):
    """Acceptance 11: byte for byte, apart from time stamps; and the energy is the traces'."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (replay(tmp_path / name / "run", clock, monkeypatch) for name in ("a", "b"))
    assert len([name for name in first if name.endswith(".jsonl")]) == 2 and "study.json" in first
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    merged = json.loads(first["merged"])
    steps = 2 * (10 + 3) + 5
    times = [0.5 * i for i in range(steps + 1)]
    true = sum(
        (power(begin) + power(end)) / 4
        for trace in TRACES
        for name, power in trace.items()
        if name == "node" or "node" not in trace
        for begin, end in itertools.pairwise(times)
    )
    assert merged["it_j"] == pytest.approx(true, rel=1e-6) and merged["estimated_fraction"] == 0
    assert merged["stages"]["fit/train"]["duration_s"] == pytest.approx(10.0)
    assert len(merged["hosts"]) == 2


class Writer(pl.Callback):
    """Writes for long when a stage is over, like `PredictionWriter`."""

    def __init__(self, clock: Clock, error: BaseException | None = None) -> None:
        self.clock, self.error = clock, error

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.clock.now += 3.0
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("first", ["energy", "writer"])
def test_what_other_callbacks_do_at_the_end_belongs_to_the_stage(tmp_path, clock, first):
    callback, writer = energy(tmp_path, Source(50.0, clock=clock)), Writer(clock)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path)  # which the Trainer puts behind the others
    order = [callback, writer] if first == "energy" else [writer, callback]
    running = trainer(*order, checkpoint, enable_checkpointing=True, max_epochs=1)
    running.predict(Module(0.0), loader(8))
    running.test(Module(0.0), loader(8), verbose=False)
    running.fit(Module(0.0), loader(8))
    assert callback.summary["stages"]["predict"]["duration_s"] == pytest.approx(3.0)
    assert callback.summary["stages"]["predict"]["it_j"] == pytest.approx(150.0)
    assert callback.summary["stages"]["test"]["duration_s"] == pytest.approx(3.0)
    assert callback.summary["stages"]["fit/other"]["duration_s"] == pytest.approx(3.0)
    callback.end_run()
    assert callback.summary["stages"]["idle"]["duration_s"] == pytest.approx(0.0, abs=1e-9)
    assert running.callbacks.count(callback) == 1 and len(running.callbacks) == 4


def test_a_writer_that_fails_costs_the_stage_nothing(tmp_path, clock):
    callback = energy(tmp_path, Source(50.0, clock=clock))
    with pytest.raises(OSError, match="disk full"):
        trainer(callback, Writer(clock, OSError("disk full"))).predict(Module(0.0), loader(8))
    assert callback.summary["status"] == "failed"
    assert callback.summary["stages"]["predict"]["it_j"] == pytest.approx(150.0)
    (host,) = read_folder(tmp_path / "energy")
    assert host.status == "failed" and host.tallies["predict"].total_j == pytest.approx(150.0)
    assert "energy-recorder" not in [t.name for t in threading.enumerate()]


class Work(Module):
    """Every step draws an energy that says which kind of step it is: what was counted where can be read off."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.joules = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.joules += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.joules += 1e3
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.joules += 1e6

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.joules += 1e9


def test_the_energy_of_every_step_is_in_its_stage(tmp_path):
    module = Work()
    callback = energy(tmp_path, Source(integral=lambda _: module.joules), period_s=0.05)
    running = trainer(callback, accumulate_grad_batches=2, val_check_interval=0.5, num_sanity_val_steps=2)
    running.fit(module, loader(80), loader(40))  # 20 batches an epoch, 10 of validation twice in each
    running.validate(module, loader(40), verbose=False)
    running.test(module, loader(40), verbose=False)
    running.predict(module, loader(40))
    callback.end_run()
    found = {label: values["it_j"] for label, values in callback.summary["stages"].items() if label != "fit"}
    # The first batch of training after a pause begins with the step, so nothing of it is elsewhere.
    assert found == {
        "startup": 0, "fit/sanity": 2e3, "fit/train": 40, "fit/val": 40e3, "fit/other": 0, "validate": 10e3,
        "test": 10e6, "predict": 10e9, "idle": 0,
    }  # fmt: skip


def test_several_trainers_and_runs_with_one_object(tmp_path):
    callback = energy(tmp_path)
    trainer(callback, max_epochs=1).fit(Module(), loader(40))
    trainer(callback).test(Module(), loader(20), verbose=False)
    assert callback.summary["stages"]["fit/train"]["updates"] == 10
    trainer(callback, max_epochs=1).fit(Module(), loader(20))
    assert callback.summary["stages"]["fit/train"]["updates"] == 15
    with pytest.raises(RuntimeError, match="boom"):
        trainer(callback).fit(Module(fail_at=2), loader(80))
    assert callback.summary["status"] == "failed"
    trainer(callback, max_epochs=1).fit(Module(), loader(20))  # a new run
    callback.end_run()
    assert callback.summary["stages"]["fit/train"]["updates"] == 5
    (host,) = read_folder(tmp_path / "energy")
    assert host.segments == 2 and host.status == "completed"


def test_training_that_resumes_within_an_epoch_is_training(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    trainer(Save(), max_epochs=1).fit(Module(0.0), loader(40))
    callback = energy(tmp_path)
    trainer(callback, max_epochs=1).fit(Module(0.0), loader(40), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    callback.end_run()
    train = callback.summary["stages"]["fit/train"]
    assert (train["samples"], train["updates"]) == (20, 5) and train["it_j"] > 0


def test_a_module_with_a_number_called_batch_size(tmp_path):
    module = Module()
    module.batch_size = 32
    callback = energy(tmp_path)
    trainer(callback).test(module, loader(8), verbose=False)
    callback.end_run()
    assert callback.summary["stages"]["test"]["samples"] == 8


def test_counts_are_as_recent_as_the_energy(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 15:
                time.sleep(0.2)  # a period passes, then the process might be killed
                seen.append(read_folder(tmp_path / "energy")[0].counts)

    seen: list[Any] = []
    callback = energy(tmp_path)
    trainer(callback, Look(), max_epochs=1).fit(Module(), loader(80))
    callback.end_run()
    assert seen[0].samples[TRAIN] == 64 and seen[0].updates[TRAIN] == 16


def test_workers_neither_lock_nor_write_the_record(tmp_path):
    callback = energy(tmp_path)
    data = DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4, num_workers=1, persistent_workers=True)
    running = trainer(callback)
    running.test(Module(), data, verbose=False)
    callback.end_run()
    again = energy(tmp_path)
    again.begin_run()
    assert again._recorder is not None
    again.end_run()
    (host,) = read_folder(tmp_path / "energy")
    assert host.segments == 2


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "energy").write_text("a file in the way")
    callback = energy(tmp_path)
    trainer(callback).test(Module(), loader(8), verbose=False)
    callback.end_run()
    assert callback.summary["it_j"] > 0
    assert any("cannot be written" in message for message in caplog.messages)


def test_epochs_add_up_to_training(tmp_path):
    callback = energy(tmp_path)
    fitting = trainer(callback, max_epochs=3, num_sanity_val_steps=0)
    fitting.fit(Module(), loader(40), loader(20))
    callback.end_run()
    epochs = callback.summary["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    stages = callback.summary["stages"]
    assert sum(e["train_kwh"] for e in epochs) == pytest.approx(stages["fit/train"]["it_kwh"], rel=1e-9)
    assert sum(e["val_kwh"] for e in epochs) == pytest.approx(stages["fit/val"]["it_kwh"], rel=1e-9)
    assert all("val/loss" in epoch["metrics"] for epoch in epochs)
    cumulative = [epoch["cumulative_kwh"] for epoch in epochs]
    assert cumulative == sorted(cumulative) and cumulative[0] > epochs[0]["it_kwh"]


def test_a_callback_without_a_runner_starts_with_the_first_stage(tmp_path):
    callback = energy(tmp_path)
    trainer(callback).test(Module(), loader(8), verbose=False)
    assert callback.summary["it_j"] > 0
    assert "energy-recorder" in [t.name for t in threading.enumerate()]
    callback.end_run()
    callback.end_run()
    assert "energy-recorder" not in [t.name for t in threading.enumerate()]


def test_constructing_opens_nothing(tmp_path):
    callback = energy(tmp_path)
    assert not (tmp_path / "energy").exists()
    assert "energy-recorder" not in [t.name for t in threading.enumerate()]
    callback.end_run()
    assert not (tmp_path / "energy").exists()


def test_an_exception_closes_the_record(tmp_path):
    callback = energy(tmp_path)
    with pytest.raises(RuntimeError, match="boom"):
        trainer(callback).fit(Module(fail_at=5), loader(80))
    assert "energy-recorder" not in [t.name for t in threading.enumerate()]
    (host,) = read_folder(tmp_path / "energy")
    assert host.status == "failed"
    assert host.tallies["fit/train"].total_j > 0
    (path,) = (tmp_path / "energy").glob("*.jsonl")
    assert {"kind": "exception", "type": "RuntimeError"} in list(read_records(path))
    summary = json.loads((tmp_path / "energy" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["stages"]["fit/train"]["updates"] == 5
    assert summary["it_j"] == pytest.approx(sum(t.total_j for t in host.tallies.values()), rel=1e-4)


def test_results_and_loggers_get_the_same_numbers(tmp_path):
    class Logger(pl.loggers.Logger):
        name, version = "l", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[dict[str, float], int]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((dict(metrics), step))

        def log_hyperparams(self, *args: Any) -> None: ...

    logger, record = Logger(), RunRecord(str(tmp_path), {})
    callback = energy(tmp_path)
    running = trainer(record, callback, logger=logger)
    running.fit(Module(pause_s=0.01), loader(40), loader(20))
    running.test(Module(), loader(20), verbose=False)
    callback.end_run()
    rows = [row for row, _ in logger.rows]
    epochs = [row for row in rows if "energy/epoch/it_kwh" in row]
    power = [row for row in rows if "energy/power_w/total" in row]
    totals = [row for row in rows if "energy/total_it_kwh" in row]
    assert len(epochs) == 2 and len(totals) == 2 and len(power) >= 3
    assert all(row["energy/power_w/cpu"] == pytest.approx(75.0) for row in power)
    times = [row["energy/time_s"] for row in power]
    assert times == sorted(set(times))
    assert record.costs["energy/total_it_kwh"] >= totals[-1]["energy/total_it_kwh"] > 0
    assert record.record["energy"]["stages"]["test"]["samples"] == 20
    assert [host["status"] for host in record.record["energy"]["hosts"].values()] == ["completed"]
    assert "energy/earlier_kwh" not in record.costs
    assert record.record["energy"]["carbon_intensity_g_per_kwh"] == 400


def test_parts_of_a_resumed_run_are_kept(tmp_path):
    first = energy(tmp_path)
    trainer(first).test(Module(), loader(40), verbose=False)
    first.end_run("interrupted")
    second = energy(tmp_path)
    trainer(second).test(Module(), loader(40), verbose=False)
    second.end_run()
    assert second.summary["earlier_kwh"] == pytest.approx(first.summary["it_kwh"], rel=1e-5)
    (host,) = read_folder(tmp_path / "energy")
    assert host.segments == 2
    both = first.summary["it_j"] + second.summary["it_j"]
    assert sum(t.total_j for t in host.tallies.values()) == pytest.approx(both, rel=1e-4)
    assert main_metrics_of(second.summary)["energy/earlier_kwh"] == second.summary["earlier_kwh"]


def test_the_energy_that_an_epoch_was_reached_with_includes_the_parts_before_a_resume(tmp_path, clock):
    class Slow(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            clock.now += 1.0
            return super().training_step(batch, batch_idx)

    for _ in range(2):
        callback = energy(tmp_path, Source(60.0, clock=clock), period_s=1e6)
        trainer(callback, max_epochs=1).fit(Slow(0.0), loader(40))
        callback.end_run()
    (epoch,) = callback.summary["epochs"]
    assert epoch["it_kwh"] * 3.6e6 == pytest.approx(600.0)
    assert epoch["cumulative_kwh"] * 3.6e6 == pytest.approx(1200.0)


def test_a_second_recorder_on_the_machine_only_counts(tmp_path):
    first, second = energy(tmp_path), energy(tmp_path)
    first.begin_run()
    second.begin_run()
    assert second._recorder is None
    trainer(second).test(Module(), loader(8), verbose=False)
    assert second.counts.samples == {"test": 8}
    second.end_run()
    first.end_run()
    assert len(list((tmp_path / "energy").glob("*.jsonl"))) == 1


def test_two_energy_callbacks_are_a_mistake(tmp_path):
    one, two = energy(tmp_path / "a"), energy(tmp_path / "b")
    with pytest.raises(ValueError, match="two EnergyCallbacks"):
        trainer(one, two).test(Module(), loader(8), verbose=False)
    one.end_run()
    two.end_run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period_s": 0.01}, r"period_s=0\.01.*at least 0\.05"),
        ({"pue": 0.9}, r"pue=0\.9"),
        ({"gpu_scope": "mine"}, "gpu_scope='mine'.*auto, job or node"),
        ({"meters": "nvlm"}, "meters='nvlm'"),
        ({"carbon_intensity": None, "country": "DEX"}, "DEX.*DEU"),
        ({"carbon_intensity": -1.0}, "carbon_intensity=-1"),
        ({"pue": float("inf")}, "pue=inf"),
        ({"options": {"cpu_modell": {}}}, "no meter cpu_modell; there are .*cpu_model"),
        ({"figures": ["nope"]}, "has no nope"),
        ({"country": "XXX"}, "XXX"),
        ({"overhead_w": float("nan")}, "overhead_w=nan"),
    ],
)
def test_bad_settings_name_the_remedy(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        energy(tmp_path, **options)


def test_unknown_and_unreadable_meters_are_errors_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="rapl"):
        energy(tmp_path, meters=["rapll"]).begin_run()
    missing = {"rapl": {"root": str(tmp_path / "none")}}
    with pytest.raises(ValueError, match="'rapl' cannot be read here"):
        energy(tmp_path, meters=["rapl"], options=missing).begin_run()


def test_counters_of_root_alone_are_a_warning_in_the_run_and_an_estimate_in_its_numbers(tmp_path, caplog, monkeypatch):
    package = tmp_path / "powercap" / "intel-rapl:0"
    package.mkdir(parents=True)
    for name, content in (("name", "package-0"), ("energy_uj", "5"), ("max_energy_range_uj", "262143328850")):
        (package / name).write_text(content)
    allowed = os.open

    def guarded(path: Any, *arguments: Any, **keywords: Any) -> int:
        if str(path) == str(package / "energy_uj"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return allowed(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", guarded)
    options = {"rapl": {"root": str(tmp_path / "powercap")}, "hwmon": {"root": str(tmp_path / "none")}}
    callback = EnergyCallback(
        tmp_path / "energy", options=options, codecarbon=False, carbon_intensity=1.0, figures=[], period_s=0.05
    )
    trainer(callback).test(Module(), loader(20), verbose=False)
    callback.end_run()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "rapl" in r.getMessage()]
    assert str(package / "energy_uj") in warning and "sudo chmod a+r" in warning
    channel = callback.summary["channels"]["cpu"]
    assert not channel["measured"] and channel["source"].startswith("model (")
    assert callback.summary["estimated_fraction"] == 1


def test_automatic_choice_says_what_is_estimated_and_why(tmp_path, caplog):
    options = {"rapl": {"root": str(tmp_path / "none")}, "hwmon": {"root": str(tmp_path / "none")}}
    callback = EnergyCallback(
        tmp_path / "energy", options=options, codecarbon=False, carbon_intensity=1.0, figures=[], period_s=0.05
    )
    with caplog.at_level(logging.INFO):
        callback.begin_run()
    time.sleep(0.2)
    callback.end_run()
    line = next(message for message in caplog.messages if message.startswith("energy:"))
    assert "cpu estimated (model" in line and "dram estimated" in line and "rapl:" in line
    assert callback.summary["estimated_fraction"] == 1
    assert callback.summary["it_j"] > 0


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ({"a": "text", "x": torch.zeros(3)}, 3),
        ([[torch.zeros(7, 1)], torch.zeros(2)], 7),
        ("text", 0),
        (None, 0),
        (torch.zeros(()), 0),
        ({"t": torch.zeros(()), "x": torch.zeros(8, 2)}, 8),
        ([{"image": torch.zeros(3, 4, 4)}] * 6, 6),
        ((torch.zeros(4, 1), torch.zeros(4)), 4),
    ],
)
def test_samples_of_a_batch(batch, size):
    assert first_dimension(batch) == size
