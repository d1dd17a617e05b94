"""Scores of predictions that are a number of samples, as sums: exact for any batch size and any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.metrics.sums import Sums

COVERAGES = (50, 90)
"""Percent of the central intervals that `SampleScores` counts."""


def entropy(log_probability: Tensor) -> Tensor:
    """Entropy over the last dimension in nats, of log-probabilities; a probability of 0 contributes nothing."""
    return -(log_probability.exp() * log_probability.clamp_min(torch.finfo(log_probability.dtype).min)).sum(-1)


class UncertaintyScores(Sums):
    """MACE, mean entropy and mean mutual information of classes that are predicted by samples.

    `compute` returns (p the mean over samples of the probabilities):

    - ``mace``: mean over the bins of the confidence max p that hold an image of |mean of [right] - confidence|, equal
      widths, bin i is (i / bins, (i + 1) / bins] (Kuhn et al., 2026, arXiv 2602.18825). A bin with two images weighs as
      much as one with two thousand; ``ece`` of `ClassificationScores` weighs by images;
    - ``entropy``: mean of H(p), in nats: all uncertainty;
    - ``mutual_information``: mean of H(p) - mean over samples of H(p_s): the part that is due to the weights.

    Args:
        num_bins: Bins of the confidence.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    gap: Tensor
    items: Tensor
    entropy: Tensor
    information: Tensor

    def __init__(self, num_bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins = num_bins
        for name, shape in (("gap", num_bins), ("items", num_bins), ("entropy", ()), ("information", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, log_probability: Tensor, expected_entropy: Tensor, label: Tensor) -> None:
        """Add a batch.

        Args:
            log_probability: Logarithm of the mean probabilities, ``(batch, class)``.
            expected_entropy: Mean over samples of the entropy, ``(batch,)``.
            label: ``(batch,)`` int64.
        """
        log_probability = log_probability.double()
        confidence, prediction = log_probability.exp().max(1)
        place = (confidence * self.num_bins).ceil().long().sub(1).clamp(0, self.num_bins - 1)
        bins = F.one_hot(place, self.num_bins).double()
        self.gap += ((prediction == label).double() - confidence) @ bins
        self.items += bins.sum(0)
        total = entropy(log_probability)
        self.entropy += total.sum()
        self.information += (total - expected_entropy.double()).sum()

    @override
    def compute(self) -> dict[str, Tensor]:
        """All scores, float64."""
        seen, number = self.items > 0, self.items.sum()
        return {
            "mace": (self.gap[seen] / self.items[seen]).abs().mean(),
            "entropy": self.entropy / number,
            "mutual_information": self.information / number,
        }


def fair_crps(samples: Tensor, target: Tensor) -> Tensor:
    """CRPS estimated from S samples without bias: mean |x_s - y| - sum over pairs of |x_s - x_t| / (2 S (S - 1)).

    Source: Ferro, Richardson and Weigel, Meteorol. Appl. 15 (2008); pairs by sorting, S log S.

    Args:
        samples: ``(S, ...)``, at least 2.
        target: ``(...)``.

    Raises:
        ValueError: For a single sample.
    """
    number = len(samples)
    if number < 2:
        raise ValueError(f"model.num_eval_samples={number}: the CRPS needs 2 samples or more")
    ordered = samples.sort(dim=0).values
    weights = torch.arange(1 - number, number, 2, dtype=samples.dtype, device=samples.device)
    spread = torch.tensordot(weights, ordered, dims=1) / (number * (number - 1))
    return (samples - target).abs().mean(0) - spread


def sample_quantile(ordered: Tensor, level: float) -> Tensor:
    """Quantile of S ordered samples at place level (S + 1): a new sample lies below it with probability ``level``.

    Args:
        ordered: ``(S, ...)``, ascending.
        level: Between 0 and 1; levels beyond 1 / (S + 1) from the ends give the outermost sample.
    """
    place = min(max(level * (len(ordered) + 1) - 1, 0.0), len(ordered) - 1.0)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


class SampleScores(Sums):
    """NLL, CRPS, and coverage and width of central intervals, of forecasts that are samples.

    `compute` returns ``crps`` (`fair_crps`), ``width_50`` and ``width_90`` in the data's units, the same with
    ``_scaled`` on the scaled axis, ``coverage_50`` and ``coverage_90`` (`sample_quantile`; 0.5 and 0.9 are right) and
    ``nll_scaled``, per value.

    Args:
        scale: Scale of the scaler, (channel,).
        coverages: Percent of the intervals.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    count: Tensor
    nll: Tensor
    crps: Tensor
    covered: Tensor
    width: Tensor

    def __init__(self, scale: Tensor, coverages: Sequence[int] = COVERAGES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.coverages = tuple(coverages)
        self.register_buffer("scale", scale.detach().to(torch.float64).clone(), persistent=False)
        shapes = {"count": (), "nll": (), "crps": (), "covered": (len(coverages),), "width": (len(coverages),)}
        for name, shape in shapes.items():
            zeros = torch.zeros((len(scale), *shape), dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    @override
    def update(self, samples: Tensor, log_density: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            samples: Of the predictive distribution, scaled, ``(S, batch, time, channel)``.
            log_density: Of the truth under it, ``(batch, time, channel)``.
            target: Truth, scaled, ``(batch, time, channel)``.
            valid: Windows that count, ``(batch, channel)`` bool.
        """
        samples, target = samples.double(), target.double()

        def total(value: Tensor) -> Tensor:
            return torch.where(valid.unsqueeze(1), value, value.new_zeros(())).sum((0, 1))

        ordered = samples.sort(dim=0).values
        self.count += valid.sum(0) * target.shape[1]
        self.nll -= total(log_density.double())
        self.crps += total(fair_crps(samples, target))
        for i, percent in enumerate(self.coverages):
            lower, upper = (sample_quantile(ordered, 0.5 + sign * percent / 200) for sign in (-1, 1))
            self.covered[:, i] += total(((lower <= target) & (target <= upper)).double())
            self.width[:, i] += total(upper - lower)

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        count = self.count.sum()
        out = {
            "crps": (self.crps * self.scale).sum() / count,
            "crps_scaled": self.crps.sum() / count,
            "nll_scaled": self.nll.sum() / count,
        }
        for i, percent in enumerate(self.coverages):
            out[f"coverage_{percent}"] = self.covered[:, i].sum() / count
            out[f"width_{percent}"] = (self.width[:, i] * self.scale).sum() / count
            out[f"width_{percent}_scaled"] = self.width[:, i].sum() / count
        return out
