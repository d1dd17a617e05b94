"""ArrayWriter: what a prediction says of each row, written by every process at the place of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from parallel.array import argsort, from_local, take
from parallel.array.store import format_of, save


class ArrayWriter(pl.Callback):
    """Writes outputs of predict steps that have an entry for each row, in the order of their ``row`` numbers.

    A zarr store holds them and ``row`` by name; of npy files there is one for each, ``<stem>_<key>.npy``. Every process
    writes its own part. The DataModule's ``comm`` says who has the other rows.

    Args:
        dirpath: Folder, made if it does not exist.
        filename: Name of the store; ``.zarr`` or ``.npy``.
        keys: Outputs.

    Raises:
        ValueError: For other formats.
    """

    def __init__(self, dirpath: str | Path, filename: str = "rows.zarr", keys: Sequence[str] = ("prediction",)) -> None:
        self.path, self.keys = Path(dirpath) / filename, tuple(keys)
        if self.path.suffix not in (".zarr", ".npy"):
            raise ValueError(f"callbacks.rows.filename={filename!r}: use a name that ends in .zarr or .npy")
        assert format_of(self.path) in ("zarr", "npy")
        self._parts: list[dict[str, Tensor]] = []

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._parts = []

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._parts.append({key: outputs[key].detach().cpu() for key in ("row", *self.keys)})

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Every process has as many batches as the others, some of them without rows.
        parts, self._parts = self._parts, []
        comm = trainer.datamodule.comm
        joined = {key: from_local(torch.cat([p[key] for p in parts]), 0, comm) for key in ("row", *self.keys)}
        if len(parts) > 1 or joined["row"].comm.size > 1:
            order = argsort(joined["row"])
            joined = {key: take(value, order, 0) for key, value in joined.items()}
        for key, value in joined.items():
            path = self.path if self.path.suffix == ".zarr" else self.path.with_name(f"{self.path.stem}_{key}.npy")
            save(value, path, key)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._parts = []
