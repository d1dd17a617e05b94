"""Derivatives of solutions, first and second, to everything; and their memory of what they need."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from physics.power_flow import BRANCH_PARAMETERS, Grid, NotConverged, PowerFlowLayer, Solver, power_flow, solve
from physics.power_flow import implicit as module
from tests.physics.power_flow.grids import F64, embedded, noisy, tiny_case

OF_GRID = ("r", "x", "g", "b", "r_asym", "x_asym", "g_asym", "b_asym", "tap", "shift", "g_shunt", "b_shunt", "va")


def tiny() -> Grid:
    return Grid.from_matpower(tiny_case())


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def test_to_everything():
    grid, count = tiny(), 2
    s = grid.s_bus()[:, None] * torch.tensor([1.0, 0.7])

    def f(s, vm, status, *fields):
        changed = grid.replace(**dict(zip(OF_GRID, fields, strict=True)))
        return power_flow(changed, s, vm, status, tol=1e-12)[:2]

    inputs = leaves(s, grid.vm[:, None].repeat(1, count), grid.status[:, None].repeat(1, count))
    assert gradcheck(f, inputs + leaves(*(getattr(grid, name) for name in OF_GRID)), atol=1e-6)


def test_to_shared_set_points_and_a_distributed_slack():
    grid = tiny().replace(slack_weights=torch.tensor([0.5, 0.3, 0.2], dtype=F64))
    s = grid.s_bus()[:, None] * torch.tensor([1.0, 0.7])

    def f(s, vm, status, weights, x):
        return power_flow(grid.replace(slack_weights=weights, x=x), s, vm, status, tol=1e-12)[:2]

    assert gradcheck(f, leaves(s, grid.vm, grid.status, grid.slack_weights, grid.x), atol=1e-6)


def test_to_loads_and_generators_of_the_grid():
    grid = tiny()

    def f(p, q, gen):
        return power_flow(grid.replace(p_load_mw=p, q_load_mvar=q, gen_p_mw=gen), tol=1e-12)[:2]

    assert gradcheck(f, leaves(grid.p_load_mw, grid.q_load_mvar, grid.gen_p_mw), atol=1e-6, rtol=1e-4)


def test_parameters_that_differ_between_scenarios():
    grid, count = embedded("case14"), 3
    s = noisy(grid, count).s
    x = grid.x * (0.8 + 0.4 * torch.rand(count, 20, dtype=F64))
    tap = grid.tap * (0.98 + 0.04 * torch.rand(count, 20, dtype=F64))
    together = power_flow(grid, s, x=x, tap=tap, tol=1e-11)[:2]
    for b in range(count):
        one = power_flow(grid.replace(x=x[b], tap=tap[b]), s[:, b : b + 1], tol=1e-11)[:2]
        assert all(torch.allclose(t[:, b : b + 1], o, atol=1e-9) for t, o in zip(together, one, strict=True))
    small = tiny()
    s = small.s_bus()[:, None] * torch.tensor([1.0, 0.7])
    (x,) = leaves(small.x * (0.8 + 0.4 * torch.rand(2, 3, dtype=F64)))
    assert gradcheck(lambda x: power_flow(small, s, x=x, tol=1e-12)[:2], x, atol=1e-6)


def test_twice():
    grid = tiny()
    s = grid.s_bus()[:, None]

    def f(s, vm, x):
        vm, va, _ = power_flow(grid.replace(x=x), s, vm, tol=1e-13)
        return vm.square().sum() + va.sin().sum()

    assert gradgradcheck(f, leaves(s, grid.vm, grid.x), atol=1e-5)


def test_by_hand_on_two_buses():
    """The derivative of the root of the biquadratic."""
    from tests.physics.power_flow.grids import two_buses

    r, x, p, q = 0.05, 0.2, 0.4, 0.1
    grid = two_buses(r, x, p, q)
    p, q, r, x = leaves(*(torch.tensor(value, dtype=F64) for value in (p, q, r, x)))
    half = (1 - 2 * (p * r + q * x)) / 2
    root = half + (half**2 - (p**2 + q**2) * (r**2 + x**2)).sqrt()
    expected = torch.autograd.grad(root.sqrt(), (p, q, r, x))
    s = torch.stack([torch.zeros((), dtype=torch.complex128), -torch.complex(p, q)])[:, None]
    vm, _, _ = power_flow(grid.replace(r=r[None], x=x[None]), s, tol=1e-13)
    found = torch.autograd.grad(vm[1, 0], (p, q, r, x))
    assert torch.allclose(torch.stack(found), torch.stack(expected), atol=1e-9)


@pytest.mark.parametrize("method", ["chord", "newton"])
def test_the_way_forward_does_not_matter(method):
    grid = embedded("case118")
    s, x = leaves(noisy(grid, 4).s, grid.x)
    vm, va, solution = power_flow(grid.replace(x=x), s, method=method)
    assert set(solution.method) == {method} and torch.equal(vm, solution.vm)
    weight = torch.randn(118, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((weight * (vm + va)).sum(), (s, x))
    s, x = leaves(s, x)
    vm, va, _ = power_flow(grid.replace(x=x), s, method="lm", tol=1e-11)
    expected = torch.autograd.grad((weight * (vm + va)).sum(), (s, x))
    assert all(torch.allclose(one, two, rtol=1e-6, atol=1e-8) for one, two in zip(found, expected, strict=True))


def test_adjoints_without_a_shared_factorization(monkeypatch):
    """Where iterations do not get there, scenario by scenario; and where the mean's Jacobian is singular."""
    grid = embedded("case14")
    s = noisy(grid, 3, 0.2).s

    def gradient() -> torch.Tensor:
        (leaf,) = leaves(s)
        return torch.autograd.grad(power_flow(grid, leaf, tol=1e-12)[0].sum(), leaf)[0]

    expected = gradient()
    monkeypatch.setattr(module, "_ADJOINT_STEPS", 1)
    assert torch.allclose(gradient(), expected, atol=1e-9)
    monkeypatch.setattr(module._Problem, "_factorized", lambda self: None)
    assert torch.allclose(gradient(), expected, atol=1e-9)


def test_failures_are_not_differentiated():
    grid = embedded("case14")
    s = grid.s_bus()[:, None] * torch.tensor([1.0, 30.0])
    with pytest.raises(NotConverged, match="case14: 1 of 2 not converged: scenario 1"):
        power_flow(grid, s)
    _, _, solution = power_flow(grid, s, allow_failures=True)
    assert solution.converged.tolist() == [True, False]


def test_a_solver_for_many_batches():
    grid = embedded("case57")
    solver = Solver(grid)
    for seed in range(2):
        s = noisy(grid, 3, seed=seed).s
        vm, va, _ = power_flow(grid, s, solver=solver, tol=1e-11)
        expected = solve(grid, noisy(grid, 3, seed=seed), tol=1e-11)
        assert torch.allclose(torch.polar(vm, va), expected.v, atol=1e-10)


def test_layer():
    grid = embedded("case14")
    layer = PowerFlowLayer(grid)
    s = noisy(grid, 4).s
    vm, va = layer(s)
    assert torch.allclose(torch.polar(vm, va), solve(grid, noisy(grid, 4), tol=1e-11).v, atol=1e-9)
    again, _ = layer(s)  # starts from where the last call ended
    assert torch.allclose(again, vm, atol=1e-9)
    x = torch.nn.Parameter(grid.x.log())
    vm, _ = layer(s, x=x.exp())
    vm.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    several, _ = layer(s, x=x.exp().expand(4, -1))
    assert torch.allclose(several, vm, atol=1e-9)
    shunted, _ = layer(s, b_shunt=grid.b_shunt + 0.1)
    assert (shunted - vm).max().item() > 1e-3
    assert layer.to("cpu").grid.vm.device.type == "cpu"
    assert layer.float().grid.vm.dtype == torch.float32
    assert set(BRANCH_PARAMETERS) <= set(vars(layer.grid))


def test_training_through_the_layer():
    """Find the reactance of one branch from voltages."""
    grid = embedded("case14")
    s = noisy(grid, 8, 0.2).s
    measured = torch.polar(*PowerFlowLayer(grid)(s)).detach()
    scale = torch.nn.Parameter(torch.tensor(1.4, dtype=F64))
    optimizer = torch.optim.LBFGS([scale], line_search_fn="strong_wolfe")
    layer = PowerFlowLayer(grid)
    pick = torch.zeros(20, dtype=F64).index_fill(0, torch.tensor(6), 1.0)

    def closure():
        optimizer.zero_grad()
        vm, va = layer(s, x=grid.x * (1 + pick * (scale - 1)))
        loss = (torch.polar(vm, va) - measured).abs().square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert scale.item() == pytest.approx(1, abs=1e-4)
