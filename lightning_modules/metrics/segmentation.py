"""Scores of a class for every pixel, from one table of counts: exact for any batch size and any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.sums import Sums


class PixelScores(Sums):
    """Intersection over union of every class, their mean, and the share of pixels that are right.

    `compute` returns, with T[c, p] pixels of class c that were taken for p over everything that was seen:

    - ``iou`` (C,): T[c, c] / (sum_p T[c, p] + sum_p T[p, c] - T[c, c]); NaN for a class that does not occur in either;
    - ``miou``: its mean over the classes that occur, as Cityscapes counts it (not a mean over images);
    - ``pixel_accuracy``: sum_c T[c, c] / sum T.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count; None: all count.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add pixels: classes of the same shape, int64."""
        prediction, label = prediction.flatten(), label.flatten()
        if self.ignore_index is not None:
            kept = label != self.ignore_index
            prediction, label = prediction[kept], label[kept]
        pairs = torch.bincount(label * self.num_classes + prediction, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes)

    @override
    def compute(self) -> dict[str, Tensor]:
        right = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - right
        iou = right / union
        return {
            "miou": iou.nanmean(),
            "pixel_accuracy": right.sum() / self.counts.sum(),
            "iou": iou,
        }
