"""PETNet's acceptance list at high activity: learned algorithms, a spiking one among them, against classical sorters.

A SAFIR-like insert at 300 MBq by Monte Carlo; training, validation and test have seeds of their own. Numbers in
comments were measured here.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.measure import single_thread
from networks.competing_lines import CompetingLines
from networks.event_driven import EventDrivenCompetition
from networks.petnet import PairNetwork
from networks.spiking import Events
from physics.pet.coincidences import POLICIES, Good, candidate_pairs, gate_policy, greedy_one_to_one, single_window
from physics.pet.decoding import pairs_of_lines
from physics.pet.hits import Hits, Pairs, true_pairs
from physics.pet.matching import count_pairs, precision_recall_f1
from physics.pet.monte_carlo import Acquisition, cut, simulate
from physics.pet.pair_features import pair_candidates
from physics.pet.scanner import PRESETS
from physics.pet.toy import draw_delays

SCANNER = PRESETS["safir2880"]
WINDOWS = (0, 1, 2)
TUNED = (0, 70, 110, 130, 140, 150, 152, 155, 160)
"""Least angles that sorters get to choose from."""
WIDE = (0, 70)
"""Those of the acceptance list: "best GATE policy (w = 1, at least 70 degrees)"."""


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


@functools.cache
def safir(milliseconds: float, seed: int) -> Hits:
    delays = draw_delays(2880, 20, 0.5, 0)
    stream = simulate(SCANNER, Acquisition(3e8), milliseconds * 1e6, delays, seed)
    return cut(stream, SCANNER, 2000).hits.shifted(delays)


TRAIN, TEST, VALIDATION = (120.0, 1), (8.0, 2), (4.0, 3)


def f1_of(hits: Hits, pairs: Pairs) -> float:
    counts = count_pairs(hits, pairs, len(true_pairs(hits).first))
    return precision_recall_f1(counts.correct, counts.pairs, counts.true)[2]


def same_decay(hits: Hits, pairs: Pairs) -> np.ndarray:
    return hits.decay[pairs.first] == hits.decay[pairs.second]


def best_threshold(hits: Hits, pairs: Pairs, scores: np.ndarray) -> float:
    """The score above which pairs, the best of which take their hits first, have the largest F1."""
    kept = greedy_one_to_one(pairs, scores, len(hits))
    kept = kept[np.argsort(-scores[kept])]
    correct = np.cumsum(same_decay(hits, pairs.where(kept)))
    f1 = 2 * correct / (np.arange(1, len(kept) + 1) + len(true_pairs(hits).first))
    return float(scores[kept[f1.argmax()]]) - 1e-9


# ----------------------------------------------------------------------------------------------------------- sorters


@functools.cache
def sorters(angles: tuple[float, ...]) -> tuple[float, float]:
    """F1 of the calibrated single window and of GATE's best policy, with windows and angles best for the test data."""
    test = safir(*TEST)

    def best(find):
        tried = ((w, Good.by_angle(SCANNER, angle)) for w in WINDOWS for angle in angles)
        return max(f1_of(test, find(window, good)) for window, good in tried)

    window = best(lambda w, good: (p := single_window(test, w)).where(good.mask(SCANNER, test, p)))
    return window, max(best(lambda w, good, p=p: gate_policy(test, SCANNER, w, p, good)) for p in POLICIES)


# ------------------------------------------------------------------------------------------------------- pair scorer


@functools.cache
def scorer_f1() -> float:
    """F1 of learned scores of pairs on unseen hits."""
    train, test = safir(*TRAIN), safir(*TEST)
    torch.manual_seed(0)
    net = PairNetwork()
    threshold = fit_pairs(net, train)
    pairs, scores = scored(net, test)
    kept = greedy_one_to_one(pairs, scores, len(test))
    return f1_of(test, pairs.where(kept[scores[kept] > threshold]))


def scored(net: PairNetwork, hits: Hits) -> tuple[Pairs, np.ndarray]:
    pairs, features = pair_candidates(hits, SCANNER, 2, 90.0)
    with torch.no_grad():
        logits = net(torch.from_numpy(features), *(torch.from_numpy(rows) for rows in pairs))[-1]
    return pairs, logits.double().numpy()


def fit_pairs(net: PairNetwork, train: Hits, epochs: int = 6) -> float:
    """Train on batches of samples, and return the threshold chosen on other hits."""
    pairs, features = pair_candidates(train, SCANNER, 2, 90.0)
    x, y = torch.from_numpy(features), torch.from_numpy(same_decay(train, pairs).astype(np.float32))
    net.fit_scale(x)
    sample = train.sample[pairs.first]
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    bounds = np.searchsorted(sample, np.arange(0, train.num_samples + 50, 50))
    for _ in range(epochs):
        for k in torch.randperm(len(bounds) - 1).tolist():
            rows = slice(bounds[k], bounds[k + 1])
            first, second = (torch.from_numpy(r[rows]) for r in pairs)
            if not len(first):
                continue
            low = int(torch.minimum(first.min(), second.min()))
            logits = net(x[rows], first - low, second - low)
            loss = sum(F.binary_cross_entropy_with_logits(stage, y[rows]) for stage in logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    validation = safir(*VALIDATION)
    return best_threshold(validation, *scored(net, validation))


# -------------------------------------------------------------------------------------------------- spiking network


class LinePairs(NamedTuple):
    pairs: Pairs
    ends: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # crystals and steps between them


def line_pairs(net: CompetingLines, hits: Hits) -> LinePairs:
    """Pairs of hits up to four steps apart that have a line."""
    pairs = candidate_pairs(hits, 4)
    a, b, step = hits.crystal[pairs.first], hits.crystal[pairs.second], hits.step
    ends = torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(step[pairs.second] - step[pairs.first])
    keep = net.is_line(*ends[:2])
    return LinePairs(pairs.where(keep.numpy()), tuple(values[keep] for values in ends))


@functools.cache
def lines() -> CompetingLines:
    """The spiking network, trained as the scorer is: on the same hits, with a threshold from the same other ones."""
    train, validation = safir(*TRAIN), safir(*VALIDATION)
    net = CompetingLines("safir2880")
    pairs, ends = line_pairs(net, train)
    y = torch.from_numpy(same_decay(train, pairs).astype(np.float32))
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss = F.binary_cross_entropy_with_logits(net.logits(*ends), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pairs, ends = line_pairs(net, validation)
    with torch.no_grad():
        logits = net.logits(*ends).double().numpy()
        net.threshold.fill_(1 + best_threshold(validation, pairs, logits) / net.slope)
    return net


def listed(net: CompetingLines, hits: Hits) -> Pairs:
    """What its lines fire for, event-driven."""
    fired = EventDrivenCompetition(net)(hits.sample, hits.step, hits.crystal)
    return pairs_of_lines(hits, fired.item, fired.a, fired.b, fired.step_a, fired.step_b)


# --------------------------------------------------------------------------------------------------- acceptance list


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_12_learned_scores_at_300_mbq():
    """12: a learned algorithm F1 0.92 at 300 MBq, on unseen seeds, and above all classical sorters.

    The margins over what the list has measured itself, 0.905 for GATE's best policy and 0.882 for the single window.
    """
    assert scorer_f1() >= 0.92  # 0.939
    assert scorer_f1() >= 0.905 + 0.02 and scorer_f1() >= 0.882 + 0.04
    assert scorer_f1() > max(sorters(TUNED))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_12_margins_over_the_sorters_of_the_list():
    """12: GATE's best policy + 0.02, calibrated single window + 0.04, with angles of 0 and 70 degrees.

    These are the sorters that the list names ("GATE, w = 1, at least 70 degrees") with their best windows and policies.
    Those whose angle is tuned to the object are in the next tests.
    """
    window, gate = sorters(WIDE)
    assert scorer_f1() >= gate + 0.02  # 0.939 and 0.831
    assert scorer_f1() >= window + 0.04  # 0.830


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_12_margin_over_the_tuned_window():
    """12: calibrated single window + 0.04, whatever its angle."""
    assert scorer_f1() >= sorters(TUNED)[0] + 0.04  # 0.939 and 0.898


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xfail(
    strict=True,
    reason="0.939 against 0.928: with an angle of 150 degrees GATE's policies are that good, and an oracle that knows "
    "which of several pairs of a hit is true has 0.944 with gap and angle alone",
)
def test_12_margin_over_the_tuned_policies():
    """12: GATE's best policy + 0.02, whatever its angle."""
    assert scorer_f1() >= sorters(TUNED)[1] + 0.02


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_13_a_spiking_network_reaches_the_scorer():
    """13: lines of response with learned weights, decay and thresholds, event-driven: the scorer's F1 - 0.01."""
    assert f1_of(safir(*TEST), listed(lines(), safir(*TEST))) >= scorer_f1() - 0.01  # 0.936 and 0.939


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_13_spikes_are_those_of_the_dense_scan():
    """13: with learned weights, all lines of the insert at every step: identical spikes."""
    net, part = lines(), safir(*TEST).samples(0, 3)
    rows = (torch.from_numpy(values) for values in (part.step, part.sample, part.crystal))
    dense = net(Events(*rows, torch.ones(len(part)), int(part.step.max()) + 1, 3))
    fired = EventDrivenCompetition(net)(part.sample, part.step, part.crystal)
    spikes = [sorted(zip(*(np.asarray(v).tolist() for v in found), strict=True)) for found in (dense, fired)]
    assert spikes[0] == spikes[1] and len(spikes[0]) > 5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
def test_13_event_driven_speed():
    """13: at most 2 us a hit on one core."""
    run, hits = EventDrivenCompetition(lines()), safir(*TEST)
    run(hits.sample[:10], hits.step[:10], hits.crystal[:10])
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        run(hits.sample, hits.step, hits.crystal)
        seconds.append(time.process_time() - begin)
    assert min(seconds) / len(hits) <= 2e-6  # 0.24 us
