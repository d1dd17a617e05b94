"""Gridded weather: any zarr or NetCDF store, a real sample, and generated weather."""

from datamodules.weather.advected import AdvectedFields
from datamodules.weather.era5_sample import ERA5Sample
from datamodules.weather.module import WeatherZarr
from datamodules.weather.shallow_water import ShallowWater

__all__ = ["AdvectedFields", "ERA5Sample", "ShallowWater", "WeatherZarr"]
