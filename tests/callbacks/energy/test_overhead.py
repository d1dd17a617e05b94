"""Acceptance 3: what the callback costs a run, in CPU time, which a busy machine cannot hide."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from benchmarks import energy as benchmark
from benchmarks.measure import Lap, threads
from tests.callbacks.energy.test_callback import Module, energy, loader, trainer


class Calls(pl.Callback):
    """Counts the calls, of Python and of C, inside the hooks that a training step calls in the energy callback."""

    def __init__(self, callback: pl.Callback) -> None:
        self.callback, self.found = callback, []
        self.hook = callback.on_train_batch_end

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call") and argument is not sys.setprofile

        before = sys.getprofile()
        sys.setprofile(count)
        self.callback.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.hook(trainer, pl_module, outputs, batch, batch_idx)
        sys.setprofile(before)
        self.found.append(calls)


def test_a_step_costs_a_handful_of_calls(tmp_path):
    callback = energy(tmp_path, period_s=100.0)
    calls = Calls(callback)
    trainer(callback, calls, max_epochs=1).fit(Module(0.0), loader(80))
    callback.end_run()
    assert len(calls.found) == 20
    assert max(calls.found[1:]) <= 5, calls.found  # two hooks, the size of the batch, dict.get


@pytest.mark.parametrize(("fixed_ms", "reached"), [(0.8, True), (1.9, True), (3.4, False)])
def test_the_network_is_as_wide_as_makes_a_step_of_three_milliseconds(monkeypatch, fixed_ms, reached):
    def step_ms(width: int) -> float:
        return fixed_ms + 8e-6 * width**2 + 2e-4 * width  # not quite the form that the search assumes

    def train(width: int, steps: int, *callbacks: Any) -> Lap:
        return Lap(1.0, steps * step_ms(width) / 1000)

    monkeypatch.setattr(benchmark, "train", train)
    width = benchmark.width_for(benchmark.STEP_MS)
    off = abs(step_ms(width) / benchmark.STEP_MS - 1)
    assert (off < benchmark.STEP_TOLERANCE / 3) is reached
    if not reached:  # the row of the benchmark says so
        assert off > benchmark.STEP_TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hooks_and_thread_take_less_than_half_a_percent():
    """0.4 % for the hooks of a step and 0.1 % for a reading each second.

    The width is fixed: its step takes 3 ms on an idle core, and when neighbours slow the machine down they slow the
    step down as they do the hooks. The thread is apart, because it reads by the clock on the wall. The least of five.
    """
    with threads(1):
        shares = [benchmark.hook_share(300, 400, period_s=1000.0) for _ in range(5)]
    (reading,) = [row for row in benchmark.reading_rows() if row["variant"] == benchmark.OURS and row["unit"] == "µs"]
    print(f"shares {shares}, a reading {reading['cpu']} µs")
    assert 0 < min(shares) < 0.004
    assert reading["cpu"] < 1000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_short_runs_of_the_benchmark():
    result = benchmark.run(repeats=1, steps=60, pairs=2)
    rows = {(row["what"], row["variant"]): row for row in result.rows}
    step = rows["CPU time of a training step", "without"]
    assert step["at_most"] == pytest.approx(3.3) and "at_least" not in step  # a shorter step makes the claim harder
    assert rows["CPU time in hooks and thread / CPU time of the run", "Wattlight"]["at_most"] == 0.5
    (speed,) = [row for (what, _), row in rows.items() if what.startswith("steps per second")]
    assert speed["at_least"] == 0.99
    for (what, variant), row in rows.items():
        if what.startswith("energy of") and variant == benchmark.OURS:
            assert row["at_least"] <= row["value"] <= row["at_most"], what
    (lost,) = [row for row in result.rows if "are lost" in row.get("note", "")]
    assert lost["note"].startswith(f"{100 * (1 - lost['value']):.0f} % are lost")


@pytest.mark.skipif(importlib.util.find_spec("perun") is None, reason="perun is not installed (extra peers)")
def test_perun_around_a_training():
    with threads(1):
        lap = benchmark.timed(benchmark.perun, 32, 20)
    assert lap.wall > 0 and torch.get_num_threads() > 0
