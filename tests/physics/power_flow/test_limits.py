"""Limits of reactive power: kept at the end, by whoever gave up the set-point, and back where there is no need."""

from __future__ import annotations

import pytest
import torch

from physics.power_flow import BusType, Grid, Scenarios, solve
from physics.power_flow.limits import generator_limits, generator_reactive_power, solve_with_q_limits
from tests.physics.power_flow.grids import embedded, noisy, tiny_case


def test_limits_of_a_bus_add_up():
    case = tiny_case()
    case["gen"] = case["gen"][[0, 1, 1, 1]]
    case["gen"][3, 7] = 0  # out of service
    grid = Grid.from_matpower(case)
    low, high = generator_limits(grid)
    assert low.tolist() == [-0.99, -0.8, 0] and high.tolist() == [0.99, 1.2, 0]


@pytest.mark.parametrize("name", ["case118", "case300"])
def test_limits_are_kept(name):
    grid, count = embedded(name), 6
    scenarios = noisy(grid, count, 0.05, swing=0.0)
    solution = solve_with_q_limits(grid, scenarios, tol=1e-9)
    assert bool(solution.converged.all())
    q = generator_reactive_power(grid, scenarios, solution)
    low, high = (limit[:, None] for limit in generator_limits(grid))
    pv = grid.bus_type == BusType.PV
    assert bool((q <= high + 1e-5)[pv].all()) and bool((q >= low - 1e-5)[pv].all())
    # Whoever holds the set-point is within the limits; whoever does not is at one, on the right side of the set-point.
    gave_up = pv[:, None] & (solution.bus_type == BusType.PQ)
    points = grid.vm[:, None].expand(-1, count)
    assert torch.equal(solution.vm[pv[:, None] & ~gave_up], points[pv[:, None] & ~gave_up])
    at_high, at_low = (q - high).abs() < 1e-5, (q - low).abs() < 1e-5
    assert bool((at_high | at_low)[gave_up].all())
    narrow = (high - low).expand(-1, count) < 1e-4
    assert bool((solution.vm <= points + 1e-5)[gave_up & at_high & ~narrow].all())
    assert bool((solution.vm >= points - 1e-5)[gave_up & at_low & ~narrow].all())
    assert bool(gave_up.any())
    for b in (0, count - 1):
        one = solve_with_q_limits(grid, scenarios.select([b]), tol=1e-9)
        assert torch.equal(one.bus_type[:, 0], solution.bus_type[:, b])
        assert float((one.v[:, 0] - solution.v[:, b]).abs().max()) < 1e-6


def test_wide_limits_change_nothing():
    grid = embedded("case57")
    wide = grid.replace(
        gen_q_min_mvar=torch.full_like(grid.gen_q_min_mvar, -1e4),
        gen_q_max_mvar=torch.full_like(grid.gen_q_max_mvar, 1e4),
    )
    solution = solve_with_q_limits(wide, tol=1e-10)
    assert float((solution.v - solve(grid, tol=1e-10).v).abs().max()) < 1e-9
    assert torch.equal(solution.bus_type[:, 0], grid.bus_type)


def test_reactive_power_of_generators_is_what_is_missing():
    """At every bus: generators, less loads, is what flows into the grid; with outages and several generators."""
    grid = embedded("case118")
    scenarios = noisy(grid, 3)
    status = grid.status[:, None].repeat(1, 3)
    status[4, 1] = 0
    scenarios = Scenarios(scenarios.s, status=status)
    solution = solve(grid, scenarios, tol=1e-11)
    q = generator_reactive_power(grid, scenarios, solution)
    pq = grid.bus_type == BusType.PQ
    assert float((q - (grid.generation_mva().imag / grid.base_mva)[:, None])[pq].abs().max()) < 1e-9


def test_rounds_end():
    grid = embedded("case118")
    solution = solve_with_q_limits(grid, max_rounds=1)
    assert not bool(solution.converged.any())  # violations were found and nobody has dealt with them
