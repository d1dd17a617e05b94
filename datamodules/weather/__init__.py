"""Gridded weather: any zarr or NetCDF store, a real sample, and generated shallow water."""

from datamodules.weather.era5_sample import ERA5Sample
from datamodules.weather.module import WeatherZarr
from datamodules.weather.shallow_water import ShallowWater

__all__ = ["ERA5Sample", "ShallowWater", "WeatherZarr"]
