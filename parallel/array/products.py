"""Products of matrices for every pair of splits; the smaller number of bytes decides what moves."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.chunks import balanced, offsets

_TALL_ROWS = 8192  # of a block that stays in the cache


def matmul(a: SplitArray, b: SplitArray) -> SplitArray:
    """``a @ b``, of vectors and matrices; leading axes are batches that are not split.

    ===========  ===========================================================================  ================
    splits       what moves                                                                   split of the result
    ===========  ===========================================================================  ================
    None, None   nothing                                                                      None
    0, None      nothing                                                                      0
    None, 1      nothing                                                                      1
    1, 0         partial products, each part to the rank that keeps it                        0
    1, None      the same; of the second only the matching rows are used                      0
    None, 0      the same                                                                     0
    0, 0         blocks of the second around a ring                                           0
    1, 1         blocks of the first around a ring                                            1
    0, 1         blocks of the smaller one around a ring                                      0 or 1
    ===========  ===========================================================================  ================

    A ring sends block ``s + 1`` while block ``s`` is multiplied.

    Raises:
        ValueError: If the shapes do not fit, naming both layouts.
    """
    if a.ndim == 1 and b.ndim == 1:
        return _squeezed(matmul(_row(a), _column(b)), (0, 1))
    if a.ndim == 1:
        return _squeezed(matmul(_row(a), b), (0,))
    if b.ndim == 1:
        return _squeezed(matmul(a, _column(b)), (1,))
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"matmul of {a.shape} (split={a.split}, map={a.map}) and {b.shape} (split={b.split}, map={b.map}): "
            f"{a.shape[-1]} columns on {b.shape[-2]} rows"
        )
    if a.ndim > 2 or b.ndim > 2:
        return _batched(a, b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    if a.comm.size == 1:
        split = 0 if a.split == 0 else 1 if b.split == 1 else 0 if (a.split, b.split) != (None, None) else None
        return a.like(a.local @ b.local, (a.shape[0], b.shape[1]), split)
    match a.split, b.split:
        case None, None:
            return a.like(a.local @ b.local, (a.shape[0], b.shape[1]), None)
        case 0, None:
            return a.like(a.local @ b.local, (a.shape[0], b.shape[1]), 0, a.map)
        case None, 1:
            return a.like(a.local @ b.local, (a.shape[0], b.shape[1]), 1, b.map)
        case (1, 0) | (1, None) | (None, 0):
            return _inner(a, b)
        case 0, 0:
            return _ring_rows(a, b)
        case 1, 1:
            return _ring_columns(a, b)
        case 0, 1:
            return _outer(a, b)
    raise AssertionError("all pairs of splits are above")


def dot(a: SplitArray, b: SplitArray) -> SplitArray:
    """`matmul` of vectors and matrices."""
    return matmul(a, b)


def vdot(a: SplitArray, b: SplitArray) -> SplitArray:
    """Sum of the products of all elements, the first conjugated; accumulated in float64."""
    from parallel.array.elementwise import conj, multiply
    from parallel.array.reductions import sum as total

    return total(multiply(conj(a) if a.dtype.is_complex else a, b))


def outer(a: SplitArray, b: SplitArray) -> SplitArray:
    """All products of two vectors."""
    return matmul(_column(a), _row(b))


def norm(array: SplitArray, axis: int | None = None) -> SplitArray:
    """Euclidean norm over an axis or of all elements, accumulated in float64."""
    from parallel.array.elementwise import map_local
    from parallel.array.reductions import sum as total

    squares = total(map_local(array, lambda x: x.abs().double().square()), axis)
    return squares.like(
        squares.local.sqrt().to(array.dtype if array.dtype.is_floating_point else torch.float64),
        squares.shape,
        squares.split,
        squares.map or None,
    )


def trace(array: SplitArray) -> SplitArray:
    """Sum of the diagonal of a matrix."""
    from parallel.array.reductions import sum as total
    from parallel.array.shaping import diagonal

    return total(diagonal(array))


def tall_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix`` in the type of ``matrix``, stored in that of ``rows``, for few columns.

    BLAS multiplies a short matrix by a wide one four times as fast as a tall one by a narrow one: the result is a view
    of its transpose, columns one after the other.
    """
    if matrix.dtype == rows.dtype:
        return (matrix.mT @ rows.mT).mT
    out = rows.new_empty(matrix.shape[1], len(rows))
    for i in range(0, len(rows), _TALL_ROWS):
        block = rows[i : i + _TALL_ROWS]
        out[:, i : i + len(block)] = matrix.mT @ block.to(matrix.dtype).mT
    return out.mT


def _row(a: SplitArray) -> SplitArray:
    from parallel.array.shaping import expand_dims

    return expand_dims(a, 0)


def _column(a: SplitArray) -> SplitArray:
    from parallel.array.shaping import expand_dims

    return expand_dims(a, 1)


def _squeezed(a: SplitArray, axes: tuple[int, ...]) -> SplitArray:
    from parallel.array.shaping import squeeze

    return squeeze(a, axes)


def _batched(a: SplitArray, b: SplitArray) -> SplitArray:
    """Leading axes broadcast; a split there stays, others are gathered: batches are small matrices."""
    if (
        a.split is not None
        and a.split < a.ndim - 2
        and a.ndim >= b.ndim
        and b.split in (None, a.split - a.ndim + b.ndim)
    ):
        own = a.split - a.ndim + b.ndim
        there = b if own < 0 or b.shape[own] == 1 else b.resplit(own, a.map)
        there = b.resplit(None) if own < 0 or b.shape[own] == 1 else there
        local = a.local @ there.local
        shape = [*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]]
        return a.like(local, shape, a.split, a.map)
    if a.split == a.ndim - 2:
        local = a.local @ b.resplit(None).local
        shape = [*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]]
        return a.like(local, shape, len(shape) - 2, a.map)
    local = a.resplit(None).local @ b.resplit(None).local
    return a.like(local, local.shape, None)


def _inner(a: SplitArray, b: SplitArray) -> SplitArray:
    """Both are cut along the summed axis: partial products are sent to the owners of their rows and added there."""
    map_ = a.map if a.split == 1 else b.map
    partial = a.resplit(1, map_).local @ b.resplit(0, map_).local
    target = balanced(a.shape[0], a.comm.size)
    return a.like(a.comm.reduce_scatter(partial.split(list(target))), (a.shape[0], b.shape[1]), 0, target)


def _ring_rows(a: SplitArray, b: SplitArray) -> SplitArray:
    """Rows of the result: for every block of rows of b, the columns of a that meet it."""
    comm, first = a.comm, offsets(b.map)
    out = torch.zeros(a.local.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    block = b.local
    for step in range(comm.size):
        owner = (comm.rank + step) % comm.size
        coming = comm.shift(block, b.map[(owner + 1) % comm.size]) if step < comm.size - 1 else None
        out.addmm_(a.local[:, first[owner] : first[owner] + b.map[owner]], block)
        block = coming.wait() if coming else block
    return a.like(out, (a.shape[0], b.shape[1]), 0, a.map)


def _ring_columns(a: SplitArray, b: SplitArray) -> SplitArray:
    """Columns of the result: for every block of columns of a, the rows of b that meet it."""
    turned = _ring_rows(_transposed(b), _transposed(a))
    return _transposed(turned)


def _transposed(a: SplitArray) -> SplitArray:
    return a.like(a.local.mT, a.shape[::-1], None if a.split is None else 1 - a.split, a.map or None)


def _outer(a: SplitArray, b: SplitArray) -> SplitArray:
    """Blocks of rows times blocks of columns: the smaller matrix goes around."""
    if a.nbytes < b.nbytes:
        return _transposed(_outer(_transposed(b), _transposed(a)))
    comm, first = a.comm, offsets(b.map)
    out = torch.empty(a.local.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    block: Tensor = b.local.mT.contiguous()
    for step in range(comm.size):
        owner = (comm.rank + step) % comm.size
        coming = comm.shift(block, b.map[(owner + 1) % comm.size]) if step < comm.size - 1 else None
        out[:, first[owner] : first[owner] + b.map[owner]] = a.local @ block.mT
        block = coming.wait() if coming else block
    return a.like(out, (a.shape[0], b.shape[1]), 0, a.map)


NAMES = ("matmul", "dot", "vdot", "outer", "norm", "trace")
