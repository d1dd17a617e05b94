"""What generated weather shares: trajectories of simulators, made once by whoever comes first and kept in a store."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from typing_extensions import override

from datamodules.readers.weather_store import PackedWriter
from datamodules.weather.module import WeatherZarr
from physics.shallow_water import SphericalTransform

log = logging.getLogger(__name__)

FIRST_YEAR = 2001
"""Of the first trajectory; each has a year of its own, so that none continues another."""


class Grid(NamedTuple):
    """Where generated fields live: latitudes from north to south and longitudes in degrees, statics by name."""

    latitudes: np.ndarray
    longitudes: np.ndarray
    statics: Mapping[str, np.ndarray]


def gaussian_grid(transform: SphericalTransform, **statics: np.ndarray) -> Grid:
    """That of a spherical transform; the sine of the latitude is its last static.

    Args:
        transform: Of the simulator.
        **statics: Further ones, (H, W) each.
    """
    sine = np.broadcast_to(transform.mu.numpy()[:, None], (transform.height, transform.width))
    latitudes, longitudes = (np.rad2deg(angle.numpy()) for angle in (transform.latitude, transform.longitude))
    return Grid(latitudes, longitudes, {**statics, "sin_latitude": sine})


class GeneratedWeather(WeatherZarr):
    """Independent trajectories for training, validation and test, in ``cache_dir``.

    Args:
        kind: Begin of the name of the store.
        about: Everything that the fields depend on, plain data; it makes the rest of the name and is kept in the store.
        cache_dir: Where that is kept.
        counts: Trajectories of ``train``, ``val`` and ``test``.
        records: Records of each.
        chunks: Longitude bands and channel groups that the chunks of the store fit.
        **options: Of `WeatherZarr`.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    def __init__(
        self,
        kind: str,
        about: Mapping[str, Any],
        cache_dir: str,
        counts: Mapping[str, int],
        records: int,
        chunks: tuple[int, int],
        **options: Any,
    ) -> None:
        for key, value in {**{f"num_{part}": n for part, n in counts.items()}, "records": records}.items():
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        width, step_h = options["width"], options["step_h"]
        if chunks[0] < 1 or width % chunks[0] or chunks[1] < 1:
            raise ValueError(
                f"data.chunk_token={chunks[0]}, data.chunk_channel={chunks[1]}: must be at least 1, and bands divide "
                f"data.width={width}"
            )
        if (records - 1) * step_h > 8760:
            raise ValueError(f"data.records={records}: a trajectory is at most a year long, {int(8760 / step_h) + 1}")
        self.about, self.counts, self.records = about, dict(counts), records
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        self.chunks = (chunks[0], -(-options["num_inputs"] // chunks[1]))
        first, periods = FIRST_YEAR, {}
        for part, number in counts.items():
            periods[part] = (str(first), str(first + number - 1))
            first += number
        super().__init__(store=f"{kind}_{key}.zarr", data_dir=cache_dir, cache_dir=None, **periods, **options)

    @abstractmethod
    def open_generator(self) -> Any:
        """The simulator; a ``ValueError`` names an argument without ``data.``."""

    @abstractmethod
    def grid_of(self, generator: Any) -> Grid:
        """Its grid."""

    @abstractmethod
    def records_of(self, generator: Any, members: Sequence[int]) -> Iterator[np.ndarray]:
        """Records (member, channel, lat, lon), one time after the other."""

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
            generator = self.open_generator()
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        members = range(sum(self.counts.values()))
        log.info("generating %d trajectories of %d records, once: %s", len(members), self.records, path)
        begin = time.perf_counter()
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            writer = self._writer(unfinished, self.grid_of(generator))
            fields = np.empty((len(members), self.records, len(self.channels), self.height, self.width), "f4")
            for record, now in enumerate(self.records_of(generator, members)):
                fields[:, record] = now
            for member in members:
                writer.write(member * self.records, fields[member])
            writer.close()
            unfinished.replace(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        log.info("generated in %.0f s", time.perf_counter() - begin)

    def _writer(self, path: Path, grid: Grid) -> PackedWriter:
        hours = (np.arange(self.records) * self.step_h * 3.6e12).round().astype(np.int64).astype("timedelta64[ns]")
        years = range(FIRST_YEAR, FIRST_YEAR + sum(self.counts.values()))
        times = np.concatenate([np.datetime64(f"{year}-01-01", "ns") + hours for year in years])
        return PackedWriter(
            path, [channel.variable for channel in self.channels], times, grid.latitudes, grid.longitudes,
            dict(grid.statics), self.chunks[0], self.chunks[1], attributes=dict(self.about),
        )  # fmt: skip
