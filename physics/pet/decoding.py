"""From the output spikes of a network to a list of coincidences.

Spikes of crystals confirm hits, and confirmed hits become pairs; spikes of lines of response are pairs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from physics.pet.coincidences import candidate_pairs, greedy_one_to_one
from physics.pet.hits import Hits, Pairs
from physics.pet.matching import Spikes, match_spikes
from physics.pet.scanner import Scanner


def decode_pairs(
    hits: Hits, spikes: Spikes, scanner: Scanner, *, reach: int, window: int, min_angle_degree: float = 0.0
) -> tuple[Pairs, np.ndarray]:
    """Pairs of hits that output spikes stand for.

    A spike confirms the nearest hit of its crystal within ``reach`` steps, one each. Confirmed hits whose spikes are at
    most ``window`` steps apart are candidates; those nearest in time, and of these the ones that best face each other,
    take their hits first.

    Args:
        hits: What the network has seen, ordered by sample and step.
        spikes: Of its output.
        scanner: For angles.
        reach: Steps between a spike and its hit.
        window: Steps between two spikes of a pair.
        min_angle_degree: Least angle of a pair as seen from the axis; 0: the network alone decides.

    Returns:
        Pairs of rows of ``hits``, and for each the step that the network gives it.
    """
    matched, _ = match_spikes(spikes, Spikes(hits.sample, hits.crystal, hits.step), reach)
    rows = np.flatnonzero(matched >= 0)
    when = spikes.step[matched[rows]]
    order = np.lexsort((when, hits.sample[rows]))
    rows, when = rows[order], when[order]
    confirmed = replace(hits.rows(rows), step=when)
    pairs = candidate_pairs(confirmed, window)
    angle = scanner.angle_degree(confirmed.crystal[pairs.first], confirmed.crystal[pairs.second])
    keep = angle >= min_angle_degree
    pairs, angle = pairs.where(keep), angle[keep]
    gap = when[pairs.second] - when[pairs.first]
    best = pairs.where(greedy_one_to_one(pairs, angle / 360 - gap, len(rows)))
    a, b = rows[best.first], rows[best.second]
    return Pairs(np.minimum(a, b), np.maximum(a, b)), np.maximum(when[best.first], when[best.second])


def pairs_of_lines(
    hits: Hits, sample: np.ndarray, a: np.ndarray, b: np.ndarray, step_a: np.ndarray, step_b: np.ndarray
) -> Pairs:
    """Rows of the hits that spikes of lines of response stand for, in the order of the spikes.

    Args:
        hits: What the network has seen, ordered by sample and step.
        sample: Of every spike, (spike,).
        a: Crystal at one end of the line.
        b: At the other end.
        step_a: Time of its hit.
        step_b: Likewise.
    """
    low = int(hits.step.min(initial=0))
    span = int(hits.step.max(initial=0)) - low + 1

    def number(sample: np.ndarray, crystal: np.ndarray, step: np.ndarray) -> np.ndarray:
        return (sample * hits.num_crystals + crystal) * span + (step - low)

    keys = number(hits.sample, hits.crystal, hits.step)
    order = np.argsort(keys, kind="stable")
    rows = [
        order[np.searchsorted(keys, number(sample, crystal, step), sorter=order)]
        for crystal, step in ((a, step_a), (b, step_b))
    ]
    return Pairs(np.minimum(*rows), np.maximum(*rows))
