from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from callbacks.energy.accounting import Ledger, Tally, counter_energy, gauge_energy
from callbacks.energy.meters.base import Channel
from tests.callbacks.energy.sources import sine

CPU = Channel("cpu", "cpu", "gauge", True, "test")
GPU = Channel("gpu0", "gpu", "gauge", True, "test")
DRAM = Channel("dram", "dram", "gauge", False, "model")
NODE = Channel("node", "node", "gauge", True, "test")


def counter(modulus_j=None, max_power_w=None) -> Channel:
    return Channel("cpu", "cpu", "counter", True, "test", modulus_j, max_power_w)


def booked(channel, times, values):
    ledger = Ledger([channel])
    for t, value in zip(times, values, strict=True):
        ledger.add(t, [value], "stage")
    return ledger.tallies["stage"]


def test_constant_power_is_exact():
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 2, 200))
    tally = booked(CPU, times, [75.0] * 200)
    assert tally.total_j == pytest.approx(75 * (times[-1] - times[0]), rel=1e-12)
    assert tally.max_w == pytest.approx(75)


def test_sine_is_integrated_by_trapezoids():
    power, integral = sine(100, 50, 2.0)
    times = np.arange(0, 10.01, 0.05)
    tally = booked(CPU, times, [power(t) for t in times])
    assert tally.total_j == pytest.approx(integral(times[-1]), rel=1e-5)
    # Whole periods forgive any rule; within one, the power at the end of each interval, as other tools take it, is off.
    part = booked(CPU, times[:12], [power(t) for t in times[:12]])
    assert part.total_j == pytest.approx(integral(times[11]), rel=1e-3)
    ends = sum(power(b) * (b - a) for a, b in itertools.pairwise(times[:12]))
    assert abs(ends / integral(times[11]) - 1) > 0.01


def test_counter_that_wraps_often_loses_nothing():
    times = np.arange(0, 60, 0.05)
    tally = booked(counter(5.0), times, [(40 * t) % 5.0 for t in times])
    assert tally.total_j == pytest.approx(40 * times[-1], rel=1e-12)


def test_wrap_of_a_processor_counter_is_exact():
    modulus = 262143.328850
    times = np.arange(0, 100.0)
    tally = booked(counter(modulus, 400.0), times, [(modulus - 1000 + 250 * t) % modulus for t in times])
    assert tally.total_j == pytest.approx(250 * 99, rel=1e-9)
    assert tally.covered_seconds == 99


def test_counters_that_cannot_be_right_are_not_guessed():
    assert math.isnan(counter_energy(100.0, 50.0, 1.0, counter()))  # started again, nobody knows where
    assert math.isnan(counter_energy(0.0, 730.0, 1.0, counter(max_power_w=400)))
    assert counter_energy(0.0, 599.0, 1.0, counter(max_power_w=400)) == 599.0
    assert math.isnan(counter_energy(9.0, 1.0, 1.0, counter(modulus_j=5.0)))  # negative even after one wrap
    assert counter_energy(0.0, 70.0, 0.001, counter(max_power_w=400)) == 70.0  # one update step of a slow counter
    assert math.isnan(counter_energy(math.nan, 1.0, 1.0, counter()))


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (1.0, math.nan), (-1.0, 5.0), (5.0, -0.1)])
def test_missing_and_negative_power_is_invalid(pair):
    assert math.isnan(gauge_energy(*pair, 1.0, CPU))


def test_energy_goes_to_the_label_in_force_and_nothing_is_left_over():
    ledger = Ledger([CPU, DRAM])
    rng = np.random.default_rng(0)
    t, total = 0.0, 0.0
    ledger.add(t, [10.0, 3.0], "-")
    for i in range(1000):
        step = float(rng.uniform(0.001, 1))
        t += step
        ledger.add(t, [10.0, 3.0], f"stage {i % 7}")
        total += 13 * step
    whole = ledger.total()
    assert math.fsum(tally.total_j for tally in ledger.tallies.values()) == pytest.approx(whole.total_j, rel=1e-12)
    assert whole.total_j == pytest.approx(total, rel=1e-9)
    assert whole.seconds == pytest.approx(t, rel=1e-9)
    assert whole.estimated_j == pytest.approx(3 / 13 * total, rel=1e-9)


def test_a_node_meter_is_the_total_and_parts_are_its_breakdown():
    ledger = Ledger([NODE, CPU, GPU], overhead_w=50.0)
    ledger.add(0.0, [500.0, 100.0, 200.0], "s")
    ledger.add(1.0, [500.0, 100.0, 200.0], "s")
    tally = ledger.tallies["s"]
    assert (tally.total_j, tally.joules) == (500.0, {"node": 500.0, "cpu": 100.0, "gpu0": 200.0})
    ledger.add(2.0, [math.nan, 100.0, 200.0], "s")  # the node is silent: its parts and the overhead stand in
    assert tally.total_j == 500.0 + 350.0
    assert tally.estimated_j == 50.0
    assert tally.covered_seconds == 1.0


def test_invalid_intervals_count_no_energy_and_no_coverage():
    ledger = Ledger([CPU, GPU])
    for t, gpu in enumerate([200.0, 200.0, math.nan, 200.0, 200.0]):
        ledger.add(float(t), [100.0, gpu], "s")
    tally = ledger.tallies["s"]
    assert tally.joules == {"cpu": 400.0, "gpu0": 400.0}
    assert tally.valid_seconds == {"cpu": 4.0, "gpu0": 2.0}
    assert tally.covered_seconds == 2.0
    assert ledger.invalid == {"cpu": 0, "gpu0": 2}


def test_very_short_intervals_do_not_make_the_maximum():
    ledger = Ledger([counter()])
    ledger.add(0.0, [0.0], "s")
    ledger.add(0.001, [70.0], "s")
    for second in range(1, 5):
        ledger.add(0.001 + second, [70.0 + 100.0 * second], "s")
    assert 100 <= ledger.tallies["s"].max_w < 180


def test_a_counter_in_steps_does_not_exaggerate_the_maximum():
    """100 W in steps of 0.1 s, read every 0.05 s: every second interval shows 200 W."""
    ledger = Ledger([counter(max_power_w=120.0)])
    for i in range(200):
        ledger.add(0.05 * i, [10.0 * (i // 2)], "s")
    tally = ledger.tallies["s"]
    assert tally.max_w == pytest.approx(100, rel=0.11)
    assert tally.total_j == pytest.approx(990) and tally.covered_seconds == pytest.approx(9.95)


def test_power_beyond_the_device_is_invalid():
    channel = Channel("cpu", "cpu", "gauge", True, "test", max_power_w=100.0)
    assert math.isnan(gauge_energy(1e6, 50.0, 1.0, channel))
    assert math.isnan(gauge_energy(math.inf, 50.0, 1.0, CPU))
    assert gauge_energy(120.0, 100.0, 1.0, channel) == 110.0


def test_tallies_add_and_subtract():
    one = Tally(1.0, {"cpu": 5.0}, {"cpu": 1.0}, 5.0, 2.0, 1.0, 5.0)
    both = one.copy()
    both.add(Tally(2.0, {"cpu": 6.0, "gpu0": 8.0}, {"cpu": 2.0, "gpu0": 2.0}, 14.0, 0.0, 2.0, 7.0))
    assert both.joules == {"cpu": 11.0, "gpu0": 8.0} and both.max_w == 7.0
    rest = both.minus(one)
    assert (rest.seconds, rest.total_j, rest.joules) == (2.0, 14.0, {"cpu": 6.0, "gpu0": 8.0})
    assert one.joules == {"cpu": 5.0}
