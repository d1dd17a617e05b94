"""A signal ends a run between two steps, with a checkpoint: Ctrl-C, SIGTERM and SLURM's warning lose nothing."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Raised on every rank after the same step once a signal arrived on any of them."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupt(pl.Callback):
    """Turns signals into an orderly end after the running step.

    The handler only sets a flag. After each training step the ranks agree on the flag (an asynchronous all-reduce of
    one number over gloo, started after one step and read after the next, so that no rank waits and no device is
    synchronised), save ``last.ckpt`` and raise `Interrupted`. Lightning's own SIGTERM handler broadcasts inside the
    handler, which can interleave with the collectives of the running step; this one replaces it.

    Args:
        dirpath: Folder for ``last.ckpt``.
        requeue: On the warning signal of a SLURM job, ask for the job to be queued again (``scontrol requeue``); the
            requeued job comes back to the same folder and continues (``ckpt_path: auto``).
        first_only: Ignore further signals instead of letting a second Ctrl-C end the process at once. Ranks under a
            supervisor need this: the terminal and the supervisor both signal them.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, dirpath: str, requeue: bool = True, first_only: bool = False) -> None:
        self.dirpath, self.requeue, self.first_only = dirpath, requeue, first_only
        self._requested = 0
        self._before: dict[int, Any] = {}
        self._at_epoch_end = 0  # signal to obey once the running epoch is over
        self._saved_step = -1
        self._requeued = False
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._requested:
            self._requested = signum
            log.warning("%s: stopping after this step", signal.Signals(signum).name)
        elif not self.first_only and signum == signal.SIGINT:
            raise KeyboardInterrupt

    def _install(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the handlers that Lightning registered just before the stage began."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in self.SIGNALS:
            current = signal.getsignal(signum)
            if current != self._handle:
                self._before.setdefault(signum, current)
                signal.signal(signum, self._handle)

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = _install

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install(trainer, pl_module)
        # Only here: a rank without a share of an evaluation skips its hooks, and making a group takes all ranks.
        if trainer.world_size > 1 and self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The signal to obey after this step: the same number on every rank (0: go on)."""
        if self._group is None:
            return self._requested
        agreed = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = int(flag)
            self._requested = self._requested or agreed
        flag = torch.tensor(self._requested, dtype=torch.int32)
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return agreed

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        signum = self._agreed(trainer)
        if signum and trainer.is_last_batch:  # the validation of the epoch comes first
            self._at_epoch_end = signum
        elif signum and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:  # gradients are not in checkpoints
            path = Path(self.dirpath) / "last.ckpt"
            trainer.save_checkpoint(path)
            log.warning("saved %s", path)
            if signum == signal.SIGUSR1 and trainer.is_global_zero:
                self._requeue()
            raise Interrupted(signum)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved_step = trainer.global_step

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_epoch_end:  # all that follows an epoch has been done, its checkpoint included if it was validated
            path = Path(self.dirpath) / "last.ckpt"
            if self._saved_step != trainer.global_step or not path.is_file():
                trainer.save_checkpoint(path)
            if self._at_epoch_end == signal.SIGUSR1 and trainer.is_global_zero:
                self._requeue()
            raise Interrupted(self._at_epoch_end)

    def _evaluation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Shares of an evaluation may differ by a batch, so ranks cannot agree step by step: one process only.
        # Several ranks end after the evaluation, or when the supervisor's patience ends; nothing is lost by either.
        if not self._requested or trainer.sanity_checking or trainer.state.fn == "fit":
            return
        if self._requested == signal.SIGUSR1 and trainer.is_global_zero and not self._requeued:
            self._requeue()
        if trainer.world_size == 1:
            raise Interrupted(self._requested)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _evaluation_batch_end

    def _requeue(self) -> None:
        self._requeued = True
        job = os.environ.get("SLURM_JOB_ID")
        if not self.requeue or job is None:
            return
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
            log.warning("asked SLURM to queue job %s again", job)
        except (OSError, subprocess.SubprocessError) as error:
            log.error("could not queue job %s again: %s; resubmit it by hand, it will continue", job, error)

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._before.items():
                if signal.getsignal(signum) == self._handle:
                    signal.signal(signum, handler)
        self._before = {}
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        if self._group is not None:
            if dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted):
            self._restore()
        else:  # the other ranks may be gone: no collective
            self._pending = self._group = None
            self._restore()
