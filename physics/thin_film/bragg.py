"""Bragg motifs: alternating layers of two materials (paper, section 2.8)."""

from __future__ import annotations

import torch
from torch import Tensor


def bragg_counts(material: Tensor, thickness_nm: Tensor, tolerance_nm: float = 20.0) -> Tensor:
    """How many alternations ABAB... of each length a stack contains.

    Args:
        material: ``(N, L)`` int64, layers first, -1 for no layer.
        thickness_nm: ``(N, L)``.
        tolerance_nm: Layers of the same material in a motif differ by this at most.

    Returns:
        ``(N, L + 1)`` int64: entry k is the number of windows of k successive layers that alternate between two
        materials; 0 for k < 3. A reflector of 6 layers counts 4 windows of 3, 3 of 4, 2 of 5 and 1 of 6.
    """
    number, layers = material.shape
    counts = material.new_zeros(number, layers + 1)
    for length in range(3, layers + 1):
        kind, thickness = (values.unfold(1, length, 1) for values in (material, thickness_nm))
        alternates = (kind >= 0).all(-1) & (kind[..., 0] != kind[..., 1])
        for start in (0, 1):
            one, sizes = kind[..., start::2], thickness[..., start::2]
            alternates &= (one == one[..., :1]).all(-1)
            alternates &= sizes.amax(-1) - sizes.amin(-1) <= tolerance_nm + 1e-9
        counts[:, length] = alternates.sum(-1)
    return counts


def longest_bragg(material: Tensor, thickness_nm: Tensor, tolerance_nm: float = 20.0) -> Tensor:
    """Layers of the longest alternation of each stack, 0 where there is none of 3, ``(N,)`` int64."""
    counts = bragg_counts(material, thickness_nm, tolerance_nm)
    lengths = torch.arange(counts.shape[1], device=counts.device)
    return torch.where(counts > 0, lengths, 0).amax(1)
