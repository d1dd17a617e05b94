"""Scatter matrices of rows: one pass, products in float32 or float64, sums of blocks in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallel.array.comm import Comm

_BLOCK = 1 << 18  # elements of a block of rows
QUICK_ERROR = 6e-7
"""Relative error of the entries of a matrix from products in float32: 4.4e-7 was seen with 20,000 rows of 6 columns,
3e-8 with 100,000 rows of 18 or 64; those of the blocks cancel, and the blocks are added in float64."""
_SHIFT_ROWS = 256  # whose mean is near enough to that of all
_SLAB = 32  # columns of a slab, in which half of a symmetric product is saved
_QUICK_ROWS = 1 << 14  # from which on there are blocks enough, and time to win


class GramMoments(NamedTuple):
    """Count, column means, and the matrix ``sum (x - mean)(x - mean)^T``; float64."""

    n: Tensor
    mean: Tensor
    scatter: Tensor


def _room(values: Tensor, step: int, precise: bool) -> Tensor:
    """Where a block of rows is centred; fresh pages for every block would cost more than its product."""
    quick = not precise and values.dtype == torch.float32 and len(values) >= _QUICK_ROWS
    dtype = torch.float32 if quick else torch.float64
    return torch.empty(min(step, len(values)), values.shape[1], dtype=dtype, device=values.device)


def _step(columns: int, precise: bool) -> int:
    rows = max(_BLOCK // max(columns, 1), 16)
    return rows if precise else min(rows, _QUICK_ROWS // 8)  # errors grow with the length of a sum in float32


def _add_square(square: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the upper triangle of ``square`` (and to some of what is below), slab by slab of its rows."""
    f = x.shape[1]
    if f < 2 * _SLAB:
        square += x.mT @ x
        return
    slab = max(_SLAB, f // 8)
    for i in range(0, f, slab):
        square[i : i + slab, i:] += x[:, i : i + slab].mT @ x[:, i:]


def _mirrored(square: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    return square.triu() + square.triu(1).mT


def gram_of(
    values: Tensor, shift: Tensor | None = None, target: Tensor | None = None, precise: bool = True
) -> GramMoments:
    """Scatter matrix of the rows of ``values``, ``(rows, columns)``, about their mean, in one pass.

    Args:
        values: Rows.
        shift: Something near the mean, ``(columns,)``, that is taken off first; None: the mean of the first rows.
        target: One more column, the last one, ``(rows,)``.
        precise: Products in float64; otherwise, of many float32 rows, in float32, with a relative error of
            `QUICK_ERROR`.
    """
    rows, f = values.shape
    columns = f + (target is not None)
    device = values.device
    n = torch.tensor(float(rows), dtype=torch.float64, device=device)
    if not rows:
        zero = torch.zeros(columns, dtype=torch.float64, device=device)
        return GramMoments(n, zero, torch.zeros(columns, columns, dtype=torch.float64, device=device))
    step = _step(f, precise)
    room = _room(values, step, precise)
    if shift is None:
        shift = values[:_SHIFT_ROWS].mean(0, dtype=torch.float64)
    shift = shift.to(room.dtype)
    total = torch.zeros(f, dtype=torch.float64, device=device)
    cross = torch.zeros(f, dtype=torch.float64, device=device)
    square = torch.zeros(f, f, dtype=torch.float64, device=device)
    if target is not None:
        first = target[:_SHIFT_ROWS].mean(dtype=torch.float64).to(room.dtype)
        y = target.to(room.dtype) - first
    for i in range(0, rows, step):
        block = values[i : i + step]
        x = room[: len(block)]
        if x.dtype == block.dtype:
            torch.sub(block, shift, out=x)
        else:
            x.copy_(block).sub_(shift)
        total += x.sum(0)
        _add_square(square, x)
        if target is not None:
            cross += torch.mv(x.mT, y[i : i + step])
    square = _mirrored(square)
    if target is not None:
        exact = y.double()
        total = torch.cat([total, exact.sum()[None]])
        square = torch.cat([torch.cat([square, cross[:, None]], 1), torch.cat([cross, (exact @ exact)[None]])[None]])
        shift = torch.cat([shift, first[None]])
    return GramMoments(n, shift.double() + total / n, square - torch.outer(total, total) / n)


def squares_of(values: Tensor, precise: bool = True) -> Tensor:
    """``values^T values``, float64, in one pass; ``precise`` as in `gram_of`."""
    rows, f = values.shape
    matrix = torch.zeros(f, f, dtype=torch.float64, device=values.device)
    if not rows:
        return matrix
    room = _room(values, _step(f, precise), precise)
    for block in values.split(_step(f, precise)):
        x = block if block.dtype == room.dtype else room[: len(block)].copy_(block)
        _add_square(matrix, x)
    return _mirrored(matrix)


def merged_gram(a: GramMoments, b: GramMoments) -> GramMoments:
    """Scatter of two parts together."""
    n = a.n + b.n
    if not float(n):
        return a
    d = torch.where((a.n > 0) & (b.n > 0), b.mean - a.mean, 0.0)
    mean = torch.where(a.n > 0, a.mean, b.mean) + d * b.n / n
    return GramMoments(n, mean, a.scatter + b.scatter + torch.outer(d, d) * a.n * b.n / n)


def gram_over_ranks(mine: GramMoments, comm: Comm) -> GramMoments:
    """Scatter of the rows of all ranks: a gather of the means, an all-reduce of ``f^2`` numbers.

    Two ranks swap all they have instead: as many bytes in one message.
    """
    if comm.size == 1:
        return mine
    if comm.size == 2:
        f = len(mine.mean)
        parts = comm.all_gather(torch.cat([mine.n[None], mine.mean, mine.scatter.reshape(-1)]))
        a, b = (GramMoments(p[0], p[1 : f + 1], p[f + 1 :].view(f, f)) for p in parts)
        return merged_gram(a, b)
    means = comm.all_gather(torch.cat([mine.n[None], mine.mean]))
    n = means[:, 0].sum()
    mean = (means[:, :1] * means[:, 1:]).sum(0) / n.clamp(min=1)
    d = torch.where(mine.n > 0, mine.mean - mean, 0.0)
    return GramMoments(n, mean, comm.all_reduce(mine.scatter + mine.n * torch.outer(d, d)))


def well_conditioned(gram: Tensor, least: float) -> bool:
    """Whether no eigenvalue of a matrix, scaled to a diagonal of ones, is below ``least``; zero columns are left out.

    Args:
        gram: ``(f, f)``, symmetric, float64.
        least: Smallest eigenvalue that is good enough.
    """
    scale = gram.diagonal()
    kept = scale > 0
    gram, scale = gram[kept][:, kept], scale[kept].sqrt()
    scaled = gram / torch.outer(scale, scale)
    scaled.diagonal().sub_(least)
    return bool(torch.linalg.cholesky_ex(scaled).info == 0)
