"""Intervals of forecasts against closed forms, and against draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from datamodules.energy_records import PUBLISHED
from physics.energy_cost import Configuration, fit_cost, fit_time
from physics.energy_cost.configuration import distinct
from physics.energy_cost.intervals import uncertainty
from physics.energy_cost.records import read_table
from tests.physics.energy_cost.test_fitting import record


def noisy(records, deviation, seed):
    generator = np.random.default_rng(seed)
    return [record(r.devices, r.local_batch_size, noise=deviation * generator.standard_normal()) for r in records]


GRID = [record(n, b) for n in (1, 2, 4, 8) for b in (32, 64, 128)]


def test_one_cost_in_closed_form():
    """A = H / E: h of any plan is 1 / (kappa^2 sum A^2), about 1 / n."""
    runs = noisy(GRID, 0.02, 0)
    fit = fit_cost(runs, ("device",))
    a = np.array([r.device_hours / r.energy_kwh for r in runs])
    kappa = a.sum() / (a @ a)
    s = math.sqrt(((kappa * a - 1) ** 2).sum() / (len(runs) - 1))
    expected = student.ppf(0.975, len(runs) - 1) * s * math.sqrt(1 + 1 / (kappa**2 * (a @ a)))
    for plan in (record(2, 64), record(512, 1, 10**7)):  # one cost alone knows no other direction
        assert fit.half_width(plan) == pytest.approx(expected, rel=1e-9)


def test_two_costs_in_closed_form():
    """h = (a_1^2 S_22 - 2 a_1 a_2 S_12 + a_2^2 S_11) / (S_11 S_22 - S_12^2) with the sums S of the weighted columns."""
    runs = noisy(GRID, 0.02, 1)
    fit = fit_cost(runs, ("device", "updates"))
    columns = np.array([[r.device_hours, r.device_updates / 3.6e6] for r in runs])
    a = columns / np.array([r.energy_kwh for r in runs])[:, None]
    (s11, s12), (_, s22) = a.T @ a
    residual = a @ np.array(fit.coefficients) - 1
    assert min(fit.coefficients) > 0
    s = math.sqrt((residual**2).sum() / (len(runs) - 2))
    widths = []
    for plan in (record(2, 64), record(2, 8), record(2, 2), record(2, 1)):
        x1, x2 = np.array([plan.device_hours, plan.device_updates / 3.6e6]) / fit.predict(plan)
        h = (x1**2 * s22 - 2 * x1 * x2 * s12 + x2**2 * s11) / (s11 * s22 - s12**2)
        widths.append(fit.half_width(plan))
        assert widths[-1] == pytest.approx(student.ppf(0.975, len(runs) - 2) * s * math.sqrt(1 + h), rel=1e-9)
    assert sorted(widths) == widths and widths[-1] > 1.2 * widths[0], "smaller batches than any run had"


def test_intervals_hold_as_often_as_they_say_near_and_far():
    """400 times twelve runs with errors of 2 %: about 95 of 100 new runs are inside, also far from the runs."""
    generator = np.random.default_rng(2)
    plans = {"near": record(4, 64), "far": record(64, 2)}
    inside, flat = dict.fromkeys(plans, 0), dict.fromkeys(plans, 0)
    for seed in range(400):
        fit = fit_cost(noisy(GRID, 0.02, seed))
        for name, plan in plans.items():
            error = plan.energy_kwh * (1 + 0.02 * generator.standard_normal()) / fit.predict(plan) - 1
            inside[name] += abs(error) <= fit.half_width(plan)
            flat[name] += abs(error) <= student.ppf(0.975, 8) * fit.uncertainty.deviation
    assert 0.92 <= inside["near"] / 400 <= 0.98, inside
    assert 0.90 <= inside["far"] / 400 <= 0.98, inside
    assert flat["far"] / 400 < 0.85, "the spread of the errors alone would promise too much"


def test_published_runs_are_where_the_others_say():
    """15 of 17 energies (the two others are the smallest local batches of their series), all device hours."""
    runs = distinct(read_table(PUBLISHED, repetitions=5))
    inside = [0, 0]
    for run in runs:
        others = [other for other in runs if other is not run]
        cost, time = fit_cost(others), fit_time(others)
        plan = Configuration(run.devices, run.local_batch_size, run.num_samples, run.epochs)
        inside[0] += abs(run.energy_kwh / cost.predict(run) - 1) <= cost.half_width(run)
        inside[1] += abs(run.device_hours / time.device_hours(plan) - 1) <= time.half_width(plan)
    assert inside == [15, 17]


def test_directions_that_no_run_has_are_left_out_and_nothing_tested_has_no_width():
    matrix = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [1.5, 1.5, 0.0]])
    found = uncertainty(matrix, [0.1, -0.1, 0.0], 0.01)
    assert found.freedom == 2 and len(found.axes) == 1
    assert found.leverage([1.0, 1.0, 0.0]) == pytest.approx(1 / 7.25)  # the sum of the two, of one direction
    assert found.leverage([0.0, 0.0, 9.0]) == 0
    assert uncertainty(np.eye(2), [0.0, 0.0], 0.01).half_width([1.0, 0.0]) == math.inf
