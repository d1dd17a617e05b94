"""Differences and convolutions: neighbours exchange the rows at their borders."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from parallel.array.array import SplitArray, normalized_axis


def diff(array: SplitArray, n: int = 1, axis: int = -1) -> SplitArray:
    """``n`` times the difference of consecutive elements along an axis, which becomes shorter by ``n``."""
    if n < 0:
        raise ValueError(f"diff: n={n}; it counts how often, 0 or more")
    axis = normalized_axis(axis, array.ndim)
    for _ in range(min(n, array.shape[axis] + 1)):
        array = _once(array, axis)
    return array


def _once(array: SplitArray, axis: int) -> SplitArray:
    length = max(array.shape[axis] - 1, 0)
    shape = (*array.shape[:axis], length, *array.shape[axis + 1 :])
    if axis != array.split or array.comm.size == 1:
        return array.like(
            _differences(array.local, axis), shape, array.split, None if axis == array.split else array.map or None
        )
    around = array.halo(0, 1)
    # The rank with the last row has no neighbour for it.
    last = max((r for r, rows in enumerate(array.map) if rows), default=0)
    map_ = [max(rows - (r == last), 0) for r, rows in enumerate(array.map)]
    local = _differences(around, axis) if array.local.shape[axis] else array.local
    return array.like(local, shape, axis, map_)


def _differences(local: Tensor, axis: int) -> Tensor:
    if local.dtype == torch.bool:
        return torch.diff(local, dim=axis)
    return torch.diff(local, dim=axis) if local.shape[axis] else local


def convolve(
    array: SplitArray, kernel: Tensor | SplitArray, mode: Literal["full", "same", "valid"] = "full"
) -> SplitArray:
    """Discrete convolution of a vector with a short kernel that every rank has, as of `numpy.convolve`.

    Args:
        array: Vector, longer than the kernel.
        kernel: Vector.
        mode: ``full`` n + k - 1, ``same`` n, ``valid`` n - k + 1 elements.

    Raises:
        ValueError: For other shapes or modes, or a kernel longer than the array.
    """
    if mode not in ("full", "same", "valid"):
        raise ValueError(f"convolve: mode={mode!r}; choose full, same, valid")
    weights = kernel.resplit(None).local if isinstance(kernel, SplitArray) else kernel
    n, k = array.shape[0], len(weights)
    if array.ndim != 1 or weights.dim() != 1 or not 0 < k <= n:
        raise ValueError(
            f"convolve of shapes {array.shape} and {tuple(weights.shape)}: two vectors, the kernel shorter"
        )
    dtype = torch.promote_types(array.dtype, weights.dtype)
    from parallel.array.shaping import pad

    before, after = {"full": (k - 1, k - 1), "same": ((k - 1) - (k - 1) // 2, (k - 1) // 2), "valid": (0, 0)}[mode]
    padded = pad(array.astype(dtype), [(before, after)])
    around = padded.halo(0, k - 1)
    length = n + before + after - k + 1
    map_, local_rows = None, length
    if array.split == 0:
        begins = torch.tensor([0, *padded.map]).cumsum(0).tolist()
        map_ = [max(min(end, length) - min(begin, length), 0) for begin, end in itertools.pairwise(begins)]
        local_rows = map_[array.comm.rank]
    turned = weights.to(dtype).flip(0)
    out = torch.zeros(local_rows, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    for i, weight in enumerate(turned):  # exact for whole numbers, which torch's convolution does not take
        out += around[i : i + local_rows].to(out.dtype) * weight.to(out.dtype)
    return array.like(out.to(dtype), (length,), array.split, map_)


NAMES = ("diff", "convolve")
