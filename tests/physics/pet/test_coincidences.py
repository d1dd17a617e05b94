"""Classical sorters against loops that follow their definitions word by word."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from physics.pet.coincidences import (
    POLICIES,
    Good,
    candidate_pairs,
    expected_single_window_pairs,
    gate_policy,
    greedy_one_to_one,
    single_window,
)
from physics.pet.hits import Hits, Pairs, concatenate, true_pairs
from physics.pet.scanner import make_scanner
from physics.pet.toy import Toy, draw_delays, simulate_toy

SCANNER = make_scanner("toy24")


def hits_at(sample, crystal, step, energy=None, decay=None):
    n = len(sample)
    return Hits(
        sample=np.array(sample), crystal=np.array(crystal), step=np.array(step),
        decay=np.arange(n) if decay is None else np.array(decay), true_step=np.array(step),
        energy_kev=np.full(n, 511.0) if energy is None else np.array(energy, float),
        scattered=np.zeros(n, bool), num_samples=max(sample) + 1, num_crystals=24, num_steps=1000,
    )  # fmt: skip


def random_hits(seed, count=400, samples=6, steps=60):
    rng = np.random.default_rng(seed)
    hits = hits_at(
        rng.integers(samples, size=count), rng.integers(24, size=count), rng.integers(steps, size=count),
        rng.uniform(400, 600, count),
    )  # fmt: skip
    return hits.sorted()


def chain_by_loop(hits, window):
    """The single window as a person writes it down."""
    found, group = [], []
    for i in range(len(hits)):
        if group and (hits.sample[i] != hits.sample[group[-1]] or hits.step[i] - hits.step[group[-1]] > window):
            if len(group) == 2:
                found.append(tuple(group))
            group = []
        group.append(i)
    if len(group) == 2:
        found.append(tuple(group))
    return found


def policy_by_loop(hits, window, policy, good):
    """GATE's policies as a person writes them down."""
    found = []
    for i in range(len(hits)):
        mine = [
            j for j in range(i + 1, len(hits))
            if hits.sample[j] == hits.sample[i] and hits.step[j] - hits.step[i] <= window
            and hits.crystal[i] != hits.crystal[j]
        ]  # fmt: skip
        if not mine:
            continue
        energy = {j: hits.energy_kev[i] + hits.energy_kev[j] for j in mine}
        goods = [j for j in mine if good(i, j)]
        winner = max(mine, key=energy.get)
        if policy == "take_all_goods":
            kept = goods
        elif policy == "remove_multiples":
            kept = goods if len(mine) == 1 else []
        elif policy == "take_if_only_one_good":
            kept = goods if len(goods) == 1 else []
        elif policy == "take_winner_of_goods":
            kept = [max(goods, key=energy.get)] if goods else []
        elif policy == "take_winner_if_is_good":
            kept = [winner] if winner in goods else []
        else:
            kept = [winner] if goods == mine else []
        found += [(i, j) for j in kept]
    return found


def as_tuples(pairs):
    return list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))


@pytest.mark.parametrize("window", [0, 1, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 40, 400])
def test_single_window_is_the_chain(window, count):
    hits = random_hits(count, max(count, 1)).rows(np.arange(count))
    assert as_tuples(single_window(hits, window)) == chain_by_loop(hits, window)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [0, 2])
def test_policies(policy, window):
    hits = random_hits(7)
    least = Good.by_angle(SCANNER, 120)

    def good(i, j):
        return SCANNER.angle_degree(hits.crystal[i], hits.crystal[j]) >= 120

    expected = policy_by_loop(hits, window, policy, good)
    assert len(expected) > 5
    assert as_tuples(gate_policy(hits, SCANNER, window, policy, least)) == expected


def test_axial_limit_of_good_pairs():
    scanner = make_scanner("safir2880")
    hits = replace(hits_at([0, 0, 0], [0, 90, 90 + 15 * 180], [0, 0, 0]), num_crystals=2880)
    found = gate_policy(hits, scanner, 0, "take_all_goods", Good(100.0, 10.0))
    assert as_tuples(found) == [(0, 1)]


def test_single_window_of_a_poisson_stream():
    rng = np.random.default_rng(0)
    n, rate, window = 400_000, 0.01, 8  # a window of w whole steps holds gaps below w + 1
    step = np.floor(np.cumsum(rng.exponential(1 / rate, n))).astype(np.int64)
    zero = np.zeros(n, np.int64)
    hits = Hits(zero, zero, step, np.arange(n), step, np.ones(n), zero > 0, 1, 24, int(step[-1]) + 1)
    found = len(single_window(hits, window).first)
    # Differences of floors: a gap counts if it is below w, or w to w + 1 with the probability of the rest.
    late = 1 - (np.exp(-rate * window) - np.exp(-rate * (window + 1))) / rate  # P(difference of floors <= w)
    exact = n * (1 - late) ** 2 * late
    assert found == pytest.approx(exact, rel=0.01)
    assert expected_single_window_pairs(n, rate, window + 0.5) == pytest.approx(exact, rel=0.002)


def test_samples_are_apart():
    hits = hits_at([0, 1], [0, 12], [999, 0])
    assert not len(single_window(hits, 50).first) and not len(candidate_pairs(hits, 999).first)


def test_times_without_delays_may_lie_outside_of_the_sample():
    hits = hits_at([0, 0, 1, 1], [0, 12, 3, 15], [998, 999, 0, 1]).shifted(np.full(24, 30))
    assert as_tuples(candidate_pairs(hits, 1)) == [(0, 1), (2, 3)]
    early = hits.shifted(np.full(24, -60))
    assert as_tuples(candidate_pairs(early, 1)) == [(0, 1), (2, 3)]


def test_greedy_takes_the_best_first():
    rng = np.random.default_rng(3)
    first, second = rng.integers(30, size=(2, 200))
    keep = first != second
    pairs, scores = Pairs(first[keep], second[keep]), rng.integers(50, size=keep.sum()).astype(float)  # with ties
    used, expected = set(), []
    for k in sorted(range(len(scores)), key=lambda k: (-scores[k], k)):
        if not used & {pairs.first[k], pairs.second[k]}:
            expected.append(k)
            used |= {pairs.first[k], pairs.second[k]}
    assert greedy_one_to_one(pairs, scores, 30).tolist() == sorted(expected)
    assert not len(greedy_one_to_one(Pairs(first[:0], second[:0]), scores[:0], 30))


def test_toy_is_seeded_and_true_pairs_are_its_decays():
    delays = draw_delays(24, 8, 0.5, 0)
    toy = Toy(num_steps=100, rate=2.0, efficiency=0.5, delay_trials=8)
    one, two, other = (simulate_toy(SCANNER, toy, 300, delays, seed).check() for seed in (1, 1, 2))
    assert all((getattr(one, c) == getattr(two, c)).all() for c in Hits.columns())
    assert len(one) != len(other) or (one.crystal != other.crystal).any()
    pairs = true_pairs(one)
    expected = sorted((i, j) for i in range(len(one)) for j in range(i + 1, min(i + 40, len(one)))
                      if one.decay[i] == one.decay[j])  # fmt: skip
    assert sorted(as_tuples(pairs)) == expected and len(expected) > 100
    assert (SCANNER.steps_apart(one.crystal[pairs.first], one.crystal[pairs.second]) >= 10).all()
    assert (one.step == one.true_step - delays[one.crystal]).all()


def test_the_mirrored_toy_is_no_antipode():
    toy = Toy(num_steps=100, rate=5.0, efficiency=1.0, spread=0, delay_trials=0, mirrored=True)
    hits = simulate_toy(SCANNER, toy, 200, np.zeros(24, int), 0)
    a, b = (SCANNER.position(hits.crystal[rows]) for rows in true_pairs(hits))
    assert ((a + b) % 24 == 0).all()


def test_concatenated_samples_keep_their_decays_apart():
    part = simulate_toy(SCANNER, Toy(num_steps=100), 50, np.zeros(24, int), 0)
    both = concatenate([part, part])
    assert both.num_samples == 100 and len(true_pairs(both).first) == 2 * len(true_pairs(part).first)
    again = both.samples(50, 100)
    assert (again.crystal == part.crystal).all() and (again.step == part.step).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"crystal": [24]}, "crystal 24"), ({"step": [1000]}, "step 1000"), ({"step": [-1]}, "step -1")],
)
def test_hits_outside_of_their_range(change, words):
    hits = replace(hits_at([0], [0], [0]), **{k: np.array(v) for k, v in change.items()})
    with pytest.raises(ValueError, match=words):
        hits.check()


def test_wrong_settings():
    hits = random_hits(0)
    with pytest.raises(ValueError, match="window=-1"):
        single_window(hits, -1)
    with pytest.raises(ValueError, match="choose remove_multiples"):
        gate_policy(hits, SCANNER, 0, "nope")
    with pytest.raises(ValueError, match="delays"):
        hits.shifted(np.zeros(3))
    with pytest.raises(ValueError, match="order"):
        replace(hits, sample=hits.sample[::-1].copy()).check()
    with pytest.raises(ValueError, match="num_steps=10"):
        Toy(num_steps=10, delay_trials=20)


def test_order_of_hits_is_that_of_time():
    hits = random_hits(5)
    assert all(a <= b for a, b in pairwise((hits.sample * 1000 + hits.step).tolist()))
