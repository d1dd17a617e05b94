"""Ranks of factorised weights, and how much smaller the factors are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from networks.ab_factors import ABFactor, Decomposition, num_factored
from networks.tall_view import tall_shape


def full_rank(layer: ABFactor) -> int:
    """Largest rank that a weight can have."""
    return min(tall_shape(layer.shape))


def whole_rank(layer: ABFactor, parts: Decomposition) -> int:
    """The rank of a split that drops nothing."""
    return len(parts.sigma)


def compression(module: nn.Module, layers: Sequence[ABFactor], ranks: Mapping[str, int]) -> float:
    """Numbers of the whole network over those of its factors and other parameters.

    Args:
        module: The network, its weights whole or in factors.
        layers: Those that are factorised.
        ranks: Of the layers by path; one that is missing has its full rank.
    """
    whole = {layer.path: math.prod(layer.shape) for layer in layers}
    names = {*whole, *(f"{path}_{side}" for path in whole for side in "ab")}
    others = sum(p.numel() for name, p in module.named_parameters() if name not in names)
    small = sum(
        min(num_factored(layer.shape, ranks.get(layer.path, full_rank(layer))), whole[layer.path]) for layer in layers
    )
    return (sum(whole.values()) + others) / (small + others)
