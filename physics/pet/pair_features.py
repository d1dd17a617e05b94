"""Candidates for coincidences with what can be known about each: features of pairs of hits, neighbours included."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from physics.pet.coincidences import candidate_pairs
from physics.pet.hits import Hits, Pairs
from physics.pet.scanner import Scanner

FEATURES = (
    "gap", "angle", "rings_apart", "mid_height", "energy_a", "energy_b", "energy_low", "rivals_a", "rivals_b",
    "rival_angle_a", "rival_angle_b", "rival_gap_a", "rival_gap_b", "rival_rings_a", "rival_rings_b",
    "rival_energy_a", "rival_energy_b", "rival_score_a", "rival_score_b",
)  # fmt: skip
"""Names of the features. Those of a rival are of the hit's most likely other partner: the one nearest to facing it."""


class Candidates(NamedTuple):
    """Pairs of hits with their features (pair, feature), float32."""

    pairs: Pairs
    features: np.ndarray


def pair_candidates(hits: Hits, scanner: Scanner, window: int, min_angle_degree: float) -> Candidates:
    """All pairs within a window whose crystals are far enough apart, with `FEATURES`.

    Args:
        hits: Ordered by sample and step, delays taken off.
        scanner: Its geometry.
        window: Steps.
        min_angle_degree: Least angle between the crystals as seen from the axis.
    """
    pairs = candidate_pairs(hits, window)
    angle = scanner.angle_degree(hits.crystal[pairs.first], hits.crystal[pairs.second])
    keep = angle >= min_angle_degree
    pairs, angle = pairs.where(keep), angle[keep]
    a, b = pairs
    gap = (hits.step[b] - hits.step[a]).astype(float)
    ring_a, ring_b = scanner.ring(hits.crystal[a]), scanner.ring(hits.crystal[b])
    rings = np.abs(ring_a - ring_b).astype(float)
    energy_a, energy_b = hits.energy_kev[a] / 511.0, hits.energy_kev[b] / 511.0
    # How well a pair fits, roughly: what its hits' rivals are ranked by.
    fit = angle / 180 - 0.5 * gap - 0.02 * rings
    count = np.bincount(a, minlength=len(hits)) + np.bincount(b, minlength=len(hits))
    rival_a, rival_b = best_rivals(pairs, fit, len(hits))
    columns = [
        gap, angle / 180, rings, np.abs(ring_a + ring_b - scanner.num_rings + 1) / 2, energy_a, energy_b,
        np.minimum(energy_a, energy_b), count[a] - 1.0, count[b] - 1.0,
    ]  # fmt: skip
    of_rivals = (
        (angle / 180, 0.0), (gap, float(window + 1)), (rings, float(scanner.num_rings)),
        (np.minimum(energy_a, energy_b), 0.0), (fit, -1.0),
    )  # fmt: skip
    for values, without in of_rivals:
        for rival in (rival_a, rival_b):
            columns.append(np.where(rival >= 0, values[rival], without) if len(values) else values)
    return Candidates(pairs, np.stack(columns, -1).astype(np.float32))


def best_rivals(pairs: Pairs, scores: np.ndarray, num_hits: int) -> tuple[np.ndarray, np.ndarray]:
    """For both hits of every pair the row of the best other pair with that hit, -1 without one."""
    count = len(scores)
    ends = np.concatenate([pairs.first, pairs.second])
    rows = np.tile(np.arange(count), 2)
    order = np.lexsort((-scores[rows], ends))
    sorted_ends = ends[order]
    first = np.searchsorted(sorted_ends, np.arange(num_hits))
    total = np.bincount(ends, minlength=num_hits)

    def rival(hit: np.ndarray) -> np.ndarray:
        if not count:
            return np.empty(0, dtype=np.int64)
        best = rows[order[first[hit]]]
        second = rows[order[np.minimum(first[hit] + 1, len(order) - 1)]]
        own = np.arange(count)
        return np.where(best != own, best, np.where(total[hit] > 1, second, -1))

    return rival(pairs.first), rival(pairs.second)
