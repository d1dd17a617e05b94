"""Shapes, axes, joining and cutting of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.array.array import SplitArray, normalized_axis
from parallel.array.chunks import balanced
from parallel.array.elementwise import map_local


def reshape(array: SplitArray, shape: Sequence[int], split: int | None = None) -> SplitArray:
    """The same elements, in C order, with another shape.

    Elements move between neighbours along the flattened array, never through a gather.

    Args:
        array: Elements.
        shape: New shape; one entry may be -1.
        split: Axis of the result that is split; None: axis 0 if the array is split, else nothing.

    Raises:
        ValueError: If the shape has another number of elements.
    """
    shape = _completed(shape, array.size)
    if array.split is None:
        return array.like(array.local.reshape(shape), shape, None).resplit(split)
    if not shape:
        return array.like(array.resplit(None).local.reshape(shape), shape, None)
    rows = array.resplit(0)
    if rows.shape[0] == shape[0]:  # every row stays where it is
        local = rows.local.reshape(rows.local.shape[0], *shape[1:])
        found = array.like(local, shape, 0, rows.map)
    else:
        width = _product(rows.shape[1:])
        flat = array.like(rows.local.reshape(-1), (array.size,), 0, [n * width for n in rows.map])
        target = balanced(shape[0], array.comm.size)
        moved = flat.resplit(0, [n * _product(shape[1:]) for n in target])
        found = array.like(moved.local.reshape(target[array.comm.rank], *shape[1:]), shape, 0, target)
    return found if split is None else found.resplit(split)


def _completed(shape: Sequence[int], size: int) -> tuple[int, ...]:
    shape = tuple(int(n) for n in shape)
    if shape.count(-1) == 1:
        known = _product(n for n in shape if n != -1)
        if known and size % known == 0:
            shape = tuple(size // known if n == -1 else n for n in shape)
    if min(shape, default=0) < 0 or _product(shape) != size:
        raise ValueError(f"reshape to {shape}: the array has {size} elements")
    return shape


def _product(numbers: object) -> int:
    product = 1
    for number in numbers:  # type: ignore[attr-defined]
        product *= number
    return product


def ravel(array: SplitArray) -> SplitArray:
    """The elements in C order, as one axis."""
    return reshape(array, (-1,) if array.size else (0,))


def transpose(array: SplitArray, axes: Sequence[int] | None = None) -> SplitArray:
    """Axes in another order, reversed by default; nothing moves between ranks."""
    order = list(reversed(range(array.ndim))) if axes is None else [normalized_axis(a, array.ndim) for a in axes]
    if sorted(order) != list(range(array.ndim)):
        raise ValueError(f"transpose(axes={axes}): name each of the {array.ndim} axes once")
    split = None if array.split is None else order.index(array.split)
    return array.like(array.local.permute(order), [array.shape[a] for a in order], split, array.map or None)


def swapaxes(array: SplitArray, a: int, b: int) -> SplitArray:
    """Two axes exchanged."""
    order = list(range(array.ndim))
    a, b = normalized_axis(a, array.ndim), normalized_axis(b, array.ndim)
    order[a], order[b] = b, a
    return transpose(array, order)


def moveaxis(array: SplitArray, source: int, destination: int) -> SplitArray:
    """One axis at another place."""
    order = list(range(array.ndim))
    order.insert(normalized_axis(destination, array.ndim), order.pop(normalized_axis(source, array.ndim)))
    return transpose(array, order)


def expand_dims(array: SplitArray, axis: int) -> SplitArray:
    """A new axis of length 1."""
    axis = normalized_axis(axis, array.ndim + 1)
    split = None if array.split is None else array.split + (axis <= array.split)
    shape = (*array.shape[:axis], 1, *array.shape[axis:])
    return array.like(array.local.unsqueeze(axis), shape, split, array.map or None)


def squeeze(array: SplitArray, axis: int | Sequence[int] | None = None) -> SplitArray:
    """Without axes of length 1."""
    axes = [i for i, n in enumerate(array.shape) if n == 1] if axis is None else axis
    axes = [normalized_axis(a, array.ndim) for a in ([axes] if isinstance(axes, int) else axes)]
    if wrong := [a for a in axes if array.shape[a] != 1]:
        raise ValueError(f"squeeze(axis={wrong[0]}): the axis has length {array.shape[wrong[0]]}, not 1")
    array = array.resplit(None) if array.split in axes else array
    kept = [i for i in range(array.ndim) if i not in axes]
    local = array.local.reshape([array.local.shape[i] for i in kept])
    split = None if array.split is None else kept.index(array.split)
    return array.like(local, [array.shape[i] for i in kept], split, array.map or None)


def broadcast_to(array: SplitArray, shape: Sequence[int]) -> SplitArray:
    """Repeated along axes of length 1 and new ones before; an array that is split keeps its split."""
    shape = tuple(shape)
    if array.split is not None and array.shape[array.split] == 1 and shape[array.split - array.ndim] != 1:
        array = array.resplit(None)
    split = None if array.split is None else array.split + len(shape) - array.ndim
    local = list(shape)
    if split is not None:
        local[split] = array.map[array.comm.rank]
    return array.like(array.local.expand(local), shape, split, array.map or None)


def concatenate(arrays: Sequence[SplitArray], axis: int = 0) -> SplitArray:
    """Arrays one after the other along an axis; the result is balanced if it is split along it.

    Raises:
        ValueError: If other axes have different lengths.
    """
    first = arrays[0]
    axis = normalized_axis(axis, first.ndim)
    others = [tuple(n for i, n in enumerate(a.shape) if i != axis) for a in arrays]
    if len(set(others)) > 1 or len({a.ndim for a in arrays}) > 1:
        raise ValueError(f"concatenate along axis {axis}: shapes {[a.shape for a in arrays]} differ elsewhere")
    shape = list(first.shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    split = next((a.split for a in arrays if a.split is not None), None)
    dtype = arrays[0].dtype
    for one in arrays[1:]:
        dtype = torch.promote_types(dtype, one.dtype)
    arrays = [a.astype(dtype) for a in arrays]
    if split is None:
        return first.like(torch.cat([a.local for a in arrays], axis), shape, None)
    if split != axis:
        map_ = next(a.map for a in arrays if a.split == split)
        parts = [a.resplit(split, map_).local for a in arrays]
        return first.like(torch.cat(parts, axis), shape, split, map_)
    return _joined(arrays, axis, shape)


def _joined(arrays: Sequence[SplitArray], axis: int, shape: Sequence[int]) -> SplitArray:
    """Every array moves to where its rows lie in the joined one."""
    comm = arrays[0].comm
    target, begin, parts = balanced(shape[axis], comm.size), 0, []
    for one in arrays:
        end, first, map_ = begin + one.shape[axis], 0, []
        for rows in target:
            map_.append(max(min(end, first + rows) - max(begin, first), 0))
            first += rows
        parts.append(one.resplit(axis, map_).local)
        begin = end
    return arrays[0].like(torch.cat(parts, axis), shape, axis, target)


def stack(arrays: Sequence[SplitArray], axis: int = 0) -> SplitArray:
    """Arrays of one shape along a new axis."""
    return concatenate([expand_dims(a, axis) for a in arrays], axis)


def vstack(arrays: Sequence[SplitArray]) -> SplitArray:
    """Rows one below the other."""
    return concatenate([a if a.ndim > 1 else expand_dims(a, 0) for a in arrays], 0)


def hstack(arrays: Sequence[SplitArray]) -> SplitArray:
    """Side by side."""
    return concatenate(arrays, 0 if arrays[0].ndim == 1 else 1)


def column_stack(arrays: Sequence[SplitArray]) -> SplitArray:
    """Vectors as the columns of a matrix."""
    return concatenate([a if a.ndim > 1 else expand_dims(a, 1) for a in arrays], 1)


def flip(array: SplitArray, axis: int = 0) -> SplitArray:
    """In reverse order along an axis; ranks swap places, the result is balanced if it was."""
    axis = normalized_axis(axis, array.ndim)
    if axis != array.split or array.comm.size == 1:
        return map_local(array, lambda local: local.flip(axis))
    last = array.comm.size - 1
    comm, mirrored = array.comm, tuple(reversed(array.map))
    partner = last - comm.rank
    turned = array.local.flip(axis).movedim(axis, 0).contiguous()
    if partner != comm.rank:
        shape = (mirrored[comm.rank], *turned.shape[1:])
        turned = comm.swap(turned, partner, shape, partner).wait()
    local = turned.movedim(0, axis)
    found = array.like(local, array.shape, axis, mirrored)
    return found.resplit(axis, array.map)


def roll(array: SplitArray, shift: int, axis: int = 0) -> SplitArray:
    """Elements moved along an axis, those that leave come back at its other end."""
    axis = normalized_axis(axis, array.ndim)
    if axis != array.split or array.comm.size == 1:
        return map_local(array, lambda local: local.roll(shift, axis))
    length = array.shape[axis]
    shift = shift % length if length else 0
    if not shift:
        return array
    from parallel.array.indexing import getitem

    whole = (slice(None),) * axis
    parts = [getitem(array, (*whole, slice(length - shift, None))), getitem(array, (*whole, slice(0, length - shift)))]
    return concatenate(parts, axis).resplit(axis, array.map)


def tile(array: SplitArray, times: int, axis: int = 0) -> SplitArray:
    """The array, ``times`` times one after the other along an axis."""
    return concatenate([array] * times, axis)


def repeat(array: SplitArray, times: int, axis: int = 0) -> SplitArray:
    """Every element ``times`` times along an axis; nothing moves."""
    axis = normalized_axis(axis, array.ndim)
    shape = (*array.shape[:axis], array.shape[axis] * times, *array.shape[axis + 1 :])
    map_ = [n * times for n in array.map] if axis == array.split else array.map
    return array.like(array.local.repeat_interleave(times, axis), shape, array.split, map_ or None)


def pad(array: SplitArray, width: Sequence[tuple[int, int]], value: float = 0.0) -> SplitArray:
    """Constant values before and behind along every axis; new ones along the split axis are on the outer ranks."""
    flat = [n for pair in reversed(width) for n in pair]
    shape = [n + a + b for n, (a, b) in zip(array.shape, width, strict=True)]
    map_ = list(array.map)
    if array.split is not None:
        place = 2 * (array.ndim - 1 - array.split)
        before, after = width[array.split]
        map_[0] += before
        map_[-1] += after
        flat[place] = before if array.comm.rank == 0 else 0
        flat[place + 1] = after if array.comm.rank == array.comm.size - 1 else 0
    return array.like(torch.nn.functional.pad(array.local, flat, value=value), shape, array.split, map_ or None)


def diagonal(array: SplitArray) -> SplitArray:
    """Diagonal of a matrix, on every rank."""
    n = min(array.shape)
    rows = array.resplit(0)
    if rows.comm.size == 1 or array.split is None:
        return array.like(array.resplit(None).local.diagonal().contiguous(), (n,), None)
    local = rows.local[:, rows.offset :].diagonal() if rows.offset < rows.shape[1] else rows.local.new_empty(0)
    local = local[: max(min(n - rows.offset, len(local)), 0)]
    counts = [max(min(n - begin, count), 0) for begin, count in zip(_offsets(rows), rows.map, strict=True)]
    return array.like(rows.comm.all_gather_rows(local.contiguous(), counts), (n,), None)


def _offsets(array: SplitArray) -> Sequence[int]:
    from parallel.array.chunks import offsets

    return offsets(array.map)


def triangle(array: SplitArray, k: int, upper: bool) -> SplitArray:
    """Matrix with zeros below (``upper``) or above diagonal ``k``."""
    i = torch.arange(array.local.shape[-2], device=array.device)[:, None]
    j = torch.arange(array.local.shape[-1], device=array.device)
    i = i + (array.offset if array.split == array.ndim - 2 else 0)
    j = j + (array.offset if array.split == array.ndim - 1 else 0)
    keep: Tensor = j - i >= k if upper else j - i <= k
    return map_local(array, lambda local: torch.where(keep, local, torch.zeros((), dtype=local.dtype)))


def triu(array: SplitArray, k: int = 0) -> SplitArray:
    """Zeros below diagonal ``k``."""
    return triangle(array, k, True)


def tril(array: SplitArray, k: int = 0) -> SplitArray:
    """Zeros above diagonal ``k``."""
    return triangle(array, k, False)


NAMES = (
    "reshape",
    "ravel",
    "transpose",
    "swapaxes",
    "moveaxis",
    "expand_dims",
    "squeeze",
    "broadcast_to",
    "concatenate",
    "stack",
    "vstack",
    "hstack",
    "column_stack",
    "flip",
    "roll",
    "tile",
    "repeat",
    "pad",
    "diagonal",
    "triu",
    "tril",
)
