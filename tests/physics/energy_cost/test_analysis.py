"""What plans cost according to few and to many runs, and how well that is known."""

from __future__ import annotations

import pytest

from datamodules.energy_records import PUBLISHED
from physics.energy_cost import Configuration, Forecast
from physics.energy_cost.analysis import RefusedPlan, forecasts
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
