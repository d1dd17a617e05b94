"""Distances between all rows of two arrays: blocks go around a ring while the last one is being multiplied.

Consumers that do not need the matrix (`nearest`, `kernel_sums`, `neighbour_counts`) see it tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.chunks import balanced, offsets
from parallel.array.comm import Comm

Metric = Literal["euclidean", "sqeuclidean", "manhattan", "cosine", "gaussian"]
METRICS = ("euclidean", "sqeuclidean", "manhattan", "cosine", "gaussian")
TILE_BYTES = 1 << 23
"""Largest tile that is computed at once: it is still in the cache when it is looked at."""
PIECE_BYTES = 1 << 24
"""Largest piece of rows that goes around the ring at once."""
_DIAGONAL_PARTS = 16  # of the tile of a block with itself, of which one half is computed
_SYMMETRIC_FROM = 256  # columns from which computing a tile costs more than to send its mirror image

Visitor = Callable[[int, int, Tensor], None]


def _check(x: SplitArray, y: SplitArray, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: choose {', '.join(METRICS)}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"distances between rows of shapes {x.shape} (split={x.split}, map={x.map}) and {y.shape} "
            f"(split={y.split}, map={y.map}): two matrices with equally many columns are needed"
        )


def tile(
    a: Tensor,
    b: Tensor,
    metric: Metric = "euclidean",
    sigma: float = 1.0,
    exact: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Distances between the rows of two local matrices, ``(rows of a, rows of b)``.

    Args:
        a: Rows.
        b: Rows.
        metric: ``gaussian`` is the kernel ``exp(-d^2 / (2 sigma^2))``.
        sigma: Its width.
        exact: Squares of differences, instead of ``|a|^2 + |b|^2 - 2 a b^T`` which cancels where rows nearly coincide.
        out: Where they go, ``(rows of a, rows of b)``, part of a larger matrix for example; None: a new tensor.
    """
    if out is not None and (exact or metric in ("manhattan", "cosine")):
        return out.copy_(tile(a, b, metric, sigma, exact))
    if metric == "manhattan":
        return torch.cdist(a, b, p=1.0)
    if metric == "cosine":
        scaled = [x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (a, b)]
        return torch.addmm(torch.ones((), dtype=a.dtype, device=a.device), scaled[0], scaled[1].mT, alpha=-1).clamp_(
            0, 2
        )
    if exact:
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        if metric == "euclidean":
            return squares
        squares.square_()
    else:
        # One product of f + 2 columns: the norms ride along.
        left = torch.cat([a, a.square().sum(1, keepdim=True), torch.ones_like(a[:, :1])], 1)
        right = torch.cat([-2 * b, torch.ones_like(b[:, :1]), b.square().sum(1, keepdim=True)], 1)
        squares = torch.mm(left, right.mT, out=out).clamp_(min=0)
    if metric == "gaussian":
        return squares.mul_(-0.5 / sigma**2).exp_()
    return squares.sqrt_() if metric == "euclidean" else squares


def _centre(x: SplitArray, metric: str = "euclidean", exact: bool = False) -> Callable[[Tensor], Tensor]:
    """Takes a common row near their mean off rows: the expanded form loses less. Metrics without it: nothing."""
    if metric in ("manhattan", "cosine") or exact:
        return lambda rows: rows
    total = x.local.sum(0, dtype=torch.float64)
    mean = ((x.comm.all_reduce(total) if x.split == 0 else total) / max(x.shape[0], 1)).to(x.dtype)
    return lambda rows: rows - mean


def _rows(x: SplitArray) -> SplitArray:
    return x.resplit(0) if x.split == 1 else x


def ring(x: SplitArray, y: SplitArray, visit: Callable[[int, Tensor], None]) -> None:
    """Give all rows of ``y`` to every rank, in pieces: ``visit(number of its first row, piece)``.

    The next piece is on its way while one is being looked at. A rank has its own rows and two pieces of the others'.

    Args:
        x: Tells the ranks.
        y: Split along rows, or whole: then there is one piece.
        visit: What happens with a piece.
    """
    if y.split is None or y.comm.size == 1:
        visit(0, y.local)
        return
    comm, first = y.comm, offsets(y.map)
    row_bytes = y.local.element_size() * max(y.shape[1], 1)
    pieces = max(math.ceil(max(y.map) * row_bytes / PIECE_BYTES), 1)
    maps = [balanced(rows, pieces) for rows in y.map]
    for number, own in enumerate(y.local.split(list(maps[comm.rank]))):
        piece = own
        for step in range(comm.size):
            owner, after = (comm.rank + step) % comm.size, (comm.rank + step + 1) % comm.size
            coming = comm.shift(piece, maps[after][number]) if step < comm.size - 1 else None
            visit(first[owner] + sum(maps[owner][:number]), piece)
            piece = coming.wait() if coming else piece


def cdist(
    x: SplitArray,
    y: SplitArray | None = None,
    metric: Metric = "euclidean",
    sigma: float = 1.0,
    exact: bool = False,
    symmetric: bool | None = None,
) -> SplitArray:
    """Distances between all rows, ``(rows of x, rows of y)``, split as ``x``.

    Args:
        x: Split along rows (or columns, then it is resplit), or whole.
        y: The same; None: ``x`` with itself.
        metric: ``euclidean``, ``sqeuclidean``, ``manhattan``, ``cosine``, or the ``gaussian`` kernel.
        sigma: Width of the kernel.
        exact: Squares of differences instead of the expanded form; slower.
        symmetric: Of ``x`` with itself: compute one half of the tiles and send their mirror images. None: where rows
            are so long that computing a tile takes longer than sending it.

    Raises:
        ValueError: If the rows have different lengths.
    """
    x = _rows(x)
    own = y is None
    y = x if y is None else _rows(y)
    _check(x, y, metric)
    if x.split is None and y.split == 0:
        x = x.resplit(0)
    out = torch.empty(x.local.shape[0], y.shape[0], dtype=x.dtype, device=x.device)
    centre = _centre(x, metric, exact)
    a = centre(x.local)
    if own and (symmetric or (symmetric is None and x.shape[1] >= _SYMMETRIC_FROM and x.split == 0)):
        _symmetric(x, a, out, lambda p, q: tile(p, q, metric, sigma, exact))
    else:

        def visit(first: int, block: Tensor) -> None:
            height, block = _height(len(block), out.element_size()), centre(block)
            for i in range(0, len(a), height):
                target = out[i : i + height, first : first + len(block)]
                tile(a[i : i + height], block, metric, sigma, exact, target)

        ring(x, y, visit)
    if own and metric in ("euclidean", "sqeuclidean", "manhattan"):
        _zero_diagonal(out, x.offset)
    return x.like(out, (x.shape[0], y.shape[0]), x.split, x.map or None)


def _zero_diagonal(out: Tensor, first: int) -> None:
    out.diagonal(first).zero_()


def _height(columns: int, width: int) -> int:
    return max(TILE_BYTES // max(columns * width, 1), 16)


def num_tiles(comm_size: int) -> float:
    """Tiles (of ``(n / P)^2`` distances) that a rank computes in symmetric mode; all of them are ``P``."""
    diagonal = (_DIAGONAL_PARTS + 1) / (2 * _DIAGONAL_PARTS)
    return diagonal + (comm_size - 1) / 2


def _symmetric(x: SplitArray, a: Tensor, out: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Fill the local rows of a symmetric matrix.

    Rank r computes the tiles (r, r + s) for s below P / 2 and sends their mirror images to rank r + s. For even P the
    tile (r, r + P / 2) is shared: of rows and columns halved, each of the two ranks computes one half of its rows.
    """
    comm, first = x.comm, offsets(x.map) if x.split == 0 else (0,)
    map_ = x.map if x.split == 0 else (len(a),)
    size, rank = (comm.size, comm.rank) if x.split == 0 else (1, 0)
    bounds = [len(a) * i // _DIAGONAL_PARTS for i in range(_DIAGONAL_PARTS + 1)]
    for i in range(_DIAGONAL_PARTS):
        rows = slice(bounds[i], bounds[i + 1])
        part = compute(a[rows], a[bounds[i] :])
        out[rows, first[rank] + bounds[i] : first[rank] + len(a)] = part
        out[bounds[i + 1] :, first[rank] + bounds[i] : first[rank] + bounds[i + 1]] = part[
            :, bounds[i + 1] - bounds[i] :
        ].mT
    block = a
    for step in range(1, size // 2 + 1):
        after, before = (rank + step) % size, (rank - step) % size
        block = comm.shift(a, map_[after], by=step).wait()
        columns = slice(first[after], first[after] + map_[after])
        if 2 * step == size:  # the other one computes the rest of the tile
            half = len(a) // 2 if rank < after else 0
            low, high = (0, half) if rank < after else (map_[after] // 2, map_[after])
            if rank < after:
                mine = compute(a[:half], block)
                out[:half, columns] = mine
                came = comm.swap(mine, after, (map_[after], len(a) - half), after).wait()
                out[half:, columns] = came.mT
            else:  # columns low:high of the other's rows
                mine = compute(a, block[low:high])
                out[:, first[after] + low : first[after] + high] = mine
                came = comm.swap(mine, after, (low, len(a)), after).wait()
                out[:, first[after] : first[after] + low] = came.mT
            continue
        mine = compute(a, block)
        out[:, columns] = mine
        came = comm.swap(mine, after, (map_[before], len(a)), before).wait()
        out[:, first[before] : first[before] + map_[before]] = came.mT


def _tiles(
    a: Tensor, block: Tensor, centre: Callable[[Tensor], Tensor], compute: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, first column, distances) of tiles of at most `TILE_BYTES`; only their rows are centred, as copies."""
    side = int(math.sqrt(TILE_BYTES / a.element_size()))
    for i in range(0, len(a), side):
        rows = centre(a[i : i + side])
        for j in range(0, len(block), side):
            yield i, j, compute(rows, centre(block[j : j + side]))


def nearest(
    x: SplitArray, y: SplitArray, k: int, metric: Metric = "euclidean", exclude_self: bool = False
) -> tuple[SplitArray, SplitArray]:
    """The ``k`` nearest rows of ``y`` of every row of ``x``, nearest first, and their distances.

    Never more than a tile of distances is in memory. Of equal distances the lower number wins.

    Args:
        x: Rows that ask.
        y: Rows that are looked for.
        k: How many.
        metric: Any but ``gaussian``.
        exclude_self: Row i of ``x`` is row i of ``y`` and does not count.

    Returns:
        Distances and numbers of rows, ``(rows of x, k)``, split as ``x``.

    Raises:
        ValueError: If there are fewer than ``k`` rows.
    """
    x, y = _rows(x), _rows(y)
    _check(x, y, metric)
    if not 0 < k <= y.shape[0] - exclude_self:
        raise ValueError(
            f"k={k} neighbours among {y.shape[0] - exclude_self} rows; use 1 to {y.shape[0] - exclude_self}"
        )
    if x.split is None and y.split == 0:
        x = x.resplit(0)
    squared = metric == "euclidean"
    a, centre = x.local, _centre(x, metric)
    best = torch.full((len(a), k), torch.inf, dtype=x.dtype, device=x.device)
    where = torch.full((len(a), k), torch.iinfo(torch.int64).max, device=x.device)

    def visit(first: int, block: Tensor) -> None:
        for i, j, distances in _tiles(a, block, centre, lambda p, q: tile(p, q, "sqeuclidean" if squared else metric)):
            if exclude_self:
                _forget_self(distances, x.offset + i, first + j)
            rows = slice(i, i + len(distances))
            _keep_best(best[rows], where[rows], distances, first + j)

    ring(x, y, visit)
    order = torch.argsort(where, dim=1, stable=True)
    best, where = best.gather(1, order), where.gather(1, order)
    order = torch.argsort(best, dim=1, stable=True)
    best, where = best.gather(1, order), where.gather(1, order)
    shape, map_ = (x.shape[0], k), x.map or None
    return x.like(best.sqrt() if squared else best, shape, x.split, map_), x.like(where, shape, x.split, map_)


def _forget_self(distances: Tensor, row: int, column: int) -> None:
    """Of a tile that begins at (row, column): the distance of a row to itself counts as infinite."""
    offset = row - column
    if -distances.shape[0] < offset < distances.shape[1]:
        distances.diagonal(offset).fill_(torch.inf)


def _keep_best(best: Tensor, where: Tensor, distances: Tensor, first: int) -> None:
    """Merge a tile into the running best ones, in place; rows whose worst neighbour is nearer are left alone."""
    k = best.shape[1]
    worst = best.amax(1)
    touched = (distances.amin(1) <= worst).nonzero()[:, 0]
    if not len(touched):
        return
    sub = distances if len(touched) == len(distances) else distances[touched]
    values, columns = torch.topk(sub, min(k, sub.shape[1]), dim=1, largest=False)
    # torch.topk leaves open which of equal values it takes: the last one kept may have equals that were left out.
    tied = ((sub == values[:, -1:]).sum(1) > (values == values[:, -1:]).sum(1)).nonzero()[:, 0]
    if len(tied):
        columns[tied] = torch.argsort(sub[tied], dim=1, stable=True)[:, : columns.shape[1]]
    joined = torch.cat([best[touched], sub.gather(1, columns)], 1)
    names = torch.cat([where[touched], columns + first], 1)
    by_name = torch.argsort(names, dim=1, stable=True)
    joined, names = joined.gather(1, by_name), names.gather(1, by_name)
    order = torch.argsort(joined, dim=1, stable=True)[:, :k]
    best[touched], where[touched] = joined.gather(1, order), names.gather(1, order)


def kernel_sums(x: SplitArray, y: SplitArray, sigma: float) -> SplitArray:
    """``sum_j exp(-|x_i - y_j|^2 / (2 sigma^2))`` of every row of ``x``, float64; densities, degrees of a graph."""
    x, y = _rows(x), _rows(y)
    _check(x, y, "gaussian")
    x = x.resplit(0) if x.split is None and y.split == 0 else x
    a, centre = x.local, _centre(x)
    total = torch.zeros(len(a), dtype=torch.float64, device=x.device)

    def visit(first: int, block: Tensor) -> None:
        for i, _, values in _tiles(a, block, centre, lambda p, q: tile(p, q, "gaussian", sigma)):
            total[i : i + len(values)] += values.sum(1, dtype=torch.float64)

    ring(x, y, visit)
    return x.like(total, (x.shape[0],), x.split, x.map or None)


def neighbour_counts(x: SplitArray, y: SplitArray, radius: float) -> SplitArray:
    """How many rows of ``y`` are within a radius of every row of ``x``; core points of DBSCAN."""
    x, y = _rows(x), _rows(y)
    _check(x, y, "euclidean")
    x = x.resplit(0) if x.split is None and y.split == 0 else x
    a, centre = x.local, _centre(x)
    total = torch.zeros(len(a), dtype=torch.int64, device=x.device)

    def visit(first: int, block: Tensor) -> None:
        for i, _, values in _tiles(a, block, centre, lambda p, q: tile(p, q, "sqeuclidean")):
            total[i : i + len(values)] += (values <= radius**2).sum(1)

    ring(x, y, visit)
    return x.like(total, (x.shape[0],), x.split, x.map or None)


def received_elements(rows: int, columns: int, comm: Comm) -> int:
    """Numbers that a rank receives in `cdist` of rows with themselves: all blocks but its own."""
    map_ = balanced(rows, comm.size)
    return (rows - map_[comm.rank]) * columns


NAMES = ("cdist", "nearest", "kernel_sums", "neighbour_counts")
