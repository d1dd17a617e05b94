"""Reductions and cumulative functions: local, then one collective of the size of the result.

Sums and products of float32 are accumulated in float64 and rounded once; those of whole numbers are int64.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel.array.array import SplitArray, normalized_axis
from parallel.array.ordered import from_keys, to_keys

Axis = int | Sequence[int] | None


def normalized_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Axes counted from 0, in ascending order; None: all.

    Raises:
        ValueError: If an axis does not exist or is named twice.
    """
    if axis is None:
        return tuple(range(ndim))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    found = sorted(normalized_axis(one, ndim) for one in axes)
    if len(set(found)) < len(found):
        raise ValueError(f"axis={axis} names an axis twice")
    return tuple(found)


def reduced(array: SplitArray, local: Tensor, axes: Sequence[int], keepdims: bool) -> SplitArray:
    """Wrap a local result whose reduced axes are gone, after what had to be exchanged.

    Args:
        array: What was reduced.
        local: Result, equal on all ranks if the split axis is among the axes.
        axes: Axes that are gone.
        keepdims: Whether they come back with length 1.
    """
    shape = [n for axis, n in enumerate(array.shape) if axis not in axes]
    split = (
        None
        if array.split is None or array.split in axes
        else array.split - builtins.sum(a < array.split for a in axes)
    )
    if keepdims:
        for axis in axes:
            local = local.unsqueeze(axis)
            shape.insert(axis, 1)
        split = None if split is None else array.split
    return array.like(local, shape, split, array.map if split is not None else None)


def crosses(array: SplitArray, axes: Sequence[int]) -> bool:
    """Whether ranks must exchange something to reduce these axes."""
    return array.split in axes and array.comm.size > 1


def sum(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Sum over axes."""
    axes = normalized_axes(axis, array.ndim)
    total = _accumulated(array.local, axes, "sum")
    total = array.comm.all_reduce(total) if crosses(array, axes) else total
    return reduced(array, total.to(_result_type(array.dtype)), axes, keepdims)


def prod(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Product over axes."""
    axes = normalized_axes(axis, array.ndim)
    total = _accumulated(array.local, axes, "prod")
    total = array.comm.all_reduce(total, "prod") if crosses(array, axes) else total
    return reduced(array, total.to(_result_type(array.dtype)), axes, keepdims)


def _result_type(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


def _accumulated(local: Tensor, axes: Sequence[int], operation: str) -> Tensor:
    dtype = torch.complex128 if local.is_complex() else torch.float64 if local.is_floating_point() else torch.int64
    if not axes:
        return local.to(dtype)
    if operation == "sum":
        return local.sum(dim=axes, dtype=dtype)
    for axis in reversed(axes):
        local = local.prod(dim=axis, dtype=dtype)
    return local


def count_nonzero(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """How many elements are not zero."""
    return sum(array.like(array.local != 0, array.shape, array.split, array.map or None), axis, keepdims)


def nansum(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Sum over axes, NaN as 0."""
    return sum(
        array.like(
            torch.nan_to_num(array.local, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
            if array.dtype.is_floating_point
            else array.local,
            array.shape,
            array.split,
            array.map or None,
        ),
        axis,
        keepdims,
    )


def any(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Whether an element is not zero."""
    axes = normalized_axes(axis, array.ndim)
    found = array.local != 0
    for one in reversed(axes):
        found = found.any(dim=one)
    return reduced(array, array.comm.all_reduce(found, "max") if crosses(array, axes) else found, axes, keepdims)


def all(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Whether no element is zero."""
    axes = normalized_axes(axis, array.ndim)
    found = array.local != 0
    for one in reversed(axes):
        found = found.all(dim=one)
    return reduced(array, array.comm.all_reduce(found, "min") if crosses(array, axes) else found, axes, keepdims)


def max(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Largest value; NaN where there is one."""
    return _extreme(array, axis, keepdims, largest=True)


def min(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Smallest value; NaN where there is one."""
    return _extreme(array, axis, keepdims, largest=False)


def ptp(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Largest minus smallest value."""
    from parallel.array import elementwise

    return elementwise.subtract(max(array, axis, keepdims), min(array, axis, keepdims))


def _extreme(array: SplitArray, axis: Axis, keepdims: bool, largest: bool) -> SplitArray:
    axes = normalized_axes(axis, array.ndim)
    _refuse_empty(array, axes, "max" if largest else "min")
    if not axes:
        return array
    if not crosses(array, axes):
        local = array.local.amax(axes) if largest else array.local.amin(axes)
        return reduced(array, local, axes, keepdims)
    # The collective knows no NaN: as whole numbers in the same order, NaN beyond all.
    keys = to_keys(array.local, nan_last=largest)
    if array.local.numel() or keys.shape[array.split]:
        keys = keys.amax(axes) if largest else keys.amin(axes)
    else:
        limits = torch.iinfo(keys.dtype)
        shape = [n for i, n in enumerate(keys.shape) if i not in axes]
        keys = keys.new_full(shape, limits.min if largest else limits.max)
    keys = array.comm.all_reduce(keys, "max" if largest else "min")
    return reduced(array, from_keys(keys, array.dtype), axes, keepdims)


def _refuse_empty(array: SplitArray, axes: Sequence[int], name: str) -> None:
    if array.size == 0 and builtins.any(array.shape[axis] == 0 for axis in axes):
        raise ValueError(f"{name} of an array of shape {array.shape} over axes {tuple(axes)}: there is no element")


def argmax(array: SplitArray, axis: int | None = None, keepdims: bool = False) -> SplitArray:
    """Index of the largest value, the first one of several; along an axis, or in the flattened array."""
    return _position(array, axis, keepdims, largest=True)


def argmin(array: SplitArray, axis: int | None = None, keepdims: bool = False) -> SplitArray:
    """Index of the smallest value, the first one of several; along an axis, or in the flattened array."""
    return _position(array, axis, keepdims, largest=False)


def _position(array: SplitArray, axis: int | None, keepdims: bool, largest: bool) -> SplitArray:
    axes = normalized_axes(axis, array.ndim)
    _refuse_empty(array, axes, "argmax" if largest else "argmin")
    keys = to_keys(array.local, nan_last=largest)
    keys = keys if largest else ~keys  # the order of whole numbers, reversed without overflow
    worst = torch.iinfo(keys.dtype).min
    if axis is None:
        flat = keys.reshape(-1)
        if not flat.numel():
            best, where = keys.new_full((), worst), torch.full((), torch.iinfo(torch.int64).max)
        else:
            place = flat.argmax()
            best, where = flat[place], _flat_index(array, int(place))
        where = where.to(keys.device)
    else:
        axis = axes[0]
        if keys.shape[axis]:
            where = keys.argmax(axis)
            best = keys.gather(axis, where.unsqueeze(axis)).squeeze(axis)
            where = where + (array.offset if axis == array.split else 0)
        else:
            shape = [n for i, n in enumerate(keys.shape) if i != axis]
            best, where = keys.new_full(shape, worst), torch.full(shape, torch.iinfo(torch.int64).max)
            where = where.to(keys.device)
    if crosses(array, axes):
        top = array.comm.all_reduce(best, "max")
        where = torch.where(best == top, where, torch.iinfo(torch.int64).max)
        where = array.comm.all_reduce(where, "min")
    return reduced(array, where, axes, keepdims)


def _flat_index(array: SplitArray, place: int) -> Tensor:
    """Index in the flattened whole array of a place in the flattened local one."""
    index, rest = 0, place
    digits = []
    for length in reversed(array.local.shape):
        rest, digit = divmod(rest, length)
        digits.append(digit)
    for axis, (digit, length) in enumerate(zip(reversed(digits), array.shape, strict=True)):
        index = index * length + digit + (array.offset if axis == array.split else 0)
    return torch.tensor(index, dtype=torch.int64)


def cumsum(array: SplitArray, axis: int = 0) -> SplitArray:
    """Running sums along an axis: local ones, on top of the sum of the ranks before."""
    return _cumulative(array, axis, "sum")


def cumprod(array: SplitArray, axis: int = 0) -> SplitArray:
    """Running products along an axis."""
    return _cumulative(array, axis, "prod")


def _cumulative(array: SplitArray, axis: int, operation: str) -> SplitArray:
    axis = normalized_axis(axis, array.ndim)
    scan: Callable[..., Tensor] = torch.cumsum if operation == "sum" else torch.cumprod
    dtype = torch.float64 if array.dtype == torch.float32 else _result_type(array.dtype)
    local = scan(array.local, axis, dtype=dtype)
    if axis == array.split and array.comm.size > 1:
        last = _accumulated(array.local, (axis,), operation)
        before = array.comm.exscan(last, operation).to(dtype).unsqueeze(axis)
        local = local + before if operation == "sum" else local * before
    return array.like(local.to(_result_type(array.dtype)), array.shape, array.split, array.map or None)


NAMES = (
    "sum",
    "prod",
    "any",
    "all",
    "max",
    "min",
    "ptp",
    "argmax",
    "argmin",
    "cumsum",
    "cumprod",
    "count_nonzero",
    "nansum",
)
