"""Tables of a prediction with names of buses, branches, parameters: one file for each method of the DataModule."""

from __future__ import annotations

import os
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

    Scenarios come in the order of their numbers; within one the rows keep their order. One process writes every batch
    at once, so that a year of steps needs the memory of one batch; the rows of several meet on rank 0. The file takes
    its name when it is complete: readers see the old table or the new one, never a part.

    Args:
        dirpath: Folder of the table, made if it does not exist.
        filename: Name of the file; ``.csv`` or ``.parquet`` (needs pyarrow).
        table: Method of the DataModule that makes a table of the outputs of a predict step, which have ``scenario``.
        sort_by: Column to sort by, largest values first, all rows in memory; None: by scenario.
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
        self._unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self._parquet: Any = None

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._discard()

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
        if trainer.world_size == 1 and self.sort_by is None:
            self._append(make(tensors))
        elif trainer.world_size == 1 or self.once:
            self._parts.append((int(tensors["scenario"][0]), make(tensors)))
        else:
            for i, scenario in enumerate(tensors["scenario"].tolist()):  # those of other ranks lie between
                self._parts.append((scenario, make({key: value[i : i + 1] for key, value in tensors.items()})))

    def _append(self, table: pd.DataFrame) -> None:
        """Write rows behind those that the unfinished file has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix == ".csv":
            table.to_csv(self._unfinished, index=False, mode="a", header=not self._unfinished.exists())
            return
        import pyarrow
        from pyarrow import parquet

        rows = pyarrow.Table.from_pandas(table, preserve_index=False)
        if self._parquet is None:
            self._parquet = parquet.ParquetWriter(self._unfinished, rows.schema)
        self._parquet.write_table(rows.cast(self._parquet.schema))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "predict":
            if trainer.world_size == 1 and self.sort_by is None:
                self._close()
                if self._unfinished.exists():
                    self._unfinished.replace(self.path)
            else:
                gathered = gather_to_rank_zero(self._parts)
                parts = [part for share in gathered or () for part in share]
                if parts:
                    self._write(self._merged(parts))
        self._discard()

    def _merged(self, parts: list[tuple[int, pd.DataFrame]]) -> pd.DataFrame:
        import pandas as pd

        first: dict[int, pd.DataFrame] = {}
        for scenario, table in parts:  # each scenario once: shares of unequal ranks may repeat some
            first.setdefault(scenario, table)
        table = pd.concat([first[scenario] for scenario in sorted(first)], ignore_index=True)
        if self.sort_by is not None:
            table = table.sort_values(self.sort_by, ascending=False, kind="stable", ignore_index=True)
        return table

    def _close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None

    def _discard(self) -> None:
        """Forget rows and files that are not complete."""
        self._close()
        self._parts = []
        self._unfinished.unlink(missing_ok=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._discard()
