"""Forecasts as a zarr store that xarray opens, written by all ranks, each its own part of the globe."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from physics.time_units import whole_units


class ForecastStore(pl.Callback):
    """Writes what prediction returns: ``variable (time, prediction_timedelta, [level], latitude, longitude)``.

    ``time`` is that of the origin, as in WeatherBench 2. Where records are unevenly apart leads differ from origin to
    origin: ``prediction_timedelta`` numbers the records then, and ``valid_time (time, prediction_timedelta)`` says when
    each forecast is for. The steps return ``prediction`` (B, L, H, W, V), this rank's block in the units of the fields,
    and ``index`` (B,). Every chunk belongs to one rank. The store appears under its name when it is complete.

    Args:
        dirpath: Folder.
        filename: Of the store.
    """

    def __init__(self, dirpath: str | Path, filename: str = "forecasts.zarr") -> None:
        self.path = Path(dirpath) / filename
        self._unfinished = self.path.with_name(f".{self.path.name}")
        self._arrays: list[tuple[Any, int | None]] = []  # of this rank's channels: (array, number of the level)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule
        if trainer.is_global_zero:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.parent.mkdir(parents=True, exist_ok=True)
            self._create(data, self._rows(trainer), data.grid.token_size)
        trainer.strategy.barrier("forecast_store_created")
        import zarr

        group = zarr.open_group(str(self._unfinished), mode="r+")
        levels = _levels(data)
        self._arrays = [
            (group[c.variable], None if c.level is None else levels.index(c.level))
            for c in data.channels[data.own_channels]
        ]

    @staticmethod
    def _rows(trainer: pl.Trainer) -> int:
        """Origins that are predicted; fewer than there are where the batches are limited."""
        data = trainer.datamodule
        number = trainer.num_predict_batches[0]
        return int(min(len(data.samples("test")), number * data.eval_batch_size))

    def _create(self, data: Any, rows: int, bands: int) -> None:
        import zarr

        group = zarr.create_group(str(self._unfinished))
        levels, height, width = _levels(data), len(data.latitudes), len(data.longitudes)
        times = data.hours[data.columns("test", train=False)[:rows]]
        (moments, unit), calendar = whole_units(times), {"calendar": "standard"}
        if data.step_h is None:
            leads, of_leads = np.asarray(data.lead_steps, dtype=np.int64), {"long_name": "records ahead"}
        else:
            leads, unit_of_leads = whole_units(times[0, 1:] - times[0, 0])
            of_leads = {"units": unit_of_leads}
        coordinates = {
            "time": (moments[:, 0], {"units": f"{unit} since 1970-01-01"} | calendar),
            "prediction_timedelta": (leads, of_leads),
            "latitude": (data.latitudes, {"units": "degrees_north"}),
            "longitude": (data.longitudes, {"units": "degrees_east"}),
        }
        if levels:
            coordinates["level"] = (np.array(levels), {"units": "hPa"})
        for name, (values, attributes) in coordinates.items():
            array = group.create_array(name, data=np.ascontiguousarray(values), dimension_names=(name,))
            array.attrs.update(attributes)
        dims = ("time", "prediction_timedelta", "latitude", "longitude")
        if data.step_h is None:
            valid = group.create_array("valid_time", data=moments[:, 1:].copy(), dimension_names=dims[:2])
            valid.attrs.update({"units": f"{unit} since 1970-01-01"} | calendar)
        for variable in dict.fromkeys(channel.variable for channel in data.channels):
            on_levels = any(c.variable == variable and c.level is not None for c in data.channels)
            middle = (len(levels),) if on_levels else ()
            group.create_array(
                variable,
                shape=(rows, len(data.lead_steps), *middle, height, width),
                chunks=(1, 1, *(1 for _ in middle), height, width // bands),
                dtype="float32",
                fill_value=float("nan"),
                dimension_names=(*dims[:2], *("level" for _ in middle), *dims[2:]),
            )
        with warnings.catch_warnings():  # not yet part of the specification of zarr v3
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(group.store)

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
        columns = trainer.datamodule.own_longitudes
        block = outputs["prediction"].detach().cpu().numpy()
        for row, fields in zip(outputs["index"].tolist(), block, strict=True):
            for channel, (array, level) in enumerate(self._arrays):
                place = (row, slice(None)) if level is None else (row, slice(None), level)
                array[(*place, slice(None), columns)] = fields[..., channel]

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.barrier("forecast_store_written")
        if trainer.is_global_zero:
            shutil.rmtree(self.path, ignore_errors=True)
            self._unfinished.rename(self.path)
            rank_zero_info("forecasts in %s", self.path)
        self._arrays = []

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._arrays = []
        if trainer.is_global_zero:
            shutil.rmtree(self._unfinished, ignore_errors=True)


def _levels(data: Any) -> list[float]:
    """Pressures of all channels, hPa, in their order."""
    return list(dict.fromkeys(channel.level for channel in data.channels if channel.level is not None))
