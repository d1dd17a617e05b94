from __future__ import annotations

import math

import pytest

from callbacks.energy.accounting import Ledger
from callbacks.energy.meters.base import MeterError
from callbacks.energy.meters.constant import ConstantMeter
from callbacks.energy.meters.replay import ReplayMeter
from tests.callbacks.energy.sources import Clock


@pytest.fixture
def clock():
    return Clock()


def test_a_constant_is_exact(clock):
    meter = ConstantMeter(75, "cpu", "cpu", clock=clock)
    channels = meter.open()
    assert channels[0].source == "constant (75 W)" and not channels[0].measured
    ledger = Ledger(channels)
    for step in range(11):
        clock.now = 100 + 0.37 * step
        ledger.add(clock.now, meter.read(), "run")
    assert ledger.total().total_j == pytest.approx(75 * 3.7, rel=1e-12)


def test_a_function_of_the_time_since_open(clock):
    meter = ConstantMeter(lambda t: 100 + 10 * t, measured=True, clock=clock)
    clock.now += 5
    [channel] = meter.open()
    clock.now += 2
    assert meter.read() == [120.0] and channel.measured


def test_bad_constants():
    for watts in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="no power"):
            ConstantMeter(watts)
    with pytest.raises(ValueError, match="component='disk'"):
        ConstantMeter(1, component="disk")


@pytest.fixture
def trace(tmp_path):
    def write(text):
        path = tmp_path / "trace.csv"
        path.write_text(text)
        return str(path)

    return write


TRACE = """t_s,channel,value,component,kind,measured
10,gpu0,100,,,
10,node,0,node,counter,false
12,gpu0,200,,,
14,node,800,node,counter,false
14,gpu0,nan,,,
15,gpu0,50,,,
16,gpu0,70,,,
"""


def test_replay_interpolates_and_ends(trace, clock):
    meter = ReplayMeter(trace(TRACE), clock=clock)
    assert meter.probe().ok
    channels = {c.name: c for c in meter.open()}
    assert (channels["gpu0"].component, channels["gpu0"].kind, channels["gpu0"].measured) == ("gpu", "gauge", True)
    assert (channels["node"].component, channels["node"].kind, channels["node"].measured) == ("node", "counter", False)
    begin = clock.now

    def at(seconds):
        clock.now = begin + seconds
        return dict(zip(channels, meter.read(), strict=True))

    assert at(0) == {"gpu0": 100, "node": 0}
    assert at(0.5) == pytest.approx({"gpu0": 125, "node": 100})
    assert at(2) == pytest.approx({"gpu0": 200, "node": 400})
    assert math.isnan(at(3)["gpu0"]), "beside a row without a value"
    assert at(4)["node"] == 800
    assert math.isnan(at(4.1)["node"])
    assert at(5.5)["gpu0"] == 60
    assert at(6)["gpu0"] == 70
    assert math.isnan(at(6.1)["gpu0"])


def test_replay_faster_keeps_powers(trace, clock):
    meter = ReplayMeter(
        trace("t_s,channel,value,kind\n0,cpu,0,counter\n0,gpu,50,gauge\n10,cpu,1000,counter\n10,gpu,50,gauge\n"),
        speed=5,
        clock=clock,
    )
    meter.open()
    clock.now += 1
    assert meter.read() == pytest.approx([100, 50]), "100 W for a second"


def test_replay_in_a_loop(trace, clock):
    path = trace("t_s,channel,value,kind\n0,cpu,7,counter\n0,gpu,10,\n2,cpu,107,counter\n2,gpu,30,\n")
    meter = ReplayMeter(path, loops=True, clock=clock)
    meter.open()
    begin = clock.now
    for seconds, expected in ((0, [7, 10]), (1, [57, 20]), (3, [157, 20]), (41, [2057, 20])):
        clock.now = begin + seconds
        assert meter.read() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,channel,value\n", r"trace\.csv, line 1: no column t_s"),
        ("t_s,channel,value\n", "has no rows"),
        ("t_s,channel,value\n0,gpu0,1\n1,gpu0,fast\n", r"line 3, column value: 'fast' is no number"),
        ("t_s,channel,value\n0,gpu0\n", "line 2, column value: None"),
        ("t_s,channel,value\nnan,gpu0,1\n", "line 2, column t_s"),
        ("t_s,channel,value\n0,,1\n", "line 2, column channel: empty"),
        ("t_s,channel,value\n1,gpu0,1\n1,gpu0,1\n", r"line 3, column t_s: 1 does not come after 1"),
        ("t_s,channel,value,kind\n0,gpu0,1,energy\n", "line 2, column kind: 'energy' is unknown; .*counter"),
        ("t_s,channel,value,component\n0,x,1,disk\n", "line 2, column component: 'disk'"),
        ("t_s,channel,value,measured\n0,x,1,maybe\n", "line 2, column measured: 'maybe'"),
        ("t_s,channel,value,kind\n0,x,5,counter\n1,x,4,counter\n", "line 3, column value: the counter 'x' goes down"),
        ("t_s,channel,value,kind\n0,x,5,counter\n1,x,6,gauge\n", "line 3: channel 'x' had another"),
    ],
)
def test_bad_traces(trace, text, message):
    meter = ReplayMeter(trace(text))
    assert not meter.probe().ok
    with pytest.raises(MeterError, match=message):
        meter.open()


def test_bad_options(tmp_path):
    assert "missing.csv" in ReplayMeter(str(tmp_path / "missing.csv")).probe().reason
    for speed in (0, -1, math.inf):
        with pytest.raises(ValueError, match="speed"):
            ReplayMeter("trace.csv", speed=speed)
