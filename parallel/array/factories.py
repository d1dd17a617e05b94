"""Arrays made of nothing, of local parts, of whole arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray, normalized_axis
from parallel.array.chunks import balanced, offsets
from parallel.array.comm import Comm

Shape = int | Sequence[int]


def _local_shape(shape: Sequence[int], split: int | None, comm: Comm) -> tuple[int, ...]:
    if split is None:
        return tuple(shape)
    axis = normalized_axis(split, len(shape))
    return (*shape[:axis], balanced(shape[axis], comm.size)[comm.rank], *shape[axis + 1 :])


def _shape(shape: Shape) -> tuple[int, ...]:
    return (int(shape),) if isinstance(shape, int | np.integer) else tuple(int(n) for n in shape)


def full(
    shape: Shape,
    value: Any,
    dtype: torch.dtype | None = None,
    split: int | None = None,
    comm: Comm | None = None,
    device: torch.device | str | None = None,
) -> SplitArray:
    """An array of one value."""
    comm, shape = comm or Comm.world(), _shape(shape)
    local = torch.full(_local_shape(shape, split, comm), value, dtype=dtype, device=device)
    return SplitArray(local, shape, split, comm)


def zeros(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    split: int | None = None,
    comm: Comm | None = None,
    device: torch.device | str | None = None,
) -> SplitArray:
    """An array of zeros."""
    return full(shape, 0, dtype, split, comm, device)


def ones(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    split: int | None = None,
    comm: Comm | None = None,
    device: torch.device | str | None = None,
) -> SplitArray:
    """An array of ones."""
    return full(shape, 1, dtype, split, comm, device)


def empty(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    split: int | None = None,
    comm: Comm | None = None,
    device: torch.device | str | None = None,
) -> SplitArray:
    """An array whose values are not set."""
    comm, shape = comm or Comm.world(), _shape(shape)
    return SplitArray(torch.empty(_local_shape(shape, split, comm), dtype=dtype, device=device), shape, split, comm)


def full_like(array: SplitArray, value: Any, dtype: torch.dtype | None = None) -> SplitArray:
    """One value in the layout of another array."""
    local = torch.full_like(array.local, value, dtype=dtype)
    return array.like(local, array.shape, array.split, array.map or None)


def zeros_like(array: SplitArray, dtype: torch.dtype | None = None) -> SplitArray:
    """Zeros in the layout of another array."""
    return full_like(array, 0, dtype)


def ones_like(array: SplitArray, dtype: torch.dtype | None = None) -> SplitArray:
    """Ones in the layout of another array."""
    return full_like(array, 1, dtype)


def empty_like(array: SplitArray, dtype: torch.dtype | None = None) -> SplitArray:
    """The layout of another array, values not set."""
    return array.like(torch.empty_like(array.local, dtype=dtype), array.shape, array.split, array.map or None)


def arange(
    start: float,
    stop: float | None = None,
    step: float = 1,
    dtype: torch.dtype | None = None,
    split: int | None = None,
    comm: Comm | None = None,
) -> SplitArray:
    """Evenly spaced values as of `numpy.arange`; whole numbers where all arguments are."""
    start, stop = (0, start) if stop is None else (start, stop)
    if step == 0:
        raise ValueError("arange: step=0 comes to no end; give a step that is not 0")
    comm = comm or Comm.world()
    length = max(int(np.ceil((stop - start) / step)), 0)
    whole = all(isinstance(value, int | np.integer) for value in (start, stop, step))
    rows = _numbers(length, split, comm)
    values = start + step * (rows if whole else rows.double())
    return SplitArray(values.to(dtype or (torch.int64 if whole else torch.float64)), (length,), split, comm)


def linspace(
    start: float,
    stop: float,
    num: int = 50,
    endpoint: bool = True,
    dtype: torch.dtype = torch.float64,
    split: int | None = None,
    comm: Comm | None = None,
) -> SplitArray:
    """``num`` values from ``start`` to ``stop``."""
    comm = comm or Comm.world()
    steps = num - 1 if endpoint else num
    rows = _numbers(num, split, comm).double()
    values = start + rows * ((stop - start) / steps) if steps > 0 else start + 0 * rows
    if endpoint and num > 1:
        values = torch.where(rows == num - 1, torch.tensor(float(stop), dtype=torch.float64), values)
    return SplitArray(values.to(dtype), (num,), split, comm)


def logspace(
    start: float, stop: float, num: int = 50, base: float = 10.0, split: int | None = None, comm: Comm | None = None
) -> SplitArray:
    """Powers of ``base`` whose exponents are those of `linspace`."""
    exponents = linspace(start, stop, num, split=split, comm=comm)
    return exponents.like(torch.pow(float(base), exponents.local), exponents.shape, exponents.split)


def eye(
    rows: int,
    columns: int | None = None,
    k: int = 0,
    dtype: torch.dtype = torch.float32,
    split: int | None = None,
    comm: Comm | None = None,
) -> SplitArray:
    """Ones on diagonal ``k``, zeros elsewhere."""
    comm, shape = comm or Comm.world(), (rows, rows if columns is None else columns)
    i = _numbers(shape[0], 0 if split == 0 else None, comm)[:, None]
    j = _numbers(shape[1], 0 if split == 1 else None, comm)
    return SplitArray((j - i == k).to(dtype), shape, split, comm)


def _numbers(length: int, split: int | None, comm: Comm) -> Tensor:
    """Global numbers of the local rows of an axis."""
    if split is None:
        return torch.arange(length)
    rows = balanced(length, comm.size)
    begin = offsets(rows)[comm.rank]
    return torch.arange(begin, begin + rows[comm.rank])


def from_global(
    values: Any, split: int | None = None, comm: Comm | None = None, dtype: torch.dtype | None = None
) -> SplitArray:
    """The array that every rank has as a whole (list, NumPy array, tensor), split; nothing is sent."""
    comm = comm or Comm.world()
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    tensor = tensor if dtype is None else tensor.to(dtype)
    return SplitArray(tensor, tensor.shape, None, comm).resplit(split)


def from_local(local: Tensor, split: int | None = 0, comm: Comm | None = None) -> SplitArray:
    """The array whose parts the ranks have, as many rows as each has; their shapes are compared.

    Raises:
        ValueError: If shapes or types of the ranks do not fit together.
    """
    comm = comm or Comm.world()
    if comm.size == 1 or split is None:
        return SplitArray(local, local.shape, split, comm)
    split = normalized_axis(split, local.dim()) if local.dim() else 0
    others = [n for axis, n in enumerate(local.shape) if axis != split]
    # Codes of types: whatever order they have, it is the same on all ranks.
    code = sorted(str(one) for one in _TYPES).index(str(local.dtype))
    numbers = torch.zeros(10, dtype=torch.int64, device=comm.device)
    described = [local.dim(), split, code, local.shape[split] if local.dim() else 0, *others]
    numbers[: len(described)] = torch.tensor(described)
    found = comm.all_gather(numbers).tolist()
    alike = {tuple(row[:3] + row[4:]) for row in found}
    if len(alike) > 1:
        raise ValueError(
            f"from_local: the ranks have parts that do not fit together; dimensions, split, type, rows, other "
            f"lengths: {[row[: len(described)] for row in found]}"
        )
    rows = [row[3] for row in found]
    shape = list(local.shape)
    shape[split] = sum(rows)
    return SplitArray(local, shape, split, comm, rows)


_TYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
