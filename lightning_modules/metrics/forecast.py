"""Errors of forecasts as sums: exact for any batch size and any number of ranks, on both axes, against naive peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.sums import Sums

DAY_GROUPS = ("working_day", "saturday", "sunday", "holiday")
"""Names of day types 0, 1, 2 (Sunday or public holiday), and of the public holidays alone."""


class SumRatio(Sums):
    """Quotient of two sums over everything seen, (...): a weighted mean that does not depend on batches or ranks.

    The sums are float64, so that the order in which batches arrive changes the result only in the last digits.

    Args:
        shape: Shape of both sums; the quotients are averaged over the entries whose denominator is not zero.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self, shape: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("numerator", torch.zeros(tuple(shape), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("denominator", torch.zeros(tuple(shape), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, numerator: Tensor, denominator: Tensor) -> None:
        """Add to both sums."""
        self.numerator += numerator
        self.denominator += denominator

    @override
    def compute(self) -> Tensor:
        """Mean quotient, NaN if nothing was seen."""
        seen = self.denominator != 0
        return (self.numerator[seen] / self.denominator[seen]).mean()


class ForecastErrors(Sums):
    """MAE, MSE, RMSE, MASE, WAPE, bias and skill of point forecasts, overall and by lead day, day type and channel.

    Everything is accumulated on the scaled axis. A channel's error in the data's units is its scaled error times its
    scale, so that the sums per channel serve both axes. Means are taken over all valid values of all channels.

    `compute` returns (names without the stage prefix; ``_scaled`` = scaled axis, otherwise the data's units):

    - ``mae mse rmse bias`` and ``mae_scaled mse_scaled rmse_scaled bias_scaled``, bias = mean(reference - forecast);
    - ``mase``: each absolute error over the channel's training error of repeating the last week. Channels for which
      that is zero (constant ones) have no MASE and are left out;
    - ``wape``: sum of absolute errors over sum of absolute values, in the data's units;
    - per naive peer ``<peer>_mae``, ``<peer>_mae_scaled`` and ``skill_<peer>_percent`` = 100 (1 - MAE / MAE of the
      peer) on the scaled axis, where no channel drowns the others;
    - with ``breakdown``: ``mae_day_<i>`` for lead days from 1, ``mae_<group>`` for `DAY_GROUPS` that occur;
    - with ``channel_names``: ``mae_channel_<name>`` for channels with a valid window.

    Args:
        location: Location of the scaler, (channel,): data's units = scaled * scale + location.
        scale: Scale of the scaler, (channel,).
        mase_scale: Training-part MAE of repeating the last week in the data's units, (channel,).
        horizon: T, forecast steps.
        cycle_length: D, steps per day.
        peers: Names of the naive forecasts that `update` may be given.
        breakdown: Whether errors by lead day and day type are reported.
        channel_names: Channels to report one by one, None for none.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    windows: Tensor
    absolute: Tensor
    squared: Tensor
    signed: Tensor
    magnitude: Tensor
    group_absolute: Tensor
    group_count: Tensor
    peer_windows: Tensor
    peer_absolute: Tensor

    def __init__(
        self,
        location: Tensor,
        scale: Tensor,
        mase_scale: Tensor,
        horizon: int,
        cycle_length: int,
        *,
        peers: Sequence[str] = ("rhp", "last_week"),
        breakdown: bool = True,
        channel_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.horizon, self.cycle_length = horizon, cycle_length
        self.peers, self.breakdown, self.channel_names = tuple(peers), breakdown, channel_names
        for name, value in (("location", location), ("scale", scale), ("mase_scale", mase_scale)):
            self.register_buffer(name, value.detach().to(torch.float64).clone(), persistent=False)
        channels = len(scale)

        def add_sum(name: str, *shape: int) -> None:
            self.add_state(name, torch.zeros(tuple(shape), dtype=torch.float64), dist_reduce_fx="sum")

        add_sum("windows", channels)
        add_sum("absolute", horizon, channels)
        add_sum("squared", channels)
        add_sum("signed", channels)
        add_sum("magnitude", channels)
        add_sum("group_absolute", len(DAY_GROUPS), channels)
        add_sum("group_count", len(DAY_GROUPS), channels)
        add_sum("peer_windows", len(self.peers), channels)
        add_sum("peer_absolute", len(self.peers), channels)

    @override
    def update(
        self,
        prediction: Tensor,
        target: Tensor,
        valid: Tensor,
        *,
        peers: Mapping[str, Tensor | None] | None = None,
        day_type: Tensor | None = None,
        holiday: Tensor | None = None,
    ) -> None:
        """Add a batch of windows.

        Args:
            prediction: Point forecast, scaled, (batch, time, channel).
            target: Truth, scaled, (batch, time, channel).
            valid: Windows that count, (batch, channel) bool.
            peers: Naive forecasts by name, each (batch, time, channel), scaled; None where there is none.
            day_type: Day type of each step, (batch, time, channel); needed with ``breakdown``.
            holiday: Public holidays, (batch, time, channel) bool; needed with ``breakdown``.
        """
        target = target.to(torch.float64)
        mask = valid.unsqueeze(1)
        zero = target.new_zeros(())
        error = torch.where(mask, target - prediction, zero)  # where, not a product: 0 * NaN would be NaN
        absolute = error.abs()
        self.windows += valid.sum(0)
        self.absolute += absolute.sum(0)
        self.squared += error.square().sum((0, 1))
        self.signed += error.sum((0, 1))
        self.magnitude += torch.where(mask, (target * self.scale + self.location).abs(), zero).sum((0, 1))
        for i, name in enumerate(self.peers):
            peer = (peers or {}).get(name)
            if peer is not None:
                self.peer_windows[i] += valid.sum(0)
                self.peer_absolute[i] += torch.where(mask, (target - peer).abs(), zero).sum((0, 1))
        if self.breakdown:
            if day_type is None or holiday is None:
                raise ValueError("errors by day type need day_type and holiday; set breakdown=False without them.")
            groups = torch.stack([day_type == 0, day_type == 1, day_type == 2, holiday]) & mask
            self.group_count += groups.sum((1, 2))
            self.group_absolute += torch.where(groups, absolute, zero).sum((1, 2))

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        count = self.windows * self.horizon
        total = count.sum()
        absolute = self.absolute.sum(0)
        out = {
            "mae": (absolute * self.scale).sum() / total,
            "mse": (self.squared * self.scale.square()).sum() / total,
            "bias": (self.signed * self.scale).sum() / total,
            "mae_scaled": absolute.sum() / total,
            "mse_scaled": self.squared.sum() / total,
            "bias_scaled": self.signed.sum() / total,
            "wape": (absolute * self.scale).sum() / self.magnitude.sum(),
        }
        out["rmse"], out["rmse_scaled"] = out["mse"].sqrt(), out["mse_scaled"].sqrt()
        varying = self.mase_scale > 1e-6 * self.scale
        out["mase"] = (absolute * self.scale / self.mase_scale)[varying].sum() / count[varying].sum()
        for name, windows, peer_absolute in zip(self.peers, self.peer_windows, self.peer_absolute, strict=True):
            if windows.any():
                peer_total = windows.sum() * self.horizon
                out[f"{name}_mae"] = (peer_absolute * self.scale).sum() / peer_total
                out[f"{name}_mae_scaled"] = peer_absolute.sum() / peer_total
                out[f"skill_{name}_percent"] = 100 * (1 - out["mae_scaled"] / out[f"{name}_mae_scaled"])
        if self.breakdown:
            for day, part in enumerate(self.absolute.split(self.cycle_length), start=1):
                out[f"mae_day_{day}"] = (part.sum(0) * self.scale).sum() / (self.windows.sum() * len(part))
            for name, part, group_count in zip(DAY_GROUPS, self.group_absolute, self.group_count, strict=True):
                if group_count.any():
                    out[f"mae_{name}"] = (part * self.scale).sum() / group_count.sum()
        for name, error, number in zip(self.channel_names or (), absolute * self.scale, count, strict=False):
            if number:
                out[f"mae_channel_{name}"] = error / number
        return out
