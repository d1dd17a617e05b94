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
from parallel.array.gram import gram_of, gram_over_ranks
from parallel.array.reductions import Axis, crosses, normalized_axes, reduced

_BLOCK = 1 << 17  # elements: two scratch matrices of them in float64 are about what a core caches


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
    room = values.new_empty((2, min(step, rows), columns), dtype=torch.float64)  # fresh pages cost more than the sums
    blocks = [_block(block, order, *room[:, : len(block)]) for block in values.split(step)]
    return _tree(Moments(*(torch.stack(parts) for parts in zip(*blocks, strict=True))))


def _tree(stacked: Moments) -> Moments:
    """Merge the moments along the first dimension, neighbours first: errors grow with the depth, all pairs at once."""
    while (number := len(stacked.n)) > 1:
        even = number - number % 2
        pairs = merged(Moments(*(p[0:even:2] for p in stacked)), Moments(*(p[1:even:2] for p in stacked)))
        stacked = Moments(*(torch.cat([pair, p[even:]]) for pair, p in zip(pairs, stacked, strict=True)))
    return Moments(*(p[0] for p in stacked))


def _block(block: Tensor, order: int, deviation: Tensor, square: Tensor) -> Moments:
    """Moments of the columns of a block; ``deviation`` and ``square`` are float64 of its shape, and overwritten."""
    mean = deviation.copy_(block).mean(0)
    n, zero = torch.full_like(mean, float(len(block))), torch.zeros_like(mean)
    deviation.sub_(mean)
    # The mean of a block is rounded: what the deviations still sum up to belongs to it (Chan et al., eq. 1.7).
    rest = deviation.sum(0) / n
    m2 = torch.mul(deviation, deviation, out=square).sum(0)
    if order <= 2:
        return Moments(n, mean + rest, m2 - n * rest**2, zero, zero)
    m3 = deviation.mul_(square).sum(0)
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
    step = min(max(_BLOCK // columns, 16), rows)
    room = values.new_empty((2, step, columns), dtype=torch.float64)
    found = []
    for block in values.split(step):
        deviation, square = room[:, : len(block)]
        mean = deviation.copy_(block).mean(1)
        deviation.sub_(mean[:, None])
        n, zero = torch.full_like(mean, float(columns)), torch.zeros_like(mean)
        m2 = torch.mul(deviation, deviation, out=square).sum(1)
        higher = (deviation.mul_(square).sum(1), square.square_().sum(1)) if order > 2 else (zero, zero)
        found.append(Moments(n, mean, m2, *higher))
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
