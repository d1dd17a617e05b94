"""First-order methods: step by step what torch.optim does, scenario by scenario."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from physics.power_flow import (
    ADAM_SETTINGS,
    AdamSettings,
    Equations,
    RMSpropSettings,
    descend,
    follow,
    residual,
    solve,
    start_descent,
)
from physics.power_flow.solver import starting_state
from tests.physics.power_flow.grids import F64, embedded, noisy

# A plateau schedule that acts within a few dozen steps.
IMPATIENT = AdamSettings(lr=0.02, factor=0.6, patience=4, threshold=0.2, cooldown=3)
BRISK = RMSpropSettings(lr=0.002, momentum=0.9)


def by_torch(grid, scenarios, column: int, settings, steps: int) -> tuple[torch.Tensor, list[float], list[float]]:
    """The same descent with torch's autograd, optimizer and schedule: unknowns, losses, learning rates."""
    pvpq = torch.cat([grid.pv, grid.pq])
    va = torch.zeros(len(pvpq), dtype=F64, requires_grad=True)
    vm = torch.ones(len(grid.pq), dtype=F64, requires_grad=True)
    if isinstance(settings, AdamSettings):
        optimizer = torch.optim.Adam([va, vm], settings.lr, (settings.beta1, settings.beta2))
        schedule = ReduceLROnPlateau(
            optimizer, "min", settings.factor, settings.patience, settings.threshold, "rel", settings.cooldown
        )
    else:
        optimizer = torch.optim.RMSprop([va, vm], settings.lr, settings.alpha, momentum=settings.momentum)
        schedule = StepLR(optimizer, settings.step_size, settings.gamma)
    losses, rates = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        angles = torch.zeros(grid.num_buses, dtype=F64).index_copy(0, pvpq, va) + grid.va[grid.slack[0]]
        magnitudes = grid.vm.index_copy(0, grid.pq, vm)
        f = residual(grid, magnitudes[:, None], angles[:, None], scenarios.s[:, column : column + 1])
        loss = f.square().mean()
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([loss.item()] if isinstance(settings, AdamSettings) else []))
        losses.append(loss.item())
    return torch.cat([va.detach() + grid.va[grid.slack[0]], vm.detach()]), losses, rates


@pytest.mark.parametrize("settings", [IMPATIENT, BRISK], ids=["adam", "rmsprop"])
def test_steps_are_those_of_torch(settings):
    grid, steps = embedded("case30"), 48
    scenarios = noisy(grid, 3, 0.3)
    eq = Equations(grid)
    batch = eq.batch(scenarios)
    state = starting_state(eq, scenarios, "flat", batch)
    descent = start_descent(eq.unknowns(state), settings)
    losses, rates = [], []
    for _ in range(steps):
        loss, gradient, _ = eq.loss_and_gradient(state, batch)
        losses.append(loss)
        rates.append(descent.lr)
        descent = descend(descent, loss, gradient, settings)
        state = eq.with_unknowns(state, descent.u)
    assert len({tuple(rate.tolist()) for rate in rates}) > 3
    # Where a gradient begins as a rounding error, its sign does too, and a step of Adam has its size.
    for column in range(3):
        u, expected_losses, expected_rates = by_torch(grid, scenarios, column, settings, steps)
        assert torch.allclose(torch.stack(losses)[:, column], torch.tensor(expected_losses, dtype=F64), rtol=1e-4)
        assert torch.allclose(torch.stack(rates)[:, column], torch.tensor(expected_rates, dtype=F64), rtol=1e-12)
        assert torch.allclose(descent.u[:, column], u, atol=1e-5)
    # The whole solver is these steps.
    method = "adam" if isinstance(settings, AdamSettings) else "rmsprop"
    solution = solve(grid, scenarios, method, settings=settings, max_iter=steps)
    assert torch.allclose(eq.unknowns(eq.state(solution.vm, solution.va)), descent.u, atol=1e-12)
    assert solution.iterations.tolist() == [steps] * 3 and not bool(solution.converged.any())


def test_frozen_scenarios_stay():
    grid = embedded("case14")
    scenarios = noisy(grid, 2, 0.1)
    exact = solve(grid, scenarios, "newton", tol=1e-12)
    start = exact.vm.clone(), exact.va.clone()
    start[1][grid.pq, 1] += 0.05
    solution = solve(grid, scenarios, "adam", start=start, max_iter=25, settings=AdamSettings(lr=1e-3))
    assert solution.converged.tolist() == [True, False] and solution.iterations.tolist() == [0, 25]
    assert torch.equal(solution.vm[:, 0], exact.vm[:, 0])


def test_the_end_is_seen():
    grid = embedded("case14")
    solution = solve(grid, method="adam", start=solve(grid, method="newton", tol=1e-12), max_iter=1000)
    assert bool(solution.converged) and int(solution.iterations) == 0


def test_following_a_series():
    """First moment zeroed, second moment and count of steps kept, a fresh schedule."""
    u = torch.randn(5, 2, dtype=F64)
    state = start_descent(u, IMPATIENT)
    for _ in range(30):
        state = descend(state, torch.ones(2, dtype=F64), torch.randn(5, 2, dtype=F64), IMPATIENT)
    assert bool((state.lr < IMPATIENT.lr).all())
    after = follow(state, AdamSettings(lr=1e-4))
    assert torch.equal(after.u, state.u) and torch.equal(after.square, state.square)
    assert bool((after.mean == 0).all()) and after.steps.tolist() == [30, 30] and after.lr.tolist() == [1e-4, 1e-4]
    assert bool((after.best == torch.inf).all()) and not bool(after.frozen.any())


def test_settings_of_the_paper():
    assert ADAM_SETTINGS["case118"].lr == 0.01795 and ADAM_SETTINGS["case118"].patience == 14
    assert ADAM_SETTINGS["case9241pegase"] == ADAM_SETTINGS["default"]
    assert len(ADAM_SETTINGS) == 11


def test_dense_and_sparse_are_the_same():
    grid = embedded("case14")
    options = {"max_iter": 60, "settings": IMPATIENT}
    sparse, dense = (solve(grid, noisy(grid, 2), "adam", dense=dense, **options) for dense in (False, True))
    assert float((sparse.v - dense.v).abs().max()) < 1e-10


def test_lbfgs():
    """It needs tens of times the iterations of Newton's method, but gets there on a small grid."""
    grid = embedded("case14")
    scenarios = noisy(grid, 3, 0.1)
    exact = solve(grid, scenarios, "newton", tol=1e-11)
    found = solve(grid, scenarios, "lbfgs", tol=1e-7, max_iter=600)
    assert bool(found.converged.all()) and bool((found.iterations > 40).all())
    assert float((found.v - exact.v).abs().max()) < 1e-4
    alone = solve(grid, scenarios.select([1]), "lbfgs", tol=1e-7, max_iter=600)
    assert float((alone.v - found.v[:, 1:2]).abs().max()) < 1e-5


def test_lbfgs_decreases_the_loss():
    grid = embedded("case57")
    points = solve(grid, method="lbfgs", max_iter=60, record=True).history
    losses = [point.mse for point in points]
    assert all(later <= loss for loss, later in itertools.pairwise(losses))
    assert losses[-1] < 1e-2 * losses[0]
