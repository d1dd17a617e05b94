"""Which rank evaluates which samples, as pure functions of sizes."""

import subprocess
import sys
from itertools import pairwise

import pytest

from parallel.sample_layout import (
    SampleShare,
    check_num_samples,
    check_sample_parallel_size,
    mesh,
    share_of,
    view_streams,
)
from tests.composing import ROOT


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (12, 5), (10, 4), (16, 16), (7, 3), (64, 12)])
def test_every_sample_has_one_rank_and_shares_differ_by_at_most_one(samples, size):
    shares = [SampleShare(size, j).ids(samples) for j in range(size)]
    assert [s for share in shares for s in share] == list(range(samples))
    assert all(s * size // samples == j for j, share in enumerate(shares) for s in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and min(map(len, shares)) >= 1
    # Means of ranks, weighted, average to the mean over all samples.
    weights = [SampleShare(size, j).weight(samples) for j in range(size)]
    assert sum(weights) == pytest.approx(size, abs=1e-12)
    values = [3.0 * s**2 for s in range(samples)]
    means = [w * sum(values[s] for s in share) / len(share) for w, share in zip(weights, shares, strict=True)]
    assert sum(means) / size == pytest.approx(sum(values) / samples, rel=1e-12)


def test_alone_a_process_has_all_samples():
    share = SampleShare()
    assert share.ids(3) == range(3) and share.weight(3) == 1.0


def test_ranks_of_a_group_are_neighbours():
    assert [mesh(rank, 6, 3) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [mesh(rank, 4, 1).data for rank in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("size", "world", "text"),
    [
        (3, 4, r"strategy\.sample_parallel_size=3 does not divide .* = 4 processes; use one of 1, 2, 4$"),
        (8, 4, r"strategy\.sample_parallel_size=8 does not divide"),
        (0, 4, r"strategy\.sample_parallel_size=0: it counts"),
    ],
)
def test_groups_must_fill_the_world(size, world, text):
    with pytest.raises(ValueError, match=text):
        check_sample_parallel_size(size, world)
    with pytest.raises(ValueError, match=text):
        mesh(0, world, size)


@pytest.mark.parametrize(
    ("samples", "size", "antithetic", "text"),
    [
        (0, 1, False, r"model\.num_samples=0: at least 1"),
        (2, 4, False, r"model\.num_samples=2 leaves 2 of strategy\.sample_parallel_size=4 ranks .*size=2 .*=4 or more"),
        (3, 4, False, r"leaves 1 of .* use strategy\.sample_parallel_size=2 and share the data"),
        (7, 1, True, r"model\.num_samples=7: antithetic samples come in pairs"),
        (6, 2, True, r"model\.num_samples=6: an antithetic pair would be split .* a multiple of 4, for instance 8$"),
        (12, 5, True, r"a multiple of 10, for instance 20$"),
    ],
)
def test_samples_must_reach_every_rank_in_whole_pairs(samples, size, antithetic, text):
    with pytest.raises(ValueError, match=text):
        check_num_samples(samples, size, antithetic=antithetic)


def test_other_keys_are_named_and_sound_numbers_pass():
    with pytest.raises(ValueError, match=r"^model\.num_eval_samples=1 leaves"):
        check_num_samples(1, 2, "model.num_eval_samples")
    check_num_samples(8, 2, antithetic=True)
    check_num_samples(6, 3, antithetic=True)
    check_num_samples(5, 5)
    with pytest.raises(ValueError, match="leaves 1 of"):
        SampleShare(2, 0).ids(1)


def everybody(scope, samples, size):
    return [g for j in range(size) for g in view_streams(scope, samples, SampleShare(size, j))]


def test_views_of_samples():
    assert everybody("shared", 6, 3) == [0] * 6
    assert everybody("rank", 6, 3) == [0, 0, 1, 1, 2, 2]
    assert everybody("sample", 6, 3) == list(range(6))
    for views in (1, 2, 3, 4, 6):  # a number of views does not depend on the ranks
        found = [everybody(views, 6, size) for size in (1, 2, 3, 4)]
        assert found == [found[0]] * 4 and set(found[0]) == set(range(views))
    assert everybody("rank", 6, 2) == everybody(2, 6, 1)


@pytest.mark.parametrize("scope", ["ranks", 0, 7, True, 2.0])
def test_impossible_views(scope):
    with pytest.raises(ValueError, match=r"model\.augment_scope=.*choose shared, rank, sample, or a number .* to .*=6"):
        view_streams(scope, 6, SampleShare())


def test_shares_are_ranges_of_global_numbers():
    assert [share_of(12, 5, j) for j in range(5)] == [range(a, b) for a, b in pairwise([0, 3, 5, 8, 10, 12])]


def test_configurations_are_checked_without_torch():
    code = "import parallel.sample_layout, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
