from __future__ import annotations

import random

from callbacks.energy.accounting import Tally
from callbacks.energy.trace import Trace


def interval(seconds: float, watts: float) -> Tally:
    return Tally(seconds, {"cpu": watts * seconds}, {"cpu": seconds}, watts * seconds)


def filled(number: int, limit: int) -> tuple[Trace, list[float]]:
    rng = random.Random(0)
    trace, powers = Trace(limit), [rng.uniform(50, 400) for _ in range(number)]
    for i, watts in enumerate(powers):
        trace.add(float(i + 1), interval(1.0, watts), "fit/train", i)
    return trace, powers


def test_short_runs_are_kept_whole():
    trace, powers = filled(90, 100)
    assert [point.total_w for point in trace.points()] == powers
    assert trace.points()[3].time_s == 3.5 and trace.points()[3].step == 3


def test_long_runs_keep_their_extremes_in_bounded_memory():
    trace, powers = filled(30_000, 100)
    points = trace.points()
    assert len(points) <= 100 and len(trace._points) < 200
    assert max(point.total_w for point in points) == max(powers)
    assert min(point.total_w for point in points) == min(powers)
    times = [point.time_s for point in points]
    assert times == sorted(times) and times[0] < 3000 and times[-1] > 27000


def test_moments_are_joined_until_power_means_something():
    trace = Trace()
    for i in range(10):
        trace.add(0.01 * (i + 1), interval(0.01, 100.0 if i % 2 else 300.0), "test", 0)
    points = trace.points()
    assert len(points) == 2
    assert [round(point.total_w) for point in points] == [220, 180]


def test_points_since_a_time_and_labels_are_not_mixed():
    trace = Trace()
    trace.add(0.04, interval(0.04, 1000.0), "fit/val", 0)  # too short to be shown
    trace.add(1.04, interval(1.0, 100.0), "fit/train", 0)
    trace.add(2.04, interval(1.0, 200.0), "fit/train", 0)
    assert [point.total_w for point in trace.points()] == [100.0, 200.0]
    assert [point.total_w for point in trace.points(since_s=trace.points()[0].time_s)] == [200.0]
