"""What a training step needs: time, and memory of tensors at its peak."""

from __future__ import annotations

import statistics
import time
import weakref
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from callbacks.run_record import RunRecord

_SKIPPED = 2  # steps of a training that set something up


class LiveTensors(TorchDispatchMode):
    """Within, counts the bytes of all tensors that are made or used and still alive, each storage once.

    What a process has allocated and an allocator keeps says little of a network; this does, on any device.

    Attributes:
        bytes: Of storages alive.
        peak_bytes: The most since the beginning, or since `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._known: dict[int, int] = {}  # bytes by key of a storage

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak_bytes = self.bytes

    def watch(self, *tensors: Tensor) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known[key] = size = storage.nbytes()
            self.bytes += size
            # The Python object of a storage lives as long as the storage, which holds a reference to it.
            weakref.finalize(storage, self._forget, key)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _forget(self, key: int) -> None:
        self.bytes -= self._known.pop(key, 0)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch(*(leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)))
        return out


class StepCost(pl.Callback):
    """Time of training steps, and the memory of tensors at the peak of one of them.

    Logged after every epoch: ``time/step_s``, the median from the beginning of a step to its end, evaluations and the
    loading of data left out. Once, in the third step of a training: ``memory/peak_tensors_mib``, weights, states of the
    optimizer, gradients, activations and the batch together; that step takes longer and does not count.

    Args:
        memory: Whether to look at the memory.
    """

    def __init__(self, memory: bool = True) -> None:
        self.memory = memory
        self._begin: float | None = None
        self._seconds: list[float] = []
        self._seen = 0
        self._mode: LiveTensors | None = None
        self._peak_mib: float | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen, self._seconds = 0, []

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seen += 1
        if self.memory and self._peak_mib is None and self._seen == _SKIPPED + 1:
            self._mode = LiveTensors()
            self._mode.__enter__()
            self._mode.watch(*pl_module.parameters(), *pl_module.buffers())
            return
        self._begin = self._now(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._mode is not None:
            self._peak_mib = self._mode.peak_bytes / 2**20
            self._leave()
        elif self._begin is not None and self._seen > _SKIPPED:
            self._seconds.append(self._now(trainer) - self._begin)

    def _leave(self) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

    def _now(self, trainer: pl.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        return time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {}
        if self._seconds:
            found["time/step_s"] = statistics.median(self._seconds)
            self._seconds = []
        if self._peak_mib is not None:
            found["memory/peak_tensors_mib"] = self._peak_mib
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.record["step"] = callback.record.get("step", {}) | found
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"peak_mib": self._peak_mib}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._peak_mib = state_dict["peak_mib"]
