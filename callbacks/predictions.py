"""PredictionWriter: the forecasts of all ranks in one table on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from callbacks.gathering import gather_to_rank_zero, repeats_items

if TYPE_CHECKING:
    import pandas as pd

_KEY = ("series", "origin", "timestamp")


class PredictionWriter(pl.Callback):
    """Writes ``<dirpath>/<filename>`` with the rows of ``datamodule.prediction_table(outputs)`` of every batch.

    The tables of all ranks meet on rank 0, which sorts them by time within each series (series in the order of the
    data), drops repeated rows (samplers may pad) and replaces the file in one step: readers see the old table or the
    new one, never a part.

    Args:
        dirpath: Folder of the table, made if it does not exist.
        filename: Name of the table; ``.csv`` or ``.parquet`` (needs pyarrow).
    """

    def __init__(self, dirpath: str | Path, filename: str = "forecast.csv") -> None:
        self.path = Path(dirpath) / filename
        if self.path.suffix not in (".csv", ".parquet"):
            raise ValueError(f"callbacks.predictions.filename={filename!r}: use a name that ends in .csv or .parquet.")
        self._tables: list[pd.DataFrame] = []

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tables = []

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
        on_cpu = {key: value.detach().cpu() for key, value in outputs.items() if isinstance(value, Tensor)}
        self._tables.append(trainer.datamodule.prediction_table(on_cpu))

    def _write(self, table: pd.DataFrame) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            if self.path.suffix == ".csv":
                table.to_csv(unfinished, index=False)
            else:
                table.to_parquet(unfinished, index=False)
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Here, and not in on_predict_end: a rank without a window (one origin, two ranks) skips the hooks of the loop,
        # and the others would wait for it forever.
        if stage == "predict":
            parts = gather_to_rank_zero([] if repeats_items(trainer) else self._tables)
            if parts is not None and any(parts):
                self._write(_merge([table for part in parts for table in part], trainer.datamodule.channel_names))
        self._tables = []

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._tables = []


def _merge(tables: list[pd.DataFrame], series: list[str]) -> pd.DataFrame:
    """One table in the order of series, origin and time, each row once."""
    import pandas as pd

    table = pd.concat(tables, ignore_index=True)
    keys = [key for key in _KEY if key in table.columns]
    position = {name: i for i, name in enumerate(series)}

    def rank(column: pd.Series) -> pd.Series:
        return column.map(position) if column.name == "series" else column

    return table.drop_duplicates(keys).sort_values(keys, key=rank, kind="stable", ignore_index=True)
