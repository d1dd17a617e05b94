"""Acceleration of fixed-point iterations, for every scenario of a batch by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from physics.power_flow.buffers import Buffers


class Mixing:
    """Anderson mixing of depth 1: ``s_k = r_k - g (s_{k-1} + r_k - r_{k-1})``.

    ``g`` makes ``|r_k - g (r_k - r_{k-1})|`` least, scenario by scenario.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._last: tuple[Tensor, Tensor] | None = None  # r, s
        self._turn = 0

    def select(self, columns: Tensor) -> None:
        """Go on with some scenarios."""
        if self._last is not None:
            self._last = self._last[0][:, columns], self._last[1][:, columns]

    def step(self, r: Tensor) -> Tensor:
        """The step to take where the chord step is ``r``; it lasts until the call after next."""
        self._turn = 1 - self._turn
        kept, step = (self._buffers(f"{name}{self._turn}", *r.shape, dtype=r.dtype) for name in ("r", "s"))
        kept.copy_(r)
        if self._last is None:
            step.copy_(r)
        else:
            before, last = self._last
            change = torch.sub(r, before, out=self._buffers("change", *r.shape, dtype=r.dtype))
            product = self._buffers("product", *r.shape, dtype=r.dtype)
            along = torch.mul(change, r, out=product).sum(0)
            square = torch.mul(change, change, out=product).sum(0)
            weight = torch.where(square > 0, along / square, 0.0)
            torch.sub(r, change.add_(last).mul_(weight), out=step)
        self._last = kept, step
        return step
