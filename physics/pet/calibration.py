"""Delays of crystals from data without labels: differences of hits that are likely to be coincidences (section 2.7)."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import cg

from physics.pet.hits import Hits
from physics.pet.scanner import Scanner


def consecutive_pairs(
    hits: Hits, scanner: Scanner, max_gap: int, spread: int, max_rings: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Consecutive hits of crystals that face each other: crystals a and b, and steps from a to b.

    Args:
        hits: Ordered by sample and step.
        scanner: Its geometry.
        max_gap: Largest difference, steps.
        spread: Most crystals between b and the opposite of a along the ring.
        max_rings: Most rings between them; None: any.
    """
    gap = np.diff(hits.step)
    a, b = hits.crystal[:-1], hits.crystal[1:]
    near = (np.diff(hits.sample) == 0) & (gap <= max_gap)
    near &= scanner.steps_apart(a, b) >= scanner.crystals_per_ring // 2 - spread
    if max_rings is not None:
        near &= np.abs(scanner.ring(a) - scanner.ring(b)) <= max_rings
    return a[near], b[near], gap[near]


def estimate_delays(
    hits: Hits,
    scanner: Scanner,
    *,
    median_delay: float,
    max_gap: int = 20,
    spread: int = 2,
    max_rings: int | None = None,
    reweightings: int = 20,
    scale: float = 1.0,
) -> np.ndarray:
    """Delay of every crystal in steps by robust least squares.

    Two photons of a decay at t are recorded at ``t - d_a`` and ``t - d_b``: ``t_a - t_b = -(d_a - d_b)`` for true
    pairs, and anything for accidental ones, whose weight ``1 / (1 + (r / scale)^2)`` (Cauchy) falls from one
    reweighting to the next; the scale itself shrinks to ``scale`` from the spread of the data. Differences say nothing
    about a delay that all crystals share: the median is given.

    Args:
        hits: Ordered by sample and step.
        scanner: Its geometry.
        median_delay: Median of the delays of all crystals, steps.
        max_gap: Largest difference of two hits that are taken for a pair, steps.
        spread: How far the crystals of a pair may be from facing each other.
        max_rings: Most rings between them; None: any.
        reweightings: Solutions of the weighted equations, one after the other.
        scale: Residual of half weight at the end, steps.

    Returns:
        (crystal,) float64; crystals without any pair have the median.

    Raises:
        ValueError: If there is no pair at all.
    """
    a, b, gap = consecutive_pairs(hits, scanner, max_gap, spread, max_rings)
    if not len(a):
        raise ValueError("no pair of hits is fit for a calibration of the delays: more samples, or a wider spread")
    n, pairs = scanner.num_crystals, len(a)
    rows = np.arange(pairs)
    design = sparse.csr_matrix(
        (np.concatenate([np.ones(pairs), -np.ones(pairs)]), (np.tile(rows, 2), np.concatenate([a, b]))), (pairs, n)
    )
    # gap = t_b - t_a = d_a - d_b
    delays = np.zeros(n)
    weights = np.ones(pairs)
    small = sparse.identity(n) * 1e-6  # decides what the data leave open: the common delay, crystals without pairs
    width = max(scale, float(np.std(gap)))
    for _ in range(reweightings):
        weighted = design.multiply(weights[:, None]).tocsr()
        normal = (weighted.T @ design + small).tocsr()
        # A Laplacian of the graph of pairs, sparse and nearly solved by the delays before.
        scale_by = sparse.diags(1 / normal.diagonal())
        delays, _ = cg(normal, weighted.T @ gap, x0=delays, rtol=1e-8, maxiter=500, M=scale_by)
        residual = gap - design @ delays
        width = max(scale, 0.7 * width)
        weights = 1 / (1 + (residual / width) ** 2)
    known = np.bincount(np.concatenate([a, b]), minlength=n) > 0
    delays += median_delay - np.median(delays[known])
    delays[~known] = median_delay
    return delays
