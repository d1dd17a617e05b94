"""Errors of designed stacks, kept sample by sample: the same for any batch size and any number of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_modules.metrics.sums import Sums


class SampleTable(Sums):
    """A table with a row per sample and a named column per quantity, of all ranks together.

    `compute` returns the columns in the order of the samples' numbers, each sample once, so that whatever is derived
    from them, medians included, does not depend on batches and ranks. Values are float64; a failed simulation is inf.

    Args:
        columns: Names.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, columns: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = tuple(columns)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        # torchmetrics gathers nothing from a rank whose list is empty, and the others would wait for it.
        self.rows.append(torch.zeros(0, 1 + len(self.columns), dtype=torch.float64, device=self.device))

    @override
    def reset(self) -> None:
        super().reset()
        self._begin()

    @override
    def update(self, index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            index: Numbers of the samples, ``(B,)``.
            values: ``(B,)`` for every column.
        """
        columns = [values[name].detach().double() for name in self.columns]
        self.rows.append(torch.stack([index.double(), *columns], 1))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Columns by name, ``(N,)`` float64, and ``index``."""
        rows = dim_zero_cat(self.rows)
        index, where = rows[:, 0].unique(return_inverse=True)
        first = torch.full((len(index),), len(rows), device=rows.device)
        first = first.scatter_reduce(0, where, torch.arange(len(rows), device=rows.device), "amin")
        kept = rows[first]
        return {"index": index.long()} | {name: kept[:, i + 1] for i, name in enumerate(self.columns)}


def summary(values: Tensor) -> dict[str, Tensor]:
    """Mean over samples, median and 90th percentile of a column ``(N,)``; NaN where there is none."""
    if not len(values):
        nothing = values.new_full((), torch.nan)
        return {"mean": nothing, "median": nothing, "p90": nothing}
    ordered = values.sort().values  # a sum that does not depend on the order of the samples
    middle = len(ordered) - 1
    median = (ordered[middle // 2] + ordered[-(-middle // 2)]) / 2
    return {"mean": ordered.mean(), "median": median, "p90": ordered[math.ceil(0.9 * len(ordered)) - 1]}


class RateBuckets(Sums):
    """Loss and accuracy of a denoiser by the share of its input that is masked.

    `compute` returns ``loss_<low>_<high>`` and ``accuracy_<low>_<high>`` (in percent of masked positions) for every
    bucket that was seen, over the positions that the loss counts, and ``loss`` and ``accuracy`` over all.

    Args:
        edges: Of the buckets, rising from 0 to 1.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    nll: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, edges: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.edges = tuple(edges)
        for name in ("nll", "correct", "count"):
            self.add_state(name, torch.zeros(len(edges) - 1, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, nll: Tensor, correct: Tensor, counted: Tensor, rate: Tensor) -> None:
        """Add a batch.

        Args:
            nll: Cross-entropy of every position, ``(B, L)``.
            correct: Whether the likeliest token is right, ``(B, L)``.
            counted: Which positions count, ``(B, L)``.
            rate: Mask rate, ``(B,)``.
        """
        inner = torch.tensor(self.edges[1:-1], dtype=rate.dtype, device=rate.device)
        bucket = torch.nn.functional.one_hot(torch.bucketize(rate, inner, right=True), len(self.edges) - 1).double()
        self.nll += (nll.double() * counted).sum(1) @ bucket
        self.correct += (correct & counted).double().sum(1) @ bucket
        self.count += counted.double().sum(1) @ bucket

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        values = {"loss": self.nll.sum() / self.count.sum(), "accuracy": self.correct.sum() / self.count.sum()}
        for i, (low, high) in enumerate(itertools.pairwise(self.edges)):
            if self.count[i]:
                name = f"{100 * low:.0f}_{100 * high:.0f}"
                values[f"loss_{name}"] = self.nll[i] / self.count[i]
                values[f"accuracy_{name}"] = self.correct[i] / self.count[i]
        return values
