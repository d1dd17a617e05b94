"""How good found coincidences are: against true pairs of hits, and against spikes at labels (section 2.6)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from physics.pet.hits import NO_DECAY, Hits, Pairs


class Spikes(NamedTuple):
    """Places of ones in a binary tensor: (spike,) int64 each."""

    sample: np.ndarray
    crystal: np.ndarray
    step: np.ndarray


class Labels(NamedTuple):
    """Coincidences that a network is to mark in both crystals at the step of the decay: (label,) int64 each."""

    sample: np.ndarray
    a: np.ndarray
    b: np.ndarray
    step: np.ndarray


class ListCounts(NamedTuple):
    """Counts of a list of pairs: they add up over samples.

    ``pairs`` found, ``correct`` (both hits of one decay), ``true`` coincidences in the data; of the found ones
    ``randoms`` (of two decays, or of a hit of none), ``scattered`` (of one decay, with a scattered photon), and
    ``multiples`` (with a hit that is in another found pair as well).
    """

    pairs: int
    correct: int
    true: int
    randoms: int
    scattered: int
    multiples: int


def count_pairs(hits: Hits, found: Pairs, num_true: int) -> ListCounts:
    """Compare found pairs with the decays that made their hits.

    Args:
        hits: All hits.
        found: Rows of them, each pair once.
        num_true: True coincidences (`physics.pet.hits.true_pairs`).
    """
    a, b = found
    same = (hits.decay[a] == hits.decay[b]) & (hits.decay[a] != NO_DECAY) & (hits.sample[a] == hits.sample[b])
    scattered = same & (hits.scattered[a] | hits.scattered[b])
    uses = np.bincount(np.concatenate([a, b]), minlength=max(len(hits), 1))
    return ListCounts(
        len(a), int(same.sum()), num_true, int((~same).sum()), int(scattered.sum()),
        int(((uses[a] > 1) | (uses[b] > 1)).sum()),
    )  # fmt: skip


def precision_recall_f1(correct: float, found: float, true: float) -> tuple[float, float, float]:
    """Precision, recall and their harmonic mean; 0 where nothing was found or there was nothing to find."""
    precision, recall = correct / found if found else 0.0, correct / true if true else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def match_spikes(spikes: Spikes, targets: Spikes, tolerance: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign spikes to targets of the same sample and crystal, one to one, at most ``tolerance`` steps apart.

    As many as possible are matched, with the smallest sum of differences of time.

    Returns:
        For every target the row of its spike, -1 without one, and for every spike whether it is matched.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance}: must be at least 0 steps")
    matched = np.full(len(targets.sample), -1, dtype=np.int64)
    used = np.zeros(len(spikes.sample), dtype=bool)
    if not len(matched) or not len(used):
        return matched, used
    crystals = 1 + max(int(spikes.crystal.max()), int(targets.crystal.max()))
    spike_key = spikes.sample * crystals + spikes.crystal
    target_key = targets.sample * crystals + targets.crystal
    order = np.lexsort((spikes.step, spike_key))
    keys, begins, counts = np.unique(target_key, return_index=True, return_counts=True)
    low, high = np.searchsorted(spike_key[order], keys), np.searchsorted(spike_key[order], keys, side="right")
    alone = (counts == 1) & (high > low)
    # One target: the nearest of its spikes, found between its neighbours in time.
    at = begins[alone]
    span = (
        1 + max(int(spikes.step.max()), int(targets.step.max())) - min(int(spikes.step.min()), int(targets.step.min()))
    )
    base = min(int(spikes.step.min()), int(targets.step.min()))
    line = spike_key[order] * (2 * span) + (spikes.step[order] - base)
    place = np.searchsorted(line, target_key[at] * (2 * span) + (targets.step[at] - base))
    best, distance = np.full(len(at), -1, dtype=np.int64), np.full(len(at), tolerance + 1, dtype=np.int64)
    for offset in (-1, 0):
        i = place + offset
        valid = (i >= low[alone]) & (i < high[alone])
        row = order[np.where(valid, i, 0)]
        away = np.where(valid, np.abs(spikes.step[row] - targets.step[at]), tolerance + 1)
        nearer = away < distance
        best, distance = np.where(nearer, row, best), np.where(nearer, away, distance)
    matched[at] = best
    used[best[best >= 0]] = True
    for k in np.flatnonzero((counts > 1) & (high > low)):
        rows, mine = order[low[k] : high[k]], np.flatnonzero(target_key == keys[k])
        cost = np.abs(targets.step[mine][:, None] - spikes.step[rows][None]).astype(float)
        far = cost > tolerance
        cost[far] = (tolerance + 1) * 1e3  # never better than a match within the tolerance
        i, j = linear_sum_assignment(cost)
        for target, spike in zip(i, j, strict=True):
            if not far[target, spike]:
                matched[mine[target]] = rows[spike]
                used[rows[spike]] = True
    return matched, used


class SpikeCounts(NamedTuple):
    """Counts of spikes against labels: they add up over samples.

    Hits: ``spikes``, ``targets``, ``matched`` and the sum ``time_error`` of ``|dt|`` over the matched. Pairs:
    ``pair_correct`` (both spikes of a label matched), ``pair_spurious`` (unmatched spikes over 2), ``pairs`` (labels).
    """

    spikes: int
    targets: int
    matched: int
    time_error: int
    pair_correct: int
    pair_spurious: float
    pairs: int


def count_spikes(spikes: Spikes, labels: Labels, tolerance: int) -> SpikeCounts:
    """Match spikes to labels and count hits and pairs.

    A label asks for one spike in each of its crystals. Pair precision is ``TP / (TP + unmatched / 2)``, pair recall
    ``TP / labels``. Spikes that match one half of a label are matched hits, and no pair.
    """
    n = len(labels.sample)
    targets = Spikes(np.tile(labels.sample, 2), np.concatenate([labels.a, labels.b]), np.tile(labels.step, 2))
    matched, used = match_spikes(spikes, targets, tolerance)
    found = matched >= 0
    error = np.abs(spikes.step[matched[found]] - targets.step[found]).sum() if found.any() else 0
    both = found[:n] & found[n:]
    return SpikeCounts(len(used), 2 * n, int(found.sum()), int(error), int(both.sum()), float((~used).sum()) / 2, n)


def pair_f1(counts: SpikeCounts) -> tuple[float, float, float]:
    """Precision, recall and F1 of pairs."""
    return precision_recall_f1(counts.pair_correct, counts.pair_correct + counts.pair_spurious, counts.pairs)


class LegacyCounts(NamedTuple):
    """True positives (pairs), false positives (left-over spikes, one by one), false negatives (pairs)."""

    tp: int
    fp: int
    fn: int

    def scores(self, *, stored: bool = False) -> tuple[float, float, float]:
        """Precision, recall, F1; ``stored``: with false positives in the place of negatives in the recall.

        That is what the reference repository holds: recall equals precision, and so does F1.
        """
        precision = self.tp / (self.tp + self.fp) if self.tp + self.fp else 0.0
        missed = self.fp if stored else self.fn
        recall = self.tp / (self.tp + missed) if self.tp + missed else 0.0
        return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def legacy_counts(spikes: Spikes, targets: Spikes) -> LegacyCounts:
    """The metric of the reference code, for comparison only.

    The target spikes of a sample, in the order of time, are taken two by two as coincidences. One counts as found if
    both crystals have any spike left, at any time; these two are used up. It mixes pairs (TP, FN) with single spikes
    (FP), ignores time altogether, and pairs wrongly where two coincidences share a step.
    """
    tp = fn = 0
    left: dict[tuple[int, int], int] = {}
    for key in zip(spikes.sample.tolist(), spikes.crystal.tolist(), strict=True):
        left[key] = left.get(key, 0) + 1
    order = np.lexsort((targets.crystal, targets.step, targets.sample))
    rows = list(zip(targets.sample[order].tolist(), targets.crystal[order].tolist(), strict=True))
    i = 0
    while i + 1 < len(rows):
        first, second = rows[i], rows[i + 1]
        if first[0] != second[0]:  # an odd spike at the end of a sample has no partner
            i += 1
            continue
        i += 2
        enough = left.get(first, 0) >= 1 and left.get(second, 0) >= (2 if first == second else 1)
        tp, fn = tp + enough, fn + (not enough)
        if enough:
            left[first] -= 1
            left[second] -= 1
    return LegacyCounts(tp, sum(left.values()), fn)
