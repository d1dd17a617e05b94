"""k-means and its relatives: one pass over the rows and one all-reduce of ``k (f + 1)`` numbers per iteration."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.learning.base import Estimator, Step, all_reduce, like_rows
from parallel.array.moments import moments
from parallel.array.rng import Generator, uniform_at

_BLOCK = 16384  # rows whose scores stay in the cache
Init = Literal["k-means||", "random", "given"]


def scores(x: Tensor, centres: Tensor) -> Tensor:
    """``|c|^2 - 2 c x^T``, ``(k, rows)``: squared distances less what does not depend on the centre."""
    return torch.addmm(centres.square().sum(1)[:, None], centres, x.mT, alpha=-2)


def assign(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of every row (of equal ones the first), and its squared distance."""
    labels, least = [], []
    for block in x.split(_BLOCK):
        value, label = scores(block, centres).min(0)
        labels.append(label)
        least.append(value + block.square().sum(1))
    if not labels:
        return torch.empty(0, dtype=torch.int64, device=x.device), x.new_empty(0)
    return torch.cat(labels), torch.cat(least).clamp_(min=0)


def lloyd_sums(x: Tensor, centres: Tensor) -> Tensor:
    """Sums and numbers of the rows of every centre, and the sum of the least scores: ``(k (f + 1) + 1,)`` float64.

    Blocks of rows: scores by one product, the least of each column, a product of the 0/1 matrix of the nearest centres
    with the rows.
    """
    k, f = centres.shape
    sums = torch.zeros(k, f, dtype=torch.float64, device=x.device)
    counts = torch.zeros(k, dtype=torch.float64, device=x.device)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    norms, twice = centres.square().sum(1)[:, None], -2 * centres
    room = x.new_empty(2, k, min(_BLOCK, len(x)))  # the blocks' scores, and who is nearest: never allocated anew
    for block in x.split(_BLOCK):
        score, nearest = room[:, :, : len(block)]
        torch.addmm(norms, twice, block.mT, out=score)
        least = score.amin(0)
        torch.eq(score, least, out=nearest)  # 0 and 1 in the type of the rows, in one pass
        number = nearest.sum(1)
        if int(number.sum()) != len(block):  # equal distances: the first centre has the row
            nearest.mul_(nearest.cumsum(0) == 1)
            number = nearest.sum(1)
        sums += nearest @ block
        counts += number
        total += least.sum(dtype=torch.float64)
    return torch.cat([sums.reshape(-1), counts, total[None]])


class KMeans(Estimator):
    """Lloyd's algorithm.

    Args:
        k: Clusters.
        init: ``k-means||`` (Bahmani et al., 2012), ``random`` rows, or ``given``.
        centres: Where to start, ``(k, f)``, with ``init="given"``.
        max_iter: Most iterations.
        tol: Stop where the sum of squared shifts of the centres is at most ``tol`` times the mean variance of the
            columns; 0: where no centre moves.
        empty: What becomes of a centre without rows: ``keep`` it where it is, or move it to the row ``farthest`` from
            its own centre.
        seed: Of the start, which is the same for every number of ranks.

    Attributes:
        centres: ``(k, f)``.
        inertia: Sum of squared distances of the rows to their centres, before the last update.
        counts: Rows of every centre.
    """

    fitted: ClassVar[tuple[str, ...]] = ("centres", "counts", "spread")

    def __init__(
        self,
        k: int = 8,
        init: Init = "k-means||",
        centres: Tensor | None = None,
        max_iter: int = 300,
        tol: float = 1e-4,
        empty: Literal["keep", "farthest"] = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__(max_iter)
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        if init not in ("k-means||", "random", "given"):
            raise ValueError(f"init={init!r}: choose k-means||, random or given")
        if (init == "given") != (centres is not None):
            raise ValueError(f"init={init}, centres={'given' if centres is not None else None}: give both or none")
        if empty not in ("keep", "farthest"):
            raise ValueError(f"empty={empty!r}: choose keep or farthest")
        if not tol >= 0:
            raise ValueError(f"tol={tol}: must be 0 or more")
        self.k, self.init, self.start, self.tol, self.empty, self.seed = k, init, centres, tol, empty, seed
        self.centres: Tensor | None = None
        self.counts: Tensor | None = None
        self.spread: Tensor | None = None
        self._norm: tuple[Tensor, float] | None = None

    @property
    def inertia(self) -> float:
        """Sum of squared distances of the rows to their centres, before the last update."""
        return self.objective

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """Choose the first centres.

        Raises:
            ValueError: If there are more clusters than rows, or the given centres do not fit.
        """
        super().begin(x)
        x = self.rows(x)
        if self.k > x.shape[0]:
            raise ValueError(f"k={self.k}: there are only {x.shape[0]} rows; use at most as many clusters")
        if self.start is not None:
            if tuple(self.start.shape) != (self.k, x.shape[1]):
                raise ValueError(f"centres of shape {tuple(self.start.shape)}: ({self.k}, {x.shape[1]}) is needed")
            self.centres = self.start.to(dtype=x.dtype, device=x.device).clone()
        elif self.init == "random":
            self.centres = x[Generator(self.seed).choice(x.shape[0], self.k)].resplit(None).local
        else:
            self.centres = parallel_init(x, self.k, self.seed)
        self.spread = torch.zeros((), dtype=torch.float64)
        if self.tol > 0:
            found, _ = moments(x, 0, order=2)
            self.spread = found.variance().mean()
        self._norm = None

    def _squared_norm(self, x: SplitArray) -> float:
        """Sum of the squares of all elements: the part of the inertia that does not depend on the centres."""
        if self._norm is None or self._norm[0] is not x.local:
            blocks = [block.double().square().sum() for block in x.local.split(_BLOCK)]
            total = torch.stack(blocks).sum() if blocks else torch.zeros((), dtype=torch.float64, device=x.device)
            self._norm = x.local, float(all_reduce(x, total))
        return self._norm[1]

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """Assign all rows, move all centres."""
        x = self.rows(x)
        centres = self.centres.to(x.device)
        self.check_columns(x, centres.shape[1])
        sums = all_reduce(x, lloyd_sums(x.local, centres))
        inertia = max(float(sums[-1]) + self._squared_norm(x), 0.0)
        k, f = centres.shape
        self.counts = sums[k * f : -1]
        total = sums[: k * f].view(k, f)
        means = total / self.counts.clamp(min=1)[:, None]
        new = torch.where(self.counts[:, None] > 0, means, centres.double()).to(centres.dtype)
        if self.empty == "farthest" and bool((self.counts == 0).any()):
            new = self._reseeded(x, centres, new)
        shift = float((new - centres).double().square().sum())
        self.centres = new
        return Step(inertia, shift, shift <= self.tol * float(self.spread))

    def _reseeded(self, x: SplitArray, centres: Tensor, new: Tensor) -> Tensor:
        """Centres without rows go to the rows that are farthest from theirs."""
        from parallel.array.sorting import topk

        empty = (self.counts == 0).nonzero()[:, 0]
        _, least = assign(x.local, centres)
        _, where = topk(like_rows(x, least), len(empty), 0)
        new = new.clone()
        new[empty] = x[where.resplit(None).local].resplit(None).local
        return new

    def predict(self, x: SplitArray) -> SplitArray:
        """Cluster of every row."""
        self.require_fitted()
        x = self.rows(x)
        self.check_columns(x, self.centres.shape[1])
        return like_rows(x, assign(x.local, self.centres.to(x.local))[0])

    def transform(self, x: SplitArray) -> SplitArray:
        """Distances of every row to all centres, ``(rows, k)``."""
        self.require_fitted()
        x = self.rows(x)
        from parallel.array.distance import tile

        return like_rows(x, tile(x.local, self.centres.to(x.local)))

    def score(self, x: SplitArray) -> float:
        """Minus the inertia of rows, the larger the better."""
        self.require_fitted()
        x = self.rows(x)
        _, least = assign(x.local, self.centres.to(x.local))
        return -float(all_reduce(x, least.sum(dtype=torch.float64)))


def parallel_init(x: SplitArray, k: int, seed: int = 0, rounds: int = 5) -> Tensor:
    """First centres by k-means||, ``(k, f)``: the same for every number of ranks.

    Each round adds every row with probability ``min(1, 2 k d^2 / sum d^2)``; the coin of row i is Philox(seed, round,
    i). Candidates, weighted by how many rows are nearest to each, are clustered by weighted k-means++ on every rank.

    Source: Bahmani et al., *Scalable k-means++*, VLDB 2012.
    """
    first = Generator(seed).choice(x.shape[0], 1)
    candidates = x[first].resplit(None).local
    numbers = np.arange(x.offset, x.offset + len(x.local))
    least = torch.full((len(x.local),), torch.inf, dtype=x.dtype, device=x.device)
    new = candidates
    for round_ in range(rounds):
        if len(new):
            least = torch.minimum(least, assign(x.local, new)[1])
        phi = float(all_reduce(x, least.sum(dtype=torch.float64)))
        if phi <= 0:
            break
        coins = torch.from_numpy(uniform_at(numbers, seed, stream=1000 + round_)).to(x.device)
        chosen = (coins < 2 * k * least.double() / phi).nonzero()[:, 0]
        rows = x.local[chosen]
        new = x.comm.all_gather_rows(rows, x.comm.gather_counts(len(rows))) if x.split == 0 else rows
        candidates = torch.cat([candidates, new])
    while len(candidates) < k:  # few or equal rows: any will do
        more = x[Generator(seed, 7).choice(x.shape[0], k)].resplit(None).local
        candidates = torch.cat([candidates, more])[: max(k, len(candidates))]
    labels, _ = assign(x.local, candidates)
    weights = all_reduce(x, torch.bincount(labels, minlength=len(candidates)).double())
    return _weighted_plus_plus(candidates, weights, k, seed)


def _weighted_plus_plus(points: Tensor, weights: Tensor, k: int, seed: int, trials: int = 4) -> Tensor:
    """Weighted k-means++, several trials for each centre, then weighted Lloyd iterations; float64, on every rank."""
    p, w = points.double().cpu(), weights.cpu()
    coins = iter(uniform_at(np.arange(k * trials), seed, stream=2000))
    chosen = [int(torch.searchsorted(w.cumsum(0), next(coins) * w.sum()).clamp(max=len(p) - 1))]
    least = (p - p[chosen[0]]).square().sum(1)
    for _ in range(k - 1):
        mass = (w * least).cumsum(0)
        if float(mass[-1]) <= 0:  # fewer different points than clusters
            chosen.append(next(i for i in range(len(p)) if i not in chosen))
            continue
        best = None
        for _ in range(trials):
            one = int(torch.searchsorted(mass, next(coins) * mass[-1]).clamp(max=len(p) - 1))
            distances = torch.minimum(least, (p - p[one]).square().sum(1))
            cost = float((w * distances).sum())
            if best is None or cost < best[0]:
                best = cost, one, distances
        chosen.append(best[1])
        least = best[2]
    centres = p[chosen]
    for _ in range(20):
        nearest = torch.cdist(p, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, p * w[:, None])
        counts = torch.zeros(k, dtype=torch.float64).index_add_(0, nearest, w)
        new = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1e-300)[:, None], centres)
        if torch.equal(new, centres):
            break
        centres = new
    return centres.to(points)


class MiniBatchKMeans(KMeans):
    """k-means whose iterations see one block of rows each (Sculley, 2010): for data larger than memory.

    A centre moves to the mean of all rows that it ever got: ``partial_fit`` per block of a `streaming.Stream`.

    Args:
        k: Clusters.
        init: As of `KMeans`, of the first block.
        centres: Where to start.
        max_iter: Most blocks of `fit`.
        tol: As of `KMeans`; 0 by default: blocks differ, and the last one says little.
        seed: Of the start.
    """

    fitted: ClassVar[tuple[str, ...]] = ("centres", "counts", "spread", "seen")

    def __init__(
        self,
        k: int = 8,
        init: Init = "k-means||",
        centres: Tensor | None = None,
        max_iter: int = 100,
        tol: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(k, init, centres, max_iter, tol, "keep", seed)
        self.seen: Tensor | None = None

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """Choose the first centres from a block."""
        super().begin(x)
        self.seen = torch.zeros(self.k, dtype=torch.float64)

    def partial_fit(self, x: SplitArray) -> Step:
        """Move the centres by the rows of a block; the first block also chooses them."""
        if self.centres is None:
            self.begin(x)
        return self.step(x)

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """Assign a block, move the centres towards it."""
        x = self.rows(x)
        centres = self.centres.to(x.device)
        self.check_columns(x, centres.shape[1])
        sums = all_reduce(x, lloyd_sums(x.local, centres))
        k, f = centres.shape
        inertia = max(float(sums[-1]) + self._squared_norm(x), 0.0)
        self.counts = sums[k * f : -1]
        seen = self.seen.to(x.device) + self.counts
        total = sums[: k * f].view(k, f)
        step = torch.where(seen > 0, 1 / seen.clamp(min=1), 0.0)[:, None]
        new = centres.double() + step * (total - self.counts[:, None] * centres.double())
        shift = float((new - centres.double()).square().sum())
        self.centres, self.seen = new.to(centres.dtype), seen
        return Step(inertia, shift, self.tol > 0 and shift <= self.tol * float(self.spread))


class KMedians(KMeans):
    """k-means with Manhattan distances, whose centres are medians of columns, found by histograms.

    Args:
        k: Clusters.
        init: As of `KMeans`.
        centres: Where to start.
        max_iter: Most iterations.
        tol: As of `KMeans`.
        seed: Of the start.
    """

    def __init__(
        self,
        k: int = 8,
        init: Init = "k-means||",
        centres: Tensor | None = None,
        max_iter: int = 100,
        tol: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(k, init, centres, max_iter, tol, "keep", seed)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return torch.empty(0, dtype=torch.int64), x.new_empty(0)
        least, labels = torch.cdist(x, self.centres.to(x), p=1.0).min(1)
        return labels, least

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """Assign all rows, move all centres to the medians of their rows."""
        from parallel.array.sorting import median

        x = self.rows(x)
        labels, least = self._nearest(x.local)
        objective = float(all_reduce(x, least.sum(dtype=torch.float64)))
        self.counts = all_reduce(x, torch.bincount(labels, minlength=self.k).double())
        new = self.centres.to(x.local).clone()
        for j in range(self.k):
            if int(self.counts[j]):
                new[j] = median(x[like_rows(x, labels == j)], 0).resplit(None).local
        shift = float((new - self.centres.to(new)).double().square().sum())
        self.centres = new
        return Step(objective, shift, shift <= self.tol * float(self.spread))

    def predict(self, x: SplitArray) -> SplitArray:
        """Cluster of every row."""
        self.require_fitted()
        x = self.rows(x)
        return like_rows(x, self._nearest(x.local)[0])

    def score(self, x: SplitArray) -> float:
        """Minus the sum of Manhattan distances."""
        self.require_fitted()
        x = self.rows(x)
        return -float(all_reduce(x, self._nearest(x.local)[1].sum(dtype=torch.float64)))


class KMedoids(KMedians):
    """`KMedians` whose centres are rows: those nearest to the medians.

    Args:
        k: Clusters.
        init: As of `KMeans`.
        centres: Where to start.
        max_iter: Most iterations.
        tol: As of `KMeans`.
        seed: Of the start.
    """

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """One of `KMedians`, then the nearest row of each cluster."""
        from parallel.array.reductions import argmin

        x = self.rows(x)
        labels, _ = self._nearest(x.local)
        before = self.centres.to(x.local)
        done = super().iterate(x)
        rows = []
        for j in range(self.k):
            distances = torch.cdist(x.local, self.centres[j : j + 1].to(x.local), p=1.0)[:, 0]
            distances = torch.where(labels == j, distances, torch.inf)
            rows.append(int(argmin(like_rows(x, distances))) if int(self.counts[j]) else -1)
        medoids = x[torch.tensor([max(r, 0) for r in rows])].resplit(None).local
        keep = torch.tensor([r < 0 for r in rows])[:, None]
        self.centres = torch.where(keep, before, medoids)
        shift = float((self.centres - before).double().square().sum())
        return Step(done.objective, shift, shift <= self.tol * float(self.spread))


def silhouette(x: SplitArray, labels: SplitArray, sample: int = 1000, seed: int = 0) -> float:
    """Mean silhouette of a sample of the rows against all rows; exact where the sample is everything.

    Source: Rousseeuw, 1987.
    """
    from parallel.array.distance import tile

    x = x.resplit(0) if x.split == 1 else x
    own = labels.resplit(0, x.map).local if x.split == 0 else labels.resplit(None).local
    k = int(all_reduce(x, own.max() + 1 if len(own) else torch.tensor(0), "max"))
    at = Generator(seed).choice(x.shape[0], min(sample, x.shape[0]))
    rows = x[at].resplit(None).local
    theirs = labels[at].resplit(None).local
    one_hot = torch.nn.functional.one_hot(own.long(), k).to(x.dtype)
    sums = torch.zeros(len(rows), k, dtype=torch.float64, device=x.device)
    for block, hot in zip(x.local.split(_BLOCK), one_hot.split(_BLOCK), strict=True):
        sums += tile(rows, block, exact=True) @ hot
    found = all_reduce(x, torch.cat([sums, one_hot.sum(0, dtype=torch.float64)[None]]))
    sums, counts = found[:-1], found[-1]
    mine = counts[theirs]
    a = sums.gather(1, theirs[:, None])[:, 0] / (mine - 1).clamp(min=1)
    others = (sums / counts.clamp(min=1)).masked_fill(counts == 0, torch.inf)
    b = others.scatter(1, theirs[:, None], torch.inf).amin(1)
    s = torch.where((mine > 1) & b.isfinite(), (b - a) / torch.maximum(a, b).clamp(min=1e-300), 0.0)
    return float(s.mean())
