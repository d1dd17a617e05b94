"""Many tensors as one vector, which one collective can send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class FlatTensors:
    """Tensors and the vector that holds their elements one after the other.

    The vector is float64 if any of the tensors is, else float32: sums over ranks are made in that precision, whatever
    the type of the tensors.

    Args:
        tensors: On one device, in an order that is the same on all ranks.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.sizes = [t.numel() for t in self.tensors]
        self.numel = sum(self.sizes)
        double = any(t.dtype == torch.float64 for t in self.tensors)
        self.dtype = torch.float64 if double else torch.float32
        self.device = self.tensors[0].device if self.tensors else torch.device("cpu")

    def __len__(self) -> int:
        return len(self.tensors)

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are exactly the tensors here."""
        tensors = list(tensors)
        return len(tensors) == len(self.tensors) and all(
            a is b and a.numel() == size for a, b, size in zip(tensors, self.tensors, self.sizes, strict=True)
        )

    def empty(self) -> Tensor:
        """A vector of the right size, ``(numel,)``."""
        return torch.empty(self.numel, dtype=self.dtype, device=self.device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector in the shapes of the tensors."""
        return [part.view(t.shape) for part, t in zip(vector.split(self.sizes), self.tensors, strict=True)]

    @torch.no_grad()
    def pack(self, out: Tensor | None = None) -> Tensor:
        """Copy the tensors into a vector ``(numel,)``."""
        out = self.empty() if out is None else out
        if self.tensors:
            torch._foreach_copy_(self.split(out), [t.detach() for t in self.tensors])
        return out

    @torch.no_grad()
    def unpack(self, vector: Tensor) -> None:
        """Copy a vector into the tensors."""
        if self.tensors:
            torch._foreach_copy_([t.detach() for t in self.tensors], self.split(vector.to(self.device)))
