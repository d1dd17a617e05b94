"""Metrics on cases that can be counted by hand, and the assignment against all assignments."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from physics.pet.hits import Pairs
from physics.pet.matching import (
    Labels,
    LegacyCounts,
    Spikes,
    count_pairs,
    count_spikes,
    legacy_counts,
    match_spikes,
    pair_f1,
    precision_recall_f1,
)
from tests.physics.pet.test_coincidences import hits_at


def spikes(*rows):
    return Spikes(*(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)))


def labels(*rows):
    return Labels(*(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)))


ONE = labels((0, 3, 15, 40))


def test_perfect():
    counts = count_spikes(spikes((0, 3, 40), (0, 15, 40)), ONE, 0)
    assert counts == (2, 2, 2, 0, 1, 0.0, 1) and pair_f1(counts) == (1, 1, 1)


def test_one_hit_missing():
    counts = count_spikes(spikes((0, 3, 40)), ONE, 0)
    assert (counts.matched, counts.pair_correct, counts.pair_spurious) == (1, 0, 0)
    assert pair_f1(counts) == (0, 0, 0)


def test_extra_hit():
    counts = count_spikes(spikes((0, 3, 40), (0, 15, 40), (0, 7, 40)), ONE, 0)
    precision, recall, f1 = pair_f1(counts)
    assert (precision, recall) == (1 / 1.5, 1) and f1 == pytest.approx(0.8)


def test_right_crystals_at_a_wrong_time():
    late = spikes((0, 3, 46), (0, 15, 43))
    assert pair_f1(count_spikes(late, ONE, 0)) == (0, 0, 0)
    counts = count_spikes(late, ONE, 10)
    assert pair_f1(counts) == (1, 1, 1) and counts.time_error == 9


def test_two_coincidences_share_a_crystal():
    both = labels((0, 3, 15, 40), (0, 3, 16, 44))
    counts = count_spikes(spikes((0, 3, 41), (0, 3, 45), (0, 15, 40), (0, 16, 44)), both, 3)
    assert (counts.matched, counts.pair_correct, counts.time_error) == (4, 2, 2)
    # One spike for both labels of the crystal: only one of them is a pair, and nothing is spurious.
    counts = count_spikes(spikes((0, 3, 41), (0, 15, 40), (0, 16, 44)), both, 3)
    assert (counts.matched, counts.pair_correct, counts.pair_spurious) == (3, 1, 0)


def test_samples_do_not_mix():
    assert count_spikes(spikes((1, 3, 40), (1, 15, 40)), ONE, 100).matched == 0


def test_nothing_at_all():
    none = Spikes(*(np.empty(0, np.int64) for _ in range(3)))
    assert pair_f1(count_spikes(none, ONE, 0)) == (0, 0, 0)
    no_labels = Labels(*(np.empty(0, np.int64) for _ in range(4)))
    assert count_spikes(none, no_labels, 0).pairs == 0
    assert count_spikes(spikes((0, 1, 2)), no_labels, 0).pair_spurious == 0.5


def best_assignment(times, targets, tolerance):
    """Most matches, then the smallest sum, over all assignments."""
    best = (0, 0)
    slots = [*range(len(times)), *([None] * len(targets))]
    for order in set(permutations(slots, len(targets))):
        away = [abs(times[i] - t) for i, t in zip(order, targets, strict=True) if i is not None]
        if all(a <= tolerance for a in away):
            best = min(best, (-len(away), sum(away)))
    return -best[0], best[1]


@pytest.mark.parametrize("seed", range(30))
def test_assignment_is_optimal(seed):
    rng = np.random.default_rng(seed)
    times, targets = rng.integers(20, size=rng.integers(1, 5)), rng.integers(20, size=rng.integers(1, 4))
    zero = np.zeros_like
    matched, used = match_spikes(
        Spikes(zero(times), zero(times), times), Spikes(zero(targets), zero(targets), targets), 4
    )
    found = matched >= 0
    away = np.abs(times[matched[found]] - targets[found])
    assert (int(found.sum()), int(away.sum())) == best_assignment(times.tolist(), targets.tolist(), 4)
    assert used.sum() == found.sum() == len(set(matched[found].tolist()))


def test_lists_of_pairs():
    hits = hits_at([0] * 6, [0, 12, 1, 13, 2, 14], [0] * 6, decay=[0, 0, 1, 1, 2, -1])
    hits.scattered[2] = True
    counts = count_pairs(hits, Pairs(np.array([0, 2, 0, 4]), np.array([1, 3, 3, 5])), 2)
    assert counts == (4, 2, 2, 2, 1, 3)
    assert precision_recall_f1(counts.correct, counts.pairs, counts.true) == (0.5, 1.0, pytest.approx(2 / 3))


def test_two_hits_without_a_decay_are_no_coincidence():
    hits = hits_at([0, 0], [0, 12], [5, 5], decay=[-1, -1])
    assert count_pairs(hits, Pairs(np.array([0]), np.array([1])), 0).correct == 0


# --------------------------------------------------------------------------------------------- the reference's metric


def targets_of(given):
    return Spikes(np.tile(given.sample, 2), np.concatenate([given.a, given.b]), np.tile(given.step, 2))


def test_legacy_ignores_time():
    anywhere = spikes((0, 3, 0), (0, 15, 99))
    assert legacy_counts(anywhere, targets_of(ONE)) == (1, 0, 0)
    assert pair_f1(count_spikes(anywhere, ONE, 10))[2] == 0


def test_legacy_mixes_pairs_with_hits():
    counts = legacy_counts(spikes((0, 3, 40), (0, 15, 40), (0, 7, 1), (0, 8, 1), (0, 9, 1)), targets_of(ONE))
    assert counts == (1, 3, 0)
    assert counts.scores()[0] == 0.25  # three false hits count like three false pairs: ours gives 1 / 2.5
    missing = legacy_counts(spikes((0, 3, 40)), targets_of(ONE))
    assert missing == (0, 1, 1)


def test_the_stored_version_takes_false_positives_for_negatives():
    precision, recall, f1 = LegacyCounts(6, 2, 5).scores(stored=True)
    assert precision == recall == pytest.approx(f1) == 0.75
    assert LegacyCounts(6, 2, 5).scores()[1] == pytest.approx(6 / 11)


def test_legacy_pairs_wrongly_where_two_coincidences_share_a_step():
    both = labels((0, 1, 13, 40), (0, 2, 14, 40))
    only_first = spikes((0, 1, 40), (0, 13, 40))
    # By time and crystal the targets are 1, 2, 13, 14: pairs (1, 2) and (13, 14), neither of which is complete.
    assert legacy_counts(only_first, targets_of(both)) == (0, 2, 2)
    assert count_spikes(only_first, both, 0).pair_correct == 1
