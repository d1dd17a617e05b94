from __future__ import annotations

import math
from dataclasses import replace

import pytest

from physics.energy_cost import Configuration, fit_cost, fit_time, forecast, knee, pareto_front
from physics.energy_cost.records import read_table
from tests.physics.energy_cost.test_fitting import record

# Device hours of these are of the form that `fit_time` assumes, those of the others are not.
RUNS = [record(n, b, growth=0.0) for n in (2, 4, 8, 16) for b in (16, 64, 256)]
GROWING = [record(n, b) for n in (1, 2, 4, 8, 16) for b in (16, 64, 256)]


def test_hours_that_were_put_in_are_found():
    time = fit_time(RUNS)
    assert max(map(abs, time.errors)) < 1e-9
    plan = Configuration(32, 32, 50_000, 10)
    assert time.device_hours(plan) == pytest.approx(record(32, 32, 50_000, growth=0.0).device_hours, rel=1e-6)


def test_a_plan_is_what_the_run_would_have_been():
    cost, time = fit_cost(GROWING), fit_time(GROWING)
    plan = Configuration(8, 32, 40_000, 10)
    found = forecast(plan, cost, time, GROWING, 0.4)
    assert found.hours == pytest.approx(record(8, 32).hours, rel=0.05)
    exact = record(8, 32, device_hours=8 * found.hours)
    parts = {
        "node": 0.2 * exact.node_hours,
        "device": 0.07 * exact.device_hours,
        "samples": 0.5 * exact.samples / 3.6e6,
        "updates": 2.0 * exact.device_updates / 3.6e6,
    }
    assert found.parts_kwh == pytest.approx(parts, rel=1e-6)
    assert found.energy_kwh == pytest.approx(sum(parts.values()), rel=1e-6)
    assert found.co2_kg == pytest.approx(0.4 * found.energy_kwh)
    assert found.energy_low < found.energy_kwh < found.energy_high
    assert not found.extrapolates
    far = forecast(Configuration(512, 32, 40_000, 10), cost, time, GROWING)
    assert far.co2_kg is None
    assert far.extrapolates == ("512 devices; the runs have 1 to 16",)
    near, wide = (f.energy_high / f.energy_kwh - 1 for f in (found, far))
    assert wide > 2 * near, "what is far from the runs is less sure"
    assert far.hours_high / far.hours > 2 * found.hours_high / found.hours - 1


def test_a_forecast_of_an_untested_fit_has_no_bounds():
    few = [record(1, 16), record(2, 256), record(8, 64), record(16, 16)]
    found = forecast(Configuration(2, 32, 40_000, 10), fit_cost(few), fit_time(GROWING), few)
    assert (found.energy_low, found.energy_high) == (0.0, math.inf)
    assert 0 < found.hours_low < found.hours_high < math.inf


@pytest.mark.parametrize(
    ("metrics", "mode", "expected"),
    [
        ([0.90, 0.905, 0.90, 0.85, 0.5], "max", 256),
        ([0.90, 0.905, 0.906, 0.904, 0.90], "max", 1024),
        ([1.0, 1.002, 1.2, 1.5, 3.0], "min", 128),
        ([0.5, 0.9, 0.9, 0.3, 0.9], "max", 256),  # beyond a gap nothing counts
    ],
)
def test_the_largest_batch_that_loses_nothing(metrics, mode, expected):
    assert knee([64, 128, 256, 512, 1024], metrics, mode) == expected


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ([0.5, 0.6, 0.9, 0.9, 0.5], 512),  # small batches that are worse end nothing
        ([0.9, 0.9, math.nan, math.nan, math.nan], 128),  # diverged
        ([math.nan, 0.9, 0.9, 0.8, 0.9], 256),
    ],
)
def test_the_knee_begins_at_the_best_and_ends_where_training_diverges(metrics, expected):
    assert knee([64, 128, 256, 512, 1024], metrics) == expected
    assert knee([64, 128, 256, 512, 1024], [-value for value in metrics], "min") == expected


def test_hours_that_the_runs_say_nothing_about_are_refused():
    """On one and two devices communication per step and its growth are one column; on one there is neither."""
    two = fit_time([record(n, b, growth=0.0) for n in (1, 2) for b in (16, 64, 256)])
    assert two.device_hours(Configuration(2, 32, 40_000, 10)) == pytest.approx(
        record(2, 32, growth=0.0).device_hours, rel=0.03
    )
    with pytest.raises(ValueError, match=r"say too little about t_u .* and t_r .* 64 devices"):
        two.device_hours(Configuration(64, 32, 40_000, 10))
    one = fit_time([record(1, b, growth=0.0) for b in (16, 64, 256)])
    with pytest.raises(ValueError, match="say too little about"):
        one.device_hours(Configuration(2, 32, 40_000, 10))
    fit_time(RUNS).device_hours(Configuration(64, 32, 40_000, 10))


def test_energy_of_a_plan_is_as_unsure_as_its_hours():
    """What follows the hours has their spread, the rest that of the costs; both in quadrature."""
    plan, cost, time = Configuration(8, 64, 40_000, 10), fit_cost(RUNS), fit_time(RUNS)
    known = forecast(plan, cost, replace(time, uncertainty=replace(time.uncertainty, deviation=0.0)), RUNS)
    unsure = forecast(plan, cost, replace(time, uncertainty=replace(time.uncertainty, deviation=0.1)), RUNS)
    share = (known.parts_kwh["node"] + known.parts_kwh["device"]) / known.energy_kwh
    of_hours = unsure.hours_high / unsure.hours - 1
    assert of_hours > 0.2
    widths = [found.energy_high / found.energy_kwh - 1 for found in (known, unsure)]
    assert widths[1] == pytest.approx(math.hypot(widths[0], share * of_hours))


def test_steps_cost_a_single_device_too():
    """Twice the steps for the same samples take longer on one device, before there is any communication."""
    fit = fit_time([record(n, b, growth=0.0) for n in (1, 2, 4) for b in (16, 64, 256)])
    short, long = (fit.device_hours(Configuration(1, batch, 40_000, 10)) for batch in (64, 16))
    expected = record(1, 16, growth=0.0).device_hours / record(1, 64, growth=0.0).device_hours
    assert expected > 1.1 and long / short == pytest.approx(expected, rel=0.05)


def test_a_knee_needs_something_to_compare():
    with pytest.raises(ValueError, match="all of them diverged"):
        knee([1, 2], [math.nan, math.nan])
    with pytest.raises(ValueError, match="no run has a metric"):
        knee([], [])
    with pytest.raises(ValueError, match="mode='up'"):
        knee([1], [1.0], "up")


def test_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 6), (3, 3), (4, 3), (1, 5)]
    assert pareto_front(points) == [0, 1, 3, 5]


def test_tables_name_what_is_wrong(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("series,gpus\na,1\n")
    with pytest.raises(ValueError, match="no column local_batch_size"):
        read_table(path)
    head = "series,gpus,local_batch_size,num_samples,epochs,energy_kwh,gpu_hours\n"
    path.write_text(head + "a,2,16,1000,1,0.1,0.5\na,2,16,1000,1,much,0.5\n")
    with pytest.raises(ValueError, match="line 3"):
        read_table(path)
    path.write_text(head)
    with pytest.raises(ValueError, match="no rows"):
        read_table(path)
