"""How well coincidences are found, over all samples, whatever batches and ranks they came in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_modules.metrics.sums import Sums
from physics.pet.matching import SpikeCounts

BOOTSTRAP = 400
"""Draws of samples behind an interval."""


class PairScores(Sums):
    """A list of pairs against the decays that made the hits.

    `compute` returns ``precision``, ``recall`` and ``f1`` of pairs of the same decay, ``f1_low`` and ``f1_high`` (95 %
    of draws of samples with replacement), ``randoms_fraction``, ``scatter_fraction`` and ``multiples_fraction`` of the
    found pairs, ``hits_per_s`` and ``hits``.
    """

    full_state_update = False
    sums: Tensor
    by_sample: list[Tensor]

    _SUMS = ("pairs", "correct", "true", "randoms", "scattered", "multiples", "hits", "seconds")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(self._SUMS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("by_sample", [], dist_reduce_fx="cat")

    @override
    def update(self, counts: dict[str, float], by_sample: Tensor) -> None:
        """Add a batch.

        Args:
            counts: Sums of the batch by name.
            by_sample: Correct, found and true pairs of every sample, (B, 3).
        """
        self.sums += torch.tensor([float(counts[name]) for name in self._SUMS], dtype=torch.float64).to(self.sums)
        self.by_sample.append(by_sample.to(self.sums.device, torch.float64))

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        total = dict(zip(self._SUMS, self.sums, strict=True))
        precision, recall, f1 = f1_of(total["correct"], total["pairs"], total["true"])
        samples = dim_zero_cat(self.by_sample) if len(self.by_sample) else self.sums.new_zeros(0, 3)
        low, high = bootstrap_f1(samples)
        found = total["pairs"].clamp_min(1)
        return {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1_low": low,
            "f1_high": high,
            "randoms_fraction": total["randoms"] / found,
            "scatter_fraction": total["scattered"] / found,
            "multiples_fraction": total["multiples"] / found,
            "hits": total["hits"],
            "hits_per_s": total["hits"] / total["seconds"],
        }


class SpikeScores(Sums):
    """Output spikes against labels, matched one to one within a tolerance (`physics.pet.matching.count_spikes`).

    `compute` returns ``hit_precision``, ``hit_recall``, ``hit_f1``; ``pair_precision``, ``pair_recall``, ``pair_f1``;
    ``time_error_steps``, the mean ``|dt|`` of matched spikes, where there are some.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(SpikeCounts._fields), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, counts: SpikeCounts) -> None:
        """Add the counts of a batch."""
        self.sums += torch.tensor([float(value) for value in counts], dtype=torch.float64).to(self.sums)

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        c = SpikeCounts(*self.sums)
        hit = f1_of(c.matched, c.spikes, c.targets)
        pair = f1_of(c.pair_correct, c.pair_correct + c.pair_spurious, c.pairs)
        names = ("precision", "recall", "f1")
        out = {f"hit_{name}": value for name, value in zip(names, hit, strict=True)}
        out |= {f"pair_{name}": value for name, value in zip(names, pair, strict=True)}
        return out | ({"time_error_steps": c.time_error / c.matched} if c.matched else {})


def f1_of(correct: Tensor, found: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1, any shape; 0 where nothing was found or there was nothing to find."""
    precision = correct / found.clamp_min(1)
    recall = correct / true.clamp_min(1)
    return precision, recall, 2 * correct / (found + true).clamp_min(1)


def bootstrap_f1(by_sample: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the interval that holds 95 % of the F1 of draws of samples with replacement.

    Args:
        by_sample: Correct, found and true pairs of every sample, (sample, 3).
    """
    count = len(by_sample)
    if not count:
        return by_sample.new_tensor(torch.nan), by_sample.new_tensor(torch.nan)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(BOOTSTRAP):
        chosen = torch.randint(count, (count,), generator=generator).to(by_sample.device)
        draws.append(by_sample.index_select(0, chosen).sum(0))
    values = f1_of(*torch.stack(draws).unbind(-1))[2]
    low, high = values.quantile(values.new_tensor([0.025, 0.975]))
    return low, high
