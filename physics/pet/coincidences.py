"""Classical sorters of coincidences: the single window, and the policies of GATE. All vectorised.

They take `Hits` in the order of sample and step, find nothing across samples, and return `Pairs` of rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from physics.pet.hits import Hits, Pairs
from physics.pet.scanner import Scanner

POLICIES = (
    "remove_multiples", "take_all_goods", "take_winner_of_goods", "take_if_only_one_good", "take_winner_if_is_good",
    "take_winner_if_all_are_goods",
)  # fmt: skip


def single_window(hits: Hits, window: int) -> Pairs:
    """Groups of exactly two hits, where a gap of more than ``window`` steps ends a group (section 2.7).

    A chain rule: a group is as long as every hit is within the window of the one before it; groups of one, three and
    more are dropped.

    Args:
        hits: Ordered by sample and step.
        window: Steps, at least 0.
    """
    if window < 0:
        raise ValueError(f"window={window}: must be at least 0 steps")
    n = len(hits)
    begins = np.ones(n + 2, dtype=bool)  # whether a group begins at a hit; beyond the last one does
    if n > 1:
        np.greater(np.diff(hits.step), window, out=begins[1:n])
        begins[1:n] |= hits.sample[1:] != hits.sample[:-1]
    first = np.flatnonzero(begins[:n] & ~begins[1 : n + 1] & begins[2 : n + 2])
    return Pairs(first, first + 1)


def expected_single_window_pairs(num_hits: float, rate: float, window: float) -> float:
    """Pairs that `single_window` finds in a Poisson stream of hits without coincidences.

    A group of two has a gap above the window before and after it, one below between: ``N e^(-2 S w) (1 - e^(-S w))``.

    Args:
        num_hits: N.
        rate: S, hits per unit of time.
        window: w, in that unit.
    """
    return num_hits * math.exp(-2 * rate * window) * -math.expm1(-rate * window)


def candidate_pairs(hits: Hits, window: int) -> Pairs:
    """All pairs of hits in different crystals at most ``window`` steps apart; every hit opens a window of its own."""
    if window < 0:
        raise ValueError(f"window={window}: must be at least 0 steps")
    n = len(hits)
    # A time line on which samples are further apart than the window.
    low = int(hits.step.min(initial=0))
    span = int(hits.step.max(initial=0)) - low + window + 1
    line = hits.sample * span + (hits.step - low)
    after = np.searchsorted(line, line + window, side="right") - np.arange(n) - 1
    first = np.repeat(np.arange(n), after)
    starts = np.cumsum(after) - after
    second = first + 1 + np.arange(len(first)) - np.repeat(starts, after)
    differ = hits.crystal[first] != hits.crystal[second]
    return Pairs(first[differ], second[differ])


class Good(NamedTuple):
    """Which pairs may be coincidences at all: far enough apart across the axis, near enough along it.

    Args:
        min_transaxial_mm: Least distance across the axis.
        max_axial_mm: Largest distance along it; None: any.
    """

    min_transaxial_mm: float = 0.0
    max_axial_mm: float | None = None

    @classmethod
    def by_angle(cls, scanner: Scanner, min_angle_degree: float) -> Good:
        """Those whose crystals are at least so far apart as seen from the axis."""
        return cls(2 * scanner.radius_mm * math.sin(math.radians(min_angle_degree) / 2))

    def mask(self, scanner: Scanner, hits: Hits, pairs: Pairs) -> np.ndarray:
        """Whether pairs are good, (pair,) bool."""
        a, b = hits.crystal[pairs.first], hits.crystal[pairs.second]
        good = scanner.transaxial_mm(a, b) >= self.min_transaxial_mm - 1e-9
        return good if self.max_axial_mm is None else good & (scanner.axial_mm(a, b) <= self.max_axial_mm + 1e-9)


def gate_policy(hits: Hits, scanner: Scanner, window: int, policy: str, good: Good | None = None) -> Pairs:
    """Coincidences by a policy of GATE's sorter: what becomes of a single that opens a window with several others.

    Multiples are the pairs of an opening single that has more than one. ``remove_multiples`` keeps good pairs that are
    none; ``take_all_goods`` all good ones; ``take_winner_of_goods`` of the good ones of an opening single that of the
    largest energy; ``take_if_only_one_good`` good ones that are the only good one; ``take_winner_if_is_good`` the one
    of the largest energy, if it is good; ``take_winner_if_all_are_goods`` that one, if all are good.

    Args:
        hits: Ordered by sample and step.
        scanner: For distances.
        window: Steps, at least 0.
        policy: One of `POLICIES`.
        good: Which pairs are good; None: all.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown; choose {', '.join(POLICIES)}")
    pairs = candidate_pairs(hits, window)
    is_good = (good or Good()).mask(scanner, hits, pairs)
    opening = pairs.first
    if policy == "take_all_goods":
        return pairs.where(is_good)
    if policy == "remove_multiples":
        return pairs.where(is_good & (np.bincount(opening, minlength=1)[opening] == 1))
    if policy == "take_if_only_one_good":
        goods = np.bincount(opening, weights=is_good, minlength=1)
        return pairs.where(is_good & (goods[opening] == 1))
    energy = hits.energy_kev[pairs.first] + hits.energy_kev[pairs.second]
    if policy == "take_winner_of_goods":
        kept = np.flatnonzero(is_good)
        return pairs.where(kept[_winners(opening[kept], energy[kept])])
    winner = _winners(opening, energy)
    keep = is_good[winner]
    if policy == "take_winner_if_all_are_goods":
        bad = np.bincount(opening, weights=~is_good, minlength=1)
        keep = bad[opening[winner]] == 0
    return pairs.where(winner[keep])


def _winners(opening: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Rows with the largest energy of every opening single, in their order; of equal ones the first."""
    order = np.lexsort((np.arange(len(opening)), -energy, opening))
    first = np.ones(len(order), dtype=bool)
    first[1:] = opening[order[1:]] != opening[order[:-1]]
    return np.sort(order[first])


def greedy_one_to_one(pairs: Pairs, scores: np.ndarray, num_hits: int) -> np.ndarray:
    """Pairs that remain if the best takes its two hits first, then the next best of what is left, and so on.

    In rounds: a pair that is the best of both of its hits is taken, and all others of these hits fall away.

    Args:
        pairs: Candidates.
        scores: (pair,); of equal ones the first wins.
        num_hits: Hits that they are pairs of.

    Returns:
        Rows of the pairs that remain, in their order.
    """
    order = np.lexsort((np.arange(len(scores)), -scores))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    left, taken = np.arange(len(scores)), []
    while len(left):
        a, b, r = pairs.first[left], pairs.second[left], rank[left]
        best = np.full(num_hits, len(scores), dtype=np.int64)
        np.minimum.at(best, a, r)
        np.minimum.at(best, b, r)
        wins = (best[a] == r) & (best[b] == r)
        taken.append(left[wins])
        used = np.zeros(num_hits, dtype=bool)
        used[a[wins]] = used[b[wins]] = True
        left = left[~(used[a] | used[b])]
    return np.sort(np.concatenate(taken)) if taken else left
