"""What measuring energy costs, here and in the usual tools.

- *Per reading*: CPU time of one reading of all meters of this machine, against one measurement of codecarbon.
- *Per run*: the same training (1,000 steps of 3 ms in a Lightning Trainer) without anything, with the callback at one
  reading per second, and with the tracker of each peer around it as its documentation says. The network is as wide as
  makes its step take 3 ms here; a row tells how long it took in the end, and fails if it took a tenth longer (shorter
  steps, on a machine that has become faster meanwhile, make the callback's share larger). Rounds are
  interleaved; a variant's tracker is started before the clock and stopped behind it, so what counts is what it does
  meanwhile.
- *Speed in turns within one run*: blocks of 50 steps with the callback and without it take turns, so that a machine
  whose speed drifts by 10 % between runs does so within no pair: the interleaved ratio of the steps per second, which
  the bound of 0.99 is about.
- *In the hooks*: CPU time inside the callback's hooks and its thread, as a share of the CPU time of the run, which no
  neighbour on the machine can hide.
- *Short stages*: energy of a stage of one second that begins between two periods, against the truth (10 W constant).

codecarbon is a dependency of the program; carbontracker, zeus and perun are peers that are measured where they are
installed (extra ``peers``). Without sensors zeus and perun read nothing, which costs little. pyJoules 0.5.1 refuses to
begin without a sensor (``NoSuchDeviceError``), eco2ai 0.3.12 cannot be imported (``pkg_resources`` has left
setuptools): neither can be compared on a machine like that.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import (
    REPEATS,
    Estimate,
    Lap,
    Timing,
    compare,
    interleave,
    median,
    ratio_row,
    threads,
    time_rows,
)
from benchmarks.record import Result, Row
from callbacks.energy.callback import EnergyCallback

CLAIM: str = (
    "The energy callback takes less than 0.5 % of a run's time and leaves at least 99 % of its speed; a reading of all "
    "meters takes less CPU time than one of codecarbon."
)

OURS, NOTHING, CODECARBON = "Wattlight", "without", "codecarbon"
STEPS, STEP_MS = 1000, 3.0
STEP_TOLERANCE = 0.1
BATCH = 16
BLOCK, PAIRS = 50, 200


class Work(pl.LightningModule):
    """Four linear layers; their width decides how long a step takes.

    Args:
        width: Inputs, hidden units and outputs.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean square of the output."""
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), 1e-3)


def train(width: int, steps: int, *callbacks: pl.Callback) -> Lap:
    """Train and return the time from the first to the last step."""
    data = DataLoader(TensorDataset(torch.randn(steps * BATCH, width)), batch_size=BATCH)
    clock = Steps()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[clock, *callbacks],
    )  # fmt: skip
    trainer.fit(Work(width), data)
    return Lap(clock.end.wall - clock.begin.wall, clock.end.cpu - clock.begin.cpu)


class Steps(pl.Callback):
    """Reads the clocks at the first and the last step."""

    begin: Lap
    end: Lap

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first batch."""
        self.begin = Lap(time.perf_counter(), time.process_time())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last one."""
        self.end = Lap(time.perf_counter(), time.process_time())


class Clocked(EnergyCallback):
    """Adds up the CPU time inside its own hooks and its thread; wall time would count waiting for the interpreter.

    What the clock itself takes is left out: behind a training step the caches of the processor hold something else, so
    that the first look at it takes microseconds, and the second one, between two others, tells what one costs.
    """

    HOOKS = (
        "on_train_start", "on_train_epoch_start", "_begin_training", "on_train_batch_end", "on_train_epoch_end",
        "on_train_end",
    )  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds = 0.0
        for name in self.HOOKS:
            setattr(self, name, self._timed(getattr(self, name)))

    def begin_run(self) -> None:
        """Time the thread's readings too, but not twice: those at boundaries are within a hook."""
        super().begin_run()
        read, timed = self._recorder.read, self._timed(self._recorder.read)
        main = threading.get_ident()
        self._recorder.read = lambda: (read if threading.get_ident() == main else timed)()

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            time.thread_time()
            before = time.thread_time()
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begin - (begin - before)

        return timed


class Switched(EnergyCallback):
    """Works in every second block of ``BLOCK`` training steps only, and times the blocks.

    The hooks of every batch and the readings of the thread come and go; what happens once per run is not counted here
    but in `hook_share`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.laps: list[Lap] = []
        self._steps, self._begin = 0, Lap(0.0, 0.0)

    @property
    def working(self) -> bool:
        """Whether this block is measured; on, off, off, on: a steady drift of the machine cancels too."""
        return self._steps // BLOCK % 4 in (0, 3)

    def begin_run(self) -> None:
        """Let the thread read in working blocks only."""
        super().begin_run()
        read = self._recorder.read
        self._recorder.read = lambda *args, **kwargs: read(*args, **kwargs) if self.working else None

    def _begin_training(self, *args: Any) -> None:
        """The first batch of an epoch."""
        super()._begin_training(*args)
        self.on_train_batch_start(*args)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """The clock; the callback itself has no such hook but in the first batch."""
        if self._steps % BLOCK == 0:
            now = Lap(time.perf_counter(), time.process_time())
            if self._steps:
                self.laps.append(Lap(now.wall - self._begin.wall, now.cpu - self._begin.cpu))
            self._begin = now

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The callback, then the count."""
        if self.working:
            super().on_train_batch_end(*args, **kwargs)
        self._steps += 1


# ------------------------------------------------------------------------------------------------------------ peers


@contextlib.contextmanager
def nothing(folder: Path) -> Iterator[list[pl.Callback]]:
    """No measurement."""
    yield []


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[list[pl.Callback]]:
    """The callback at one reading per second, with its file; codecarbon, which it can run beside, is off."""
    callback = EnergyCallback(folder / "energy", codecarbon=False, figures=[])
    callback.begin_run()
    try:
        yield [callback]
    finally:
        callback.end_run()


@contextlib.contextmanager
def ours_with_codecarbon(folder: Path) -> Iterator[list[pl.Callback]]:
    """As the platform runs it."""
    callback = EnergyCallback(folder / "energy", figures=[])
    callback.begin_run()
    time.sleep(2)  # codecarbon starts in the background
    try:
        yield [callback]
    finally:
        callback.end_run()


@contextlib.contextmanager
def codecarbon(folder: Path) -> Iterator[list[pl.Callback]]:
    """Codecarbon's own tracker, one measurement per second."""
    tracker = _codecarbon_tracker(1)
    tracker.start()
    try:
        yield []
    finally:
        tracker.stop()


def _codecarbon_tracker(period_s: float, **options: Any) -> Any:
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    return OfflineEmissionsTracker(
        country_iso_code="DEU", measure_power_secs=period_s, output_methods=[], allow_multiple_runs=True,
        log_level="critical", **options,
    )  # fmt: skip


@contextlib.contextmanager
def carbontracker(folder: Path) -> Iterator[list[pl.Callback]]:
    """Carbontracker with its calls around the epoch."""
    from carbontracker.tracker import CarbonTracker

    tracker = CarbonTracker(epochs=1, update_interval=1, verbose=0, ignore_errors=True, log_dir=str(folder))

    class Epochs(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            tracker.epoch_start()

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            tracker.epoch_end()

    try:
        yield [Epochs()]
    finally:
        tracker.stop()


@contextlib.contextmanager
def zeus(folder: Path) -> Iterator[list[pl.Callback]]:
    """Zeus with a window around the epoch."""
    from zeus.monitor import ZeusMonitor

    monitor = ZeusMonitor(approx_instant_energy=False)
    monitor.begin_window("run")
    try:
        yield []
    finally:
        monitor.end_window("run")


@contextlib.contextmanager
def perun(folder: Path) -> Iterator[Callable[..., Any]]:
    """Perun's decorator around the training, one reading per second; it starts a process that reads."""
    from perun import perun as monitored

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        # It hands back how the monitoring ended, and what the function has returned.
        wrapped = monitored(data_out=str(folder), sampling_period=1, app_name="train", run_id="0")(function)
        return lambda *args: wrapped(*args)[1]

    yield around


VARIANTS = {
    NOTHING: nothing,
    OURS: ours,
    "Wattlight with codecarbon beside": ours_with_codecarbon,
    CODECARBON: codecarbon,
    "carbontracker": carbontracker,
    "zeus": zeus,
    "perun": perun,
}
NEEDS = {"carbontracker": "carbontracker", "zeus": "zeus", "perun": "perun"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what trackers and Lightning print."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def timed(variant: Callable[[Path], Any], width: int, steps: int) -> Lap:
    """One training under a variant, which has callbacks, or wants to call the function itself."""
    with tempfile.TemporaryDirectory() as folder, quiet(), variant(Path(folder)) as given:
        return given(train)(width, steps) if callable(given) else train(width, steps, *given)


# -------------------------------------------------------------------------------------------------------------- run


def run(repeats: int = 2 * REPEATS, steps: int = STEPS, pairs: int = PAIRS) -> Result:
    """All comparisons."""
    available = {name: v for name, v in VARIANTS.items() if name not in NEEDS or importlib.util.find_spec(NEEDS[name])}
    with threads(1):
        width = width_for(STEP_MS)
        laps = interleave(
            {name: functools.partial(timed, variant, width, steps) for name, variant in available.items()}, repeats
        )
        share = statistics.median(hook_share(width, steps) for _ in range(3))
        switched = on_and_off(width, pairs)
        rows = reading_rows()
    timings = {name: Timing.of(found) for name, found in laps.items()}
    what = f"{steps} training steps"
    rows += time_rows(what, timings, unit="s")
    rows.append(
        {"what": "CPU time of a training step", "variant": NOTHING, "unit": "ms",
         "value": 1000 * statistics.median(lap.cpu for lap in laps[NOTHING]) / steps,
         "at_most": STEP_MS * (1 + STEP_TOLERANCE)}
    )  # fmt: skip
    for name in available:
        if name != NOTHING:
            rows.append(ratio_row(what, timings, name, NOTHING))
    rows.append(
        {"what": f"steps per second, in turns of {BLOCK} steps within one run, ratio", "variant": f"{OURS} / {NOTHING}",
         "unit": "", "value": switched.value, "low": switched.low, "high": switched.high, "at_least": 0.99}
    )  # fmt: skip
    rows.append(
        {"what": "CPU time in hooks and thread / CPU time of the run", "variant": OURS, "value": 100 * share,
         "unit": "%", "at_most": 0.5}
    )  # fmt: skip
    rows += short_stage_rows()
    missing = ", ".join(name for name in VARIANTS if name not in available) or "-"
    settings = {"steps": steps, "width": width, "repeats": repeats, "pairs": pairs, "threads": 1, "period": "1 s"}
    packages = ("codecarbon", *(NEEDS[name] for name in NEEDS if name in available))
    return Result(rows, settings | {"not installed": missing}, packages=packages)


def width_for(milliseconds: float, steps: int = 100, rounds: int = 8) -> int:
    """Width with which a step takes this long, CPU time.

    A step has a fixed part (the Trainer's loop) and one that grows with the square of the width: two widths tell both,
    and the width between the closest two is tried until one is within a third of the tolerance.
    """
    seconds, tried = milliseconds / 1000, {}
    candidates = [128, 512]
    with quiet():
        train(128, 20)  # what the first training alone pays
        for _ in range(rounds):
            while candidates:
                width = candidates.pop()
                tried[width] = statistics.median(train(width, steps).cpu / steps for _ in range(3))
            below = max((w for w in tried if tried[w] <= seconds), default=min(tried))
            above = min((w for w in tried if w > below), default=2 * below)
            if above not in tried:
                candidates.append(above)
                continue
            share = min(max((seconds - tried[below]) / (tried[above] - tried[below]), 0.0), 1.0)
            width = round((below**2 + share * (above**2 - below**2)) ** 0.5)
            best = min(tried, key=lambda w: abs(tried[w] - seconds))
            if abs(tried[best] / seconds - 1) < STEP_TOLERANCE / 3 or width in tried:
                break
            candidates.append(width)
    return min(tried, key=lambda w: abs(tried[w] - seconds))


def on_and_off(width: int, pairs: int) -> Estimate:
    """Speed in a block with the callback over that in its neighbour without, median of all pairs."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        callback = Switched(Path(folder), codecarbon=False, figures=[])
        callback.begin_run()
        train(width, 2 * BLOCK * (pairs + 1), callback)
        callback.end_run()
    walls = [lap.wall for lap in callback.laps[: 2 * pairs]]
    neighbours = zip(walls[::2], walls[1::2], strict=True)
    return median([b / a if i % 2 == 0 else a / b for i, (a, b) in enumerate(neighbours)])


def hook_share(width: int, steps: int, period_s: float = 1.0) -> float:
    """CPU time inside the callback as a share of the CPU time of the run."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        callback = Clocked(Path(folder), codecarbon=False, figures=[], period_s=period_s)
        callback.begin_run()
        callback.seconds = 0.0
        lap = train(width, steps, callback)
        seconds = callback.seconds
        callback.end_run()
    return seconds / lap.cpu


def reading_rows() -> list[Row]:
    """CPU time of one reading."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        callback = EnergyCallback(folder, codecarbon=False, figures=[], period_s=1000.0)
        callback.begin_run()
        tracker = _codecarbon_tracker(1000)
        tracker.start()
        timings = compare(
            {OURS: callback._recorder.read, CODECARBON: tracker._measure_power_and_energy},
            repeats=3 * REPEATS, calls=200,
        )  # fmt: skip
        tracker.stop()
        callback.end_run()
    what = "one reading of all meters"
    return [
        *time_rows(what, timings, unit="µs"),
        ratio_row(what, timings, OURS, CODECARBON, at_most=1.0),
    ]


def short_stage_rows() -> list[Row]:
    """A stage of one second between two others of 0.7 s, at a period of 0.5 s and a constant power of 10 W."""
    from callbacks.energy.meters.constant import ConstantMeter
    from callbacks.energy.recorder import Recorder

    recorder = Recorder([ConstantMeter(10.0)], period_s=0.5)
    clock: list[float] = []  # before and after each call

    def timed_call(function: Callable[..., Any], *args: Any) -> None:
        clock.append(time.perf_counter())
        function(*args)
        clock.append(time.perf_counter())

    timed_call(recorder.start, "before")
    time.sleep(0.7)
    timed_call(recorder.switch, "stage")
    time.sleep(1.0)
    timed_call(recorder.switch, "after")
    time.sleep(0.7)
    timed_call(recorder.stop)
    found = _against_clock(recorder.tallies()["stage"].total_j / 10, clock[4] - clock[3], clock[5] - clock[2])
    with quiet():
        tracker = _codecarbon_tracker(0.5, force_ram_power=10, force_cpu_power=10)
        tracker.start()
        begin = time.perf_counter()
        time.sleep(0.7)
        tracker.start_task("stage")
        time.sleep(1.0)
        tracker.stop_task("stage")
        time.sleep(0.7)
        tracker.stop()
        theirs = time.perf_counter() - begin
        total = tracker._total_ram_energy.kWh * 3.6e6 / (10 * theirs)
    seconds = sum(tally.total_j for tally in recorder.tallies().values()) / 10
    whole = _against_clock(seconds, clock[-2] - clock[1], clock[-1] - clock[0])
    stage, run = "energy of a stage of 1 s, found / true", "energy of the run around it, found / true"
    return [
        {"what": stage, "variant": OURS, "value": found, "unit": "", "at_least": 0.99, "at_most": 1.01},
        {"what": run, "variant": OURS, "value": whole, "unit": "", "at_least": 0.99, "at_most": 1.01},
        {"what": run, "variant": f"{CODECARBON} with a task", "value": total, "unit": "",
         "note": f"{100 * (1 - total):.0f} % are lost between a measurement and the start of the task"},
    ]  # fmt: skip


def _against_clock(seconds: float, least: float, most: float) -> float:
    """Found / true, where the true time lies between two: a call that begins or ends a stage takes time itself."""
    return seconds / min(max(seconds, least), most)
