"""What meters see: identities of the model, noise that depends on its scenario alone, gaps."""

from __future__ import annotations

import pytest
import torch

from datamodules.grid_sources import load_grid
from physics.power_flow import Scenarios, solve
from physics.power_flow.distance import distances
from physics.power_flow.measurements import AT_BRANCHES, QUANTITIES, count, misfit, simulate, with_noise


@pytest.fixture(scope="module")
def solved():
    grid = load_grid("case14")
    generator = torch.Generator().manual_seed(0)
    s = grid.s_bus()[:, None] * (1 + 0.2 * torch.randn(14, 3, generator=generator, dtype=torch.float64))
    solution = solve(grid, Scenarios(s), "newton", tol=1e-11)
    return grid, s, solution


def test_injections_are_those_that_were_solved_for(solved):
    grid, s, solution = solved
    seen = simulate(grid, solution.vm, solution.va)
    assert list(seen) == list(QUANTITIES)
    free = torch.cat([grid.pv, grid.pq])
    torch.testing.assert_close(seen["p"][free], s.real[free], rtol=0, atol=1e-10)
    torch.testing.assert_close(seen["q"][grid.pq], s.imag[grid.pq], rtol=0, atol=1e-10)


def test_power_is_conserved(solved):
    """What is fed in is lost in branches and shunts; branches of resistance lose active power."""
    grid, _, solution = solved
    seen = simulate(grid, solution.vm, solution.va)
    lost = (seen["p_from"] + seen["p_to"]).sum(0)
    shunts = (solution.vm.square() * grid.g_shunt[:, None]).sum(0)
    torch.testing.assert_close(seen["p"].sum(0), lost + shunts, rtol=0, atol=1e-10)
    assert ((seen["p_from"] + seen["p_to"]) > -1e-12).all()


def test_only_what_is_asked_for(solved):
    grid, _, solution = solved
    assert list(simulate(grid, solution.vm, solution.va, ["q_to", "vm"])) == ["q_to", "vm"]
    with pytest.raises(ValueError, match=r"quantity 'i' is unknown; choose from vm, va"):
        simulate(grid, solution.vm, solution.va, ["i"])


def test_noise_of_a_scenario_does_not_depend_on_the_others(solved):
    grid, _, solution = solved
    values = simulate(grid, solution.vm, solution.va)
    sigma = {name: 1e-3 for name in QUANTITIES}
    together = with_noise(values, sigma, 0.2, 5, [0, 1, 2])
    alone = with_noise({name: value[:, 2:] for name, value in values.items()}, sigma, 0.2, 5, [2])
    for name in QUANTITIES:
        torch.testing.assert_close(together[name][:, 2:], alone[name], rtol=0, atol=0, equal_nan=True)
    other = with_noise(values, sigma, 0.2, 6, [0, 1, 2])
    assert (together["vm"] != other["vm"]).all()


def test_noise_and_gaps_have_their_size():
    values = {"vm": torch.ones(2000, 4, dtype=torch.float64), "p": torch.zeros(2000, 4, dtype=torch.float64)}
    found = with_noise(values, {"vm": 0.01, "p": 0.5}, 0.3, 0, range(4))
    for name, sigma in (("vm", 0.01), ("p", 0.5)):
        error = (found[name] - values[name])[found[name].isfinite()]
        assert float(error.std()) == pytest.approx(sigma, rel=0.04)
        assert float(found[name].isnan().double().mean()) == pytest.approx(0.3, abs=0.02)
    assert int(count(found)) == sum(int(v.isfinite().sum()) for v in found.values())


def test_misfit_counts_what_was_measured_in_units_of_its_noise():
    nan = torch.nan
    measured = {"vm": torch.tensor([[1.0, nan], [1.1, 0.9]]), "p_from": torch.tensor([[0.5, 0.4]])}
    simulated = {"vm": torch.tensor([[1.01, 7.0], [1.1, 0.8]]), "p_from": torch.tensor([[0.3, 0.4]])}
    found = misfit(simulated, measured, {"vm": 0.01, "p_from": 0.1})
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.0, -10.0], [-2.0, 0.0]]), atol=1e-5, rtol=0)


def test_angles_are_compared_modulo_a_turn():
    measured = {"va": torch.tensor([[3.1]], dtype=torch.float64)}
    simulated = {"va": torch.tensor([[-3.1]], dtype=torch.float64)}
    found = misfit(simulated, measured, {"va": 1.0})
    assert float(found) == pytest.approx(2 * torch.pi - 6.2)


def test_gaps_have_no_gradient():
    simulated = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    misfit({"vm": simulated}, {"vm": torch.tensor([[torch.nan], [0.5]])}, {"vm": 0.1}).square().sum().backward()
    assert simulated.grad[0] == 0 and simulated.grad[1] == pytest.approx(2 * 0.5 / 0.01)


def test_branches_and_buses_are_all_there():
    assert set(AT_BRANCHES) < set(QUANTITIES) and len(QUANTITIES) == 8


def test_distances():
    """A triangle with a double branch: the shorter of both counts, whichever way it is written."""
    f, t = torch.tensor([0, 1, 0, 1, 2]).numpy(), torch.tensor([1, 0, 2, 2, 3]).numpy()
    length = torch.tensor([5.0, 2.0, 10.0, 1.0, 0.5]).numpy()
    found = distances(5, f, t, length, torch.tensor([0]).numpy())
    assert found.tolist() == [0.0, 2.0, 3.0, 3.5, float("inf")]
