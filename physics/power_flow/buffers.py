"""Memory that iterations use again and again: a fresh large array costs more than the arithmetic on it."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Named matrices of any shape, each kept until it is asked for again.

    What a buffer holds is lost at the next call with its name, so results that are to stay must be copied.

    Args:
        like: Tensor with the device and the usual dtype.
    """

    def __init__(self, like: Tensor) -> None:
        self._device, self._dtype = like.device, like.dtype
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous matrix, not initialised.

        Args:
            name: Which buffer.
            rows: Of the matrix.
            columns: Of the matrix.
            dtype: None: the usual one.
        """
        key = name, dtype or self._dtype
        flat = self._flat.get(key)
        if flat is None or flat.numel() < rows * columns:
            self._flat[key] = flat = torch.empty(rows * columns, dtype=key[1], device=self._device)
        return flat[: rows * columns].view(rows, columns)
