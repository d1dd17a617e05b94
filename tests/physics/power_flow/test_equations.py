"""The fast residual and Jacobian against the differentiable residual, and products without matrices."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.autograd.functional import jacobian

from physics.power_flow import Equations, Grid, Scenarios, residual
from physics.power_flow.equations import State
from tests.physics.power_flow.grids import F64, embedded, tiny_case


def shared_slack(grid: Grid) -> Grid:
    weights = torch.rand(grid.num_buses, dtype=F64)
    return grid.replace(slack_weights=weights / weights.sum())


def several_slacks(grid: Grid) -> Grid:
    kind = grid.bus_type.clone()
    kind[grid.pv[:2]] = 3
    return grid.replace(bus_type=kind)


GRIDS = {
    "tiny": lambda: Grid.from_matpower(tiny_case()),
    "case14": lambda: embedded("case14"),
    "distributed slack": lambda: shared_slack(embedded("case14")),
    "distributed, two slacks": lambda: shared_slack(several_slacks(embedded("case14"))),
    "several slacks": lambda: several_slacks(embedded("case30")),
    "dense": lambda: embedded("case30"),
}


@pytest.fixture(params=GRIDS)
def point(request):
    """Grid, equations, scenarios with outages, and a state somewhere."""
    torch.manual_seed(0)
    grid, count = GRIDS[request.param](), 3
    s = grid.s_bus()[:, None] * torch.rand(1, count)
    status = (torch.rand(grid.num_branches, count) < 0.9).double()
    status[:, 0], status[0, 1] = grid.status, 0.5
    scenarios = Scenarios(s, None, status)
    eq = Equations(grid, dense=request.param == "dense")
    vm, va = 1 + 0.1 * torch.rand(grid.num_buses, count, dtype=F64), 0.3 * torch.rand(grid.num_buses, count, dtype=F64)
    state = eq.state(vm, va, torch.rand(int(eq.distributed), count, dtype=F64))
    return grid, eq, scenarios, state, vm, va


def of(point, column: int):
    """The differentiable residual of a scenario as a function of the unknowns ``[N_u]``."""
    grid, eq, scenarios, state, *_ = point
    one = State(*(value[:, column : column + 1] for value in state))

    def f(u):
        at = eq.with_unknowns(one, u[:, None])
        share = at.share if eq.distributed else None
        vm, va = eq.in_grid_order(at.vm), eq.in_grid_order(at.va)
        columns = slice(column, column + 1)
        return residual(grid, vm, va, scenarios.s[:, columns], scenarios.status[:, columns], share)[:, 0]

    return f, eq.unknowns(one)[:, 0]


def test_orders(point):
    _, eq, _, state, vm, va = point
    assert torch.equal(eq.in_grid_order(state.vm), vm) and torch.equal(eq.in_grid_order(state.va), va)
    again = eq.with_unknowns(state, eq.unknowns(state))
    assert all(torch.equal(one, two) for one, two in zip(state, again, strict=True))
    moved = state.clone()
    eq.step(moved, torch.ones(eq.num_unknowns, 3, dtype=F64), 1.0)
    assert torch.allclose(eq.unknowns(moved), eq.unknowns(state) + 1)
    assert torch.equal(moved.va[: eq.num_slack], state.va[: eq.num_slack])
    assert torch.equal(moved.vm[: eq.first_pq], state.vm[: eq.first_pq])


def test_residual(point):
    _, eq, scenarios, state, *_ = point
    batch = eq.batch(scenarios)
    fast = eq.mismatch(state, batch)
    _, p, q = eq.injections(state, batch.changes)
    assert torch.allclose(eq.mismatch_of(p, q, state, batch), fast, atol=1e-12, rtol=0)
    for column in range(3):
        f, u = of(point, column)
        assert torch.allclose(f(u), fast[:, column], atol=1e-12, rtol=0)


def test_jacobian_and_products(point):
    _, eq, scenarios, state, *_ = point
    batch = eq.batch(scenarios)
    right = torch.randn(eq.num_unknowns, 3, dtype=F64)
    forward, backward = (
        product(state, right, batch.changes) for product in (eq.jacobian_product, eq.transposed_jacobian_product)
    )
    dense = eq.pattern.dense(eq.jacobian_values(state, batch.changes))
    for column in range(3):
        exact = jacobian(*of(point, column))
        index = torch.tensor([column])
        matrix = eq.jacobian(state.select(index), batch.changes.select(index)).toarray()
        assert torch.allclose(torch.from_numpy(matrix), exact, atol=1e-11, rtol=0)
        assert torch.allclose(dense[column], exact, atol=1e-11, rtol=0)
        assert torch.allclose(forward[:, column], exact @ right[:, column], atol=1e-11, rtol=0)
        assert torch.allclose(backward[:, column], exact.T @ right[:, column], atol=1e-11, rtol=0)


def test_loss_and_gradient(point):
    _, eq, scenarios, state, *_ = point
    loss, gradient, _ = eq.loss_and_gradient(state, eq.batch(scenarios))
    for column in range(3):
        f, u = of(point, column)
        u.requires_grad_()
        mean = f(u).square().mean()
        mean.backward()
        assert float(loss[column]) == pytest.approx(mean.item())
        assert torch.allclose(gradient[:, column], u.grad, atol=1e-11, rtol=0)


def test_buses_of_rows():
    eq = Equations(embedded("case14"))
    grid = eq.grid
    rows = torch.arange(eq.num_unknowns)
    expected = torch.cat([grid.pv, grid.pq, grid.pq])
    assert torch.equal(eq.bus_of_row(rows), expected)
    eq = Equations(shared_slack(embedded("case14")))
    assert int(eq.bus_of_row(torch.tensor(eq.num_unknowns - 1))) == int(grid.slack[0])


def test_admittances_of_scenarios():
    """Scenarios that differ in everything about a branch."""
    from physics.power_flow import admittances
    from physics.power_flow.admittance import BranchAdmittances

    grid = embedded("case14")
    x = torch.stack([grid.x, 1.3 * grid.x, grid.x])
    status = torch.ones(3, 20, dtype=F64)
    status[2, 4] = 0.5
    y = BranchAdmittances(*(value.mT for value in admittances(grid, status, x=x)))
    scenarios = Scenarios(grid.s_bus()[:, None].repeat(1, 3), admittances=y).check(grid)
    eq = Equations(grid)
    vm, va = 1 + 0.1 * torch.rand(14, 3, dtype=F64), 0.3 * torch.rand(14, 3, dtype=F64)
    found = eq.mismatch(eq.state(vm, va), eq.batch(scenarios))
    assert torch.allclose(found, residual(grid, vm, va, scenarios.s, status.mT, x=x), atol=1e-12, rtol=0)
    assert scenarios.select([1]).admittances.ff.shape == (20, 1)
    with pytest.raises(ValueError, match="leave status out"):
        dataclasses.replace(scenarios, status=status.mT).check(grid)
