"""One step of pruning: the lowest scores of all layers together go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def num_pruned(alive: int, rate: float) -> int:
    """How many of the weights that are alive go: ``round(rate * alive)``."""
    return round(rate * alive)


def prune(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Remove the lowest scores among the weights that are alive, all tensors together.

    Of equal scores the one that comes first (in the order of ``masks``, then by index) goes first, so that every rank
    and every run decides alike.

    Args:
        masks: What is alive, by name.
        scores: Of the same names and shapes; only those of weights that are alive count.
        rate: Part of them that goes, between 0 and 1.

    Returns:
        New masks on the CPU.

    Raises:
        ValueError: For a rate outside (0, 1).
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate}: must lie between 0 and 1, the part of the weights that a level removes")
    flat_masks = [masks[name].detach().cpu().flatten() for name in masks]
    mask = torch.cat(flat_masks)
    values = torch.cat([scores[name].detach().cpu().flatten() for name in masks])
    places = mask.nonzero().squeeze(1)
    order = torch.sort(values[places], stable=True).indices
    mask[places[order[: num_pruned(len(places), rate)]]] = False
    parts = mask.split([len(part) for part in flat_masks])
    return {name: part.view(masks[name].shape).clone() for name, part in zip(masks, parts, strict=True)}


def remaining(level: int, rate: float) -> float:
    """Part of the weights that is left after ``level`` steps, without rounding."""
    return (1 - rate) ** level


def level_of(remaining_fraction: float, rate: float) -> int:
    """The first level that leaves at most this part."""
    level = 0
    while remaining(level, rate) > remaining_fraction:
        level += 1
    return level


def sign_agreement(values: Sequence[Tensor], initial: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """Part of the weights alive whose sign is that of their initial value."""
    same = sum(int(((v.sign() == w.sign()) & m).sum()) for v, w, m in zip(values, initial, masks, strict=True))
    return same / max(sum(int(m.sum()) for m in masks), 1)
