"""A signal ends a run between two steps, with a checkpoint: Ctrl-C, SIGTERM and SLURM's warning lose nothing."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

log = logging.getLogger(__name__)

# Between two rounds in which ranks compare their flags: time, and the fewest and the most steps. A rank that is further
# ahead of another waits there.
AGREE_S, LEAST_STEPS, MOST_STEPS = 1.0, 2, 100


class Interrupted(Exception):
    """Raised on every rank after the same step once a signal arrived on any of them."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupt(pl.Callback):
    """Turns signals into an orderly end after the running step.

    The handler only sets a flag. Once a second, or after two steps where these take longer, and at the end of every
    epoch, the ranks agree on it: an asynchronous all-reduce over gloo, started after one step and read at the next
    round, so that no device is synchronised and no rank waits that is less than that ahead of another. Then they save
    ``last.ckpt`` and raise `Interrupted`.

    Lightning's own way (its pull request 20825) is replaced: the SIGTERM handler broadcasts inside the handler, which
    can interleave with the collectives of the running step, and before every batch all ranks wait for a broadcast of
    rank 0 and for their devices, strategies that let nodes run ahead of each other included.

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
        self._agreed = 0  # what all ranks know of, the same number on each
        self._begun_at, self._steps, self._lag = 0.0, 0, LEAST_STEPS  # of the running round; steps until it is read
        self._loop: Any = None  # of Lightning, whose broadcast is left out

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
            self._loop = trainer.fit_loop.epoch_loop
            self._loop._broadcast_sigterm_tensor = _nothing

    def _agree(self, wait: bool) -> int:
        """The signal to obey after this step: the same number on every rank (0: go on).

        Args:
            wait: For a round of this step. All ranks call this with the same value.
        """
        if self._group is None:
            return self._requested
        self._steps += 1
        if self._pending is not None and (wait or self._steps >= self._lag):
            self._read()
        if wait and not self._agreed:
            self._begin()
            self._read()
        elif self._pending is None and not self._agreed:
            self._begin()
        return self._agreed

    def _begin(self) -> None:
        """Start to compare flags, and what a step takes on the slowest rank: it says when all read the next round."""
        now = time.monotonic()
        step_s = (now - self._begun_at) / self._steps if self._begun_at and self._steps else math.inf
        state = torch.tensor([float(self._requested), step_s], dtype=torch.float64)
        self._pending = (dist.all_reduce(state, dist.ReduceOp.MAX, group=self._group, async_op=True), state)
        self._begun_at, self._steps = now, 0

    def _read(self) -> None:
        work, state = self._pending
        self._pending = None
        work.wait()
        signum, step_s = state.tolist()
        self._lag = min(max(math.ceil(AGREE_S / max(step_s, 1e-9)), LEAST_STEPS), MOST_STEPS)
        self._agreed = int(signum)
        self._requested = self._requested or self._agreed

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        signum = self._agree(trainer.is_last_batch)
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
        if self._loop is not None:
            self._loop.__dict__.pop("_broadcast_sigterm_tensor", None)
            self._loop = None
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


def _nothing() -> None:
    """In place of Lightning's broadcast before every batch."""
