"""Weather that any machine can make: trajectories of shallow water, generated once and kept in a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from datamodules.weather.generated import GeneratedWeather, Grid, gaussian_grid
from datamodules.weather.module import Normalization
from datamodules.weather.statistics import Climatology
from physics.shallow_water import SphericalShallowWater

CHANNELS = ("h", "u", "v", "zeta")
"""Depth (m), winds (m/s), relative vorticity (1e-5 / s)."""
STATICS = ("ground", "sin_latitude")
_FORMAT = 1


class ShallowWater(GeneratedWeather):
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
        self.generator_seed = generator_seed
        self.physics: dict[str, Any] = {
            "height": height, "width": width, "truncation": truncation, "dt_s": dt_s, "depth_m": depth_m,
            "jet_m_s": jet_m_s, "jet_latitude_rad": jet_latitude_rad, "jet_width_rad": jet_width_rad,
            "jet_days": jet_days, "eddy_days": eddy_days, "diffusion_hours": diffusion_hours,
            "mountains_m": tuple(mountains_m), "noise_per_s": noise_per_s, "spin_up_days": spin_up_days,
            "seed": generator_seed,
        }  # fmt: skip
        about = {
            "format": _FORMAT, "generator": "SphericalShallowWater", "members": num_train + num_val + num_test,
            "records": records, "interval_h": step_h, "chunks": [chunk_token, -(-num_inputs // max(chunk_channel, 1))],
            **self.physics, "mountains_m": list(self.physics["mountains_m"]),
        }  # fmt: skip
        super().__init__(
            "shallow_water", about, cache_dir, {"train": num_train, "val": num_val, "test": num_test}, records,
            (chunk_token, chunk_channel), surface=CHANNELS, statics=STATICS, height=height, width=width,
            num_inputs=num_inputs, num_outputs=num_outputs, step_h=step_h,
            train_steps=train_steps, train_every=train_every, leads_h=leads_h, eval_every=eval_every,
            normalization=normalization, statistics_records=statistics_records, climatology=climatology,
            in_memory=in_memory, batch_size=batch_size, eval_batch_size=eval_batch_size, drop_last=drop_last,
            num_workers=num_workers, pin_memory=pin_memory, seed=seed,
        )  # fmt: skip

    @override
    def open_generator(self) -> SphericalShallowWater:
        return SphericalShallowWater(**self.physics)

    @override
    def grid_of(self, generator: SphericalShallowWater) -> Grid:
        return gaussian_grid(generator.transform, ground=generator.orography_m.numpy())

    @override
    def records_of(self, generator: SphericalShallowWater, members: Sequence[int]) -> Iterator[np.ndarray]:
        return (now.numpy() for now in generator.trajectories(members, self.records, float(self.step_h)))
