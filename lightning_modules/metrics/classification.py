"""Scores of a classifier that gives probabilities, as sums: exact for any batch size and any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_modules.metrics.sums import Sums


class ClassificationScores(Sums):
    """Accuracy, top-k accuracy, NLL, Brier score, expected calibration error and macro F1.

    `compute` returns (N images, C classes, p probabilities, y the class):

    - ``accuracy``, and ``top<k>_accuracy``: y is among the k most probable classes;
    - ``nll``: mean of -log p_y;
    - ``brier``: mean of the sum over classes of (p_c - [c = y])^2, between 0 and 2;
    - ``ece``: sum over bins of the confidence max p of (images in the bin / N) |accuracy - mean confidence|, equal
      widths (Guo et al., ICML 2017);
    - ``f1_macro``: mean over the classes that occur, as label or as prediction, of 2 TP / (2 TP + FP + FN).

    Sums are float64, so that the order in which batches arrive changes a result only in its last digits. Nothing was
    seen: all are NaN.

    Args:
        num_classes: C.
        top_k: k; None: not reported.
        num_bins: Bins of the calibration error.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    correct: Tensor
    in_top_k: Tensor
    nll: Tensor
    brier: Tensor
    true_positives: Tensor
    predicted: Tensor
    labelled: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor

    def __init__(self, num_classes: int, top_k: int | None = 5, num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.top_k, self.num_bins = num_classes, top_k, num_bins
        for name in ("correct", "in_top_k", "nll", "brier"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("true_positives", "predicted", "labelled"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("bin_confidence", "bin_correct"):
            self.add_state(name, torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add a batch.

        Args:
            logits: ``(batch, class)`` float.
            label: ``(batch,)`` int64.
        """
        log_probability = logits.double().log_softmax(1)
        probability = log_probability.exp()
        confidence, prediction = probability.max(1)
        right = prediction == label
        truth = F.one_hot(label, self.num_classes)
        self.correct += right.sum()
        if self.top_k is not None:
            self.in_top_k += (logits.topk(self.top_k, dim=1).indices == label[:, None]).sum()
        self.nll -= log_probability.gather(1, label[:, None]).sum()
        self.brier += ((probability - truth) ** 2).sum()
        # Sums over one-hot rows, not bincount: it has no deterministic form on CUDA.
        guess = F.one_hot(prediction, self.num_classes)
        self.labelled += truth.sum(0)
        self.predicted += guess.sum(0)
        self.true_positives += (truth * guess).sum(0)
        bins = F.one_hot((confidence * self.num_bins).long().clamp(0, self.num_bins - 1), self.num_bins).double()
        self.bin_confidence += confidence @ bins
        self.bin_correct += right.double() @ bins

    @override
    def compute(self) -> dict[str, Tensor]:
        """All scores, float64."""
        number = self.labelled.sum().double()
        scores = {"accuracy": self.correct / number}
        if self.top_k is not None:
            scores[f"top{self.top_k}_accuracy"] = self.in_top_k / number
        occurrences = (self.labelled + self.predicted).double()
        f1 = (2 * self.true_positives / occurrences)[occurrences > 0]
        return scores | {
            "nll": self.nll / number,
            "brier": self.brier / number,
            "ece": (self.bin_correct - self.bin_confidence).abs().sum() / number,
            "f1_macro": f1.mean(),
        }


class Separation(Sums):
    """How well a score tells two sets apart: the area under the ROC curve of ``score > threshold``.

    `compute` returns the probability that a score of the second set is larger than one of the first, where equal ones
    count a half (the statistic of Mann and Whitney): 0.5 for scores that say nothing, 1 where all of the second are
    larger. It is exact: all scores are kept. NaN while one of the sets is empty.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    first: list[Tensor]
    second: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("first", "second"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        # torchmetrics gathers nothing from a rank whose list is empty, and the others would wait for it.
        for scores in (self.first, self.second):
            scores.append(torch.zeros(0, dtype=torch.float64, device=self.device))

    @override
    def reset(self) -> None:
        super().reset()
        self._begin()

    @override
    def update(self, score: Tensor, second: bool) -> None:
        """Add a batch.

        Args:
            score: ``(batch,)``.
            second: Which set they are of.
        """
        (self.second if second else self.first).append(score.detach().double())

    @override
    def compute(self) -> Tensor:
        """The area, float64."""
        first, second = (dim_zero_cat(scores) for scores in (self.first, self.second))
        if not len(first) or not len(second):
            return torch.full((), torch.nan, dtype=torch.float64, device=first.device)
        first = first.sort().values
        below = torch.searchsorted(first, second, right=False) + torch.searchsorted(first, second, right=True)
        return below.double().mean() / (2 * len(first))
