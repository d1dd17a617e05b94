"""Candidates, their rivals, and coincidences decoded from spikes."""

from __future__ import annotations

import numpy as np

from physics.pet.decoding import decode_pairs, pairs_of_lines
from physics.pet.hits import Pairs
from physics.pet.matching import Spikes
from physics.pet.pair_features import FEATURES, best_rivals, pair_candidates
from physics.pet.scanner import make_scanner
from tests.physics.pet.test_coincidences import hits_at, random_hits

SCANNER = make_scanner("toy24")


def test_rivals_are_the_best_other_pairs():
    rng = np.random.default_rng(0)
    first, second = rng.integers(15, size=60), 15 + rng.integers(15, size=60)
    scores = rng.permutation(60).astype(float)
    for side, found in zip((first, second), best_rivals(Pairs(first, second), scores, 30), strict=True):
        for k in range(60):
            others = [i for i in range(60) if i != k and side[k] in (first[i], second[i])]
            assert found[k] == (max(others, key=lambda i: scores[i]) if others else -1)


def test_features_of_a_pair_by_hand():
    hits = hits_at([0, 0, 0], [0, 12, 9], [5, 5, 6], energy=[511, 450, 480])
    pairs, features = pair_candidates(hits, SCANNER, 2, 90.0)
    assert list(zip(*(p.tolist() for p in pairs), strict=True)) == [(0, 1), (0, 2)]
    row = dict(zip(FEATURES, features[0].tolist(), strict=True))
    assert row["gap"] == 0 and row["angle"] == 1 and row["rivals_a"] == 1 and row["rivals_b"] == 0
    assert row["rival_angle_a"] == np.float32(135 / 180) and row["rival_gap_a"] == 1 and row["rival_gap_b"] == 3
    assert row["energy_low"] == np.float32(450 / 511)
    empty = pair_candidates(random_hits(0).rows(np.arange(1)), SCANNER, 2, 90.0)
    assert empty.features.shape == (0, len(FEATURES))


def test_spikes_confirm_hits_and_hits_become_pairs():
    hits = hits_at([0, 0, 0, 1], [0, 12, 5, 3], [10, 12, 11, 10])
    spikes = Spikes(np.array([0, 0, 1]), np.array([0, 12, 3]), np.array([13, 13, 10]))
    pairs, step = decode_pairs(hits, spikes, SCANNER, reach=3, window=0)
    assert (pairs.first.tolist(), pairs.second.tolist(), step.tolist()) == ([0], [1], [13])
    assert not len(decode_pairs(hits, spikes, SCANNER, reach=2, window=0)[1])  # the spike in crystal 0 is too late
    none = Spikes(*(np.empty(0, np.int64) for _ in range(3)))
    assert not len(decode_pairs(hits, none, SCANNER, reach=3, window=0)[1])


def test_of_three_confirmed_hits_those_that_face_each_other_are_paired():
    hits = hits_at([0, 0, 0], [0, 6, 12], [10, 10, 10])
    spikes = Spikes(np.zeros(3, int), np.array([0, 6, 12]), np.full(3, 10))
    pairs, _ = decode_pairs(hits, spikes, SCANNER, reach=0, window=1)
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0], [2])


def test_spikes_of_lines_are_pairs_of_hits():
    hits = hits_at([0, 0, 0, 1, 1], [0, 0, 12, 12, 0], [4, 10, 11, 10, 10])
    sample, a, b = np.array([1, 0]), np.array([0, 0]), np.array([12, 12])
    pairs = pairs_of_lines(hits, sample, a, b, np.array([10, 10]), np.array([10, 11]))
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([3, 1], [4, 2])
    none = pairs_of_lines(hits, *np.empty((5, 0), dtype=np.int64))
    assert not len(none.first)
