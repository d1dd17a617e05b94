"""Fields that rotate around the sphere at known speeds: generated once, kept in a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.weather.generated import GeneratedWeather, Grid, gaussian_grid
from datamodules.weather.module import Normalization
from datamodules.weather.samples import Batch
from datamodules.weather.statistics import Climatology
from physics.advected_fields import AdvectedFields as Generator

_FORMAT = 1


class AdvectedFields(GeneratedWeather):
    """Trajectories of `physics.advected_fields`: as many channels as ``num_outputs``, and the sine of the latitude.

    Batches are those of `WeatherZarr`; a step has six hours.

    Args:
        cache_dir: Where the store is kept.
        num_train: Trajectories for training.
        num_val: For validation.
        num_test: For test and prediction.
        records: Records of each.
        chunk_token: Longitude bands that the chunks of the store fit.
        chunk_channel: Channel groups that they fit.
        truncation: T of the spherical harmonics.
        slowest_deg: Rotation of the first channel in a step, degrees.
        fastest_deg: Of the last one.
        diffusion: Decay per step and l (l + 1).
        noise: Of the observations, relative.
        generator_seed: Of everything random in the fields.
        height: Latitudes of the Gaussian grid.
        width: Longitudes.
        num_inputs: Checked: one more than ``num_outputs``.
        num_outputs: Channels.
        train_steps: As in `WeatherZarr`, like all that follow.
        train_every: Origins in training.
        leads_h: Leads of evaluation.
        eval_every: Origins in evaluation.
        normalization: ``store``.
        statistics_records: Most records that statistics are computed from.
        climatology: ``mean``: there are no seasons.
        in_memory: Keep the part of this rank in memory.
        batch_size: Samples of a training step over all devices.
        local_batch_size: Samples of a training step on each device, in place of ``batch_size``; null: that one.
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
        num_train: int = 8,
        num_val: int = 1,
        num_test: int = 1,
        records: int = 200,
        chunk_token: int = 4,
        chunk_channel: int = 2,
        truncation: int = 10,
        slowest_deg: float = 6.0,
        fastest_deg: float = 25.0,
        diffusion: float = 2e-5,
        noise: float = 0.01,
        generator_seed: int = 0,
        height: int = 32,
        width: int = 64,
        num_inputs: int = 5,
        num_outputs: int = 4,
        train_steps: int = 1,
        train_every: int = 1,
        leads_h: Sequence[float] = (6, 12, 24, 48),
        eval_every: int = 4,
        normalization: Normalization = "store",
        statistics_records: int | None = None,
        climatology: Climatology = "mean",
        in_memory: bool = True,
        batch_size: int = 8,
        local_batch_size: int | None = None,
        eval_batch_size: int = 16,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        if num_inputs != num_outputs + 1:
            raise ValueError(f"data.num_inputs={num_inputs}: must be data.num_outputs + 1 = {num_outputs + 1}")
        if local_batch_size is not None and local_batch_size < 1:
            raise ValueError(f"data.local_batch_size={local_batch_size}: must be at least 1")
        self.local_batch_size = local_batch_size
        self.physics: dict[str, Any] = {
            "height": height, "width": width, "channels": num_outputs, "truncation": truncation,
            "slowest_deg": slowest_deg, "fastest_deg": fastest_deg, "diffusion": diffusion, "noise": noise,
            "seed": generator_seed,
        }  # fmt: skip
        about = {"format": _FORMAT, "generator": "AdvectedFields", "records": records, **self.physics}
        about |= {"members": num_train + num_val + num_test, "chunks": [chunk_token, chunk_channel]}
        super().__init__(
            "advected_fields", about, cache_dir, {"train": num_train, "val": num_val, "test": num_test}, records,
            (chunk_token, chunk_channel), surface=[f"c{i}" for i in range(num_outputs)], statics=("sin_latitude",),
            height=height, width=width, num_inputs=num_inputs, num_outputs=num_outputs, step_h=6.0,
            train_steps=train_steps, train_every=train_every, leads_h=leads_h, eval_every=eval_every,
            normalization=normalization, statistics_records=statistics_records, climatology=climatology,
            in_memory=in_memory, batch_size=batch_size, eval_batch_size=eval_batch_size, drop_last=drop_last,
            num_workers=num_workers, pin_memory=pin_memory, seed=seed,
        )  # fmt: skip

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        if self.local_batch_size is not None:
            layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
            self.batch_size = self.local_batch_size * (layout["num_replicas"] if layout else 1)
        return super().train_dataloader()

    @override
    def open_generator(self) -> Generator:
        return Generator(**self.physics)

    @override
    def grid_of(self, generator: Generator) -> Grid:
        return gaussian_grid(generator.transform)

    @override
    def records_of(self, generator: Generator, members: Sequence[int]) -> Iterator[np.ndarray]:
        return (record.numpy() for record in generator.trajectories(members, self.records))
