from __future__ import annotations

import json
import logging
import math
import threading
import time

import numpy as np
import pytest

from callbacks.energy import recorder as recorder_module
from callbacks.energy.meters.base import Availability
from callbacks.energy.meters.polled import Polled
from callbacks.energy.recorder import Recorder
from tests.callbacks.energy.sources import Clock, Source, sine


def total(recorder: Recorder) -> float:
    return math.fsum(tally.total_j for tally in recorder.tallies().values())


def test_boundaries_are_exact_and_the_labels_add_up():
    """Power says which stage it is: at a boundary rounded to the next tick the mean powers would be mixtures."""
    clock = Clock()
    power = {"a": 100.0, "b": 300.0, "c": 20.0}
    source = Source(lambda t: power[state["label"]], clock=clock)
    state = {"label": "a"}
    recorder = Recorder([source], period_s=1000.0, clock=clock)
    recorder.start("a")
    lengths = {"a": 0.0, "b": 0.0, "c": 0.0}
    for label, seconds in [("a", 0.3), ("b", 0.01), ("a", 2.0), ("c", 0.7), ("b", 1.5)]:
        recorder.switch(label)
        state["label"] = label
        recorder.read()  # the meter's new level, at the same moment
        clock.now += seconds
        recorder.read()
        lengths[label] += seconds
    recorder.stop()
    for label, tally in recorder.tallies().items():
        assert tally.seconds == pytest.approx(lengths[label], rel=1e-9)
        assert tally.total_j == pytest.approx(power[label] * lengths[label], rel=1e-9)


def test_real_time_thread_integrates_a_sine():
    """The best of five: interrupted threads read late, and a busy machine interrupts them often."""
    power, integral = sine(100, 50, 0.5)
    off = []
    for _ in range(5):
        recorder = Recorder([Source(power)], period_s=0.05)
        recorder.start("s")
        time.sleep(0.6)
        recorder.stop()
        if recorder.num_readings >= 8:
            off.append(abs(total(recorder) / integral(recorder.tallies()["s"].seconds) - 1))
        # 2 % is far from what a reading per half second would give.
        if off and min(off) < 0.02:
            break
    assert off and min(off) < 0.02, off


def test_counters_are_exact_however_late_the_thread():
    source = Source(integral=lambda t: 40 * t, modulus_j=1000.0)
    recorder = Recorder([source], period_s=0.05)
    recorder.start("s")
    time.sleep(0.2)
    recorder.stop()
    assert total(recorder) == pytest.approx(40 * recorder.tallies()["s"].seconds, rel=1e-2)


def test_every_reading_is_written():
    records: list[dict] = []
    clock = Clock()
    recorder = Recorder([Source(10.0, clock=clock)], period_s=1000.0, write=records.append, clock=clock)
    recorder.start("startup")
    clock.now += 2
    recorder.switch("test")
    recorder.step = lambda: 7
    clock.now += 3
    recorder.stop()
    assert [(r["t"], r["label"], r["total_j"], r["step"]) for r in records] == [
        (0.0, "startup", 0.0, 0), (2.0, "startup", 20.0, 0), (5.0, "test", 50.0, 7),
    ]  # fmt: skip


def test_stop_ends_the_thread_closes_the_meters_and_may_come_twice():
    source = Source()
    recorder = Recorder([source], period_s=0.05)
    recorder.start("s")
    assert "energy-recorder" in [thread.name for thread in threading.enumerate()]
    recorder.stop()
    before = total(recorder)
    recorder.stop()
    recorder.switch("t")
    assert "energy-recorder" not in [thread.name for thread in threading.enumerate()]
    assert source.closed == 1
    assert total(recorder) == before


def test_a_meter_that_dies_costs_its_channel_and_not_the_run(caplog):
    clock = Clock()
    dying, living = Source(100.0, name="gpu0", component="gpu", clock=clock), Source(50.0, clock=clock)
    recorder = Recorder([dying, living], period_s=1000.0, clock=clock)
    recorder.start("s")
    with caplog.at_level(logging.WARNING):
        for i in range(4):
            clock.now += 1
            dying.broken = i >= 2
            recorder.read()
    recorder.stop()
    tally = recorder.tallies()["s"]
    assert tally.joules == {"gpu0": 200.0, "cpu": 200.0}
    assert tally.covered_seconds == 2.0
    assert sum("the device is lost" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("values", [[None], ["a"], [1.0, 2.0], [], [float("inf")], [float("nan")]])
def test_nonsense_of_a_meter_costs_its_channel_and_not_the_run(values):
    clock = Clock()
    strange, living = Source(100.0, name="gpu0", component="gpu", clock=clock), Source(50.0, clock=clock)
    written: list[dict] = []
    recorder = Recorder([strange, living], 1000.0, lambda r: written.append(json.dumps(r)), clock=clock)
    recorder.start("s")
    strange.read = lambda: values
    clock.now += 1
    recorder.stop()
    tally = recorder.tallies()["s"]
    assert tally.joules["cpu"] == 50.0 and tally.total_j == 50.0
    assert len(written) == 2


def test_numbers_of_numpy_are_numbers():
    source = Source(10.0)
    written: list[str] = []
    recorder = Recorder([source], 1000.0, lambda r: written.append(json.dumps(r)))
    source.read = lambda: [np.float32(10.0)]
    recorder.start("s")
    recorder.stop()
    assert len(written) == 2


def test_a_meter_that_hangs_does_not_hang_the_run(monkeypatch, caplog):
    monkeypatch.setattr(recorder_module, "PATIENCE_S", 0.2)
    source, free = Source(10.0), threading.Event()
    recorder = Recorder([source], 0.05)
    recorder.start("s")
    source.read = lambda: [free.wait(5) or 1.0]
    time.sleep(0.2)
    begin = time.perf_counter()
    recorder.stop()
    assert time.perf_counter() - begin < 2
    assert any("hangs" in message for message in caplog.messages)
    free.set()
    time.sleep(0.1)


def test_slow_meters_are_asked_once_more_at_the_end():
    class Slow(Polled):
        def probe(self):
            return Availability(True)

        def describe(self):
            return [Source(integral=lambda t: t, max_power_w=120.0).channel]

        def poll(self):
            return [100.0 * (time.perf_counter() - begin)]

    begin = time.perf_counter()
    recorder = Recorder([Slow(0.5)], 0.05)
    recorder.start("s")
    time.sleep(1.2)
    recorder.stop()
    tally = recorder.tallies()["s"]
    assert tally.total_j == pytest.approx(100 * tally.seconds, rel=0.05)
    assert tally.max_w < 150


def test_meters_that_cannot_be_opened_leave_none_open():
    class Closed(Source):
        def open(self):
            raise OSError("no")

    first = Source()
    with pytest.raises(OSError, match="no"):
        Recorder([first, Closed()]).start("s")
    assert first.closed == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"period_s": 0.01}, "period_s=0.01"), ({"overhead_w": -1}, "overhead_w=-1")],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Recorder([], **options)
