"""Normalisation of one window by its own statistics, with a way back to the scale of the series."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class WindowStatistics(NamedTuple):
    """Location and scale of every window and channel, both `(batch, 1, channel)`."""

    location: Tensor
    scale: Tensor


class InstanceNormalization(nn.Module):
    """Reversible instance normalisation (RevIN).

    Kim et al., "Reversible Instance Normalization for Accurate Time-Series Forecasting against Distribution Shift",
    ICLR 2022, equations 1-3. Every channel of a window is standardised by the mean and the (biased) variance of its
    own history; the forecast is mapped back with the same numbers. The statistics are returned, not stored, so that
    the module has no hidden state between the two calls.

    Args:
        channels: number of channels of the learnable scale and shift; None leaves both out.
        eps: added to the variance, keeps a constant window finite.
    """

    def __init__(self, channels: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if channels is not None else None
        self.bias = nn.Parameter(torch.zeros(channels)) if channels is not None else None

    def normalize(self, history: Tensor) -> tuple[Tensor, WindowStatistics]:
        """Standardise `(batch, time, channel)` along time and return the statistics beside it."""
        variance, mean = torch.var_mean(history, dim=1, correction=0, keepdim=True)
        statistics = WindowStatistics(mean, (variance + self.eps).sqrt())
        normalized = (history - statistics.location) / statistics.scale
        if self.weight is not None:
            normalized = normalized * self.weight + self.bias
        return normalized, statistics

    def denormalize(self, forecast: Tensor, statistics: WindowStatistics) -> Tensor:
        """Map a forecast `(batch, time, channel)` back to the scale of its history."""
        if self.weight is not None:
            forecast = (forecast - self.bias) / self.weight
        return forecast * statistics.scale + statistics.location


class NoNormalization(nn.Module):
    """The same interface for a network that is to see the window as it is."""

    def normalize(self, history: Tensor) -> tuple[Tensor, None]:
        """Return the window itself."""
        return history, None

    def denormalize(self, forecast: Tensor, statistics: None) -> Tensor:
        """Return the forecast itself."""
        return forecast
