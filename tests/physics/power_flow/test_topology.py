"""Cuts of random multigraphs against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from physics.power_flow.topology import components, cuts


def lost(n, f, t, sources, on, out) -> int:
    """Buses that no branch connects to a source when some are out."""
    kept = on.copy()
    kept[list(out)] = False
    part = components(n, f[kept], t[kept])
    return int((~np.isin(part, part[sources])).sum())


@pytest.mark.parametrize("seed", range(30))
def test_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    while True:
        n = int(rng.integers(2, 14))
        count = int(rng.integers(n - 1, 2 * n + 2))
        f, t = rng.integers(0, n, (2, count))  # with parallel branches and loops
        sources, on = np.unique(rng.integers(0, n, rng.integers(1, 3))), rng.random(count) < 0.9
        if not lost(n, f, t, sources, on, []):
            break
    found = cuts(n, f, t, sources, on)
    alone = np.where(found.bridge, found.size, 0)
    assert alone.tolist() == [lost(n, f, t, sources, on, [branch]) for branch in range(count)]
    pairs = np.array(list(combinations(range(count), 2)))
    assert found.cut_off(pairs[:, 0], pairs[:, 1]).tolist() == [lost(n, f, t, sources, on, pair) for pair in pairs]


def test_components():
    assert components(5, np.array([0, 3]), np.array([1, 4])).tolist() == [0, 0, 1, 2, 2]
