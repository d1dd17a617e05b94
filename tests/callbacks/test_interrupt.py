"""Signals end a run between two steps, with a checkpoint; SLURM's warning queues the job again."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch

from callbacks.interrupt import Interrupt, Interrupted
from runner import job
from strategies.daso import DASO
from tests.cli import results
from tests.composing import tiny
from tests.strategies import nets

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def faulty(folder: Path, fault: str, *overrides: str) -> dict:
    return job.run(tiny(folder, f"model.fault={fault}", "model.fault_step=8", *overrides))


@pytest.mark.parametrize("number", ALL, ids=lambda n: n.name)
def test_signal_ends_the_run_after_the_step(tmp_path, number):
    before = [signal.getsignal(s) for s in ALL]
    result = faulty(tmp_path, number.name)
    assert result["status"] == "interrupted" and result["signum"] == number
    record = results(tmp_path)
    assert record["status"] == "interrupted" and record["error"] == f"interrupted by {number.name}"
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 9 and checkpoint["config"]["name"] == "tiny"
    assert [signal.getsignal(s) for s in ALL] == before


def test_accumulated_gradients_become_a_step_first(tmp_path):
    """A checkpoint between two batches of one step would lose the first one's gradient."""
    faulty(tmp_path, "SIGTERM", "trainer.accumulate_grad_batches=2")  # in the first batch of the ninth step
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 9
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] % 2 == 0


def test_last_step_of_an_epoch_waits_for_its_validation(tmp_path):
    faulty(tmp_path, "SIGTERM", "model.fault_step=11")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    assert "val/loss" in results(tmp_path)["metrics"]


def test_handlers_are_put_back_after_an_error(tmp_path):
    before = [signal.getsignal(s) for s in ALL]
    assert faulty(tmp_path, "raise")["status"] == "failed"
    assert [signal.getsignal(s) for s in ALL] == before


def test_handlers_are_put_back_after_success(tmp_path):
    before = [signal.getsignal(s) for s in ALL]
    assert job.run(tiny(tmp_path))["status"] == "completed"
    assert [signal.getsignal(s) for s in ALL] == before


@pytest.mark.parametrize("first_only", [False, True])
def test_second_ctrl_c(first_only):
    callback = Interrupt("/nowhere", first_only=first_only)
    callback._handle(signal.SIGINT, None)
    if first_only:
        callback._handle(signal.SIGINT, None)
    else:
        with pytest.raises(KeyboardInterrupt):
            callback._handle(signal.SIGINT, None)
    callback._handle(signal.SIGTERM, None)  # a second polite request changes nothing
    assert callback._requested == signal.SIGINT


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's command on PATH, which notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script, log = folder / "scontrol", tmp_path / "scontrol.log"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return log


@pytest.fixture
def slurm_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")


def test_slurms_warning_queues_the_job_again(tmp_path, scontrol, slurm_job):
    result = faulty(tmp_path / "run", "SIGUSR1")
    assert result["status"] == "interrupted" and result["signum"] == signal.SIGUSR1
    assert scontrol.read_text() == "requeue 4711\n"
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_task_of_an_array(tmp_path, scontrol, slurm_job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    faulty(tmp_path / "run", "SIGUSR1")
    assert scontrol.read_text() == "requeue 4700_3\n"


@pytest.mark.parametrize(("fault", "overrides"), [("SIGTERM", ()), ("SIGUSR1", ("callbacks.interrupt.requeue=false",))])
def test_nothing_is_queued_otherwise(tmp_path, scontrol, slurm_job, fault, overrides):
    assert faulty(tmp_path / "run", fault, *overrides)["status"] == "interrupted"
    assert not scontrol.exists()


def test_without_slurm_nothing_is_queued(tmp_path, scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert faulty(tmp_path / "run", "SIGUSR1")["status"] == "interrupted"
    assert not scontrol.exists()


def test_a_failing_scontrol_is_reported_and_loses_nothing(tmp_path, scontrol, slurm_job):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    assert faulty(tmp_path / "run", "SIGUSR1")["status"] == "interrupted"
    assert "could not queue job 4711 again" in (tmp_path / "run" / "run.log").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def _one_rank_is_told(folder: str, rank: int) -> dict:
    return faulty(Path(folder), "SIGTERM", "trainer=multi_cpu", f"model.fault_rank={rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_after_the_same_step(ranks2, tmp_path, rank):
    first, second = ranks2(_one_rank_is_told, str(tmp_path), rank)
    assert first["status"] == second["status"] == "interrupted"
    assert first["signum"] == second["signum"] == signal.SIGTERM
    assert results(tmp_path)["status"] == "interrupted"
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def _evaluate_on(folder: str) -> str:
    return job.run(tiny(folder, "trainer=multi_cpu"))["status"]


def test_the_group_of_the_callback_is_closed(ranks2, tmp_path):
    """Many runs in the same ranks: a leaking process group would end in too many of them."""
    for i in range(3):
        assert ranks2(_evaluate_on, str(tmp_path / str(i))) == ["completed", "completed"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_slurms_warning_in_an_evaluation_queues_the_job_once(scontrol, slurm_job, world_size):
    trainer = SimpleNamespace(
        world_size=world_size, is_global_zero=True, sanity_checking=False, state=SimpleNamespace(fn="test")
    )
    callback = Interrupt("/nowhere")
    callback._handle(signal.SIGUSR1, None)
    for batch in range(2):
        with pytest.raises(Interrupted) if world_size == 1 else contextlib.nullcontext():
            callback.on_test_batch_end(trainer, None, None, None, batch)
    assert scontrol.read_text() == "requeue 4711\n"


def _told_while_steps_are_quick(folder: str) -> tuple[int, int]:
    """Steps until this rank knows that rank 1 was told in step 300 of 1 ms, and rounds until then."""
    callback = Interrupt(folder)
    callback._group = torch.distributed.new_group(backend="gloo")
    clock = SimpleNamespace(now=1.0)
    clock.monotonic = lambda: clock.now  # a busy machine makes no difference
    reduce = mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce)
    try:
        with mock.patch("callbacks.interrupt.time", clock), reduce as rounds:
            for step in range(2000):
                clock.now += 1e-3
                if step == 300 and torch.distributed.get_rank() == 1:
                    callback._handle(signal.SIGTERM, None)
                if callback._agree(wait=False):
                    break
        return step, rounds.call_count
    finally:
        callback._restore()


def test_quick_steps_share_a_round(ranks2, tmp_path):
    (first, rounds), second = ranks2(_told_while_steps_are_quick, str(tmp_path))
    assert (first, rounds) == second
    assert 300 < first <= 500  # a round began before, the next one takes 100 steps at most
    assert rounds <= 12


class Sleeper(pl.Callback):
    """Rank 0 is late in one step; when every step began."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.begins.append(time.time())
        if trainer.global_rank == 0 and len(self.begins) == 4:
            time.sleep(1.0)


def _begins(folder: str, interrupt: bool) -> list[float]:
    sleeper = Sleeper()
    callbacks = (sleeper, *([Interrupt(folder)] if interrupt else []))
    strategy = DASO(0, 0, skip=8, wait=4, schedule="fixed", local_size=1)
    _, trainer = nets.fit(strategy, folder, callbacks=callbacks, epochs=1)
    assert "_broadcast_sigterm_tensor" not in vars(trainer.fit_loop.epoch_loop)
    return sleeper.begins


@pytest.mark.parametrize("interrupt", [True, False])
def test_no_rank_waits_for_another_before_a_batch(ranks2, tmp_path, interrupt):
    """Lightning's broadcast before every batch makes them wait; with it here the test would see nothing."""
    late, other = ranks2(_begins, str(tmp_path), interrupt)
    assert (other[4] - late[3] < 0.5) == interrupt
