"""Limits of reactive power: generators that reach one give up their voltage set-point."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from physics.power_flow.admittance import ybus_sparse
from physics.power_flow.grid import BusType, Grid
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import Solution
from physics.power_flow.solver import Solver, Start

# Violations below are none, and voltages this close to their set-point have reached it, per unit.
_SLACK_OF_LIMITS = 1e-6


def generator_limits(grid: Grid) -> tuple[Tensor, Tensor]:
    """Least and largest reactive power that the generators of every bus give together, per unit, ``[n]``.

    Where there is no generator in service both are 0.
    """
    on = grid.gen_status != 0
    none = torch.zeros_like(grid.vm)
    low, high = (
        none.index_add(0, grid.gen_bus[on], limit[on]) / grid.base_mva
        for limit in (grid.gen_q_min_mvar, grid.gen_q_max_mvar)
    )
    return low, high


def generator_reactive_power(grid: Grid, scenarios: Scenarios, solution: Solution) -> Tensor:
    """Reactive power that the generators of every bus give at a solution, per unit, ``[n, B]``.

    The imaginary part of the scenarios' injections is what loads draw and what the grid's generators are scheduled to
    give, as `Scenarios.from_power` has it. Outages of the scenarios are looked at.
    """
    scheduled = grid.generation_mva().imag / grid.base_mva
    load = scheduled[:, None] - scenarios.s.imag
    return _injected(grid, scenarios, solution).imag + load


def _injected(grid: Grid, scenarios: Scenarios, solution: Solution) -> Tensor:
    """Complex power that flows from every bus into the grid, per unit, ``[n, B]``."""
    if scenarios.status is None and scenarios.admittances is None:
        v = solution.v
        return v * (ybus_sparse(grid) @ v).conj()
    from physics.power_flow.equations import Equations

    eq = Equations(grid)
    state = eq.state(solution.vm, solution.va)
    _, p, q = eq.injections(state, eq.batch(scenarios).changes)
    return torch.complex(eq.in_grid_order(p), eq.in_grid_order(q))


@torch.no_grad()
def solve_with_q_limits(
    grid: Grid,
    scenarios: Scenarios | None = None,
    method: str = "chord",
    *,
    max_rounds: int = 20,
    start: Start | None = None,
    **options: Any,
) -> Solution:
    """Solve with limits of reactive power at PV buses.

    A PV bus whose generators would have to give more or less than they can becomes a PQ bus at the limit; it becomes PV
    again if its voltage passes the set-point. Rounds go on until nothing changes. Slack buses have no limits.

    Args:
        grid: The grid.
        scenarios: The scenarios; None: the grid's own injections.
        method: See `Solver.solve`.
        max_rounds: Most rounds; scenarios that still change then count as not converged.
        start: Of the first round, see `Solver.solve`.
        options: Of `Solver.solve`.

    Returns:
        The solution, with ``bus_type`` ``[n, B]``.
    """
    scenarios = Scenarios.base(grid) if scenarios is None else scenarios
    count = len(scenarios)
    low, high = (limit[:, None] for limit in generator_limits(grid))
    scheduled = grid.generation_mva().imag / grid.base_mva
    load = scheduled[:, None] - scenarios.s.imag
    points = (grid.vm[:, None] if scenarios.vm is None else scenarios.vm).expand(-1, count)
    kind = grid.bus_type[:, None].repeat(1, count)
    was_pv = kind == BusType.PV
    at_high, at_low = torch.zeros_like(was_pv), torch.zeros_like(was_pv)
    solution: Solution | None = None
    changed = torch.ones(count, dtype=torch.bool, device=grid.device)
    for _ in range(max_rounds):
        limited = torch.where(at_high, high, low) - load
        q = torch.where(at_high | at_low, limited, scenarios.s.imag)
        given = dataclasses.replace(scenarios, s=torch.complex(scenarios.s.real, q))
        columns = changed.nonzero()[:, 0]
        part = _solve_by_types(grid, given.select(columns), kind[:, columns], method, _of(start, columns), options)
        solution = part if solution is None else _merged(solution, part, columns)
        start = solution
        given_q = generator_reactive_power(grid, scenarios, solution)
        over = was_pv & (kind == BusType.PV) & (given_q > high + _SLACK_OF_LIMITS)
        under = was_pv & (kind == BusType.PV) & (given_q < low - _SLACK_OF_LIMITS)
        back = (at_high & (solution.vm > points + _SLACK_OF_LIMITS)) | (
            at_low & (solution.vm < points - _SLACK_OF_LIMITS)
        )
        at_high, at_low = (at_high | over) & ~back, (at_low | under) & ~back
        kind = torch.where(at_high | at_low, BusType.PQ.value, grid.bus_type[:, None])
        changed = (over | under | back).any(0) & solution.converged
        if not bool(changed.any()):
            break
    assert solution is not None
    return dataclasses.replace(solution, bus_type=kind, converged=solution.converged & ~changed)


def _of(start: Start | None, columns: Tensor) -> Start | None:
    """A warm start of some scenarios."""
    if isinstance(start, Solution):
        return start.vm[:, columns], start.va[:, columns]
    if start is None or isinstance(start, str) or start[0].ndim == 1 or start[0].shape[1] == 1:
        return start
    return start[0][:, columns], start[1][:, columns]


def _solve_by_types(
    grid: Grid, scenarios: Scenarios, kind: Tensor, method: str, start: Start | None, options: dict[str, Any]
) -> Solution:
    """Solve scenarios whose buses differ in type, those of one pattern together."""
    patterns, which = torch.unique(kind, dim=1, return_inverse=True)
    whole: Solution | None = None
    for number in range(patterns.shape[1]):
        columns = (which == number).nonzero()[:, 0]
        solver = Solver(grid, patterns[:, number])
        part = solver.solve(scenarios.select(columns), method, start=_of(start, columns), **options)
        whole = _spread(part, columns, len(scenarios)) if whole is None else _merged(whole, part, columns)
    assert whole is not None
    return whole


def _spread(part: Solution, columns: Tensor, count: int) -> Solution:
    """A solution of ``count`` scenarios of which only some columns are filled."""
    index = torch.zeros(count, dtype=torch.int64, device=columns.device)
    index[columns] = torch.arange(len(columns), device=columns.device)
    method = tuple(part.method[i] for i in index.tolist())
    tensors = {
        field.name: value[..., index]
        for field in dataclasses.fields(part)
        if isinstance(value := getattr(part, field.name), Tensor)
    }
    return dataclasses.replace(part, method=method, **tensors)


def _merged(whole: Solution, part: Solution, columns: Tensor) -> Solution:
    """The solution with some columns replaced."""
    method = list(whole.method)
    for place, name in zip(columns.tolist(), part.method, strict=True):
        method[place] = name
    tensors = {}
    for field in dataclasses.fields(whole):
        mine, theirs = getattr(whole, field.name), getattr(part, field.name)
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            tensors[field.name] = mine.index_copy(-1, columns, theirs)
    return dataclasses.replace(whole, method=tuple(method), **tensors)
