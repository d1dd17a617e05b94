"""Primary cycle compression (PCC): one token per day instead of one per step (ReCycle, section III)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PrimaryCycleCompression:
    """Fold the time axis into cycles, ``X[l, d] = x[l * D + d]``, and back.

    A token is one whole cycle, so that attention sees H = L / D tokens and (H D)^2 / H^2 = D^2 times fewer pairs.
    Channels are independent series: they join the batch.

    Args:
        cycle_length: D, steps per primary cycle (24 for hourly data with a daily cycle).
    """

    cycle_length: int

    def __post_init__(self) -> None:
        if self.cycle_length < 1:
            raise ValueError(f"cycle_length={self.cycle_length} is no cycle; give the steps per day, at least 1.")

    def num_cycles(self, num_steps: int) -> int:
        """Number of cycles that hold ``num_steps`` steps; the last one may be partly filled."""
        return -(-num_steps // self.cycle_length)

    def fold(self, series: Tensor) -> Tensor:
        """Cut (batch, time, channel) into (batch * channel, cycle, step), the last cycle padded with zeros."""
        padding = -series.shape[1] % self.cycle_length
        series = series.transpose(1, 2)
        if padding:
            series = F.pad(series, (0, padding))
        return series.reshape(-1, series.shape[-1] // self.cycle_length, self.cycle_length)

    def fold_shared(self, series: Tensor, channels: int) -> Tensor:
        """Cut covariates that all channels share, (batch, time, covariate), into one wide token per cycle.

        Returns:
            Tokens (batch * channel, cycle, covariate * step), the step being the fastest index.
        """
        batch, _, covariates = series.shape
        tokens = self.fold(series).unflatten(0, (batch, covariates)).transpose(1, 2).flatten(2)
        return tokens.repeat_interleave(channels, dim=0)

    def unfold(self, tokens: Tensor, num_steps: int, channels: int) -> Tensor:
        """Join (batch * channel, cycle, step, ...) to (batch, time, channel, ...) and cut it to ``num_steps``."""
        series = tokens.flatten(1, 2)[:, :num_steps]
        return series.unflatten(0, (-1, channels)).transpose(1, 2)

    @staticmethod
    def per_series(features: Tensor) -> Tensor:
        """Bring features of tokens, (batch, cycle, channel, feature), to (batch * channel, cycle, feature)."""
        return features.transpose(1, 2).flatten(0, 1)
