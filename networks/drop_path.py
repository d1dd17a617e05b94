"""Stochastic depth: residual branches that are left out at random in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Leaves a residual branch out, sample by sample, and scales it up where it stays (Huang et al., ECCV 2016).

    Args:
        probability: Of leaving it out; in evaluation it always stays.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"model.net.drop_path={probability}: must be at least 0 and below 1")
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """``(batch, ...)`` to the same shape."""
        if not self.training or self.probability == 0:
            return branch
        stays = 1 - self.probability
        mask = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device, dtype=branch.dtype) < stays
        return branch * mask / stays

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"{self.probability}"


def rates(last: float, depth: int) -> list[float]:
    """Probabilities that grow linearly from 0 in the first block to ``last`` in the last one."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]
