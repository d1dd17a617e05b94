"""Outages: which island, exact solutions against branches taken out one by one, screening."""

from __future__ import annotations

import pytest
import torch

from physics.power_flow import (
    Contingencies,
    Grid,
    NotConverged,
    Scenarios,
    Solver,
    branch_flows,
    contingencies,
    factorization,
    screen,
    solve,
    solve_contingencies,
)
from physics.power_flow import contingency as module
from physics.power_flow.contingency import Woodbury, dc_outage_flows
from tests.physics.power_flow.grids import F64, embedded


def test_islanding_by_name():
    grid = embedded("case118")
    found = contingencies(grid)
    assert len(found) == 186 and len(found.solvable()) == 177
    lost = found.islanded()
    assert len(lost) == 9 and lost.islanded_buses.tolist().count(1) == 7
    for i in range(9):
        buses = lost.buses_cut_off(grid, i)
        assert len(buses) == int(lost.islanded_buses[i])
        status = grid.status.clone()
        status[lost.branches[i]] = 0
        with pytest.raises(ValueError, match="no branch in service connects"):
            grid.replace(status=status).check()
    for i in range(0, 177, 8):
        status = grid.status.clone()
        status[found.solvable().branches[i]] = 0
        grid.replace(status=status).check()


def test_parallel_branches_are_no_bridges():
    grid = embedded("case118")
    pairs = list(zip(grid.from_bus.tolist(), grid.to_bus.tolist(), strict=True))
    twice = [i for i, pair in enumerate(pairs) if pairs.count(pair) == 2]
    assert twice
    found = contingencies(grid)
    assert not bool(found.islanding[twice].any())
    both = contingencies(grid, 2, among=torch.tensor(twice))
    assert "(2)" in both.names[0] and len(both) == len(twice) * (len(twice) - 1) // 2


def test_all_branches_of_a_feeder_are_bridges():
    grid = embedded("case33bw")
    found = contingencies(grid)
    assert len(found) == 32 == int(found.islanding.sum())  # the five ties are out of service
    assert int(found.islanded_buses.max()) == 32 and int(found.islanded_buses.min()) == 1
    with pytest.raises(ValueError, match=r"the outage of .* cuts buses off from every slack"):
        solve_contingencies(grid, found)
    with pytest.raises(ValueError, match=r"solve Contingencies.solvable\(\)"):
        screen(grid, found)


def test_choice_of_branches():
    grid = embedded("case33bw")
    some = contingencies(grid, among=torch.tensor([0, 3, 35]))  # 35 is out of service
    assert some.branches.tolist() == [[0], [3]] and some.names == (grid.branch_names[0], grid.branch_names[3])
    with pytest.raises(ValueError, match="contingencies of k=3 branches: choose 1 or 2"):
        contingencies(grid, 3)


def exact(grid: Grid, outages: Contingencies) -> torch.Tensor:
    """Complex voltages with the branches taken out of the grid itself."""
    voltages = []
    for branches in outages.branches:
        status = grid.status.index_fill(0, branches, 0.0)
        voltages.append(solve(grid.replace(status=status), method="newton", tol=1e-11).v)
    return torch.cat(voltages, dim=1)


@pytest.mark.parametrize("name", ["case14", "case57"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_solutions(name, k, kind, monkeypatch):
    if kind == "sparse":
        monkeypatch.setitem(factorization.DENSE_UP_TO, "cpu", 0)
    monkeypatch.setattr(module, "_CORRECTION_NUMBERS", 4 * 20 * 100)  # several batches
    grid = embedded(name)
    outages = contingencies(grid, k).solvable()
    outages = outages.select(torch.arange(0, len(outages), 1 + len(outages) // 25))
    found = solve_contingencies(grid, outages, tol=1e-10)
    scenarios = outages.scenarios(grid)
    assert scenarios.names == outages.names
    newton = solve(grid, scenarios, "newton", tol=1e-10)
    # Some pairs of case57 leave no solution.
    assert torch.equal(found.converged, newton.converged) and int((~found.converged).sum()) <= (3 if k == 2 else 0)
    solved = found.converged
    assert float((found.v - newton.v)[:, solved].abs().max()) < 1e-8
    assert float((found.v[:, solved] - exact(grid, outages.select(solved))).abs().max()) < 1e-8


def test_the_formula():
    """The corrected inverse is that of the Jacobian without the branches, at the base state."""
    grid = embedded("case57")
    solver = Solver(grid)
    eq = solver.equations
    base, _, _, _ = solver.base(Scenarios.base(grid))
    factors = factorization.DenseInverse(eq.jacobian(base), F64, torch.device("cpu"))
    # Branches that share a bus, at the slack, at PV buses, parallel ones.
    outages = contingencies(grid, 2).solvable().select(torch.arange(0, 2000, 67))
    inverse = Woodbury.of_outages(eq, factors, base, outages.branches.mT)
    b = torch.randn(eq.num_unknowns, len(outages), dtype=F64)
    x = inverse.solve(b).clone()
    for i, branches in enumerate(outages.branches):
        changes = eq.weighted_changes(branches[:, None], -grid.status[branches][:, None])
        assert abs(eq.jacobian(base, changes) @ x[:, i].numpy() - b[:, i].numpy()).max() < 1e-6
    some = torch.tensor([3, 7])
    assert torch.allclose(inverse.select(some).solve(b[:, some]), x[:, some])


def test_other_injections_and_starts():
    grid = embedded("case57")
    outages, s = contingencies(grid).solvable(), 0.6 * grid.s_bus()
    found = solve_contingencies(grid, outages, s, tol=1e-10)
    expected = solve(grid, outages.scenarios(grid, s), "newton", tol=1e-10)
    assert float((found.v - expected.v).abs().max()) < 1e-8
    solver = Solver(grid)
    again = solve_contingencies(grid, outages, s, tol=1e-10, start=solver.solve(), solver=solver)
    assert float((found.v - again.v).abs().max()) < 1e-8
    with pytest.raises(NotConverged, match=r"the base case has no solution"):
        solve_contingencies(grid, outages, 40 * grid.s_bus())


def test_outages_without_solution_are_told():
    grid = embedded("case300")
    outages = contingencies(grid).solvable()
    lost = [outages.names.index(name) for name in outages.names if name.startswith(grid.bus_names[190])]
    lost += list(range(0, len(outages), 40))
    some = outages.select(torch.tensor(lost))
    found = solve_contingencies(grid, some)
    newton = solve(grid, some.scenarios(grid), "newton", start="flat", fallback=False)
    assert torch.equal(found.converged, found.converged | newton.converged)
    assert bool(found.v.isfinite().all())


def test_screening_becomes_exact():
    grid = embedded("case118")
    outages = contingencies(grid).solvable()
    exact_solution = solve_contingencies(grid, outages, tol=1e-11)
    flows = branch_flows(grid, exact_solution.vm, exact_solution.va, outages.status(grid))
    largest = torch.maximum(flows.i_from.abs(), flows.i_to.abs())
    limits = torch.full((grid.num_branches,), 0.5, dtype=F64)
    limits[3] = torch.inf
    errors = []
    for steps in (0, 1, 2, 14):
        found = screen(grid, outages, limits, steps)
        errors.append(float((found.loading - largest / limits[:, None])[torch.arange(186) != 3].abs().mean()))
        assert bool(found.loading[3].isnan().all()) and not bool(found.overloaded[3].any())
        assert found.vm.shape == exact_solution.vm.shape
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-6
    assert float(found.max_mismatch.max()) < 1e-6
    with pytest.raises(ValueError, match="choose 'woodbury' or 'dc'"):
        screen(grid, outages, method="ac")


def test_screening_reads_the_ratings():
    grid = embedded("case30")
    outages = contingencies(grid).solvable()
    found = screen(grid, outages, steps=20)
    solution = solve_contingencies(grid, outages)
    flows = branch_flows(grid, solution.vm, solution.va, outages.status(grid))
    loading = torch.maximum(flows.i_from.abs(), flows.i_to.abs()) * grid.base_mva / grid.rate_mva[:, None]
    assert torch.allclose(found.loading, loading, atol=1e-5) and bool(found.overloaded.any())


@pytest.mark.parametrize("k", [1, 2])
def test_linear_screening(k):
    """Against the DC approximation of every outage."""
    grid = embedded("case57")
    grid = grid.replace(shift=torch.linspace(-0.1, 0.1, grid.num_branches, dtype=F64))
    outages = contingencies(grid, k).solvable()
    outages = outages.select(torch.arange(0, len(outages), 1 + len(outages) // 60))
    solver = Solver(grid)
    found = dc_outage_flows(solver.equations, outages.branches, grid.s_bus())
    va = solver.solve(outages.scenarios(grid), "dc").va
    b = outages.status(grid) / (grid.x * grid.tap)[:, None]
    expected = b * (va[grid.from_bus] - va[grid.to_bus] - grid.shift[:, None])
    assert float((found - expected).abs().max()) < 1e-10
    limits = torch.full((grid.num_branches,), 0.5, dtype=F64)
    shown = screen(grid, outages, limits, method="dc", solver=solver)
    assert torch.allclose(shown.loading, expected.abs() / 0.5) and bool(shown.max_mismatch.isnan().all())
