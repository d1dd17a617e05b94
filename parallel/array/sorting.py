"""Sorting by regular sampling, unique values, order statistics by histograms, counts.

A sort moves every element once to the rank where it belongs and at most once more to balance the result. Order
statistics move no element at all: the histogram of the leading bits says which values come next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray, normalized_axis
from parallel.array.chunks import balanced, offsets
from parallel.array.comm import Comm
from parallel.array.ordered import from_keys, to_keys

_SAMPLES = 128  # per rank: loads differ by a few percent before they are balanced
_FEW_COLUMNS = 4  # times the ranks: with fewer columns each is sorted by itself
_DIGIT = 11  # bits of a round of an order statistic

Method = Literal["linear", "lower", "higher", "midpoint", "nearest"]


class _Run(NamedTuple):
    """Sorted keys, and where they came from (None: nobody asks)."""

    keys: Tensor
    places: Tensor | None


def _sorted_run(keys: Tensor, places: Tensor | None) -> _Run:
    if places is not None:
        keys, order = torch.sort(keys, stable=True)
        return _Run(keys, places[order])
    if keys.device.type == "cpu":  # NumPy sorts whole numbers with SIMD instructions
        return _Run(torch.from_numpy(np.sort(keys.numpy())), None)
    return _Run(torch.sort(keys)[0], None)


def _sample_sort(keys: Tensor, map_: Sequence[int], comm: Comm, indexed: bool) -> _Run:
    """Sort the keys of all ranks; every rank ends with its part of the balanced map.

    Equal keys keep the order of the ranks and places they came from, and may be divided among ranks.
    """
    first, total = offsets(map_)[comm.rank], sum(map_)
    places = first + torch.arange(len(keys), device=keys.device) if indexed else None
    run = _sorted_run(keys, places)
    if comm.size == 1 or not total:
        return run
    # Samples lie equally dense on all ranks, and are told apart by their places where keys are equal.
    dense = min(1.0, _SAMPLES * comm.size / total)
    taken = [int(np.ceil(rows * dense)) for rows in map_]
    mine = taken[comm.rank]
    at = ((torch.arange(mine, device=keys.device, dtype=torch.float64) + 0.5) * (len(keys) / max(mine, 1))).long()
    known = run.places[at] if run.places is not None else first + at
    samples = comm.all_gather_rows(torch.stack([run.keys[at].long(), known], 1), taken)
    order = np.lexsort((samples[:, 1].cpu().numpy(), samples[:, 0].cpu().numpy()))
    cuts = [order[len(order) * r // comm.size] for r in range(1, comm.size)]
    bounds = [0, *(_cut(run, int(samples[c, 0]), int(samples[c, 1]), first) for c in cuts), len(keys)]
    counts = [max(high - low, 0) for low, high in itertools.pairwise(bounds)]
    came = torch.cat(comm.exchange_rows(run.keys.split(counts)))
    if run.places is None:
        run = _sorted_run(came, None)
    else:
        from_where = torch.cat(comm.exchange_rows(run.places.split(counts)))
        keys, order = torch.sort(came, stable=True)
        run = _Run(keys, from_where[order])
    have = comm.gather_counts(len(run.keys))
    target = balanced(total, comm.size)
    parts = [
        None if part is None else SplitArray(part, (total,), 0, comm, have).redistribute(target).local for part in run
    ]
    return _Run(*parts)


def _cut(run: _Run, key: int, place: int, first: int) -> int:
    """How many elements of a run come before (key, place)."""
    value = torch.tensor(key, dtype=run.keys.dtype, device=run.keys.device)
    low = int(torch.searchsorted(run.keys, value))
    high = int(torch.searchsorted(run.keys, value, right=True))
    if run.places is None:
        return min(max(place - first, low), high)
    return low + int(torch.searchsorted(run.places[low:high], torch.tensor(place, device=run.places.device)))


def sort(array: SplitArray, axis: int = -1, descending: bool = False) -> SplitArray:
    """Values in ascending order along an axis, NaN last (also where descending); balanced along the split axis.

    Raises:
        ValueError: For complex numbers.
    """
    return _sorted(array, axis, descending, indexed=False)[0]


def argsort(array: SplitArray, axis: int = -1, descending: bool = False) -> SplitArray:
    """Indices that sort an axis; equal values keep their order."""
    return _sorted(array, axis, descending, indexed=True)[1]


def sort_with_index(array: SplitArray, axis: int = -1, descending: bool = False) -> tuple[SplitArray, SplitArray]:
    """`sort` and `argsort` at once."""
    return _sorted(array, axis, descending, indexed=True)


def _sorted(array: SplitArray, axis: int, descending: bool, indexed: bool) -> tuple[SplitArray, Any]:
    axis = normalized_axis(axis, array.ndim)
    keys = to_keys(array.local)
    top = torch.iinfo(keys.dtype).max
    if descending:
        is_nan = (keys == top) if array.dtype.is_floating_point else torch.zeros_like(keys, dtype=torch.bool)
        keys = torch.where(is_nan, top, ~keys)

    def values(sorted_keys: Tensor) -> Tensor:
        if not descending:
            return from_keys(sorted_keys, array.dtype)
        if array.dtype.is_floating_point:
            return from_keys(torch.where(sorted_keys == top, top, ~sorted_keys), array.dtype)
        return from_keys(~sorted_keys, array.dtype)

    if axis != array.split or array.comm.size == 1:
        ordered, index = _along(keys, axis, indexed)
        return (
            array.like(values(ordered), array.shape, array.split, array.map or None),
            array.like(index, array.shape, array.split, array.map or None) if indexed else None,
        )
    moved = keys.movedim(axis, 0)
    columns = _columns(moved)
    width = columns.shape[1]
    if width <= _FEW_COLUMNS * array.comm.size:
        runs = [_sample_sort(c.contiguous(), array.map, array.comm, indexed) for c in columns.unbind(1)]
        map_ = balanced(array.shape[axis], array.comm.size)
        nothing = columns.new_zeros(map_[array.comm.rank], 0)  # without columns the rows are balanced all the same
        joined = torch.stack([r.keys for r in runs], 1) if runs else nothing
        index = torch.stack([r.places for r in runs], 1) if indexed and runs else nothing.long()
    else:  # whole columns to the ranks, and back
        there = array.like(columns.contiguous(), (array.shape[axis], width), 0, array.map).resplit(1)
        ordered, places = _along(there.local, 0, indexed)
        map_ = balanced(array.shape[axis], array.comm.size)
        joined = there.like(ordered, there.shape, 1).resplit(0, map_).local
        index = there.like(places, there.shape, 1).resplit(0, map_).local if indexed else None

    def wrapped(local: Tensor) -> SplitArray:
        local = local.reshape(len(local), *moved.shape[1:]).movedim(0, axis)
        return array.like(local, array.shape, axis, map_)

    return wrapped(values(joined)), wrapped(index) if indexed else None


def _along(keys: Tensor, axis: int, indexed: bool) -> tuple[Tensor, Tensor | None]:
    """Sort a local axis."""
    if indexed or keys.device.type != "cpu":
        return torch.sort(keys, dim=axis, stable=True)
    return torch.from_numpy(np.sort(keys.numpy(), axis=axis)), None


def _columns(tensor: Tensor) -> Tensor:
    """All axes but the first as one, also where there is no element."""
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))


def topk(array: SplitArray, k: int, axis: int = -1, largest: bool = True) -> tuple[SplitArray, SplitArray]:
    """The k largest (smallest) values along an axis, best first, and their indices; NaN counts as the last.

    Along the split axis every rank offers its own k, and the result is on every rank.
    """
    axis = normalized_axis(axis, array.ndim)
    if not 0 < k <= array.shape[axis]:
        raise ValueError(f"topk: k={k} of an axis of length {array.shape[axis]}; use 1 to {array.shape[axis]}")
    keys = to_keys(array.local, nan_last=not largest)
    keys = keys if not largest else ~keys  # smallest first
    best, places = torch.sort(keys, dim=axis, stable=True)
    best, places = best.narrow(axis, 0, min(k, best.shape[axis])), places.narrow(axis, 0, min(k, best.shape[axis]))
    split, map_ = array.split, array.map or None
    if axis == array.split:
        rows = [min(k, n) for n in array.map]
        best = array.comm.all_gather_rows(best.movedim(axis, 0).contiguous(), rows).movedim(0, axis)
        places = array.comm.all_gather_rows((places + array.offset).movedim(axis, 0).contiguous(), rows).movedim(
            0, axis
        )
        best, order = torch.sort(best, dim=axis, stable=True)
        best, places = best.narrow(axis, 0, k), places.gather(axis, order).narrow(axis, 0, k)
        split, map_ = None, None
    shape = (*array.shape[:axis], k, *array.shape[axis + 1 :])
    values = from_keys(~best if largest else best, array.dtype)
    return array.like(values, shape, split, map_), array.like(places, shape, split, map_)


def unique(array: SplitArray, return_counts: bool = False, return_inverse: bool = False) -> Any:
    """Different values in ascending order, all NaN as one; balanced.

    Ranks exchange their own different values only. The inverse needs all different values on every rank.

    Args:
        array: Real numbers, flattened.
        return_counts: Also how often each occurs.
        return_inverse: Also the index of every element's value, in the layout of the array.
    """
    comm = array.comm
    found, inverse, counts = np.unique(
        to_keys(array.local).reshape(-1).cpu().numpy(), return_inverse=True, return_counts=True
    )
    mine, numbers = torch.from_numpy(found).to(array.device), torch.from_numpy(counts).to(array.device)
    map_: Sequence[int] | None = None
    if array.split is not None and comm.size > 1:
        have = comm.gather_counts(len(mine))
        sample = mine[torch.linspace(0, max(len(mine) - 1, 0), min(_SAMPLES, len(mine))).long()]
        samples, _ = comm.all_gather_rows(sample, [min(_SAMPLES, n) for n in have]).sort()
        cuts = samples[[len(samples) * r // comm.size for r in range(1, comm.size)]] if len(samples) else samples
        bounds = [0, *torch.searchsorted(mine, cuts).tolist(), len(mine)]
        bounds += [len(mine)] * (comm.size + 1 - len(bounds))
        sizes = [b - a for a, b in itertools.pairwise(bounds)]
        came = torch.cat(comm.exchange_rows(mine.split(sizes)))
        came_counts = torch.cat(comm.exchange_rows(numbers.split(sizes)))
        mine, where = torch.unique(came, return_inverse=True)
        numbers = torch.zeros(len(mine), dtype=torch.int64, device=mine.device).index_add_(0, where, came_counts)
        map_ = comm.gather_counts(len(mine))
    total = len(mine) if map_ is None else sum(map_)
    split = None if map_ is None else 0

    def whole(local: Tensor) -> SplitArray:
        one = array.like(local, (total,), split, map_)
        return one.balance() if split == 0 else one

    values = whole(mine)
    results = [array.like(from_keys(values.local, array.dtype), (total,), split, values.map or None)]
    if return_inverse:
        everything = values.resplit(None).local
        if map_ is not None:
            local = torch.searchsorted(everything, torch.from_numpy(found).to(array.device))
            inverse = local.cpu().numpy()[inverse]
        back = torch.from_numpy(np.asarray(inverse, dtype=np.int64)).reshape(array.local.shape).to(array.device)
        results.append(array.like(back, array.shape, array.split, array.map or None))
    if return_counts:
        results.append(whole(numbers))
    return results[0] if len(results) == 1 else tuple(results)


# ---------------------------------------------------------------------------------------------------- order statistics


def percentile(
    array: SplitArray, q: float | Sequence[float], axis: int | None = None, method: Method = "linear"
) -> SplitArray:
    """Percentiles over an axis or over all elements, exact; NaN where there is one.

    Over the split axis no element moves: every round counts the next 11 bits of the candidates, in one all-reduce.

    Args:
        array: Real numbers.
        q: Percent, 0 to 100, one or several.
        axis: None: all elements.
        method: What lies between two elements, as of `numpy.percentile`.

    Raises:
        ValueError: For percentages out of range, an unknown method, an array of nothing.
    """
    wanted = np.atleast_1d(np.asarray(q, dtype=np.float64))
    if not ((wanted >= 0) & (wanted <= 100)).all():
        raise ValueError(f"percentile: q={q} must be between 0 and 100")
    if method not in ("linear", "lower", "higher", "midpoint", "nearest"):
        raise ValueError(f"percentile: method={method!r}; choose linear, lower, higher, midpoint, nearest")
    if array.size == 0:
        raise ValueError(f"percentile of an array of shape {array.shape}: there is no element")
    axis = None if axis is None else normalized_axis(axis, array.ndim)
    if axis is None or array.ndim == 1:
        keys = to_keys(array.local).reshape(-1, 1)
        found = _order_statistics(
            keys, array.size, wanted, method, array.comm if array.split is not None else None, array.dtype
        )[:, 0]
        shape: tuple[int, ...] = ()
        split, map_ = None, None
    else:
        moved = to_keys(array.local).movedim(axis, 0)
        comm = array.comm if axis == array.split else None
        found = _order_statistics(_columns(moved), array.shape[axis], wanted, method, comm, array.dtype)
        found = found.reshape(len(wanted), *moved.shape[1:])
        shape = tuple(n for i, n in enumerate(array.shape) if i != axis)
        split, map_ = (
            (None, None)
            if array.split is None or axis == array.split
            else (array.split - (axis < array.split), array.map)
        )
    dtype = array.dtype if array.dtype.is_floating_point else torch.float64
    found = found.to(dtype)
    if np.ndim(q) == 0:
        return array.like(found[0], shape, split, map_)
    return array.like(found, (len(wanted), *shape), None if split is None else split + 1, map_)


def quantile(
    array: SplitArray, q: float | Sequence[float], axis: int | None = None, method: Method = "linear"
) -> SplitArray:
    """`percentile` of fractions between 0 and 1."""
    return percentile(array, 100 * np.asarray(q, dtype=np.float64), axis, method)


def median(array: SplitArray, axis: int | None = None) -> SplitArray:
    """Median over an axis, or of all elements."""
    return percentile(array, 50.0, axis)


def _order_statistics(
    keys: Tensor, length: int, q: np.ndarray, method: Method, comm: Comm | None, dtype: torch.dtype
) -> Tensor:
    """Percentiles of each column of keys, ``(len(q), columns)`` float64."""
    place = q / 100 * (length - 1)
    low, high = np.floor(place).astype(np.int64), np.ceil(place).astype(np.int64)
    if comm is None:
        ordered = torch.from_numpy(np.sort(keys.cpu().numpy(), axis=0)).to(keys.device)
        picked = {int(k): ordered[int(k)] for k in {*low, *high, length - 1}}
    else:
        ranks = sorted({*low.tolist(), *high.tolist(), length - 1})
        picked = dict(zip(ranks, _select(keys, ranks, comm), strict=True))
    values = {k: from_keys(v, dtype).double() for k, v in picked.items()}
    has_nan = torch.isnan(values[length - 1])
    rows = []
    for at, a, b in zip(place, low.tolist(), high.tolist(), strict=True):
        lower, upper, t = values[a], values[b], at - a
        if method == "linear":
            row = torch.where(
                lower == upper, lower, upper - (upper - lower) * (1 - t) if t >= 0.5 else lower + (upper - lower) * t
            )
        elif method == "midpoint":
            row = torch.where(lower == upper, lower, (lower + upper) / 2)
        elif method == "nearest":
            row = values.get(int(np.rint(at)), upper)
        else:
            row = lower if method == "lower" else upper
        rows.append(torch.where(has_nan, torch.nan, row))
    return torch.stack(rows)


def _select(keys: Tensor, ranks: Sequence[int], comm: Comm) -> list[Tensor]:
    """The elements of given ranks of every column, found digit by digit from the leading bits.

    Args:
        keys: ``(local rows, columns)``.
        ranks: Numbers in sorted order, from 0.
        comm: Ranks that share the rows.

    Returns:
        A key for every column, for each of ``ranks``.
    """
    width = 32 if keys.dtype == torch.int32 else 64
    unsigned = np.uint32 if width == 32 else np.uint64
    bits = keys.cpu().numpy().view(unsigned) ^ unsigned(1 << (width - 1))  # ascending as unsigned numbers
    columns = bits.shape[1]
    found = np.zeros((len(ranks), columns), dtype=np.uint64)
    # What is still looked for: (column, leading bits) -> candidates of this rank, and (rank index, rank among them).
    open_ = {(c, 0): (np.ascontiguousarray(bits[:, c]), [(i, r) for i, r in enumerate(ranks)]) for c in range(columns)}
    shift = width
    while shift:
        step = min(_DIGIT, shift)
        shift -= step
        size = 1 << step
        histograms = np.zeros((len(open_), size), dtype=np.int64)
        digits = []
        for row, (mine, _) in enumerate(open_.values()):
            digit = ((mine >> unsigned(shift)) & unsigned(size - 1)).astype(np.int64)
            digits.append(digit)
            histograms[row] = np.bincount(digit, minlength=size)
        total = comm.all_reduce(torch.from_numpy(histograms).to(comm.device)).cpu().numpy()
        following: dict[tuple[int, int], tuple[np.ndarray, list[tuple[int, int]]]] = {}
        for ((column, prefix), (mine, looked_for)), digit, counts in zip(open_.items(), digits, total, strict=True):
            ends = np.cumsum(counts)
            for i, rank in looked_for:
                value = int(np.searchsorted(ends, rank, side="right"))
                rest = rank - (int(ends[value - 1]) if value else 0)
                key = (column, (prefix << step) | value)
                if key not in following:
                    following[key] = (mine[digit == value], [])
                following[key][1].append((i, rest))
        open_ = following
    for (column, value), (_, looked_for) in open_.items():
        for i, _ in looked_for:
            found[i, column] = value
    signed = (found.astype(unsigned) ^ unsigned(1 << (width - 1))).view(np.int32 if width == 32 else np.int64)
    return list(torch.from_numpy(signed).to(keys.device))


# -------------------------------------------------------------------------------------------------------------- counts


def histogram(
    array: SplitArray, bins: int = 10, range: tuple[float, float] | None = None
) -> tuple[SplitArray, SplitArray]:
    """Numbers of elements in equal bins, and the edges of the bins, both on every rank; as of `numpy.histogram`."""
    from parallel.array.reductions import max as largest
    from parallel.array.reductions import min as smallest

    if range is None:
        low, high = (float(smallest(array)), float(largest(array))) if array.size else (0.0, 1.0)
    else:
        low, high = range
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"histogram: the range {low} to {high} is not finite and ascending; give range=(low, high)")
    counts, edges = np.histogram(array.local.cpu().numpy(), bins=bins, range=(low, high))
    total = torch.from_numpy(counts.astype(np.int64))
    total = array.comm.all_reduce(total) if array.split is not None else total
    return array.like(total, total.shape, None), array.like(torch.from_numpy(edges), edges.shape, None)


def bincount(array: SplitArray, weights: SplitArray | None = None, minlength: int = 0) -> SplitArray:
    """How often each whole number from 0 occurs (or the sum of its weights), on every rank."""
    from parallel.array.reductions import max as largest
    from parallel.array.reductions import min as smallest

    if array.size and int(smallest(array)) < 0:
        raise ValueError(f"bincount: the smallest number is {int(smallest(array))}; it counts from 0")
    length = max(minlength, int(largest(array)) + 1 if array.size else 0)
    mine = None if weights is None else weights.resplit(array.split, array.map or None).local.reshape(-1).double()
    counts = torch.bincount(array.local.reshape(-1), mine, minlength=length)
    counts = array.comm.all_reduce(counts) if array.split is not None else counts
    return array.like(counts, counts.shape, None)


def searchsorted(ordered: SplitArray, values: SplitArray, side: Literal["left", "right"] = "left") -> SplitArray:
    """Where values belong in a sorted vector, which is gathered."""
    whole = ordered.resplit(None).local
    found = torch.searchsorted(whole, values.local.contiguous(), right=side == "right")
    return values.like(found, values.shape, values.split, values.map or None)


def digitize(values: SplitArray, edges: SplitArray) -> SplitArray:
    """Number of the bin of every value; edges ascend."""
    return searchsorted(edges, values, "right")


NAMES = (
    "sort",
    "argsort",
    "topk",
    "unique",
    "percentile",
    "quantile",
    "median",
    "histogram",
    "bincount",
    "searchsorted",
    "digitize",
)
