"""The random state of every rank in the checkpoint, so that a resumed run continues bit for bit."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override


def capture() -> dict[str, Any]:
    """The global random states of this process as tensors and plain lists (``torch.load(weights_only=True)`` safe)."""
    name, keys, *rest = np.random.get_state()
    version, state, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [str(name), torch.from_numpy(keys.astype("int64")), *rest],
        "python": [version, list(state), gauss],
    }


def restore(states: dict[str, Any]) -> None:
    """Set the global random states of this process to what `capture` returned."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))


class RngState(pl.Callback):
    """Stores and restores the states of torch (CPU, CUDA), numpy and python of all ranks.

    Restoring waits for ``on_train_start``: the sanity check in between would consume random numbers. It is exact
    because no loader draws from the global generators (`datamodules.loading`). With another number of ranks than the
    checkpoint has, the streams start afresh, and that is said once.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        every = [capture()] * trainer.world_size
        if trainer.world_size > 1:  # this hook runs on every rank
            torch.distributed.all_gather_object(every, every[0])
        checkpoint["rng_states"] = every

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        every = checkpoint.get("rng_states", [])
        if len(every) == trainer.world_size:
            self._pending = every[trainer.global_rank]
        else:
            rank_zero_warn(
                f"the checkpoint holds the random states of {len(every)} ranks, this run has {trainer.world_size}: "
                "random streams start afresh, the run continues but not bit for bit"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pending is not None:
            restore(self._pending)
            self._pending = None
