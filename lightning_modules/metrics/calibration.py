"""Quantile forecasts: levels, pinball loss, scores of the intervals, and their split-conformal calibration.

Conformalised quantile regression follows Romano, Patterson and Candes (NeurIPS 2019); intervals are calibrated apart
for every lead day, because the error of a forecast grows with the lead. Its guarantee needs a test part like the one
that calibrates. `RollingScores` follows a series that changes: Barber, Candes, Ramdas and Tibshirani ("Conformal
prediction beyond exchangeability", 2023) with weight 1 for the latest windows and 0 for all others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_modules.metrics.sums import Sums

QuantileSet = Literal["equidistant", "upper", "lower"]


class CentralInterval(NamedTuple):
    """The interval between levels q and 1 - q: positions of its ends among the levels, and its nominal coverage."""

    lower: int
    upper: int
    coverage: float

    @property
    def label(self) -> str:
        """Coverage in percent as part of a metric's name: ``80``, ``97_5``."""
        return f"{100 * self.coverage:.4g}".replace(".", "_")


def quantile_levels(quantiles: int | Sequence[float], kind: QuantileSet = "equidistant") -> list[float]:
    """Levels of a quantile set (ReCycle, section III; Q = number of quantiles), ascending.

    Args:
        quantiles: Q, or the levels themselves (then ``kind`` is not used).
        kind: ``equidistant``: i / (Q + 1), i = 1..Q. ``upper``: 0.5 + i / (2 Q), i = 0..Q-1, the upper half of a
            symmetric distribution. ``lower``: its mirror.
    """
    if kind not in get_args(QuantileSet):
        raise ValueError(f"model.quantile_set={kind!r} is unknown; choose one of {', '.join(get_args(QuantileSet))}.")
    if isinstance(quantiles, int):
        if quantiles < 1:
            raise ValueError(f"model.quantiles={quantiles}: give at least one quantile, or null for a point forecast.")
        if kind == "equidistant":
            return [i / (quantiles + 1) for i in range(1, quantiles + 1)]
        upper = [0.5 + i / (2 * quantiles) for i in range(quantiles)]
        return upper if kind == "upper" else [1 - q for q in reversed(upper)]
    levels = [float(q) for q in quantiles]
    if not levels or any(not 0 < q < 1 for q in levels) or any(a >= b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"model.quantiles={levels}: levels must lie between 0 and 1 and ascend, without repetition.")
    return levels


def point_index(levels: Sequence[float]) -> int:
    """Position of the point forecast: the level nearest to the median, the upper one of two."""
    return min(range(len(levels)), key=lambda i: (round(abs(levels[i] - 0.5), 9), -i))


def central_intervals(levels: Sequence[float]) -> list[CentralInterval]:
    """All pairs of levels q < 0.5 and 1 - q, widest first."""
    return [
        CentralInterval(i, j, levels[j] - levels[i])
        for i, q in enumerate(levels)
        for j, p in enumerate(levels)
        if q < 0.5 and math.isclose(p, 1 - q, abs_tol=1e-6)
    ]


def pinball_loss(prediction: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """Pinball loss max(q e, (q - 1) e) of every quantile, e = y - prediction.

    Args:
        prediction: Quantiles, (..., quantile).
        target: Truth, (...).
        levels: q, (quantile,).

    Returns:
        Losses, (..., quantile).
    """
    error = target.unsqueeze(-1) - prediction
    return torch.maximum(levels * error, (levels - 1) * error)


class QuantileScores(Sums):
    """Pinball loss, CRPS, and coverage and width of every central interval, as float64 sums.

    `compute` returns ``pinball``, ``crps`` and ``width_<percent>`` in the data's units, the same with ``_scaled`` on
    the scaled axis, ``coverage_<percent>`` and ``crossing_rate`` (fraction of neighbouring quantiles in the wrong
    order). The CRPS is twice the integral of the pinball loss over the level, by the trapezoidal rule on the levels and
    on 0 and 1, where the loss vanishes; it is left out if the levels cover only one half of the distribution.

    Args:
        levels: Ascending levels.
        scale: Scale of the scaler, (channel,).
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    count: Tensor
    pinball: Tensor
    covered: Tensor
    width: Tensor
    crossings: Tensor

    def __init__(self, levels: Sequence[float], scale: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.intervals = central_intervals(levels)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float64), persistent=False)
        self.register_buffer("scale", scale.detach().to(torch.float64).clone(), persistent=False)
        self.register_buffer("lower", torch.tensor([i.lower for i in self.intervals]).long(), persistent=False)
        self.register_buffer("upper", torch.tensor([i.upper for i in self.intervals]).long(), persistent=False)
        shapes = {
            "count": (),
            "pinball": (len(levels),),
            "covered": (len(self.intervals),),
            "width": (len(self.intervals),),
            "crossings": (),
        }
        for name, shape in shapes.items():
            zeros = torch.zeros((len(scale), *shape), dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    @override
    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Quantiles, scaled, (batch, time, channel, quantile).
            target: Truth, scaled, (batch, time, channel).
            valid: Windows that count, (batch, channel) bool.
        """
        prediction, target = prediction.to(torch.float64), target.to(torch.float64)
        mask = valid[:, None, :, None]

        def total(value: Tensor) -> Tensor:
            return torch.where(mask, value, value.new_zeros(())).sum((0, 1))

        lower, upper = prediction[..., self.lower], prediction[..., self.upper]
        truth = target.unsqueeze(-1)
        self.count += valid.sum(0) * target.shape[1]
        self.pinball += total(pinball_loss(prediction, target, self.levels))
        self.covered += total(((lower <= truth) & (truth <= upper)).double())
        self.width += total(upper - lower)
        self.crossings += total((prediction.diff(dim=-1) < 0).double()).sum(-1)

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        count, num_levels = self.count.sum(), len(self.levels)
        mean_scaled = self.pinball.sum(0) / count
        mean = (self.pinball * self.scale[:, None]).sum(0) / count
        out = {"pinball": mean.mean(), "pinball_scaled": mean_scaled.mean()}
        if self.levels[0] < 0.5 < self.levels[-1]:
            ends = self.levels.new_tensor([0.0, 1.0])
            nodes = torch.cat([ends[:1], self.levels, ends[1:]])
            weight = nodes[2:] - nodes[:-2]  # twice the trapezoidal weight
            out["crps"], out["crps_scaled"] = weight @ mean, weight @ mean_scaled
        for i, interval in enumerate(self.intervals):
            out[f"coverage_{interval.label}"] = self.covered[:, i].sum() / count
            out[f"width_{interval.label}"] = (self.width[:, i] * self.scale).sum() / count
            out[f"width_{interval.label}_scaled"] = self.width[:, i].sum() / count
        if num_levels > 1:
            out["crossing_rate"] = self.crossings.sum() / (count * (num_levels - 1))
        return out


class ConformalScores(Sums):
    """Conformity scores of all valid validation windows, gathered over ranks, and the offsets that follow from them.

    Keeps 4 bytes per window, step, channel and interval.

    Args:
        levels: Ascending levels.
        cycle_length: D, steps per day.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    scores: list[Tensor]

    def __init__(self, levels: Sequence[float], cycle_length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cycle_length = cycle_length
        self.intervals = central_intervals(levels)
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    @override
    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Quantiles, scaled, (batch, time, channel, quantile).
            target: Truth, scaled, (batch, time, channel).
            valid: Windows that count, (batch, channel) bool.
        """
        scores = conformity_scores(prediction, target, self.intervals)
        self.scores.append(scores.transpose(1, 2)[valid].float())

    @override
    def compute(self) -> Tensor:
        """Offset of every lead day and interval, (lead day, interval)."""
        scores = dim_zero_cat(self.scores)
        if not len(scores):
            raise ValueError("model.calibrate='conformal' needs at least one validation window without missing values.")
        return offsets_by_lead_day(scores, self.cycle_length, self.intervals)


class RollingScores:
    """Conformity scores of consecutive windows, and for any origin the offsets from the latest ones known there.

    An origin o knows a window with origin p when all its targets lie before o: p + horizon <= o. So every offset is
    one that was available at its origin. No communication: every rank collects the scores of all windows.

    Args:
        levels: Ascending levels.
        cycle_length: D, steps per day.
        num_windows: n, the latest known windows that count.
    """

    def __init__(self, levels: Sequence[float], cycle_length: int, num_windows: int) -> None:
        self.cycle_length, self.num_windows = cycle_length, num_windows
        self.intervals = central_intervals(levels)
        self.reset()

    def reset(self) -> None:
        """Forget all windows."""
        self._scores: list[Tensor] = []  # (window, channel, time, interval)
        self._valid: list[Tensor] = []
        self._origins: list[Tensor] = []
        self._offsets: dict[int, Tensor] = {}

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor, origin: Tensor) -> None:
        """Add windows, in ascending order of their origins.

        Args:
            prediction: Quantiles, scaled, (batch, time, channel, quantile).
            target: Truth, scaled, (batch, time, channel).
            valid: Windows that count, (batch, channel) bool.
            origin: Index of the first step of each window, (batch,).
        """
        self._scores.append(conformity_scores(prediction, target, self.intervals).transpose(1, 2).float())
        self._valid.append(valid)
        self._origins.append(origin)
        self._offsets.clear()

    def offsets(self, origin: Tensor, horizon: int) -> Tensor:
        """Offsets for forecasts from these origins, (batch, lead day, interval).

        Args:
            origin: Index of the first step to forecast, (batch,).
            horizon: Steps to forecast, as in the windows.

        Raises:
            ValueError: If an origin knows no complete window.
        """
        if not self._origins:
            raise ValueError("model.calibrate='rolling' has seen no window yet; validation windows come first.")
        for name in ("_scores", "_valid", "_origins"):
            if len(blocks := getattr(self, name)) > 1:
                setattr(self, name, [torch.cat(blocks)])
        known = torch.searchsorted(self._origins[0], origin - horizon, right=True)
        return torch.stack([self._offsets_of(stop) for stop in known.tolist()])

    def _offsets_of(self, stop: int) -> Tensor:
        if stop not in self._offsets:
            latest = slice(max(stop - self.num_windows, 0), stop)
            scores = self._scores[0][latest][self._valid[0][latest]]
            if not len(scores):
                raise ValueError(
                    f"model.calibrate='rolling' needs a window without missing values among the "
                    f"{self.num_windows} before an origin; raise model.calibration_windows or data.max_gap."
                )
            self._offsets[stop] = offsets_by_lead_day(scores, self.cycle_length, self.intervals)
        return self._offsets[stop]


def conformity_scores(prediction: Tensor, target: Tensor, intervals: Sequence[CentralInterval]) -> Tensor:
    """How far values lie outside of each interval, max(lower - y, y - upper), negative inside.

    Args:
        prediction: Quantiles, (..., quantile).
        target: Truth y, (...).
        intervals: Positions of the ends.

    Returns:
        Scores, (..., interval).
    """
    lower, upper = prediction[..., [i.lower for i in intervals]], prediction[..., [i.upper for i in intervals]]
    truth = target.unsqueeze(-1)
    return torch.maximum(lower - truth, truth - upper)


def offsets_by_lead_day(scores: Tensor, cycle_length: int, intervals: Sequence[CentralInterval]) -> Tensor:
    """Conformal quantiles of scores (window, time, interval), apart for each day of the horizon, (day, interval)."""
    coverages = [i.coverage for i in intervals]
    return torch.stack([conformal_quantile(day, coverages) for day in scores.split(cycle_length, dim=1)])


def conformal_quantile(scores: Tensor, coverages: Sequence[float]) -> Tensor:
    """The ceil((n + 1) coverage)-th smallest of n scores: added to both ends it covers a new value with that chance.

    With too few scores for the coverage the largest one is taken (the exact answer would be an infinite interval).

    Args:
        scores: Exchangeable scores, (..., interval); all leading dimensions are pooled.
        coverages: Nominal coverage of each interval.

    Returns:
        Offsets, (interval,).
    """
    pooled = scores.flatten(0, -2)
    ranks = [min(math.ceil((len(pooled) + 1) * coverage - 1e-9), len(pooled)) for coverage in coverages]
    return torch.stack([pooled[:, i].kthvalue(rank).values for i, rank in enumerate(ranks)])


class ConformalIntervals(nn.Module):
    """Widens (or narrows) central intervals by the offsets of their lead day, without letting quantiles cross.

    The offsets are buffers, part of the checkpoint. Before `fit_offsets` was called they are zero.

    Args:
        levels: Ascending levels, at least one central pair.
    """

    offsets: Tensor
    fitted: Tensor

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__()
        self.intervals = central_intervals(levels)
        if not self.intervals:
            raise ValueError(
                f"model.calibrate needs central intervals, but model.quantiles={list(levels)} has no pair "
                "q, 1 - q; use equidistant levels or calibrate='none'."
            )
        self.num_below = sum(q < 0.5 - 1e-9 for q in levels)
        self.num_above = sum(q > 0.5 + 1e-9 for q in levels)
        self.register_buffer("offsets", torch.zeros(0, len(self.intervals)))
        self.register_buffer("fitted", torch.tensor(False))

    def fit_offsets(self, offsets: Tensor) -> None:
        """Take over offsets, (lead day, interval)."""
        with torch.inference_mode(False):  # validation runs inside it, and a checkpoint could not be loaded into these
            self.offsets = offsets.detach().to(self.offsets).clone()
            self.fitted = torch.ones_like(self.fitted)

    def forward(self, prediction: Tensor, cycle_length: int, offsets: Tensor | None = None) -> Tensor:
        """Calibrated quantiles on the scaled axis of the scores.

        Args:
            prediction: Raw quantiles, (batch, time, channel, quantile).
            cycle_length: D, steps per day.
            offsets: Of every window, (batch, lead day, interval); None takes those of `fit_offsets` for all.

        Returns:
            Quantiles, (batch, time, channel, quantile).
        """
        num_lead_days = math.ceil(prediction.shape[1] / cycle_length)
        if offsets is None:
            if not self.fitted:
                return prediction
            if len(self.offsets) != num_lead_days:
                raise ValueError(
                    f"the intervals were calibrated for {len(self.offsets)} lead days, data.horizon has "
                    f"{num_lead_days}; validate with this horizon first."
                )
            offsets = self.offsets.unsqueeze(0)
        offsets = offsets.to(prediction)
        shift = prediction.new_zeros(len(offsets), num_lead_days, prediction.shape[-1])
        shift[..., [i.lower for i in self.intervals]] = -offsets
        shift[..., [i.upper for i in self.intervals]] = offsets
        day = torch.arange(prediction.shape[1], device=prediction.device) // cycle_length
        return self._nested(prediction + shift[:, day].unsqueeze(2))

    def _nested(self, quantiles: Tensor) -> Tensor:
        """Order the quantiles from the middle outwards. Outer ones move out, never in, so that coverage is kept."""
        below, middle, above = quantiles.split(
            [self.num_below, quantiles.shape[-1] - self.num_below - self.num_above, self.num_above], dim=-1
        )
        if not middle.shape[-1]:
            # Offsets below minus half a width turn the innermost interval around: it shrinks to its centre.
            centre = (below[..., -1:] + above[..., :1]) / 2
            below = torch.cat([below[..., :-1], below[..., -1:].minimum(centre)], dim=-1)
            above = torch.cat([above[..., :1].maximum(centre), above[..., 1:]], dim=-1)
        below = torch.cat([below, middle], dim=-1).flip(-1).cummin(-1).values.flip(-1)
        above = torch.cat([middle, above], dim=-1).cummax(-1).values[..., middle.shape[-1] :]
        return torch.cat([below, above], dim=-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Allocate what the checkpoint holds: the number of lead days is unknown before the data are set up."""
        if (offsets := state_dict.get(f"{prefix}offsets")) is not None:
            self.offsets = torch.empty_like(offsets, device=self.offsets.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
