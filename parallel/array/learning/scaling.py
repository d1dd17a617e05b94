"""Scalers of columns and rows: one pass, `transform` and back."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.learning.base import Estimator, Step, like_rows
from parallel.array.moments import moments
from parallel.array.reductions import max as largest
from parallel.array.reductions import min as smallest
from parallel.array.sorting import percentile


class Scaler(Estimator):
    """``(x - centre) / scale`` of every column; columns that do not vary are only centred.

    Attributes:
        centre: ``(f,)`` float64.
        scale: ``(f,)`` float64.
    """

    fitted: ClassVar[tuple[str, ...]] = ("centre", "scale")

    def __init__(self) -> None:
        super().__init__(1)
        self.centre: Tensor | None = None
        self.scale: Tensor | None = None

    def found(self, x: SplitArray) -> tuple[Tensor, Tensor]:
        """Centre and scale of the rows, the same on all ranks."""
        raise NotImplementedError

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """All of it."""
        centre, scale = self.found(self.rows(x))
        # What a constant column leaves is rounding.
        tiny = 10 * torch.finfo(torch.float64).eps
        self.centre, self.scale = centre.double(), torch.where(scale.double() <= tiny, 1.0, scale.double())
        return Step(0.0, 0.0, True)

    def transform(self, x: SplitArray) -> SplitArray:
        """Scaled rows."""
        self.require_fitted()
        x = self.rows(x)
        self.check_columns(x, len(self.centre))
        return like_rows(x, ((x.local.double() - self.centre) / self.scale).to(x.dtype))

    predict = transform

    def inverse_transform(self, x: SplitArray) -> SplitArray:
        """Rows as they were."""
        return like_rows(x, (x.local.double() * self.scale + self.centre).to(x.dtype))


class StandardScaler(Scaler):
    """To mean 0 and standard deviation 1."""

    def found(self, x: SplitArray) -> tuple[Tensor, Tensor]:
        """Means and standard deviations."""
        part, _ = moments(x, 0, order=2)
        return part.mean, part.variance().sqrt()


class MinMaxScaler(Scaler):
    """To a range.

    Args:
        low: What the smallest value becomes.
        high: What the largest value becomes.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"low={low}, high={high}: the range is empty")
        self.low, self.high = low, high

    def found(self, x: SplitArray) -> tuple[Tensor, Tensor]:
        """What maps the extremes to the range."""
        least, most = smallest(x, 0).resplit(None).local.double(), largest(x, 0).resplit(None).local.double()
        span = most - least
        scale = torch.where(span == 0, 1.0, span) / (self.high - self.low)
        return least - self.low * scale, scale


class MaxAbsScaler(Scaler):
    """To largest absolute values of 1."""

    def found(self, x: SplitArray) -> tuple[Tensor, Tensor]:
        """Largest absolute values."""
        size = largest(abs(x), 0).resplit(None).local.double()
        return torch.zeros_like(size), size


class RobustScaler(Scaler):
    """By median and the distance of two quartiles.

    Args:
        low: Percent.
        high: Percent.
    """

    def __init__(self, low: float = 25.0, high: float = 75.0) -> None:
        super().__init__()
        self.low, self.high = low, high

    def found(self, x: SplitArray) -> tuple[Tensor, Tensor]:
        """Medians and distances."""
        both = percentile(x, [self.low, 50.0, self.high], 0).resplit(None).local.double()
        return both[1], both[2] - both[0]


class Normalizer(Estimator):
    """Every row to norm 1; nothing to fit.

    Args:
        norm: ``l1``, ``l2`` or ``max``.
    """

    def __init__(self, norm: Literal["l1", "l2", "max"] = "l2") -> None:
        super().__init__(1)
        if norm not in ("l1", "l2", "max"):
            raise ValueError(f"norm={norm!r}: choose l1, l2 or max")
        self.norm = norm

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """Nothing."""
        return Step(0.0, 0.0, True)

    def transform(self, x: SplitArray) -> SplitArray:
        """Scaled rows; rows of zeros stay."""
        x = self.rows(x)
        order = {"l1": 1, "l2": 2, "max": torch.inf}[self.norm]
        size = torch.linalg.vector_norm(x.local.double(), order, dim=1, keepdim=True)
        return like_rows(x, (x.local / torch.where(size == 0, 1.0, size)).to(x.dtype))

    predict = transform
