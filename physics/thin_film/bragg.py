"""Bragg motifs: alternating layers of two materials (paper, section 2.8)."""

from __future__ import annotations

from torch import Tensor


def bragg_counts(material: Tensor, thickness_nm: Tensor, tolerance_nm: float = 20.0) -> Tensor:
    """How many alternations ABAB... of each length a stack contains.

    Args:
        material: ``(N, L)`` int64, layers first, -1 for no layer.
        thickness_nm: ``(N, L)``.
        tolerance_nm: Layers of the same material in a motif differ by this at most.

    Returns:
        ``(N, L + 1)`` int64: entry k is the number of windows of k successive layers that alternate; 0 for k < 3.
    """
    raise NotImplementedError
