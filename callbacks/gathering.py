"""Collecting the parts of all ranks on rank 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather_to_rank_zero(part: Any) -> list[Any] | None:
    """Parts of all ranks in their order on rank 0, None on the others; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [part]
    parts = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(part, parts)
    return parts


def repeats_items(trainer: Any) -> bool:
    """Whether an evaluation on this rank gives what another rank gives already.

    So it is where ranks share something else than the items, as the ranks of a sample group do.
    """
    share = getattr(trainer.strategy, "sample_share", None)
    return share is not None and share.index > 0


def concatenate(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join step outputs along the batch, sorted by ``origin`` if they have one, whatever ranks they came from.

    What belongs to all samples (``quantiles``) is taken from the first one, scalars (``loss``) are left out.
    """
    first = outputs[0]
    joined = {
        key: first[key] if key == "quantiles" else torch.cat([out[key] for out in outputs])
        for key, value in first.items()
        if value.ndim
    }
    if "origin" in joined:
        order = joined["origin"].argsort(stable=True)
        joined = {key: value if key == "quantiles" else value[order] for key, value in joined.items()}
    return joined
