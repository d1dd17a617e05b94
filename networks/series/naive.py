"""Forecasts without a backbone: repeat a season, follow the profile, correct the profile linearly.

These networks read the batch themselves, because what they need is the window as it is or its profile.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SeasonalNaive(nn.Module):
    """Repeat the last days: y_{t+h} = x_{t+h-m*ceil(h/m)}, m the length of the repeated block.

    Args:
        season_length: steps of one season (a day).
        horizon: steps to forecast; a longer one than the block repeats the block.
        num_seasons: seasons in the repeated block: 1 repeats the last day, 7 the last week.
    """

    def __init__(self, season_length: int, horizon: int, num_seasons: int = 1) -> None:
        super().__init__()
        for key, value in (("season_length", season_length), ("horizon", horizon), ("num_seasons", num_seasons)):
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        self.block_length = season_length * num_seasons
        self.horizon = horizon

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forecast `(batch, horizon, channel)` from `history` (batch, time, channel)."""
        history = batch["history"]
        if history.shape[1] < self.block_length:
            raise ValueError(
                f"history_length={history.shape[1]} is shorter than the {self.block_length} steps that are repeated "
                "(season_length * num_seasons): lengthen the history or repeat fewer seasons"
            )
        steps = torch.arange(self.horizon, device=history.device) % self.block_length
        return history[:, history.shape[1] - self.block_length + steps]


class ProfileForecast(nn.Module):
    """The recent historic profile as the forecast: ReCycle with a network that is always zero.

    Weyrauch et al., "ReCycle: Fast and Efficient Long Time Series Forecasting with Residual Cyclic Transformers",
    IEEE CAI 2024, the fallback of the method.
    """

    def __init__(self) -> None:  # that of nn.Module would let any configuration key pass
        super().__init__()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return `forecast_profile` (batch, horizon, channel)."""
        return batch["forecast_profile"]


class ProfileLinear(nn.Module):
    """The recent historic profile plus one linear map of the window's deviation from it.

    y = P_forecast + W (x - P_history) + b, with one W in R^{horizon x time} for all channels. W and b start at zero,
    so that the untrained network is the profile forecast and training can only move away from it for a reason.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
    """

    def __init__(self, history_length: int, horizon: int) -> None:
        super().__init__()
        self.map = nn.Linear(history_length, horizon)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forecast `(batch, horizon, channel)`.

        Args:
            batch: `history` and `history_profile` (batch, time, channel), `forecast_profile` (batch, horizon, channel).
        """
        residual = batch["history"] - batch["history_profile"]
        return batch["forecast_profile"] + self.map(residual.mT).mT
