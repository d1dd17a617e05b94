"""DataModule of any store of gridded weather; each rank reads its longitudes and channels alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.loading import make_loader, whole_batch
from datamodules.readers.weather_store import Channel, WeatherStore
from datamodules.weather.era5 import era5_statistics
from datamodules.weather.origins import following, steps_of_leads, within
from datamodules.weather.samples import Batch, Block, WeatherSamples
from datamodules.weather.statistics import Climatology, Statistics, require_finite, seasonal_basis, statistics_of
from parallel.sharding import JigsawGrid, grid_of

log = logging.getLogger(__name__)

Normalization = Literal["store", "era5"]
Part = Literal["train", "val", "test"]


class WeatherZarr(LightningDataModule):
    """Forecast samples of a zarr or NetCDF store.

    A batch is a dictionary; H latitudes from the north, W longitudes of this rank, channels of this rank last:

    ========= ================= ========================================================================================
    key       shape             meaning
    ========= ================= ========================================================================================
    input     (B, H, W, V_in)   float32: normalised channels at the origin, statics, the length of the next step
    target    (B, R, H, W, V)   float32: the channels after each step (training), at each lead (evaluation)
    index     (B,)              int64: number of the sample in its part
    valid_h   (B, 1 + R)        float64: times of the origin and of the targets, hours since 1970
    step      (B, S)            float32: lengths of the steps as the network is told; 0 where it is not told
    io_bytes  ()                int64: bytes that were fetched from the store for the batch
    io_s      ()                float64: seconds that this took, decompression included
    ========= ================= ========================================================================================

    The store may have its dimensions in any order, latitudes in any direction, levels in any order. With a grid of
    ranks (``strategy=jigsaw``) a rank reads its band of longitudes and its group of channels; where the chunks of the
    store do not fit, a warning says by which factor too much is fetched (`datamodules.weather.rechunk` writes a store
    that fits).

    Args:
        store: Folder, file or address; relative ones below ``data_dir``.
        data_dir: Folder of the data.
        cache_dir: Where statistics are kept; None: beside the store.
        surface: Channels at the surface.
        pressure: Variables on pressure levels, each at all ``levels``, in this order.
        levels: Pressures, hPa.
        named: All channels by name in place of these three, in the order of the network (``[t2m, z500, ...]``).
        statics: Fields that do not change; they are standardised, but for a land mask.
        height: Checked: rows; one less than the store has leaves out the south pole.
        width: Checked: columns.
        num_inputs: Checked: channels, statics, and one for the length of the step where the network is told.
        num_outputs: Checked: channels.
        step_h: Hours of a step; None: to the next record, whenever that is.
        step_input: With ``step_h=null``: tell the network how long the step is, in an input channel.
        train: First and last moment of the training part, ISO dates; None: all records.
        val: The same of the validation part.
        test: The same of the test and prediction part.
        train_steps: Steps with targets in training.
        train_every: Origins in training: every so many.
        leads_h: Leads of evaluation in hours, records where ``step_h=null``.
        eval_every: Origins in evaluation: every so many.
        normalization: By ``store`` statistics of the training part (over grid points, each alike, not weighted by
            area), or by the reference values of ``era5``.
        statistics_records: Most records that statistics are computed from, evenly spread; None: all.
        climatology: ``mean`` of the training part, or ``seasonal``: with waves of a year, half a year and a day.
        in_memory: Keep the part of this rank in memory.
        batch_size: Samples of a training step over all devices that do not share a sample.
        eval_batch_size: Of an evaluation step.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        pin_memory: Page-locked batches, for GPUs.
        seed: Of the order of the training samples.

    Raises:
        FileNotFoundError: If there is no such store.
        ValueError: Names the setting, its value and the remedy.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("input", "target", "index", "valid_h", "step", "io_bytes", "io_s")

    def __init__(
        self,
        store: str,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        surface: Sequence[str] = (),
        pressure: Sequence[str] = (),
        levels: Sequence[float] = (),
        named: Sequence[str] | None = None,
        statics: Sequence[str] = (),
        height: int = 32,
        width: int = 64,
        num_inputs: int = 6,
        num_outputs: int = 4,
        step_h: float | None = 6.0,
        step_input: bool = False,
        train: Sequence[str] | None = None,
        val: Sequence[str] | None = None,
        test: Sequence[str] | None = None,
        train_steps: int = 1,
        train_every: int = 1,
        leads_h: Sequence[float] = (6, 24, 72, 120),
        eval_every: int = 1,
        normalization: Normalization = "store",
        statistics_records: int | None = 512,
        climatology: Climatology = "mean",
        in_memory: bool = False,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.store_name, self.data_dir, self.cache_dir = store, data_dir, cache_dir
        self.channels = [Channel.parse(name) for name in surface]
        self.channels += [Channel.parse(name, float(level)) for name in pressure for level in levels]
        if named is not None:
            if self.channels:
                raise ValueError("data.named gives all channels: set data.surface, data.pressure and data.levels to []")
            self.channels = [Channel.named(name) for name in named]
        self.statics = [Channel.parse(name).variable for name in statics]
        self.height, self.width, self.num_inputs, self.num_outputs = height, width, num_inputs, num_outputs
        self.step_h, self.step_input = step_h, step_input
        self.periods = {"train": train, "val": val, "test": test}
        self.train_steps, self.train_every, self.eval_every = train_steps, train_every, eval_every
        self.leads_h = tuple(leads_h)
        self.normalization, self.climatology_kind = normalization, climatology
        self.statistics_records = statistics_records
        self.in_memory = in_memory
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._check_arguments()
        self.lead_steps = steps_of_leads(self.leads_h, step_h)
        self._ready = False
        self._warned = False

    def _check_arguments(self) -> None:
        for key, choices in (("normalization", Normalization), ("climatology", Climatology)):
            value = self.climatology_kind if key == "climatology" else self.normalization
            if value not in get_args(choices):
                raise ValueError(f"data.{key}={value!r} is unknown; choose {', '.join(get_args(choices))}")
        for key in ("train_steps", "train_every", "eval_every", "batch_size", "eval_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)}: must be at least 1")
        if self.statistics_records is not None and self.statistics_records < 2:
            raise ValueError(f"data.statistics_records={self.statistics_records}: must be at least 2, or null for all")
        if self.step_h is not None and self.step_h <= 0:
            raise ValueError(f"data.step_h={self.step_h}: must be above 0, or null for the next record")
        if self.step_input and self.step_h is not None:
            raise ValueError(
                f"data.step_input=true: steps of data.step_h={self.step_h} h are all alike; set it to null"
            )
        names = [channel.name for channel in self.channels]
        if not names:
            raise ValueError("data.surface, data.pressure and data.named are empty: name the channels to forecast")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.surface and data.pressure name {twice[0]} twice")
        inputs = len(names) + len(self.statics) + self.step_input
        for key, value in (("num_outputs", len(names)), ("num_inputs", inputs)):
            if getattr(self, key) != value:
                raise ValueError(f"data.{key}={getattr(self, key)}, but the data have {value}: set data.{key}={value}")

    # ------------------------------------------------------------------------------------------------------- opening

    @property
    def names(self) -> list[str]:
        """Names of the channels, in the order of the network."""
        return [channel.name for channel in self.channels]

    @property
    def lead_names(self) -> list[str]:
        """Names of the leads: hours, or numbers of records."""
        return [f"{lead:g}h" if self.step_h is not None else f"{lead:g}" for lead in self.leads_h]

    @property
    def path(self) -> Path | str:
        """Where the store is."""
        if "://" in self.store_name:
            return self.store_name
        return Path(self.data_dir or ".").expanduser() / Path(self.store_name).expanduser()

    @property
    def grid(self) -> JigsawGrid:
        """Which part of a sample is this rank's."""
        return grid_of(self.trainer)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the store, check everything, and read or compute its statistics; later calls return at once."""
        if self._ready:
            return
        try:
            self.store = WeatherStore(self.path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"data.store={self.store_name}, data_dir={self.data_dir}: {error}; name its folder by data_dir, or all "
                "of its path by data.store"
            ) from None
        self._check_store()
        self._columns: dict[tuple[Part, bool], np.ndarray] = {}
        self.statistics = self._statistics()
        for part in ("train", "val", "test"):
            self.columns(part, train=part == "train")
        self._ready = True

    def _check_store(self) -> None:
        store = self.store
        rows, columns = len(store.latitudes), len(store.longitudes)
        if self.height not in (rows, rows - 1) or columns != self.width:
            raise ValueError(
                f"data.height={self.height}, data.width={self.width}: {store.path} has {rows} x {columns} points; set "
                f"data.height={rows} (or {rows - 1}: without the south pole), data.width={columns}"
            )
        store.check(self.channels)
        store.check([Channel(name) for name in self.statics])

    def _statistics(self) -> Statistics:
        records = within(self.store.times, self.periods["train"], "data.train")
        most = self.statistics_records
        if most is not None and len(records) > most:
            records = records[np.linspace(0, len(records) - 1, most).round().astype(int)]
        return statistics_of(
            self.store, self.channels, records, self.height, self.climatology_kind, self._statistics_dir()
        )

    def _statistics_dir(self) -> str | None:
        if self.cache_dir is None and "://" in self.store_name:
            raise ValueError(f"data.cache_dir=null: statistics cannot be kept beside {self.store_name}; name a folder")
        return self.cache_dir

    # ----------------------------------------------------------------------------------------------- about the fields

    @cached_property
    def latitudes(self) -> np.ndarray:
        """Degrees, from north to south."""
        return self.store.latitudes[: self.height]

    @cached_property
    def longitudes(self) -> np.ndarray:
        """Degrees, all of them."""
        return self.store.longitudes

    @cached_property
    def latitude_weight(self) -> Tensor:
        """``a(phi_i) = H cos(phi_i) / sum_j cos(phi_j)``, (H,), float64, of the store's own latitudes."""
        cos = torch.from_numpy(np.cos(np.deg2rad(self.latitudes))).clamp(min=0)
        return cos * self.height / cos.sum()

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of all channels that they are normalised by, float64."""
        if self.normalization == "era5":
            mean, std = era5_statistics(self.channels)
        else:
            mean, std = self.statistics.mean, self.statistics.std
        if (flat := np.flatnonzero(std <= 1e-12 * np.abs(mean))).size:
            raise ValueError(f"{self.store.path}: {self.names[flat[0]]} does not vary; leave it out")
        return torch.from_numpy(mean), torch.from_numpy(std)

    @property
    def own_channels(self) -> slice:
        """Which of the channels are this rank's."""
        return self.grid.channels(self.num_outputs, self.num_inputs)

    @property
    def own_longitudes(self) -> slice:
        """Which of the longitudes are this rank's."""
        return self.grid.longitudes(self.width)

    @cached_property
    def climatology(self) -> Tensor:
        """Fields of the climatology, this rank's part, normalised: (K, H, W, V), float32; see `climatology_basis`."""
        fields = self.statistics.climatology(self.own_channels, self.own_longitudes).astype(np.float64)
        mean, std = (value[self.own_channels].numpy()[:, None, None] for value in self.scale)
        fields[0] -= mean
        return torch.from_numpy((fields / std).transpose(0, 2, 3, 1).astype(np.float32))

    def climatology_basis(self, hours: Tensor) -> Tensor:
        """What the fields of the climatology are multiplied by, (..., K), at times in hours since 1970."""
        times = (hours.cpu().numpy() * 3.6e12).round().astype(np.int64).astype("datetime64[ns]")
        return torch.from_numpy(seasonal_basis(times, self.climatology_kind))

    @cached_property
    def hours(self) -> np.ndarray:
        """Times of the records, hours since 1970."""
        return self.store.times.astype(np.int64) / 3.6e12

    # -------------------------------------------------------------------------------------------------------- samples

    def columns(self, part: Part, train: bool) -> np.ndarray:
        """Records of the samples of a part, (sample, 1 + target): with targets of training, or of evaluation.

        Raises:
            ValueError: If there is no sample: periods that are too short, or a step that no two records are apart.
        """
        if (part, train) not in self._columns:
            times = self.store.times
            records = within(times, self.periods[part], f"data.{part}")
            steps = range(1, self.train_steps + 1) if train else self.lead_steps
            found = following(times, records, self.step_h, list(steps))
            if not len(found):
                spacing = sorted({float(gap) for gap in np.diff(times[records]).astype(np.int64) / 3.6e12})[:6]
                apart = ", ".join(f"{gap:g}" for gap in spacing)
                key = "data.train_steps" if train else "data.leads_h"
                raise ValueError(
                    f"data.step_h={self.step_h}: no record of data.{part} ({len(records)} records, {apart} h apart) is "
                    f"followed by others after {'every step' if train else 'all leads'}; use a multiple of the "
                    f"spacing, null for the next record, or shorten {key}"
                )
            self._columns[part, train] = found[:: self.train_every if train else self.eval_every]
        return self._columns[part, train]

    @cached_property
    def block(self) -> Block:
        """What this rank reads."""
        inputs = self.grid.channels(self.num_inputs)
        own, longitudes = self.own_channels, self.own_longitudes
        mean, std = (value[own].numpy() for value in self.scale)
        block = Block(
            self.store, self.channels[own], longitudes, self.height, mean, std, self._own_statics(inputs, longitudes),
            self.grid.local_channels(self.num_inputs), self.grid.local_channels(self.num_outputs, self.num_inputs),
        )  # fmt: skip
        if block.channels:
            self._warn_of_waste(self.store.wasted_factor(block.channels, longitudes))
        if self.in_memory and block.channels:
            block.memory = self._in_memory(block)
        return block

    def _own_statics(self, inputs: slice, longitudes: slice) -> np.ndarray:
        """Standardised static inputs of this rank, and a place for the length of the step, (H, W, S)."""
        own = range(self.num_inputs)[inputs]
        fields = []
        for number in own:
            place = number - self.num_outputs
            if place == len(self.statics):  # the length of the step
                fields.append(np.zeros((self.height, len(range(*longitudes.indices(self.width))))))
            elif place >= 0:
                whole = self.store.read_static([self.statics[place]])[0, : self.height].astype(np.float64)
                require_finite(whole[None], [Channel(self.statics[place])], self.store, 0)
                if self.statics[place] != "lsm" and whole.std() > 0:
                    whole = (whole - whole.mean()) / whole.std()
                fields.append(whole[:, longitudes])
        width = len(range(*longitudes.indices(self.width)))
        return np.stack(fields, -1) if fields else np.zeros((self.height, width, 0))

    def _warn_of_waste(self, factor: float) -> None:
        if factor > 1.05 and not self._warned:
            self._warned = True
            log.warning(
                "%s: its chunks do not fit the blocks of the ranks: a factor of %.3g too much is fetched; "
                "python -m datamodules.weather.rechunk writes a store that fits",
                self.store.path, factor,
            )  # fmt: skip

    def _in_memory(self, block: Block) -> Tensor:
        parts = [within(self.store.times, period, f"data.{part}") for part, period in self.periods.items()]
        records = np.unique(np.concatenate(parts))
        shape = (len(self.store.times), self.height, len(range(*block.longitudes.indices(self.width))))
        memory = torch.full((*shape, len(block.channels)), math.nan)
        if self.num_workers:
            memory.share_memory_()
        for some in np.array_split(records, max(1, len(records) // 64)):
            memory[torch.from_numpy(some)] = block.fields(some)
        return memory

    def samples(self, part: Part, train: bool = False) -> WeatherSamples:
        """Samples of a part, with targets of training or of evaluation."""
        scale = None
        if self.step_input:
            gaps = np.diff(self.hours)
            scale = (float(gaps.mean()), float(gaps.std()) or 1.0)
        steps = self.train_steps if train else self.lead_steps[-1]
        return WeatherSamples(self.block, self.columns(part, train), self.hours, steps, scale)

    def training_pairs(self, steps: Sequence[int], most: int) -> tuple[np.ndarray, np.ndarray]:
        """Origins in the training part with records after all steps, evenly spread, at most so many.

        Returns:
            (pair, 1 + step): numbers of the records, and their hours since 1970.
        """
        times = self.store.times
        found = following(times, within(times, self.periods["train"], "data.train"), self.step_h, list(steps))
        if len(found) > most:
            found = found[np.linspace(0, len(found) - 1, most).round().astype(int)]
        return found, self.hours[found]

    # -------------------------------------------------------------------------------------------------------- loaders

    def _loader(self, samples: WeatherSamples, train: bool) -> DataLoader[Batch]:
        return make_loader(
            samples,
            self.batch_size if train else self.eval_batch_size,
            shuffle=train,
            seed=self.seed,
            layout=self.trainer.distributed_sampler_kwargs if self.trainer else None,
            drop_last=self.drop_last,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=whole_batch,
        )

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.samples("train", train=True), train=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.samples("val"), train=False)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.samples("test"), train=False)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.samples("test"), train=False)
