"""Tiny stores of weather in the layouts that exist."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from datamodules.readers.weather_store import PackedWriter

HEIGHT, WIDTH, RECORDS = 8, 16, 12
LEVELS = [500, 850, 1000]
LATITUDES = np.linspace(78.75, -78.75, HEIGHT)
LONGITUDES = np.arange(WIDTH) * 360.0 / WIDTH
TIMES = np.datetime64("2020-01-01", "ns") + np.arange(RECORDS) * np.timedelta64(6, "h")


def values(variable: str, level: float | None = None) -> np.ndarray:
    """What a channel holds, (record, latitude, longitude), north first."""
    seed = sum(map(ord, variable)) + int(level or 0)
    return np.random.default_rng(seed).normal(size=(RECORDS, HEIGHT, WIDTH)).astype(np.float32)


def dataset(
    order: tuple[str, ...] = ("time", "level", "latitude", "longitude"),
    northward: bool = False,
    times: Any = TIMES,
    names: dict[str, str] | None = None,
) -> xarray.Dataset:
    """msl at the surface, z at three levels, and a land mask; long names as in WeatherBench 2."""
    flip = slice(None, None, -1) if northward else slice(None)
    pressure = np.stack([values("z", level) for level in LEVELS], 1)[:, :, flip]
    surface = values("msl")[:, flip]
    mask = (values("lsm")[0, flip] > 0).astype(np.float32)
    full = xarray.Dataset(
        {
            "geopotential": (("time", "level", "latitude", "longitude"), pressure),
            "mean_sea_level_pressure": (("time", "latitude", "longitude"), surface),
            "land_sea_mask": (("latitude", "longitude"), mask),
        },
        coords={"time": times, "level": LEVELS, "latitude": LATITUDES[flip], "longitude": LONGITUDES},
    )
    full = full.transpose(*order)
    return full.rename(names or {})


def write_zarr(path: Path, data: xarray.Dataset, version: int = 3, consolidated: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.to_zarr(path, zarr_format=version, consolidated=consolidated)
    return path


def write_packed(
    path: Path, channels: int = 4, token: int = 1, group: int | None = None, sharded: bool = False,
    records: int = RECORDS, size: tuple[int, int] = (HEIGHT, WIDTH),
) -> Path:  # fmt: skip
    """Channels c0, c1, ... of random numbers, which no codec makes smaller, and one static field."""
    height, width = size
    names = [f"c{i}" for i in range(channels)]
    times = np.datetime64("2020-01-01", "ns") + np.arange(records) * np.timedelta64(6, "h")
    latitudes = 90 - (np.arange(height) + 0.5) * 180 / height
    static = np.random.default_rng(7).normal(size=size)
    writer = PackedWriter(
        path, names, times, latitudes, np.arange(width) * 360 / width, {"ground": static}, token, group, sharded
    )
    random = np.random.default_rng(5)
    for record in range(records):
        writer.write(record, random.normal(size=(channels, height, width)).astype(np.float32))
    writer.close()
    return path
