"""Statistical moments in one pass: tuples (n, mean, M2, M3, M4) that are merged pairwise.

Sources: Chan, Golub and LeVeque (1983); Pébay (2008); HeAT, section 2.1. Blocks of rows are centred on their own mean
in float64 before anything is squared, so that float32 data with mean / std = 1e4 lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.comm import Comm
from parallel.array.reductions import Axis, crosses, normalized_axes, reduced

_BLOCK = 1 << 16  # elements: what a core keeps in its cache as float64


class Moments(NamedTuple):
    """Count, mean and sums of powers of deviations from it, float64; the sums above ``order`` are zero.

    All have the shape of the result; ``n`` is a number of elements for each.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor

    def variance(self, ddof: int = 0) -> Tensor:
        """``M2 / (n - ddof)``; NaN where that is not positive."""
        degrees = self.n - ddof
        return torch.where(degrees > 0, self.m2 / degrees, torch.nan)

    def skewness(self) -> Tensor:
        """``sqrt(n) M3 / M2^1.5``, not corrected for bias; NaN for constants."""
        return torch.where(self.m2 > 0, self.n.sqrt() * self.m3 / self.m2.pow(1.5), torch.nan)

    def kurtosis(self, fisher: bool = True) -> Tensor:
        """``n M4 / M2^2``, minus 3 as Fisher has it; NaN for constants."""
        value = torch.where(self.m2 > 0, self.n * self.m4 / self.m2.square(), torch.nan)
        return value - 3 if fisher else value


def merged(a: Moments, b: Moments) -> Moments:
    """Moments of two parts together (Pébay, 2008); a part of nothing changes nothing."""
    n = a.n + b.n
    total = n.clamp(min=1)  # parts of nothing have zero sums
    d = torch.where((a.n > 0) & (b.n > 0), b.mean - a.mean, 0.0)
    mean = torch.where(a.n > 0, a.mean, b.mean) + d * b.n / total
    ab = a.n * b.n
    m2 = a.m2 + b.m2 + d**2 * ab / total
    m3 = a.m3 + b.m3 + d**3 * ab * (a.n - b.n) / total**2 + 3 * d * (a.n * b.m2 - b.n * a.m2) / total
    m4 = (
        a.m4
        + b.m4
        + d**4 * ab * (a.n**2 - ab + b.n**2) / total**3
        + 6 * d**2 * (a.n**2 * b.m2 + b.n**2 * a.m2) / total**2
        + 4 * d * (a.n * b.m3 - b.n * a.m3) / total
    )
    return Moments(n, mean, m2, m3, m4)


def combined(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts together, merged in their order."""
    total: Moments | None = None
    for part in parts:
        total = part if total is None else merged(total, part)
    assert total is not None, "there is at least one part"
    return total


def over_ranks(mine: Moments, comm: Comm) -> Moments:
    """Merge the parts of all ranks, in their order: the same bits on every rank."""
    if comm.size == 1:
        return mine
    stacked = comm.all_gather(torch.stack([part.expand_as(mine.mean) for part in mine]))
    return combined(Moments(*part) for part in stacked)


def moments_of(values: Tensor, order: int = 4) -> Moments:
    """Moments of each column of ``values``, ``(rows, columns)``, in one pass over blocks of rows.

    Args:
        values: float or whole numbers, on any device.
        order: Highest power that is wanted, 2 or 4.
    """
    rows, columns = values.shape
    zero = torch.zeros(columns, dtype=torch.float64, device=values.device)
    nothing = Moments(zero, zero, zero, zero, zero)
    if not rows or not columns:
        return nothing
    step = max(_BLOCK // columns, 16)
    parts = [_block(values[i : i + step], order) for i in range(0, rows, step)]
    while len(parts) > 1:  # a tree: errors grow with its depth
        pairs = [merged(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(parts) - len(parts) % 2 :]
    return parts[0]


def _block(block: Tensor, order: int) -> Moments:
    x = block.double()
    n = torch.full((x.shape[1],), float(len(x)), dtype=torch.float64, device=x.device)
    mean = x.mean(0)
    deviation = x.sub_(mean) if x is not block else x - mean
    zero = torch.zeros_like(mean)
    # The mean of a block is rounded: what the deviations still sum up to belongs to it (Chan et al., eq. 1.7).
    rest = deviation.sum(0) / n
    if order <= 2:
        return Moments(n, mean + rest, torch.linalg.vecdot(deviation, deviation, dim=0) - n * rest**2, zero, zero)
    square = deviation.square()
    m2, m3 = square.sum(0), torch.linalg.vecdot(square, deviation, dim=0)
    return Moments(n, mean, m2, m3, square.square_().sum(0))


def moments(array: SplitArray, axis: Axis = None, order: int = 4) -> tuple[Moments, tuple[int, ...]]:
    """Moments over axes, merged over ranks where the split axis is among them.

    Args:
        array: Real numbers.
        axis: Axes; None: all.
        order: 2 (mean and variance) or 4.

    Returns:
        Moments of the local part of the result, and the axes.
    """
    axes = normalized_axes(axis, array.ndim)
    kept = [i for i in range(array.ndim) if i not in axes]
    moved = array.local.permute(*axes, *kept)
    shape = [array.local.shape[i] for i in kept]
    count = math.prod(array.local.shape[i] for i in axes)
    if not kept:
        found = _of_one_column(moved.reshape(-1), order)
    elif len(axes) == 1 and axes[0] == array.ndim - 1 and array.ndim > 1:
        found = _of_rows(array.local.reshape(-1, array.local.shape[-1]), order)  # without copying the transpose
    else:
        found = moments_of(moved.reshape(count, math.prod(shape)), order)
    found = Moments(*(part.reshape(shape) for part in found))
    return (over_ranks(found, array.comm) if crosses(array, axes) else found), axes


def _of_one_column(flat: Tensor, order: int) -> Moments:
    """Moments of all elements: as columns first, which are merged then."""
    width = 256
    whole = len(flat) // width * width
    parts = []
    if whole:
        columns = moments_of(flat[:whole].reshape(-1, width), order)
        while columns.mean.numel() > 1:
            half = columns.mean.numel() // 2
            columns = merged(Moments(*(p[:half] for p in columns)), Moments(*(p[half:] for p in columns)))
        parts.append(columns)
    parts.append(moments_of(flat[whole:, None], order))
    return combined(parts)


def _of_rows(values: Tensor, order: int) -> Moments:
    """Moments of each row, in blocks that stay in the cache."""
    rows, columns = values.shape
    if not columns or not rows:
        zero = torch.zeros(rows, dtype=torch.float64, device=values.device)
        return Moments(zero, zero, zero, zero, zero)
    step = max(_BLOCK // columns, 16)
    found = []
    for block in values.split(step):
        x = block.double()
        mean = x.mean(1)
        deviation = x - mean[:, None]
        n = torch.full_like(mean, float(columns))
        zero = torch.zeros_like(mean)
        square = deviation.square()
        higher = (torch.linalg.vecdot(square, deviation), square.square().sum(1)) if order > 2 else (zero, zero)
        found.append(Moments(n, mean, square.sum(1), *higher))
    return Moments(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _wrapped(array: SplitArray, value: Tensor, axes: Sequence[int], keepdims: bool) -> SplitArray:
    dtype = array.dtype if array.dtype.is_floating_point else torch.float64
    return reduced(array, value.to(dtype), axes, keepdims)


def mean(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Mean over axes, accumulated in float64; NaN of nothing."""
    axes = normalized_axes(axis, array.ndim)
    dtype = torch.complex128 if array.dtype.is_complex else torch.float64
    total = array.local.sum(axes, dtype=dtype) if axes else array.local.to(dtype)
    total = array.comm.all_reduce(total) if crosses(array, axes) else total
    count = 1
    for one in axes:
        count *= array.shape[one]
    result = array.dtype if array.dtype.is_floating_point or array.dtype.is_complex else torch.float64
    return reduced(array, (total / (count or torch.nan)).to(result), axes, keepdims)


def var(array: SplitArray, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> SplitArray:
    """Variance over axes with ``n - ddof`` degrees of freedom, whatever the split and the number of ranks."""
    found, axes = moments(array, axis, 2)
    return _wrapped(array, found.variance(ddof), axes, keepdims)


def std(array: SplitArray, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> SplitArray:
    """Square root of `var`."""
    found, axes = moments(array, axis, 2)
    return _wrapped(array, found.variance(ddof).sqrt(), axes, keepdims)


def skew(array: SplitArray, axis: Axis = None, keepdims: bool = False) -> SplitArray:
    """Skewness over axes, not corrected for bias, as of `scipy.stats.skew`."""
    found, axes = moments(array, axis)
    return _wrapped(array, found.skewness(), axes, keepdims)


def kurtosis(array: SplitArray, axis: Axis = None, keepdims: bool = False, fisher: bool = True) -> SplitArray:
    """Excess kurtosis over axes, not corrected for bias, as of `scipy.stats.kurtosis`."""
    found, axes = moments(array, axis)
    return _wrapped(array, found.kurtosis(fisher), axes, keepdims)


def average(array: SplitArray, axis: Axis = None, weights: SplitArray | None = None) -> SplitArray:
    """Mean with weights of the array's shape."""
    if weights is None:
        return mean(array, axis)
    from parallel.array import elementwise
    from parallel.array.reductions import sum as total

    return elementwise.divide(total(elementwise.multiply(array, weights), axis), total(weights, axis))


class GramMoments(NamedTuple):
    """Count, column means, and the matrix ``sum (x - mean)(x - mean)^T``; float64."""

    n: Tensor
    mean: Tensor
    scatter: Tensor


def gram_of(values: Tensor, shift: Tensor | None = None) -> GramMoments:
    """Scatter matrix of the rows of ``values``, ``(rows, columns)``, about their mean, in one pass in float64.

    Args:
        values: Rows.
        shift: Something near the mean, ``(columns,)``, that is taken off first; None: the mean of the first block.
    """
    rows, columns = values.shape
    total = torch.zeros(columns, dtype=torch.float64, device=values.device)
    matrix = torch.zeros(columns, columns, dtype=torch.float64, device=values.device)
    step = max(4 * _BLOCK // max(columns, 1), 16)
    for block in values.split(step) if rows else ():
        x = block.double()
        if shift is None:
            shift = x.mean(0)
        x = x - shift
        total += x.sum(0)
        matrix.addmm_(x.mT, x)
    n = torch.tensor(float(rows), dtype=torch.float64, device=values.device)
    if not rows:
        return GramMoments(n, total, matrix)
    matrix -= torch.outer(total, total) / n
    return GramMoments(n, shift + total / n, matrix)


def merged_gram(a: GramMoments, b: GramMoments) -> GramMoments:
    """Scatter of two parts together."""
    n = a.n + b.n
    if not float(n):
        return a
    d = torch.where((a.n > 0) & (b.n > 0), b.mean - a.mean, 0.0)
    mean = torch.where(a.n > 0, a.mean, b.mean) + d * b.n / n
    return GramMoments(n, mean, a.scatter + b.scatter + torch.outer(d, d) * a.n * b.n / n)


def gram_over_ranks(mine: GramMoments, comm: Comm) -> GramMoments:
    """Scatter of the rows of all ranks: a gather of the means, an all-reduce of ``f^2`` numbers."""
    if comm.size == 1:
        return mine
    means = comm.all_gather(torch.cat([mine.n[None], mine.mean]))
    n = means[:, 0].sum()
    mean = (means[:, :1] * means[:, 1:]).sum(0) / n.clamp(min=1)
    d = torch.where(mine.n > 0, mine.mean - mean, 0.0)
    return GramMoments(n, mean, comm.all_reduce(mine.scatter + mine.n * torch.outer(d, d)))


def cov(array: SplitArray, ddof: int = 1, rowvar: bool = False) -> SplitArray:
    """Covariance matrix of the columns (``rowvar``: of the rows) of a matrix, on every rank."""
    if array.ndim != 2:
        raise ValueError(f"cov of an array of shape {array.shape}: it takes a matrix")
    if rowvar:
        from parallel.array.shaping import transpose

        array = transpose(array)
    array = array.resplit(0) if array.split == 1 else array
    found = gram_of(array.local)
    if array.split == 0:
        found = gram_over_ranks(found, array.comm)
    dtype = array.dtype if array.dtype.is_floating_point else torch.float64
    return array.like((found.scatter / (found.n - ddof)).to(dtype), found.scatter.shape, None)


NAMES = ("mean", "var", "std", "skew", "kurtosis", "average", "cov")
