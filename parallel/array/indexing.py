"""Reading and writing by slices, whole numbers, masks and arrays of indices.

What a key selects stays on its rank where it can: a mask or a slice along the split axis gives an unbalanced array.
Arrays of indices along the split axis are asked of their owners, and the result is balanced.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray, normalized_axis
from parallel.array.chunks import balanced, offsets, owner_bounds
from parallel.array.shaping import reshape, transpose


class _Basic(NamedTuple):
    """A key of slices and whole numbers, one entry per axis of the array, and where new axes come in the result."""

    entries: list[slice | int]
    new_axes: list[int]


def getitem(array: SplitArray, key: Any) -> SplitArray:
    """``array[key]`` as NumPy has it."""
    keys = _expanded(array, key)
    if any(_is_array(one) for one in keys):
        return _advanced(array, keys)
    return _basic(array, _normalized(array, keys))


def _expanded(array: SplitArray, key: Any) -> list[Any]:
    """A list with an entry per axis; new axes (None) stay among them."""
    keys = [_as_index(one) for one in (key if isinstance(key, tuple) else (key,))]
    used = sum(_width(one) for one in keys if one is not None and one is not Ellipsis)
    if used > array.ndim:
        raise IndexError(f"{used} indices for an array of shape {array.shape}")
    if sum(k is Ellipsis for k in keys) > 1:
        raise IndexError("an index can have one ellipsis only")
    place = next((i for i, k in enumerate(keys) if k is Ellipsis), len(keys))
    return [*keys[:place], *([slice(None)] * (array.ndim - used)), *keys[place + 1 :]]


def _as_index(one: Any) -> Any:
    if isinstance(one, list | np.ndarray):
        return torch.from_numpy(np.asarray(one)) if len(np.shape(one)) else int(one)
    if isinstance(one, np.integer):
        return int(one)
    if isinstance(one, Tensor) and one.dim() == 0 and one.dtype != torch.bool:
        return int(one)
    return one


def _is_array(one: Any) -> bool:
    return isinstance(one, Tensor | SplitArray)


def _is_mask(one: Any) -> bool:
    return _is_array(one) and one.dtype == torch.bool


def _width(one: Any) -> int:
    """Axes that an entry of a key takes."""
    return one.ndim if _is_mask(one) else 1


# ------------------------------------------------------------------------------------------------------------- slices


def _normalized(array: SplitArray, keys: Sequence[Any]) -> _Basic:
    entries, new_axes, axis, out = [], [], 0, 0
    for one in keys:
        if one is None:
            new_axes.append(out)
            out += 1
            continue
        if isinstance(one, slice):
            entries.append(one)
            out += 1
        elif isinstance(one, int) and not isinstance(one, bool):
            length = array.shape[axis]
            if not -length <= one < length:
                raise IndexError(f"index {one} is out of bounds for axis {axis} with length {length}")
            entries.append(one % length)
        else:
            raise IndexError(f"an index of type {type(one).__name__}: use whole numbers, slices, masks or arrays")
        axis += 1
    return _Basic(entries, new_axes)


def _local_slice(begin: int, end: int, step: int, first: int, rows: int) -> slice:
    """The part of ``range(begin, end, step)``, step above 0, among the rows ``first : first + rows``, counted there."""
    skipped = max(-(-(first - begin) // step), 0)
    low = begin + skipped * step - first
    high = min(end - first, rows)
    return slice(low, max(high, low), step) if low < rows else slice(0, 0)


def _forward(one: slice, length: int) -> tuple[int, int, int, bool]:
    """A slice with a positive step that selects the same elements, and whether their order is reversed."""
    begin, end, step = one.indices(length)
    if step > 0:
        return begin, max(end, begin), step, False
    count = len(range(begin, end, step))
    low = begin + (count - 1) * step
    return (low, begin + 1, -step, True) if count else (0, 0, 1, True)


def _basic(array: SplitArray, key: _Basic) -> SplitArray:
    local_key, shape, flips, split, map_ = [], [], [], None, None
    owner = None
    for axis, one in enumerate(key.entries):
        if isinstance(one, int):
            if axis == array.split:
                owner = bisect_right(owner_bounds(array.map), one)
                local_key.append(one - offsets(array.map)[owner])
            else:
                local_key.append(one)
            continue
        begin, end, step, reverse = _forward(one, array.shape[axis])
        if reverse:
            flips.append(len(shape))
        if axis == array.split:
            parts = [
                _local_slice(begin, end, step, first, rows)
                for first, rows in zip(offsets(array.map), array.map, strict=True)
            ]
            local_key.append(parts[array.comm.rank])
            map_ = [len(range(*p.indices(rows))) for p, rows in zip(parts, array.map, strict=True)]
            split = len(shape)
        else:
            local_key.append(slice(begin, end, step))
        shape.append(len(range(begin, end, step)))
    if owner is None:
        found = array.like(array.local[tuple(local_key)], shape, split, map_)
    else:  # the row is on one rank, and the result is wanted on all
        mine = array.comm.rank == owner
        row = array.local[tuple(local_key)].contiguous() if mine else array.local.new_empty(shape)
        found = array.like(array.comm.broadcast(row, owner), shape, None)
    from parallel.array.shaping import expand_dims, flip

    for axis in flips:
        found = flip(found, axis)
    for axis in key.new_axes:
        found = expand_dims(found, axis)
    return found


# ------------------------------------------------------------------------------------------------ masks and indices


def _advanced(array: SplitArray, keys: list[Any]) -> SplitArray:
    """A key with masks or arrays of indices: first its slices, then the arrays."""
    basic, arrays, axis = [], [], 0
    for one in keys:
        if _is_mask(one):
            others = [k for k in keys if k is not one]
            if axis == 0 and all(isinstance(k, slice) and k == slice(None) for k in others):
                return _masked(array, one)
            if one.ndim != 1:
                raise IndexError("a mask of several axes must be the only entry of the index besides full slices")
            arrays.append((axis, nonzero(one)[0] if isinstance(one, SplitArray) else one.nonzero()[:, 0]))
            basic.append(slice(None))
        elif _is_array(one):
            arrays.append((axis, one))
            basic.append(slice(None))
        else:
            basic.append(one)
        axis += one is not None
    if any(k is None for k in basic):
        raise IndexError("new axes together with arrays of indices: add them with expand_dims afterwards")
    if len(arrays) == 1 and not any(isinstance(k, int) for k in basic):
        found = _basic(array, _normalized(array, basic))
        return take(found, arrays[0][1], arrays[0][0])
    # Whole numbers count as arrays of indices beside others.
    arrays += [(a, torch.tensor(k)) for a, k in enumerate(basic) if isinstance(k, int)]
    arrays.sort(key=lambda pair: pair[0])
    basic = [slice(None) if isinstance(k, int) else k for k in basic]
    return _together(_basic(array, _normalized(array, basic)), arrays)


def _together(array: SplitArray, arrays: list[tuple[int, Any]]) -> SplitArray:
    """Several arrays of indices that broadcast: one index into their axes taken as one."""
    axes = [axis for axis, _ in arrays]
    indices = [i.resplit(None).local if isinstance(i, SplitArray) else i for _, i in arrays]
    indices = torch.broadcast_tensors(*indices)
    flat = torch.zeros_like(indices[0])
    for axis, one in zip(axes, indices, strict=True):
        flat = flat * array.shape[axis] + _wrapped(one, array.shape[axis], axis)
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    place = axes[0] if adjacent else 0
    others = [axis for axis in range(array.ndim) if axis not in axes]
    moved = transpose(array, [*others[:place], *axes, *others[place:]])
    shape = moved.shape
    joined = reshape(
        moved,
        (*shape[:place], -1 if moved.size else _volume(shape[place : place + len(axes)]), *shape[place + len(axes) :]),
    )
    return take(joined, flat, place)


def _volume(lengths: Sequence[int]) -> int:
    return int(np.prod(lengths, dtype=np.int64))


def _wrapped(index: Tensor, length: int, axis: int) -> Tensor:
    """Indices from 0.

    Raises:
        IndexError: Names the first one that is out of bounds.
    """
    wrong = (index < -length) | (index >= length)
    if bool(wrong.any()):
        raise IndexError(f"index {int(index[wrong][0])} is out of bounds for axis {axis} with length {length}")
    return torch.where(index < 0, index + length, index)


def _agree_on_bounds(indices: SplitArray, length: int, axis: int) -> None:
    """Raise IndexError on all ranks where one of them has an index out of bounds: none may wait for one that raises."""
    mine, far = indices.local.to(torch.int64), torch.iinfo(torch.int64).max
    least, most = (int(mine.min()), int(mine.max())) if len(mine) else (far, -far)
    extremes = torch.tensor([-least, most], dtype=torch.int64, device=indices.device)
    least, most = (indices.comm.all_reduce(extremes, "max") * torch.tensor([-1, 1], device=indices.device)).tolist()
    for wrong in (least, most):
        if not -length <= wrong < length and len(indices):
            raise IndexError(f"index {wrong} is out of bounds for axis {axis} with length {length}")


def take(array: SplitArray, indices: Any, axis: int = 0) -> SplitArray:
    """Rows by number along an axis.

    Along the split axis the rows are fetched from their owners and the result is split there, balanced (or as the
    indices are). Along another axis nothing is sent, unless the indices are split, which are gathered then.

    Args:
        array: Rows.
        indices: Whole numbers of any shape; a SplitArray with one axis may be split.
        axis: Axis.

    Raises:
        IndexError: On all ranks, for an index that is out of bounds, whichever rank has it.
    """
    axis = normalized_axis(axis, array.ndim)
    if isinstance(indices, SplitArray) and (indices.ndim != 1 or axis != array.split):
        indices = indices.resplit(None).local
    if not isinstance(indices, SplitArray):
        indices = torch.as_tensor(indices)
        shape = tuple(indices.shape)
        flat = indices.reshape(-1).to(device=array.device, dtype=torch.int64)
        if axis != array.split:
            local = array.local.index_select(axis, _wrapped(flat, array.shape[axis], axis))
            return _unflattened(array, local, axis, shape, array.split, array.map or None)
        target = balanced(len(flat), array.comm.size)
        begin = offsets(target)[array.comm.rank]
        wanted = _wrapped(flat, array.shape[axis], axis)[begin : begin + target[array.comm.rank]]
        found = array.like(_fetched(array, wanted, axis), _shape_of(array, axis, len(flat)), axis, target)
        if len(shape) == 1:
            return found
        full = (*array.shape[:axis], *shape, *array.shape[axis + 1 :])
        return reshape(found, full)
    split = indices if indices.split == 0 else indices.resplit(0)
    _agree_on_bounds(split, array.shape[axis], axis)
    wanted = _wrapped(split.local, array.shape[axis], axis)
    return array.like(_fetched(array, wanted, axis), _shape_of(array, axis, len(indices)), axis, split.map)


def _shape_of(array: SplitArray, axis: int, length: int) -> tuple[int, ...]:
    return (*array.shape[:axis], length, *array.shape[axis + 1 :])


def _unflattened(
    array: SplitArray, local: Tensor, axis: int, shape: tuple[int, ...], split: int | None, map_: Sequence[int] | None
) -> SplitArray:
    whole = (*array.shape[:axis], *shape, *array.shape[axis + 1 :])
    local = local.reshape(*local.shape[:axis], *shape, *local.shape[axis + 1 :])
    if split is not None and split > axis:
        split += len(shape) - 1
    return array.like(local, whole, split, map_)


def _fetched(array: SplitArray, wanted: Tensor, axis: int) -> Tensor:
    """Rows of the split axis by global number, wherever they are, in the order that is asked for."""
    comm = array.comm
    if comm.size == 1:
        return array.local.index_select(axis, wanted)
    bounds = torch.tensor(owner_bounds(array.map), device=wanted.device)
    owner = torch.searchsorted(bounds, wanted, right=True)
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=comm.size).tolist()
    asked = comm.exchange_rows(wanted[order].split(counts))
    rows = array.local.movedim(axis, 0)
    answers = [rows.index_select(0, numbers - array.offset) for numbers in asked]
    came = comm.all_to_all(answers, [(n, *rows.shape[1:]) for n in counts])
    out = torch.empty((len(wanted), *rows.shape[1:]), dtype=array.dtype, device=array.device)
    out[order] = torch.cat(came)
    return out.movedim(0, axis)


def _masked(array: SplitArray, mask: Any) -> SplitArray:
    """Elements (rows) where a mask of the first axes holds."""
    depth = mask.ndim
    if tuple(mask.shape) != array.shape[:depth]:
        raise IndexError(f"a mask of shape {tuple(mask.shape)} on an array of shape {array.shape}")
    if array.split is not None and 0 < array.split < depth:
        array = array.resplit(0)
    if isinstance(mask, SplitArray):
        here = mask.resplit(0, array.map).local if array.split == 0 else mask.resplit(None).local
    else:
        here = mask.to(array.device)
        here = here.narrow(0, array.offset, array.local.shape[0]) if array.split == 0 else here
    found = array.local[here]
    tail = array.shape[depth:]
    if array.split is None:
        return array.like(found, (len(found), *tail), None)
    if array.split == 0:
        counts = array.comm.gather_counts(len(found))
        return array.like(found, (sum(counts), *tail), 0, counts)
    return array.like(found, (len(found), *tail), array.split - depth + 1, array.map)


def nonzero(array: SplitArray) -> tuple[SplitArray, ...]:
    """Indices of the elements that are not zero, an array for each axis, in C order."""
    array = array if array.split in (None, 0) else array.resplit(0)
    places = array.local.nonzero()
    if array.split is None:
        return tuple(array.like(column.contiguous(), (len(column),), None) for column in places.unbind(1))
    counts = array.comm.gather_counts(len(places))
    columns = list(places.unbind(1))
    columns[0] = columns[0] + array.offset
    return tuple(array.like(column.contiguous(), (sum(counts),), 0, counts) for column in columns)


# ------------------------------------------------------------------------------------------------------------ writing


def setitem(array: SplitArray, key: Any, value: Any) -> None:
    """``array[key] = value``: a number, or an array that broadcasts to what the key selects.

    Raises:
        ValueError: If it does not.
    """
    keys = _expanded(array, key)
    if len(keys) == 1 and _is_mask(keys[0]) and not isinstance(value, SplitArray | Tensor | np.ndarray):
        _set_mask(array, keys[0], value)
    elif any(_is_array(one) for one in keys):
        _set_rows(array, keys, value)
    else:
        _set_slice(array, _normalized(array, keys), value)


def _set_mask(array: SplitArray, mask: Any, value: Any) -> None:
    if isinstance(mask, SplitArray):
        here = mask.resplit(array.split, array.map or None) if mask.ndim == array.ndim else mask
        if mask.ndim != array.ndim:
            here = mask.resplit(0, array.map) if array.split == 0 else mask.resplit(None)
        array.local[here.local] = value
        return
    if array.split is not None and array.split < mask.dim():
        mask = mask.narrow(array.split, array.offset, array.local.shape[array.split])
    array.local[mask] = value


def _set_rows(array: SplitArray, keys: list[Any], value: Any) -> None:
    """One array of indices along an axis, full slices elsewhere; the last of equal indices wins."""
    places = [axis for axis, one in enumerate(keys) if _is_array(one)]
    if len(places) != 1 or any(
        not isinstance(k, slice) or k != slice(None) for i, k in enumerate(keys) if i != places[0]
    ):
        raise IndexError("assignment takes slices, one mask with a number, or one array of indices with full slices")
    axis, indices = places[0], keys[places[0]]
    indices = indices.resplit(None).local if isinstance(indices, SplitArray) else indices
    indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
    indices = _wrapped(indices.to(array.device), array.shape[axis], axis)
    if isinstance(value, SplitArray):
        value = value.resplit(None).local
    shape = _shape_of(array, axis, len(indices))
    whole = torch.broadcast_to(torch.as_tensor(value, dtype=array.dtype, device=array.device), shape)
    if array.split is not None and array.split != axis:
        whole = whole.narrow(array.split, array.offset, array.local.shape[array.split])
    elif array.split == axis:
        mine = (indices >= array.offset) & (indices < array.offset + array.local.shape[axis])
        whole, indices = whole.index_select(axis, mine.nonzero()[:, 0]), indices[mine] - array.offset
    rows = array.local.movedim(axis, 0)
    rows[indices] = whole.movedim(axis, 0)


def _set_slice(array: SplitArray, key: _Basic, value: Any) -> None:
    entries, reversed_axes, out = [], [], 0
    for axis, one in enumerate(key.entries):
        if isinstance(one, int):
            entries.append(slice(one, one + 1, 1))
            continue
        begin, end, step, reverse = _forward(one, array.shape[axis])
        entries.append(slice(begin, end, step))
        if reverse:
            reversed_axes.append(out)
        out += 1
    shape, local_key, map_, split = [], [], None, None
    for axis, one in enumerate(entries):
        if axis == array.split:
            parts = [
                _local_slice(one.start, one.stop, one.step, first, rows)
                for first, rows in zip(offsets(array.map), array.map, strict=True)
            ]
            map_ = [len(range(*p.indices(rows))) for p, rows in zip(parts, array.map, strict=True)]
            local_key.append(parts[array.comm.rank])
            split = axis
        else:
            local_key.append(one)
        shape.append(len(range(one.start, one.stop, one.step)))
    selected = tuple(n for n, one in zip(shape, key.entries, strict=True) if isinstance(one, slice))
    if not isinstance(value, SplitArray):
        from parallel.array.factories import from_global

        tensor = torch.as_tensor(value, dtype=array.dtype, device=array.device)
        value = from_global(tensor, None, array.comm)
    from parallel.array.shaping import broadcast_to, flip

    try:
        np.broadcast_to(np.empty(value.shape), selected)
    except ValueError:
        raise ValueError(f"an array of shape {value.shape} cannot be assigned to a part of shape {selected}") from None
    value = broadcast_to(value, selected)
    for axis in reversed_axes:
        value = flip(value, axis)
    target = array.local[tuple(local_key)]
    dropped = [axis for axis, one in enumerate(key.entries) if isinstance(one, int)]
    if split is None:
        target.copy_(value.resplit(None).local.reshape(target.shape).to(array.dtype))
        return
    if split in dropped:
        whole = value.resplit(None).local
        if map_[array.comm.rank]:
            target.copy_(whole.reshape(target.shape).to(array.dtype))
        return
    part = value.resplit(split - sum(axis < split for axis in dropped), map_).local
    target.copy_(part.reshape(target.shape).to(array.dtype))


NAMES = ("take", "nonzero")
