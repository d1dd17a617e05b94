"""Ranks of factorised weights, and how much smaller the factors are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from networks.ab_factors import ABFactor, Decomposition, num_factored
from networks.tall_view import tall_shape

_SHOWN = 6  # layers that a line names


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


def in_words(layers: Sequence[ABFactor], ranks: Mapping[str, int], smaller: float) -> str:
    """One line for the log: of many layers those that have lost most, the loggers have all.

    Args:
        layers: Those that are factorised.
        ranks: Of all of them by path.
        smaller: Their `compression`.
    """
    few = layers
    if len(layers) > _SHOWN:
        few = sorted(layers, key=lambda layer: ranks[layer.path] / full_rank(layer))[:_SHOWN]
    shown = ", ".join(f"{layer.path} {ranks[layer.path]} of {full_rank(layer)}" for layer in few)
    more = f" and of {len(layers) - len(few)} more" if len(few) < len(layers) else ""
    return f"ranks {shown}{more}; {smaller:.2f} times smaller"
