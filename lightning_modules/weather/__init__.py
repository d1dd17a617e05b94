"""Weather forecasts: the module, its loss, and the baselines that forecasts are measured against."""

from lightning_modules.weather.baselines import BASELINES, DampedPersistence, LinearInverseModel
from lightning_modules.weather.module import WeatherMixerModule

__all__ = ["BASELINES", "DampedPersistence", "LinearInverseModel", "WeatherMixerModule"]
