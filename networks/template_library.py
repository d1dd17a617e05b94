"""A library of stacks and their spectra, whose nearest spectra answer a target: what every network must beat."""

from __future__ import annotations

import torch
from torch import Tensor


class TemplateLibrary:
    """Exact nearest neighbours by weighted mean absolute error, in chunks.

    Reflectance and transmittance are stored in half precision; absorptance is the rest.

    Args:
        spectra: ``(N, 3, W)``.
        tokens: ``(N, L)``.
        chunk: Spectra that are compared at once.
    """

    def __init__(self, spectra: Tensor, tokens: Tensor, chunk: int = 8192) -> None:
        if len(spectra) != len(tokens) or not len(spectra):
            raise ValueError(f"a library of {len(spectra)} spectra and {len(tokens)} stacks")
        self.stored, self.tokens, self.chunk = spectra[:, [0, 2]].half(), tokens, chunk

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def bytes_per_stack(num_tokens: int, length: int, num_wavelengths: int) -> int:
        """Bytes of a stored stack: two channels in half precision, ids of one or two bytes."""
        return 2 * 2 * num_wavelengths + length * (1 if num_tokens <= 256 else 2)

    def nearest(self, target: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` nearest stacks of each target, nearest first.

        Args:
            target: ``(B, 3, W)``.
            weight: ``(B, 3, W)``.
            count: At most the size of the library.

        Returns:
            Numbers of the stacks ``(B, count)``, and their distances ``(B, count)``.
        """
        best = target.new_empty(len(target), 0, dtype=torch.float32)
        index = torch.empty(len(target), 0, dtype=torch.int64, device=target.device)
        target, weight = target.float(), weight.float()
        norm = weight.sum((1, 2))
        for first in range(0, len(self), self.chunk):
            stored = self.stored[first : first + self.chunk].to(target.device).float()
            spectra = torch.stack([stored[:, 0], 1 - stored.sum(1), stored[:, 1]], 1).flatten(1)
            distance = torch.stack(
                [(spectra - t).abs_() @ w for t, w in zip(target.flatten(1), weight.flatten(1), strict=True)]
            )
            best = torch.cat([best, distance / norm[:, None]], 1)
            here = torch.arange(first, first + len(stored), device=target.device)
            index = torch.cat([index, here.expand(len(target), -1)], 1)
            best, order = best.sort(dim=1, stable=True)
            best, index = best[:, :count], index.gather(1, order)[:, :count]
        return index, best

    def stacks(self, index: Tensor) -> Tensor:
        """Tokens with these numbers, ``(..., L)`` int64."""
        return self.tokens[index.to(self.tokens.device)].long().to(index.device)
