"""Solvers: closed forms, agreement with each other, batches, starts, fallbacks, and what is said of failures."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from physics.power_flow import METHODS, Equations, Grid, NotConverged, Scenarios, Solver, branch_flows, solve
from physics.power_flow.flows import shunt_power
from physics.power_flow.linear import decoupled_matrices
from tests.physics.power_flow.grids import F64, embedded, noisy, tiny_case, two_buses

EXACT = ("newton", "chord", "fdlf_xb", "fdlf_bx", "lm", "homotopy")


def upper_root(r: float, x: float, p: float, q: float, v: float) -> float:
    """``|V2|^2`` of a line with a load: the larger root of the biquadratic, nan beyond the nose."""
    half = (v * v - 2 * (p * r + q * x)) / 2
    inside = half * half - (p * p + q * q) * (r * r + x * x)
    return half + math.sqrt(inside) if inside >= 0 else math.nan


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, -0.5])
def test_two_buses(method, p):
    r, x, q, v = 0.05, 0.2, 0.2, 1.03
    solution = solve(two_buses(r, x, p, q, v), method=method, tol=1e-12)
    assert bool(solution.converged)
    assert float(solution.vm[1]) ** 2 == pytest.approx(upper_root(r, x, p, q, v), abs=1e-11)


@pytest.mark.parametrize("method", ["newton", "chord"])
def test_beyond_the_nose(method):
    r, x, q = 0.05, 0.2, 0.2
    nose = next(p / 1000 for p in range(3000) if math.isnan(upper_root(r, x, p / 1000, q, 1.0)))
    before, beyond = two_buses(r, x, nose - 0.002, q), two_buses(r, x, nose + 0.002, q)
    assert float(solve(before, method=method).vm[1]) ** 2 == pytest.approx(
        upper_root(r, x, nose - 0.002, q, 1.0), abs=1e-5
    )
    scenarios = Scenarios.base(beyond, "evening")
    solution = solve(beyond, scenarios, method)
    assert not bool(solution.converged) and bool(solution.vm.isfinite().all())
    assert solution.failures(beyond, scenarios)[0].startswith("evening: max|F| = ")
    assert "at bus 2 after" in solution.failures(beyond, scenarios)[0]
    with pytest.raises(NotConverged, match="1 of 1 not converged: evening"):
        solution.require_converged(beyond, scenarios)


@pytest.mark.parametrize("name", ["case14", "case33bw", "case57", "case_ACTIVSg200", "case300"])
def test_methods_agree(name):
    grid = embedded(name)
    expected = solve(grid, method="newton", tol=1e-11)
    assert bool(expected.converged)
    for method in EXACT[1:]:
        # BX suits feeders, whose resistances are large; XB does not converge there.
        if method == "fdlf_xb" and name == "case33bw":
            continue
        found = solve(grid, method=method, tol=1e-10, fallback=False)
        assert bool(found.converged), method
        assert float((found.v - expected.v).abs().max()) < 1e-7, method


def test_power_is_conserved():
    grid = embedded("case118")
    solution = solve(grid, noisy(grid, 5), tol=1e-11)
    flows = branch_flows(grid, solution.vm, solution.va)
    eq = Equations(grid)
    _, p, q = eq.injections(eq.state(solution.vm, solution.va))
    total = torch.complex(p.sum(0), q.sum(0))
    assert torch.allclose(total, flows.losses.sum(0) + shunt_power(grid, solution.vm).sum(0), atol=1e-9, rtol=0)


def test_rotation_of_the_slack():
    grid = embedded("case57")
    turned = grid.replace(va=grid.va + 0.4)
    one, two = solve(grid, tol=1e-11), solve(turned, tol=1e-11)
    assert torch.allclose(two.va, one.va + 0.4, atol=1e-9) and torch.allclose(two.vm, one.vm, atol=1e-9)


def test_several_slacks():
    grid = embedded("case14")
    kind = grid.bus_type.clone()
    kind[5] = 3
    base = solve(grid, tol=1e-12)
    # The second slack is where it would be anyway, so it changes nothing.
    vm, va = grid.vm.clone(), grid.va.clone()
    vm[5], va[5] = base.vm[5, 0], base.va[5, 0]
    both = solve(grid.replace(bus_type=kind, vm=vm, va=va), tol=1e-12)
    assert torch.allclose(both.v, base.v, atol=1e-9)


@pytest.mark.parametrize("method", ["newton", "chord", "lm"])
def test_distributed_slack(method):
    grid = embedded("case118")
    weights = torch.zeros(118, dtype=F64).index_add(0, grid.gen_bus, grid.gen_q_max_mvar.clamp(min=0))
    weights = weights / weights.sum()
    shared = grid.replace(slack_weights=weights)
    s = Scenarios((grid.s_bus() * 1.05)[:, None])
    solution = solve(shared, s, method, tol=1e-11)
    assert bool(solution.converged)
    # With what each bus takes up scheduled, the slack has nothing left to do.
    share = weights[:, None] * solution.slack_power
    plain = solve(grid, Scenarios(s.s + share), "newton", tol=1e-11)
    assert torch.allclose(plain.v, solution.v, atol=1e-8)
    eq = Equations(grid)
    _, p, _ = eq.injections(eq.state(solution.vm, solution.va))
    slack = int(grid.slack[0])
    assert float(eq.in_grid_order(p)[slack]) == pytest.approx(float((s.s + share).real[slack]), abs=1e-9)


def test_fast_decoupled_refuses_a_distributed_slack():
    grid = embedded("case14")
    with pytest.raises(ValueError, match="no distributed slack; choose 'chord' or 'newton'"):
        solve(grid.replace(slack_weights=torch.full((14,), 1 / 14, dtype=F64)), method="fdlf_xb")


def test_decoupled_matrices_of_a_lossless_grid():
    """Without resistances, shunts, charging, taps and shifts, both matrices and both variants are the same."""
    grid = embedded("case14")
    zero, one = torch.zeros_like(grid.x), torch.ones_like(grid.x)
    plain = grid.replace(r=zero, b=zero, tap=one, shift=zero, b_shunt=torch.zeros_like(grid.vm))
    eq = Equations(plain)
    (first, second), (third, fourth) = decoupled_matrices(eq, "xb"), decoupled_matrices(eq, "bx")
    start = eq.first_pq - eq.num_slack
    assert abs(first[start:, start:] - second).max() < 1e-12
    assert abs(first - third).max() < 1e-12 and abs(second - fourth).max() < 1e-12
    with pytest.raises(ValueError, match="choose 'xb' or 'bx'"):
        decoupled_matrices(eq, "xx")


def test_dc():
    """The linear approximation solves its own equations: flows balance at every bus, and shifts count."""
    grid = Grid.from_matpower(tiny_case())
    solution = solve(grid, method="dc")
    assert not bool(solution.converged) and float(solution.va[0]) == 0
    va = solution.va[:, 0]
    flow = (va[grid.from_bus] - va[grid.to_bus] - grid.shift) / (grid.x * grid.tap)
    out = torch.zeros(3, dtype=F64).index_add(0, grid.from_bus, flow).index_add(0, grid.to_bus, -flow)
    assert torch.allclose(out[1:], (grid.s_bus().real - grid.g_shunt)[1:])
    # An outage of the case: as with the branch out of service.
    status = grid.status[:, None].repeat(1, 2)
    status[1, 1] = 0
    both = solve(grid, Scenarios(grid.s_bus()[:, None].repeat(1, 2), status=status), "dc")
    assert torch.allclose(both.va[:, 1:], solve(grid.replace(status=status[:, 1]), method="dc").va)


@pytest.mark.parametrize("method", ["newton", "chord", "fdlf_bx"])
def test_batched_is_serial(method):
    grid, count = embedded("case57"), 6
    scenarios = noisy(grid, count, 0.1)
    points = grid.vm[:, None] + 0.01 * torch.rand(57, count, dtype=F64)
    status = grid.status[:, None].repeat(1, count)
    status[7, 2] = status[0, 4] = 0
    scenarios = dataclasses.replace(scenarios, vm=points, status=status)
    together = solve(grid, scenarios, method, tol=1e-11)
    assert bool(together.converged.all())
    held = torch.cat([grid.slack, grid.pv])
    assert torch.equal(together.vm[held], points[held])
    for b in range(count):
        alone = grid.replace(vm=points[:, b], status=status[:, b])
        one = solve(alone, Scenarios(scenarios.s[:, b : b + 1]), method, tol=1e-11)
        assert float((one.v - together.v[:, b : b + 1]).abs().max()) < 1e-9
    order = torch.randperm(count)
    mixed = solve(grid, scenarios.select(order), method, tol=1e-11)
    assert float((mixed.v - together.v[:, order]).abs().max()) < 1e-9


def test_a_scenario_without_solution_does_not_spoil_others(caplog):
    grid = embedded("case14")
    s = grid.s_bus()[:, None] * torch.tensor([1.0, 1.1, 30.0, 0.9])
    for method in ("chord", "newton"):
        solution = solve(grid, Scenarios(s, names=("a", "b", "c", "d")), method)
        assert solution.converged.tolist() == [True, True, False, True]
        assert bool(solution.v.isfinite().all()) and float(solution.max_mismatch[2]) > 1e-3
        assert len(solution.failures(grid, Scenarios(s))) == 1
        alone = solve(grid, Scenarios(s[:, [0, 1, 3]]), method)
        assert float((alone.v - solution.v[:, [0, 1, 3]]).abs().max()) < 1e-7


def test_far_scenarios_go_to_newton():
    """A factor that the mean's Jacobian does not serve: the fallback does, and says so."""
    grid = embedded("case118")
    s = grid.s_bus()[:, None] * torch.linspace(0.2, 1.8, 9)
    plain = solve(grid, Scenarios(s), max_iter=4, fallback=False)
    assert not bool(plain.converged.all()) and set(plain.method) == {"chord"}
    solution = solve(grid, Scenarios(s), max_iter=4)
    exact = solve(grid, Scenarios(s), "newton", tol=1e-10)
    assert torch.equal(solution.converged, exact.converged) and "newton" in solution.method
    solved = exact.converged
    assert float((solution.v - exact.v)[:, solved].abs().max()) < 1e-7
    assert bool((solution.iterations[solved] <= 4 + 20).all())


def test_starts():
    grid = embedded("case118")
    scenarios = noisy(grid, 3)
    expected = solve(grid, scenarios, "newton", tol=1e-11)
    base = solve(grid)
    warm = (expected.vm, expected.va)
    for start in ("auto", "dc", "flat", "case", base, warm, (base.vm[:, 0], base.va[:, 0]), (base.vm, base.va)):
        for method in ("newton", "chord"):
            found = solve(grid, scenarios, method, start=start, tol=1e-10)
            assert float((found.v - expected.v).abs().max()) < 1e-8
    assert solve(grid, scenarios, "newton", start=warm).iterations.tolist() == [0, 0, 0]
    assert solve(grid, scenarios, "chord", start=expected).iterations.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="start='cold': choose 'auto', 'dc', 'flat', 'case', or give voltages"):
        solve(grid, scenarios, start="cold")
    with pytest.raises(ValueError, match=r"give \[n\], \[n, 1\] or \[n, B\]"):
        solve(grid, scenarios, start=(grid.vm[:5], grid.va[:5]))


@pytest.mark.parametrize(("name", "turn", "nearer"), [("case_ACTIVSg200", 0.0, "case"), ("case300", 1.0, "dc")])
def test_auto_is_the_nearer_start(name, turn, nearer):
    grid = embedded(name)
    grid = grid.replace(va=grid.va + turn * (grid.bus_type != 3))
    first = {
        start: solve(grid, method="newton", start=start, record=True, max_iter=0, fallback=False).history[0].mse
        for start in ("auto", "dc", "case")
    }
    assert first["auto"] == first[nearer] == min(first.values())


def test_history():
    grid = embedded("case118")
    for method in ("newton", "chord", "adam", "fdlf_xb"):
        for count in (1, 3):
            solution = solve(grid, noisy(grid, count), method, record=True, max_iter=30)
            points = solution.history
            assert all(later.seconds >= point.seconds for point, later in itertools.pairwise(points))
            assert all(later.iteration > point.iteration for point, later in itertools.pairwise(points))
            assert points[0].max_mismatch > points[-1].max_mismatch
            assert points[0].flow_deviation_percent > 0 and points[0].mse > 0
            if method != "adam":
                assert points[-1].max_mismatch == pytest.approx(float(solution.max_mismatch.max()))
    assert solve(grid).history == ()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 3])
def test_what_has_no_solution_has_a_history(method, count):
    """Not even the scenario in the middle, around which chord iterations go."""
    grid = embedded("case14")
    far = Scenarios(20 * noisy(grid, count).s)
    solution = solve(grid, far, method, record=True, max_iter=5, fallback=False)
    assert not bool(solution.converged.any())
    assert solution.history and min(point.max_mismatch for point in solution.history) > 1e-3


def test_what_history_holds():
    """The measures of the paper at the flat start, by their definitions."""
    grid = embedded("case14")
    eq, scenarios = Equations(grid), noisy(grid, 2)
    point = solve(grid, scenarios, "newton", start="flat", record=True).history[0]
    batch = eq.batch(scenarios)
    vm = torch.where(grid.bus_type == 1, 1.0, grid.vm)[:, None].repeat(1, 2)
    f = eq.mismatch(eq.state(vm, torch.zeros_like(vm)), batch)
    assert point.max_mismatch == pytest.approx(float(f.abs().max()))
    assert point.mse == pytest.approx(float(f.square().mean()))
    target = eq.targets(batch)
    assert point.flow_deviation_percent == pytest.approx(100 * float(f.abs().sum() / target.abs().sum()))
    expected = torch.cat([scenarios.s.real[torch.cat([grid.pv, grid.pq])], scenarios.s.imag[grid.pq]])
    assert torch.allclose(target, expected)


def test_unknown_method():
    with pytest.raises(ValueError, match="method='nr': choose one of newton, chord"):
        solve(embedded("case14"), method="nr")


def test_iterations_of_newton_are_quadratic():
    grid = embedded("case118")
    points = solve(grid, method="newton", tol=1e-12, record=True).history
    sizes = [point.max_mismatch for point in points]
    assert sizes[-2] < 1e-4 and sizes[-1] < 10 * sizes[-2] ** 2 + 1e-12


def test_a_solver_can_be_used_again():
    grid = embedded("case57")
    solver = Solver(grid)
    for seed in range(3):
        scenarios = noisy(grid, 4, seed=seed)
        assert torch.equal(solver.solve(scenarios).v, solve(grid, scenarios).v)
        assert torch.equal(solver.solve(scenarios, "newton").v, solve(grid, scenarios, "newton").v)


def test_chunks_change_nothing(monkeypatch):
    from physics.power_flow import newton, solver

    grid = embedded("case57")
    scenarios = noisy(grid, 50, swing=0.2)
    whole = {method: solve(grid, scenarios, method, tol=1e-11) for method in ("chord", "newton")}
    monkeypatch.setattr(solver, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(solver, "LEAST_CHUNK", 7)
    monkeypatch.setattr(newton, "NNZ_TOGETHER", 3 * Equations(grid).pattern.nnz)
    for method, expected in whole.items():
        found = solve(grid, scenarios, method, tol=1e-11, record=True)
        assert float((found.v - expected.v).abs().max()) < 1e-9 and bool(found.converged.all())
        assert found.history[-1].max_mismatch <= 1e-11


def test_a_singular_jacobian_is_no_crash():
    """A feeder without any load at no voltage: the Jacobian of the flat start is singular at one scenario."""
    grid = two_buses(0.05, 0.2, 0.5, 0.1)
    dead = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64)
    s = grid.s_bus()[:, None].repeat(1, 2)
    solution = solve(grid, Scenarios(s), "newton", start=(dead, torch.zeros_like(dead)))
    assert bool(solution.converged[1]) and bool(solution.v.isfinite().all())
