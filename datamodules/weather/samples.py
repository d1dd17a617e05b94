"""Forecast samples of a store: the block of this rank at the origin and after every step, normalised, channels last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.readers.weather_store import Channel, WeatherStore
from datamodules.weather.statistics import require_finite

Batch = dict[str, Tensor]


@dataclass
class Block:
    """What a rank reads, and how it is handed to the network.

    Attributes:
        store: Where the fields come from.
        channels: Of this rank, in the order of the network.
        longitudes: Columns of this rank.
        height: Rows that are kept, from the north.
        mean: (channel,) of these.
        std: (channel,) of these.
        statics: Standardised fields of this rank, (latitude, longitude, static), which stand behind the channels.
        input_width: Channels of the input block; what lies beyond is zero.
        target_width: Channels of the target block.
        memory: Normalised (record, latitude, longitude, channel) of all records, if they are kept in memory.
    """

    store: WeatherStore
    channels: list[Channel]
    longitudes: slice
    height: int
    mean: np.ndarray
    std: np.ndarray
    statics: np.ndarray
    input_width: int
    target_width: int
    memory: Tensor | None = None

    def fields(self, records: np.ndarray) -> Tensor:
        """Normalised channels of some records, (record, latitude, longitude, channel), float32."""
        if self.memory is not None:
            return self.memory[torch.from_numpy(np.asarray(records, dtype=np.int64))]
        if not self.channels:  # a rank with nothing but statics and padding
            width = self.statics.shape[1]
            return torch.zeros(len(records), self.height, width, 0)
        raw = self.store.read_many([int(record) for record in records], self.channels, self.longitudes)
        raw = raw[:, :, : self.height]
        for block, record in zip(raw, records, strict=True):
            require_finite(block, self.channels, self.store, int(record))
        scaled = (raw - self.mean[:, None, None]) / self.std[:, None, None]
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 2, 3, 1), dtype=np.float32))


class WeatherSamples(Dataset[Batch]):
    """Samples of one part, a whole batch at a time.

    Args:
        block: What is read.
        columns: (sample, 1 + target): numbers of the first record and of those of the targets.
        hours: Time of every record, hours since 1970.
        steps: Steps of a sample, those without a target included.
        step_scale: (mean, scale) of the input channel that says how long the next step, to the next record, is; None:
            there is none.
    """

    def __init__(
        self,
        block: Block,
        columns: np.ndarray,
        hours: np.ndarray,
        steps: int,
        step_scale: tuple[float, float] | None = None,
    ) -> None:
        self.block, self.columns, self.hours, self.steps, self.step_scale = block, columns, hours, steps, step_scale
        self._statics = torch.from_numpy(np.ascontiguousarray(block.statics, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, index: int) -> Batch:
        """Return one sample, the batch of one without its batch dimension."""
        batch = self.__getitems__([index])
        return {key: value[0] if value.ndim else value for key, value in batch.items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """Gather a whole batch."""
        columns = self.columns[np.asarray(indices, dtype=np.int64)]
        store = self.block.store
        bytes_before, seconds_before = store.bytes_read, store.read_s
        wanted, places = np.unique(columns, return_inverse=True)
        fields = self.block.fields(wanted)[torch.from_numpy(places.reshape(columns.shape))]
        return {
            "input": self._input(fields[:, 0]),
            "target": _padded(fields[:, 1:], self.block.target_width),
            "index": torch.as_tensor(indices, dtype=torch.int64),
            "valid_h": torch.from_numpy(self.hours[columns]),
            "step": torch.from_numpy(self._steps(columns[:, 0])),
            "io_bytes": torch.tensor(store.bytes_read - bytes_before),
            "io_s": torch.tensor(store.read_s - seconds_before, dtype=torch.float64),
        }

    def _input(self, fields: Tensor) -> Tensor:
        statics = self._statics.expand(len(fields), *self._statics.shape)
        return _padded(torch.cat([fields, statics], -1), self.block.input_width)

    def _steps(self, origins: np.ndarray) -> np.ndarray:
        """Length of every step as the network is told, (sample, step), float32; zero where it is not told."""
        if self.step_scale is None:
            return np.zeros((len(origins), self.steps), dtype=np.float32)
        mean, scale = self.step_scale
        hours = self.hours[origins[:, None] + np.arange(self.steps + 1)]
        return ((np.diff(hours, axis=1) - mean) / scale).astype(np.float32)


def _padded(block: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(block, (0, width - block.shape[-1])) if block.shape[-1] < width else block
