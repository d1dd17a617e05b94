"""What stands between the profiles and any network on day tokens: the residual window in, the forecast out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks.recycle.compression import PrimaryCycleCompression

NUM_CALENDAR_FEATURES = 9
"""M: one-hot weekday (7), holiday today, holiday tomorrow."""

SMALLEST_SCALE = 1e-3
"""Of the residual window, on the scaled axis: below it a window counts as constant and is not blown up."""


class CycleTokens(NamedTuple):
    """One batch as day tokens of independent series, b = batch * channel sequences.

    Attributes:
        history: Residuals r_j = X_j - P_j (or X_j), (b, H, D).
        profile: Profile of the forecast days, (b, F, D).
        history_calendar: m_j, (b, H, 9).
        forecast_calendar: m_f, (b, F, 9).
        scale: Standard deviation that ``history`` was divided by, (b, 1, 1), or None.
    """

    history: Tensor
    profile: Tensor
    history_calendar: Tensor
    forecast_calendar: Tensor
    scale: Tensor | None


class ResidualCycles(nn.Module):
    """Base of networks that forecast the deviation from the recent historic profile, day by day.

    A subclass implements :meth:`residual_forecast_of`. Everything else is fixed here, so that the four ablations
    (residual input and output on and off) mean the same thing for every backbone.

    Args:
        history_length: L, steps before the origin; a multiple of ``cycle_length``.
        horizon: T, steps to forecast; the last day is cut if it is not a multiple.
        cycle_length: D, steps per day.
        residual_input: Whether the history is given as deviation from its profile.
        residual_forecast: Whether the profile is added to the output.
        window_scale: Whether the history window is divided by its own standard deviation and the residual forecast
            multiplied by it, so that calm and volatile series (or seasons) look alike to the network.
        quantiles: Q, number of quantiles; 1 is a point forecast.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        cycle_length: int,
        *,
        residual_input: bool,
        residual_forecast: bool,
        window_scale: bool,
        quantiles: int,
    ) -> None:
        super().__init__()
        if history_length < cycle_length or history_length % cycle_length:
            raise ValueError(
                f"net.history_length={history_length} is not a multiple of net.cycle_length={cycle_length}; "
                f"use {max(history_length // cycle_length, 1) * cycle_length}."
            )
        if horizon < 1:
            raise ValueError(f"net.horizon={horizon} forecasts nothing; give at least 1 step.")
        if quantiles < 1:
            raise ValueError(f"net.quantiles={quantiles} has no meaning; 1 is a point forecast.")
        self.cycles = PrimaryCycleCompression(cycle_length)
        self.history_length = history_length
        self.horizon = horizon
        self.cycle_length = cycle_length
        self.history_cycles = history_length // cycle_length
        self.forecast_cycles = self.cycles.num_cycles(horizon)
        self.residual_input = residual_input
        self.residual_forecast = residual_forecast
        self.window_scale = window_scale
        self.quantiles = quantiles

    def residual_forecast_of(self, tokens: CycleTokens, batch: Mapping[str, Tensor]) -> Tensor:
        """Residual forecast g of every day, (b, F, D, Q), quantiles ascending."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forecast = profile + residual forecast.

        Args:
            batch: Windows with ``history``, ``history_profile``, ``forecast_profile``, ``history_calendar`` and
                ``forecast_calendar`` (and the covariates that the network was built for).

        Returns:
            Forecast on the scaled axis, (batch, time, channel), or (batch, time, channel, quantile) for Q > 1.
        """
        channels = batch["history"].shape[2]
        tokens = self._tokens(batch)
        residual = self.residual_forecast_of(tokens, batch)
        if tokens.scale is not None:
            residual = residual * tokens.scale.unsqueeze(-1)
        forecast = residual + tokens.profile.unsqueeze(-1) if self.residual_forecast else residual
        forecast = self.cycles.unfold(forecast, self.horizon, channels)
        return forecast if self.quantiles > 1 else forecast.squeeze(-1)

    def _tokens(self, batch: Mapping[str, Tensor]) -> CycleTokens:
        window = batch["history"]
        if window.shape[1] != self.history_length:
            raise ValueError(
                f"net.history_length={self.history_length}, but the data gives {window.shape[1]} steps; "
                "bind it to ${data.history_length}."
            )
        history = self.cycles.fold(window - batch["history_profile"] if self.residual_input else window)
        scale = None
        if self.window_scale:
            scale = history.std(dim=(1, 2), keepdim=True, correction=0).clamp(min=SMALLEST_SCALE)
            history = history / scale
        return CycleTokens(
            history=history,
            profile=self.cycles.fold(batch["forecast_profile"]),
            history_calendar=self.cycles.per_series(batch["history_calendar"]),
            forecast_calendar=self.cycles.per_series(batch["forecast_calendar"]),
            scale=scale,
        )


class QuantileHead(nn.Module):
    """W_o, b_o: from the width of the network to D steps and Q ordered quantiles.

    The quantiles are sorted, so that they cannot cross. Sorting (rather than accumulating positive increments) has
    two merits: all quantiles may coincide, which the zero-initialised head needs to start as the profile itself, and
    the pinball loss of each keeps its own gradient.

    Args:
        width: Width of the incoming tokens.
        cycle_length: D.
        quantiles: Q.
        dropout: Applied before the linear map.
        zero_init: Start with W_o = b_o = 0: the untrained forecast is exactly the profile. Without it the map is the
            identity where the widths agree, as in the paper's code.
    """

    def __init__(self, width: int, cycle_length: int, quantiles: int, dropout: float, zero_init: bool) -> None:
        super().__init__()
        self.shape = (cycle_length, quantiles)
        self.dropout = nn.Dropout(dropout)
        self.projection: nn.Module = nn.Identity()
        if zero_init or width != cycle_length * quantiles:
            self.projection = nn.Linear(width, cycle_length * quantiles)
        if zero_init:
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, F, width) to (b, F, D, Q), ascending along the last dimension."""
        output = self.projection(self.dropout(tokens)).unflatten(-1, self.shape)
        return output.sort(dim=-1, stable=True).values if self.shape[1] > 1 else output


class LinearSkip(nn.Module):
    """Linear path from the residual window to the residual forecast, zero at the start.

    ``g = sum_r A_r R B_r`` with R in R^{H x D} the window, A_r in R^{F x H} mixing days and B_r in R^{D x D} mixing
    the steps of a day. The unrestricted map (``rank=None``) has F D H D weights, most of them noise for a year of
    data; days and steps treated apart need r (F H + D^2), a hundredth for r = 1.

    Args:
        history_cycles: H.
        forecast_cycles: F.
        cycle_length: D.
        rank: r, the number of terms; None for the unrestricted map.
        dropout: Applied to the window.
    """

    def __init__(
        self, history_cycles: int, forecast_cycles: int, cycle_length: int, rank: int | None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            raise ValueError(f"net.skip_rank={rank} has no terms; give at least 1, or null for the unrestricted map.")
        self.rank = rank
        self.dropout = nn.Dropout(dropout)
        self.forecast_shape = (forecast_cycles, cycle_length)
        if rank is None:
            size = (forecast_cycles * cycle_length, history_cycles * cycle_length)
            self.weight = nn.Parameter(torch.zeros(size))
        else:
            # Zero days times identity steps: the product is zero, its gradient with respect to the days is not.
            self.days = nn.Parameter(torch.zeros(rank, forecast_cycles, history_cycles))
            steps = torch.eye(cycle_length).repeat(rank, 1, 1)
            if rank > 1:
                # Terms that start alike would stay alike.
                steps[1:] = torch.randn(rank - 1, cycle_length, cycle_length) / cycle_length**0.5
            self.steps = nn.Parameter(steps)
        self.bias = nn.Parameter(torch.zeros(self.forecast_shape))

    def forward(self, history: Tensor) -> Tensor:
        """Map (b, H, D) to (b, F, D)."""
        history = self.dropout(history)
        if self.rank is None:
            linear = (history.flatten(1) @ self.weight.T).unflatten(1, self.forecast_shape)
        else:
            linear = torch.einsum("rfh,bhd,rde->bfe", self.days, history, self.steps)
        return linear + self.bias

    def sum_of_squares(self) -> Tensor:
        """Squared Frobenius norm of the whole map (without materialising it when it is separable)."""
        if self.rank is None:
            return self.weight.square().sum()
        days, steps = self.days.flatten(1), self.steps.flatten(1)
        return ((days @ days.T) * (steps @ steps.T)).sum()
