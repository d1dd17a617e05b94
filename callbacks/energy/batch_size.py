"""How many samples a batch has, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_dimension(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor; 0 if it has none."""
    kind = type(batch)
    if kind is dict or kind is list or kind is tuple:  # nearly always, and this is called at every step
        for part in batch.values() if kind is dict else batch:
            # A tensor is asked once: behind a step, which has emptied the processor's caches, this is the dearest part.
            if type(part) is Tensor and (shape := part.shape):
                return shape[0]
            break
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 0
    if isinstance(batch, str | bytes) or not hasattr(batch, "__iter__"):
        return 0
    if isinstance(batch, Mapping):
        return next((size for part in batch.values() if (size := first_dimension(part))), 0)
    parts = list(batch)
    if parts and all(isinstance(part, Mapping) for part in parts):  # a list of samples, as detectors take it
        return len(parts)
    return next((size for part in parts if (size := first_dimension(part))), 0)
