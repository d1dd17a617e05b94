from __future__ import annotations

import math
import sys
import threading
import time

import pytest

from callbacks.energy.meters.base import Availability, Channel, MeterError
from callbacks.energy.meters.polled import Polled, PolledCommand
from tests.callbacks.energy.sources import Clock


class Counted(Polled):
    """Answers with the number of polls; fails on request."""

    def __init__(self, poll_s=0.02, clock=time.perf_counter):
        super().__init__(poll_s, clock)
        self.polls, self.broken, self.threads = 0, False, set()

    def probe(self):
        return Availability(True)

    def describe(self):
        return [Channel("node", "node", "gauge", True, "test")]

    def poll(self):
        self.threads.add(threading.current_thread().name)
        if self.broken:
            raise OSError("no answer")
        self.polls += 1
        return [float(self.polls)]


class Printed(PolledCommand):
    def probe(self):
        return Availability(True)

    def describe(self):
        return [Channel("node", "node", "gauge", True, "test")]

    def poll(self):
        return [float(self.output())]


def until(condition, seconds=2.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def names():
    return {thread.name for thread in threading.enumerate()}


def test_a_thread_polls_and_read_returns_the_latest():
    meter = Counted()
    meter.open()
    assert meter.read() == [1.0], "the first poll is part of open"
    try:
        until(lambda: meter.read()[0] >= 3)
        assert meter.threads == {threading.current_thread().name, "energy-Counted"}
    finally:
        meter.close()
    assert "energy-Counted" not in names()
    done = meter.polls
    time.sleep(0.06)
    assert meter.polls == done
    meter.close()
    assert math.isnan(meter.read()[0])
    meter.poll_s = 60.0  # the thread does not come to it, and no pause of the machine makes the first value too old
    meter.open()
    assert meter.read() == [done + 1.0]
    meter.close()


def test_a_value_older_than_three_polls_is_none(caplog):
    clock = Clock()
    meter = Counted(0.02, clock)
    meter.open()
    meter.broken = True
    until(lambda: meter._failing)
    value = meter.read()[0]
    assert value >= 1
    clock.now += 0.059
    assert meter.read() == [value]
    clock.now += 0.002
    assert math.isnan(meter.read()[0])
    time.sleep(0.06)
    meter.broken = False
    until(lambda: not math.isnan(meter.read()[0]))
    meter.close()
    assert caplog.text.count("no answer") == 1, "one warning, not one a poll"


def test_a_first_poll_that_fails_is_an_error_of_open():
    meter = Counted()
    meter.broken = True
    with pytest.raises(MeterError, match="no answer"):
        meter.open()
    assert "energy-Counted" not in names()


def test_close_ends_a_program_that_hangs(tmp_path):
    script = tmp_path / "slow.py"
    flag = tmp_path / "once"
    script.write_text(
        f"import pathlib, time\nflag = pathlib.Path({str(flag)!r})\n"
        "time.sleep(60) if flag.exists() else flag.touch()\nprint(5)\n"
    )
    meter = Printed([sys.executable, "-S", str(script)], poll_s=0.01)
    meter.open()
    assert meter.read() == [5.0]
    until(lambda: meter._child is not None)
    begin = time.monotonic()
    meter.close()
    assert time.monotonic() - begin < 1.0
    assert "energy-Printed" not in names()


def test_failing_programs_say_why():
    with pytest.raises(MeterError, match="no-such-program"):
        Printed(["no-such-program"], 1.0).open()
    assert not Printed(["no-such-program"], 1.0).installed
    with pytest.raises(MeterError, match="exit status 3: not today"):
        Printed(["sh", "-c", "echo not today >&2; exit 3"], 1.0).open()
    with pytest.raises(MeterError, match=r"no answer within 0\.05 s"):
        Printed(["sleep", "10"], 1.0, timeout_s=0.05).open()


def test_bad_options():
    with pytest.raises(ValueError, match="poll_s=0"):
        Counted(0)
    with pytest.raises(ValueError, match="list of a program"):
        Printed("ipmitool dcmi", 1.0)
