"""Weather that any machine can make: trajectories of shallow water, generated once and kept in a store."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from typing_extensions import override

from datamodules.readers.weather_store import PackedWriter
from datamodules.weather.module import Normalization, WeatherZarr
from datamodules.weather.statistics import Climatology
from physics.shallow_water import SphericalShallowWater

log = logging.getLogger(__name__)

CHANNELS = ("h", "u", "v", "zeta")
"""Depth (m), winds (m/s), relative vorticity (1e-5 / s)."""
STATICS = ("ground", "sin_latitude")
_FIRST_YEAR = 2001  # of the first trajectory; each has a year of its own, so that none continues another
_FORMAT = 1


class ShallowWater(WeatherZarr):
    """Trajectories of `physics.shallow_water`: independent ones for training, validation and test.

    They are generated once, in ``cache_dir``, by the process that comes first; channels h (depth, m), u, v (m/s) and
    zeta (1e-5 / s), statics ground (m) and sine of the latitude. Batches are those of `WeatherZarr`.

    Args:
        cache_dir: Where the store is kept.
        num_train: Trajectories for training.
        num_val: For validation.
        num_test: For test and prediction.
        records: Records of each.
        chunk_token: Longitude bands that the chunks of the store fit.
        chunk_channel: Channel groups that they fit.
        truncation: T of the spherical harmonics; this and the following as
            `physics.shallow_water.SphericalShallowWater` has them.
        dt_s: Time step, seconds.
        depth_m: Mean depth.
        jet_m_s: Speed of the jets that are restored.
        jet_latitude_rad: Where they are.
        jet_width_rad: Their width.
        jet_days: Time scale of the restoring of the zonal mean.
        eddy_days: The same of the eddies.
        diffusion_hours: Time scale of the diffusion of the smallest waves.
        mountains_m: Heights of the mountains.
        noise_per_s: Standard deviation of the random vorticity at the start.
        spin_up_days: Not recorded.
        generator_seed: Of the random vorticity.
        height: Latitudes of the Gaussian grid.
        width: Longitudes.
        num_inputs: Checked: 6.
        num_outputs: Checked: 4.
        step_h: Hours between records, and of a step.
        train_steps: As in `WeatherZarr`, like all that follow.
        train_every: Origins in training.
        leads_h: Leads of evaluation.
        eval_every: Origins in evaluation.
        normalization: ``store``.
        statistics_records: Most records that statistics are computed from.
        climatology: ``mean``: there are no seasons.
        in_memory: Keep the part of this rank in memory.
        batch_size: Samples of a training step.
        eval_batch_size: Of an evaluation step.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        pin_memory: Page-locked batches.
        seed: Of the order of the training samples.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    def __init__(
        self,
        cache_dir: str,
        num_train: int = 12,
        num_val: int = 1,
        num_test: int = 1,
        records: int = 300,
        chunk_token: int = 4,
        chunk_channel: int = 2,
        truncation: int = 21,
        dt_s: float = 600.0,
        depth_m: float = 8000.0,
        jet_m_s: float = 80.0,
        jet_latitude_rad: float = 0.75,
        jet_width_rad: float = 0.14,
        jet_days: float = 4.0,
        eddy_days: float = 40.0,
        diffusion_hours: float = 12.0,
        mountains_m: Sequence[float] = (1500.0, 1200.0, 900.0, 750.0),
        noise_per_s: float = 2e-6,
        spin_up_days: float = 40.0,
        generator_seed: int = 0,
        height: int = 32,
        width: int = 64,
        num_inputs: int = 6,
        num_outputs: int = 4,
        step_h: float = 6.0,
        train_steps: int = 1,
        train_every: int = 1,
        leads_h: Sequence[float] = (6, 24, 72, 120),
        eval_every: int = 4,
        normalization: Normalization = "store",
        statistics_records: int | None = None,
        climatology: Climatology = "mean",
        in_memory: bool = True,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        counts = {"train": num_train, "val": num_val, "test": num_test}
        for key, value in {**{f"num_{part}": n for part, n in counts.items()}, "records": records}.items():
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if chunk_token < 1 or width % chunk_token or chunk_channel < 1:
            raise ValueError(
                f"data.chunk_token={chunk_token}, data.chunk_channel={chunk_channel}: must be at least 1, and "
                f"bands divide data.width={width}"
            )
        if (records - 1) * step_h > 8760:
            raise ValueError(f"data.records={records}: a trajectory is at most a year long, {int(8760 / step_h) + 1}")
        self.counts, self.records = counts, records
        self.chunks = (chunk_token, -(-num_inputs // chunk_channel))
        self.generator_seed = generator_seed
        self.physics: dict[str, Any] = {
            "height": height, "width": width, "truncation": truncation, "dt_s": dt_s, "depth_m": depth_m,
            "jet_m_s": jet_m_s, "jet_latitude_rad": jet_latitude_rad, "jet_width_rad": jet_width_rad,
            "jet_days": jet_days, "eddy_days": eddy_days, "diffusion_hours": diffusion_hours,
            "mountains_m": tuple(mountains_m), "noise_per_s": noise_per_s, "spin_up_days": spin_up_days,
            "seed": generator_seed,
        }  # fmt: skip
        first = _FIRST_YEAR
        periods = {}
        for part, number in counts.items():
            periods[part] = (str(first), str(first + number - 1))
            first += number
        super().__init__(
            store=self._name(step_h), data_dir=cache_dir, cache_dir=None, surface=CHANNELS, statics=STATICS,
            height=height, width=width, num_inputs=num_inputs, num_outputs=num_outputs, step_h=step_h, **periods,
            train_steps=train_steps, train_every=train_every, leads_h=leads_h, eval_every=eval_every,
            normalization=normalization, statistics_records=statistics_records, climatology=climatology,
            in_memory=in_memory, batch_size=batch_size, eval_batch_size=eval_batch_size, drop_last=drop_last,
            num_workers=num_workers, pin_memory=pin_memory, seed=seed,
        )  # fmt: skip

    def _name(self, step_h: float) -> str:
        """Name of the store: a key of everything that it depends on."""
        self.about = {
            "format": _FORMAT, "generator": "SphericalShallowWater", "members": sum(self.counts.values()),
            "records": self.records, "interval_h": step_h, "chunks": list(self.chunks),
            **self.physics, "mountains_m": list(self.physics["mountains_m"]),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:12]
        return f"shallow_water_{key}.zarr"

    @override
    def setup(self, stage: str | None = None) -> None:
        """Generate the trajectories if nobody has, then as `WeatherZarr`."""
        path = Path(self.path)
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"data.cache_dir={self.data_dir}: cannot be made ({error.strerror}); name another folder"
                ) from error
            with FileLock(f"{path}.lock"):
                if not path.exists():  # else another process made it while this one waited
                    self._generate(path)
        super().setup(stage)

    def _generate(self, path: Path) -> None:
        try:
            generator = SphericalShallowWater(**self.physics)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        members = range(sum(self.counts.values()))
        log.info("generating %d trajectories of %d records, once: %s", len(members), self.records, path)
        begin = time.perf_counter()
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            writer = self._writer(unfinished, generator)
            fields = np.empty(
                (len(members), self.records, 4, generator.transform.height, generator.transform.width), "f4"
            )
            for record, now in enumerate(generator.trajectories(members, self.records, float(self.step_h))):
                fields[:, record] = now.numpy()
            for member in members:
                writer.write(member * self.records, fields[member])
            writer.close()
            unfinished.replace(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        log.info("generated in %.0f s", time.perf_counter() - begin)

    def _writer(self, path: Path, generator: SphericalShallowWater) -> PackedWriter:
        grid = generator.transform
        hours = (np.arange(self.records) * self.step_h * 3.6e12).round().astype(np.int64).astype("timedelta64[ns]")
        years = range(_FIRST_YEAR, _FIRST_YEAR + sum(self.counts.values()))
        times = np.concatenate([np.datetime64(f"{year}-01-01", "ns") + hours for year in years])
        sine = np.broadcast_to(grid.mu.numpy()[:, None], (grid.height, grid.width))
        return PackedWriter(
            path, CHANNELS, times, np.rad2deg(grid.latitude.numpy()), np.rad2deg(grid.longitude.numpy()),
            {"ground": generator.orography_m.numpy(), "sin_latitude": sine}, self.chunks[0], self.chunks[1],
            attributes=self.about,
        )  # fmt: skip
