"""Progress: one line, redrawn on a terminal, written now and then elsewhere."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from callbacks import console
from callbacks.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trainer(**values) -> SimpleNamespace:
    defaults = {
        "callback_metrics": {"val/a": 1.25, "train/loss": 0.5, "test/x": 9.0},
        "max_epochs": 3,
        "num_training_batches": 6,
        "current_epoch": 1,
        "is_global_zero": True,
        "global_step": 12,
    }
    return SimpleNamespace(**defaults | values)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.s)
    return now


def steps(callback: Console, clock: SimpleNamespace, number: int, each_s: float, **values) -> None:
    callback.on_train_start(trainer(**values), None)
    for i in range(number):
        clock.s += each_s
        callback.on_train_batch_end(trainer(**values), None, None, None, i)


def test_log_file_gets_a_line_every_few_seconds(clock, caplog):
    caplog.set_level(logging.INFO)
    steps(Console(every_s=5.0), clock, 12, 1.0)
    assert [r.getMessage().split("  ")[1] for r in caplog.records] == ["step 1/6", "step 6/6", "step 11/6"]
    assert caplog.records[0].getMessage() == "epoch 2/3  step 1/6  1 s  val/a 1.25  train/loss 0.5"


def test_terminal_is_redrawn_in_place(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    callback = Console(redraw_s=0.25)
    steps(callback, clock, 10, 0.125)
    drawn = terminal.getvalue()
    assert drawn.count("\r\x1b[K") == 5 and "\n" not in drawn
    callback.on_train_end(trainer(), None)
    assert terminal.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize("event", ["on_exception", "on_train_end"])
def test_the_line_is_cleared(clock, monkeypatch, event):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    callback = Console()
    steps(callback, clock, 2, 1.0)
    getattr(callback, event)(trainer(), None, *([RuntimeError()] if event == "on_exception" else []))
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_other_ranks_are_silent(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    callback = Console()
    steps(callback, clock, 20, 1.0, is_global_zero=False)
    callback.on_train_end(trainer(is_global_zero=False), None)
    callback.on_exception(trainer(is_global_zero=False), None, RuntimeError())
    assert not caplog.records and terminal.getvalue() == ""


def test_chosen_metrics(clock, caplog):
    caplog.set_level(logging.INFO)
    steps(Console(metrics=["test/x", "absent"]), clock, 1, 1.0)
    assert caplog.records[0].getMessage().endswith("s  test/x 9")


def test_unknown_lengths(clock, caplog):
    caplog.set_level(logging.INFO)
    steps(Console(), clock, 1, 1.0, max_epochs=-1, num_training_batches=float("inf"))
    assert caplog.records[0].getMessage().startswith("epoch 2/?  step 1  1 s")
