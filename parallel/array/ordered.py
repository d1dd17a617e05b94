"""Numbers as whole numbers in the same order, so that collectives and radix methods need not know NaN and signs."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDTH = {torch.float32: torch.int32, torch.float64: torch.int64}


def to_keys(values: Tensor, nan_last: bool = True) -> Tensor:
    """Keys that are ordered as the values are; -0 and 0 have one key, all NaN have one beyond every other.

    Args:
        values: float16, bfloat16, float32, float64 or whole numbers, of any shape.
        nan_last: Whether NaN is above everything, else below.

    Returns:
        int32 for types of at most 32 bits, else int64.

    Raises:
        ValueError: For complex numbers, which have no order.
    """
    if values.is_complex():
        raise ValueError(f"{values.dtype}: complex numbers have no order")
    if not values.is_floating_point():
        return values.to(torch.int64 if values.dtype == torch.int64 else torch.int32)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    whole = _WIDTH[values.dtype]
    limits = torch.iinfo(whole)
    bits = (values + 0.0).contiguous().view(whole)  # -0 becomes 0
    keys = torch.where(bits < 0, bits ^ limits.max, bits)
    return torch.where(torch.isnan(values), limits.max if nan_last else limits.min, keys)


def from_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of keys; what `to_keys` has made of NaN becomes NaN."""
    if not dtype.is_floating_point:
        return keys.to(dtype)
    whole = _WIDTH.get(dtype, torch.int32)
    limits = torch.iinfo(whole)
    bits = torch.where(keys < 0, keys ^ limits.max, keys)
    values = bits.contiguous().view(torch.float64 if whole == torch.int64 else torch.float32)
    is_nan = (keys == limits.max) | (keys == limits.min)
    return torch.where(is_nan, torch.nan, values).to(dtype)
