"""Means, deviations and climatology of a store: computed once, record by record, and kept beside it.

Mean and deviation are over records and grid points, each point alike: they are not weighted by area, so the poles of a
regular grid weigh more than their part of the sphere. They scale what the network sees and nothing else: losses and
scores have their own weights of latitudes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from datamodules.readers.weather_store import Channel, WeatherStore

log = logging.getLogger(__name__)

Climatology = Literal["mean", "seasonal"]
_FORMAT = 1
_YEAR_NS = 365.2425 * 86400e9
_DAY_NS = 86400e9
_READ_AT_ONCE = 2**26  # bytes


def seasonal_basis(times: np.ndarray, kind: Climatology) -> np.ndarray:
    """What the fields of the climatology are multiplied by at some times, (..., K), float64.

    ``mean``: 1. ``seasonal``: also cosine and sine of the year and of half a year, and of the day.
    """
    ones = np.ones((*times.shape, 1))
    if kind == "mean":
        return ones
    since = times.astype("datetime64[ns]").astype(np.int64).astype(np.float64)
    year, day = 2 * np.pi * since / _YEAR_NS, 2 * np.pi * since / _DAY_NS
    waves = [f(phase) for phase in (year, 2 * year, day) for f in (np.cos, np.sin)]
    return np.concatenate([ones, np.stack(waves, -1)], -1)


@dataclass(frozen=True)
class Statistics:
    """Of the channels of a store.

    Attributes:
        mean: (channel,), over records and grid points, not weighted by area.
        std: (channel,), the same.
        path: Store with the climatology, (K, channel, latitude, longitude).
    """

    mean: np.ndarray
    std: np.ndarray
    path: Path

    def climatology(self, channels: slice, longitudes: slice) -> np.ndarray:
        """Fields of the climatology in physical units, a part of them: (K, channel, latitude, longitude), float32."""
        import zarr

        return np.asarray(zarr.open_array(str(self.path), path="climatology", mode="r")[:, channels, :, longitudes])


def statistics_of(
    store: WeatherStore,
    channels: Sequence[Channel],
    records: np.ndarray,
    height: int,
    kind: Climatology,
    cache_dir: str | Path | None,
) -> Statistics:
    """Read the statistics of a store, or compute them: whoever comes first does, the others wait.

    Args:
        store: Which.
        channels: Of which.
        records: Numbers of the records that count.
        height: Rows that count, from the north.
        kind: Of the climatology.
        cache_dir: Where they are kept; None: beside the store.

    Raises:
        ValueError: If the store has values that are no numbers, or a climatology needs more records.
    """
    about = {
        "format": _FORMAT,
        "store": os.path.abspath(store.path),
        "stamp": _stamp(store.path),
        "channels": [channel.name for channel in channels],
        "records": hashlib.sha256(np.asarray(records, dtype=np.int64).tobytes()).hexdigest(),
        "height": height,
        "kind": kind,
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    name = Path(store.path.rstrip("/")).name
    folder = Path(cache_dir) if cache_dir is not None else Path(store.path).parent
    path = folder / f"{name}.statistics-{key}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():  # else another process made them while this one waited
                unfinished = folder / f".{path.name}.{os.getpid()}"
                shutil.rmtree(unfinished, ignore_errors=True)
                try:
                    _compute(unfinished, store, channels, records, height, kind, about)
                    unfinished.replace(path)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    import zarr

    group = zarr.open_group(str(path), mode="r")
    return Statistics(np.asarray(group["mean"][:]), np.asarray(group["std"][:]), path)


def _stamp(path: str) -> str:
    """Changes where the store was made anew."""
    for candidate in (Path(path) / "zarr.json", Path(path) / ".zgroup", Path(path)):
        if candidate.exists():
            status = candidate.stat()
            return f"{status.st_size}-{status.st_mtime_ns}"
    return "remote"


def _compute(
    path: Path,
    store: WeatherStore,
    channels: Sequence[Channel],
    records: np.ndarray,
    height: int,
    kind: Climatology,
    about: dict[str, Any],
) -> None:
    import zarr

    log.info("%s: statistics of %d records, once", store.path, len(records))
    basis = seasonal_basis(store.times[records], kind)
    if len(records) <= 2 * basis.shape[1] and kind != "mean":
        raise ValueError(
            f"data.climatology={kind}: {len(records)} records are too few for {basis.shape[1]} fields; use mean"
        )
    shape = (len(channels), height, len(store.longitudes))
    sums = np.zeros((basis.shape[1], *shape))
    squares = np.zeros(len(channels))
    first: np.ndarray | None = None
    for record, weights, block in zip(records, basis, _blocks(store, channels, records, height), strict=True):
        require_finite(block, channels, store, int(record))
        if first is None:  # what is summed lies around zero
            first = block.mean((1, 2), keepdims=True)
        block -= first
        squares += np.square(block).mean((1, 2))
        for k, weight in enumerate(weights):
            sums[k] += weight * block
    count = len(records)
    mean = sums[0].mean((1, 2)) / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    gram = basis.T @ basis
    fields = np.linalg.lstsq(gram, sums.reshape(len(gram), -1), rcond=1e-10)[0].reshape(sums.shape)
    fields[0] += first
    group = zarr.create_group(str(path), attributes=about)
    group.create_array("mean", data=mean + first[:, 0, 0])
    group.create_array("std", data=std)
    group.create_array(
        "climatology", data=fields.astype(np.float32), chunks=(1, 1, *shape[1:]),
        dimension_names=("basis", "channel", "latitude", "longitude"),
    )  # fmt: skip


def _blocks(store: WeatherStore, channels: Sequence[Channel], records: np.ndarray, height: int) -> Iterator[np.ndarray]:
    """Records, (channel, latitude, longitude), float64, read some at a time."""
    size = 4 * len(channels) * height * len(store.longitudes)
    together = max(1, _READ_AT_ONCE // size)
    for begin in range(0, len(records), together):
        some = [int(record) for record in records[begin : begin + together]]
        for block in store.read_many(some, channels)[:, :, :height]:
            yield block.astype(np.float64)


def require_finite(block: np.ndarray, channels: Sequence[Channel], store: WeatherStore, record: int) -> None:
    """Raise a ValueError that counts values which are no numbers, and says where the first is.

    Args:
        block: (channel, latitude, longitude).
        channels: Its channels.
        store: Where it comes from.
        record: Number of the record.
    """
    if np.isfinite(block).all():
        return
    wrong = np.argwhere(~np.isfinite(block))
    channel, row, column = wrong[0]
    raise ValueError(
        f"{store.path}: {len(wrong)} values of record {record} ({store.times[record].astype('datetime64[h]')}) are not "
        f"finite, the first is {channels[channel].name} in row {row}, column {column}; leave the record out"
    )
