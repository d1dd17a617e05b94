"""How far spectra are from each other."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mae(spectrum: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of |difference| over channels and wavelengths (paper, section 2.8).

    Args:
        spectrum: ``(..., 3, W)``.
        target: The same, or what broadcasts to it.
        weight: The same, not negative; None: all ones. Where the sum is 0 the mean is 0.

    Returns:
        ``(...)``.
    """
    difference = (spectrum - target).abs()
    if weight is None:
        return difference.mean((-2, -1))
    weight = weight.to(difference).expand_as(difference)
    return (difference * weight).sum((-2, -1)) / weight.sum((-2, -1)).clamp(min=torch.finfo(difference.dtype).tiny)
