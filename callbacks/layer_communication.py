"""What each layer of a model in parts receives from other ranks, beside what the closed formulas say."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

from callbacks.run_record import RunRecord

_Counts = dict[tuple[str, str], tuple[int, float]]  # (calls, received bytes) by layer and direction


class LayerCommunication(pl.Callback):
    """Counts calls and received bytes by layer and direction over the first training steps under strategy=jigsaw.

    Writes ``layer_communication.csv`` (layer, what travels, direction, calls and bytes per step of the busiest rank,
    bytes by the closed formula for one forecast step with the processor applied once), and the sums over layers to
    results.json. Other strategies and models on one device have nothing to count.

    Args:
        dirpath: Folder of the table.
        steps: Training steps that are counted.

    Raises:
        ValueError: If ``steps`` is below 1.
    """

    def __init__(self, dirpath: str, steps: int = 10) -> None:
        if steps < 1:
            raise ValueError(f"callbacks.layer_communication.steps={steps}: 1 or more")
        self.dirpath, self.steps = dirpath, steps
        self._grid: Any = None
        self._before: _Counts = {}
        self._sums: _Counts = {}
        self._counted = self._samples = 0
        self.rows: list[dict[str, Any]] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        grid = getattr(trainer.strategy, "grid", None)
        self._grid = grid if grid is not None and grid.communicates else None
        self._sums, self._counted, self._samples, self.rows = {}, 0, 0, []

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if self._counts:
            self._before = self._grid.traffic.by_layer()
            self._samples = _samples(batch)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self._counts:
            return
        for key, (calls, received) in self._grid.traffic.by_layer().items():
            old_calls, old = self._before.get(key, (0, 0.0))
            sum_calls, total = self._sums.get(key, (0, 0.0))
            self._sums[key] = sum_calls + calls - old_calls, total + received - old
        self._counted += 1
        if self._counted == self.steps:
            self._finish(trainer, pl_module)

    @property
    def _counts(self) -> bool:
        return self._grid is not None and self._counted < self.steps

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._grid is not None and 0 < self._counted < self.steps:  # a training of fewer steps
            self._finish(trainer, pl_module)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, and write the table; a collective call."""
        net = pl_module.net
        names = [(name, direction) for name, _ in net.sharded_layers() for direction in ("forward", "backward")]
        element = next(net.parameters()).element_size()
        formulas = net.received_bytes(self._samples, 1, element)
        values = torch.tensor(
            [[*self._sums.get((n, d), (0, 0.0)), formulas[n][d == "backward"]] for n, d in names], dtype=torch.float64
        )
        values[:, :2] /= self._counted
        values = values.to(trainer.strategy.root_device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        self.rows = [
            {
                "layer": name,
                "travelling": net.variants.get(name, "statistics"),
                "direction": direction,
                "calls_per_step": calls,
                "received_bytes_per_step": received,
                "formula_bytes": formula,
            }
            for (name, direction), (calls, received, formula) in zip(names, values.tolist(), strict=True)
        ]
        if trainer.is_global_zero:
            folder = Path(self.dirpath)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "layer_communication.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.record["layer_communication"] = {
                    "steps": self._counted,
                    "received_bytes_per_step": sum(row["received_bytes_per_step"] for row in self.rows),
                    "formula_bytes": sum(row["formula_bytes"] for row in self.rows),
                    "layers_whose_activations_travel": sorted(n for n, v in net.variants.items() if v == "activations"),
                }


def _samples(batch: Any) -> int:
    """Samples of a batch of this rank."""
    tensors = batch.values() if isinstance(batch, dict) else batch
    return next(len(t) for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 1)
