"""Tables of a prediction with names of buses, branches, parameters: one file for each method of the DataModule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from callbacks.gathering import gather_to_rank_zero
from callbacks.predictions import PredictionWriter

if TYPE_CHECKING:
    import pandas as pd


class GridTable(PredictionWriter):
    """Writes ``<dirpath>/<filename>`` with the rows of ``datamodule.<table>(outputs)`` of every batch.

    As its base it gathers the rows of all ranks on rank 0 and replaces the file in one step. Scenarios come in the
    order of their numbers, whichever rank had them; within one the rows keep their order.

    Args:
        dirpath: Folder of the table, made if it does not exist.
        filename: Name of the file; ``.csv`` or ``.parquet`` (needs pyarrow).
        table: Method of the DataModule that makes a table of the outputs of a predict step, which have ``scenario``.
        sort_by: Column to sort by, largest values first; None: by scenario.
        once: Whether the first batch says all, as of parameters that all scenarios share.
    """

    def __init__(
        self,
        dirpath: str | Path,
        filename: str = "buses.csv",
        table: str = "bus_table",
        sort_by: str | None = None,
        once: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.table, self.sort_by, self.once = table, sort_by, once
        self._parts: list[tuple[int, pd.DataFrame]] = []

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
        tensors = {key: value.detach().cpu() for key, value in outputs.items() if isinstance(value, Tensor)}
        make = getattr(trainer.datamodule, self.table)
        if self.once and (batch_idx or not trainer.is_global_zero):
            return
        if trainer.world_size == 1 or self.once:
            self._parts.append((int(tensors["scenario"][0]), make(tensors)))
            return
        for i, scenario in enumerate(tensors["scenario"].tolist()):  # those of other ranks lie between
            self._parts.append((scenario, make({key: value[i : i + 1] for key, value in tensors.items()})))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "predict":
            gathered = gather_to_rank_zero(self._parts)
            parts = [part for share in gathered or () for part in share]
            if parts:
                self._write(self._merged(parts))
        self._parts = []

    def _merged(self, parts: list[tuple[int, pd.DataFrame]]) -> pd.DataFrame:
        import pandas as pd

        first = {}
        for scenario, table in parts:  # each scenario once: shares of unequal ranks may repeat some
            first.setdefault(scenario, table)
        table = pd.concat([first[scenario] for scenario in sorted(first)], ignore_index=True)
        if self.sort_by is not None:
            table = table.sort_values(self.sort_by, ascending=False, kind="stable", ignore_index=True)
        return table

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._parts = []
