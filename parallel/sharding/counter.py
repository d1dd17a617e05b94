"""Random numbers as functions of a key and the *global* index of an element: every cut of a tensor sees the same ones.

The bits are those of SplitMix64 (Steele et al., OOPSLA 2014) for initial weights, and of a 32-bit mixer of the same
kind for the masks of dropout, of which one is needed per activation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.sharding.layout import Layout

_ROWS_AT_ONCE = 1 << 20  # elements whose 64-bit numbers exist together


def _signed(number: int) -> int:
    """The 64-bit pattern as torch's signed integer."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number


_GOLDEN, _FIRST, _SECOND = (
    _signed(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # of SplitMix64


def key_of(*parts: object) -> int:
    """A 64-bit key of a seed and names."""
    text = "/".join(map(str, parts)).encode()
    return _signed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def bits_of(key: int, index: Tensor) -> Tensor:
    """64 random bits for each index.

    Args:
        key: From `key_of`.
        index: int64, any shape.

    Returns:
        int64 of the same shape.
    """
    x = (index + 1) * _GOLDEN + key
    x = _xor_shift(x, 30).mul_(_FIRST)
    x = _xor_shift(x, 27).mul_(_SECOND)
    return _xor_shift(x, 31)


def uniform_(block: Tensor, layout: Layout, place: Mapping[str, int], key: int, bound: float) -> Tensor:
    """Fill a block with numbers in [-bound, bound) that depend on the key and the global index alone; padding is 0.

    Args:
        block: The local block of one or two dimensions, changed in place.
        layout: Of the whole tensor.
        place: Of this rank in the grid.
        key: From `key_of`.
        bound: Half the width of the distribution.

    Returns:
        ``block``.
    """
    with torch.no_grad():
        block.zero_()
        columns = layout.sizes[1] if len(layout.sizes) > 1 else 1
        starts, valid = layout.offsets(place), layout.valid(place)
        starts, valid = (*starts, 0)[:2], (*valid, 1)[:2]
        if block.device.type == "meta" or not all(valid):
            return block
        column = torch.arange(valid[1], device=block.device) + starts[1]
        table = block.view(block.shape[0], -1)
        step = max(1, _ROWS_AT_ONCE // valid[1])
        for first in range(0, valid[0], step):
            rows = torch.arange(first, min(first + step, valid[0]), device=block.device)
            bits = bits_of(key, (rows + starts[0])[:, None] * columns + column)
            # The 53 bits of a double, so that float32 and float64 networks begin with the same numbers.
            unit = ((bits >> 11).bitwise_and_((1 << 53) - 1)).double().mul_(2.0**-53)
            table[rows[0] : rows[-1] + 1, : valid[1]] = (unit.mul_(2).sub_(1).mul_(bound)).to(block.dtype)
    return block


def keep_mask(key: int, samples: Tensor, rows: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Which elements of ``(sample, row, column)`` dropout keeps.

    Args:
        key: Of the layer, the step and the repetition, from `key_of`.
        samples: Global index of every sample, int64.
        rows: Global index of every row.
        columns: Global index of every column.
        rate: Probability of leaving out an element, in [0, 1).

    Returns:
        bool, ``(len(samples), len(rows), len(columns))``.
    """
    line = bits_of(key_of(key, "line"), samples[:, None] * (1 << 32) + rows)
    column = bits_of(key_of(key, "column"), columns)
    x = _low(line)[:, :, None] ^ _low(column)
    # Two rounds of multiply and shift (the constants are those of Wellons' lowbias32): without them four corners of a
    # rectangle would be dependent.
    x = x.mul_(0x7FEB352D)
    x = x.bitwise_xor_((x >> 15).bitwise_and_((1 << 17) - 1))
    x = x.mul_(-0x7B935975)  # 0x846ca68b
    x = x.bitwise_xor_((x >> 16).bitwise_and_((1 << 16) - 1))
    return x >= round(rate * 2**32) - 2**31


def _low(bits: Tensor) -> Tensor:
    """The upper 32 of 64 random bits, as int32."""
    return (bits >> 32).to(torch.int32)
