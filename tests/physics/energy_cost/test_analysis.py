"""What plans cost according to few and to many runs, and how well that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from callbacks.energy_scaling import report_sections, summary
from datamodules.energy_records import PUBLISHED
from physics.energy_cost import Configuration, Forecast
from physics.energy_cost.analysis import RefusedPlan, analyse, forecasts, left_out_plans
from physics.energy_cost.configuration import distinct
from physics.energy_cost.records import read_table

RUNS = distinct(read_table(PUBLISHED, repetitions=5))


def plan(run, **changes):
    """The configuration of a published run."""
    names = ("devices", "local_batch_size", "num_samples", "epochs")
    return Configuration(**{name: getattr(run, name) for name in names} | changes)


@pytest.mark.parametrize("count", [2, 3])
def test_costs_that_few_runs_do_not_fit_are_not_forgotten(count):
    few = [run for run in RUNS if run.series == "LBS 256" and run.devices <= 4][-count:]
    (other,) = [run for run in RUNS if (run.devices, run.local_batch_size) == (4, 64)]
    found = forecasts(few, [plan(other), plan(few[-1])])
    assert isinstance(found[0], RefusedPlan), "measured: 6.93 kWh; from samples and hours alone it would be 3.04"
    assert found[0].reason.startswith("64 samples per device and step: the runs have 256, and")
    assert "e_u [J per device update]; add runs at other local batch sizes, 4 configurations" in found[0].reason
    assert isinstance(found[1], Forecast)
    assert found[1].energy_kwh == pytest.approx(few[-1].energy_kwh, rel=0.05)


def test_costs_of_enough_runs_reach_other_batch_sizes():
    (found,) = forecasts(RUNS, [plan(RUNS[2], local_batch_size=100)])
    assert isinstance(found, Forecast)


def test_published_runs_are_forecast_by_the_others_hours_too():
    found = left_out_plans(RUNS)
    assert found["forecast"] == found["bounded"] == found["inside"] == len(RUNS) == 17
    assert found["mean_error"] == pytest.approx(0.0149, abs=5e-4)
    assert found["max_error"] == pytest.approx(0.049, abs=1e-3)
    assert found["hours_mean_error"] == pytest.approx(0.041, abs=1e-3)
    assert found["hours_max_error"] == pytest.approx(0.114, abs=1e-3)
    assert not any(found["refused"])
    for i in (0, 4, 16):  # by hand, with one run at a time
        (one,) = forecasts([run for run in RUNS if run is not RUNS[i]], [plan(RUNS[i])])
        assert one.energy_kwh == pytest.approx((1 + found["errors"][i]) * RUNS[i].energy_kwh)
        assert one.hours == pytest.approx((1 + found["hours_errors"][i]) * RUNS[i].hours)


def test_the_energy_of_a_left_out_run_does_not_reach_its_forecast():
    """Nor do its hours: a run that took ten times as much is forecast like the one it was."""
    tenfold = [replace(RUNS[3], energy_kwh=10 * RUNS[3].energy_kwh, device_hours=10 * RUNS[3].device_hours)]
    before, after = (left_out_plans(runs)["errors"][3] for runs in (RUNS, RUNS[:3] + tenfold + RUNS[4:]))
    assert 10 * (1 + after) == pytest.approx(1 + before)


def test_runs_that_the_others_refuse_are_counted_apart():
    few = [run for run in RUNS if run.series == "LBS 256" and run.devices <= 8]
    alone = [run for run in RUNS if (run.devices, run.local_batch_size) == (4, 64)]
    found = left_out_plans([*few, *alone])
    assert found["forecast"] + sum(map(bool, found["refused"])) == 5
    assert found["errors"][-1] is None and "4 devices with 64 samples each" in found["refused"][-1]
    assert left_out_plans(few[:2]) is None


def test_a_run_on_several_nodes_is_planned_on_as_many():
    spread = [replace(run, nodes=run.devices) for run in RUNS if run.devices <= 16]
    assert left_out_plans(spread)["forecast"] == len(spread)
    mixed = [*RUNS, replace(RUNS[2], nodes=2, epochs=99.0)]
    assert left_out_plans(mixed)["forecast"] == len(mixed)


def test_the_page_says_how_well_plans_are_known():
    found = analyse(RUNS, draws=0)
    assert found["rows"][0]["plan_error"] == pytest.approx(found["plans"]["errors"][0])
    text = "17 left-out runs as plans, hours forecast too: energy mean 1.49 %, largest 4.9 %, 17 of 17 within"
    assert text in summary(found)
    (section,) = (part for part in report_sections(found, {}) if part.title == "Forecasts of left-out runs")
    assert section.text[0].startswith(text) and len(section.rows) == 17
