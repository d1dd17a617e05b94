from __future__ import annotations

import pytest
import torch

from physics.shallow_water import (
    EARTH_RADIUS_M,
    Relaxation,
    ShallowWaterEquations,
    SphericalShallowWater,
    SphericalTransform,
    State,
    balanced_flow,
    stable_step,
)
from physics.shallow_water.equations import OMEGA_PER_S
from physics.shallow_water.generator import FIELDS


def disturbed(grid: SphericalTransform, members: int = 1) -> State:
    """Members that differ in a small random vorticity."""
    base = balanced_flow(grid, 20.0 * grid.cos_latitude, 3000.0)
    generator = torch.Generator().manual_seed(1)
    size = grid.truncation + 1
    parts = torch.randn(2, members, size, size, dtype=torch.float64, generator=generator)
    noise = torch.complex(parts[0], parts[1]) * grid.valid * (grid.degree < 6) * 2e-6
    noise[:, 0] = 0
    state = base.coefficients[:, None].repeat(1, members, 1, 1)
    state[0] += noise
    return State(state)


def test_a_balanced_flow_is_steady():
    grid = SphericalTransform(32, 64, 21)
    state = balanced_flow(grid, 30.0 * grid.cos_latitude, 5000.0)
    rate = ShallowWaterEquations(grid, dt_s=600).tendency(state)
    assert rate[:2].abs().max() < 1e-20 and rate[2].abs().max() < 1e-12
    # In closed form: phi = g H - (a Omega U + U^2 / 2) (sin^2 - 1/3).
    phi = grid.synthesis(state.geopotential)[:, 0]
    expected = 9.80616 * 5000.0 - (EARTH_RADIUS_M * OMEGA_PER_S * 30.0 + 450.0) * (grid.mu**2 - 1 / 3)
    assert torch.allclose(phi, expected, atol=1e-7)


def runge_kutta(equations: ShallowWaterEquations, state: State, dt: float, steps: int) -> State:
    """The classical scheme of fourth order."""
    x = state.coefficients
    for _ in range(steps):
        k1 = equations.tendency(State(x))
        k2 = equations.tendency(State(x + dt / 2 * k1))
        k3 = equations.tendency(State(x + dt / 2 * k2))
        k4 = equations.tendency(State(x + dt * k3))
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return State(x)


def test_third_order_in_time():
    grid = SphericalTransform(16, 32, 10)
    start = disturbed(grid)
    equations = {dt: ShallowWaterEquations(grid, dt_s=dt, diffusion_hours=None) for dt in (200, 100)}
    exact = runge_kutta(equations[100], start, 50.0, 288)
    errors = []
    for dt, these in equations.items():  # started exactly, so that it is not Euler's error that is seen
        states = [start]
        for _ in range(2):
            states.append(runge_kutta(these, states[-1], dt / 4, 4))
        past = [these.tendency(states[1]), these.tendency(states[0])]
        end, _ = these.run(states[2], 14400 // dt - 2, past)
        errors.append(float((end.coefficients - exact.coefficients)[0].abs().max()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.2)


def test_energy_and_mass_are_conserved():
    grid = SphericalTransform(32, 64, 15)
    equations = ShallowWaterEquations(grid, dt_s=100, diffusion_hours=None)
    state = disturbed(grid)

    def energy(state: State) -> float:
        phi = grid.synthesis(state.geopotential)
        u, v = grid.winds(state.vorticity, state.divergence)
        kinetic = (u * u + v * v) / (2 * grid.cos_latitude[:, None] ** 2)
        return float(grid.mean(phi * kinetic + phi * phi / 2))

    end, _ = equations.run(state, 216)
    mean = [float(grid.mean(grid.synthesis(s.geopotential))[0]) for s in (state, end)]
    assert abs(mean[1] / mean[0] - 1) < 1e-13
    kinetic = energy(state) - energy(balanced_flow(grid, 0 * grid.mu, 3000.0))
    assert abs(energy(end) - energy(state)) < 1e-4 * abs(kinetic)  # 3e-5: the scheme and the truncation


def test_relaxation_restores_the_mean_faster_than_the_eddies():
    grid = SphericalTransform(16, 32, 10)
    target = balanced_flow(grid, 10.0 * grid.cos_latitude, 1000.0)
    pull = Relaxation(target, 4.0, 40.0)(State(target.coefficients + 1.0))
    assert torch.allclose(pull[:, 0].real, torch.tensor(-1 / (4 * 86400.0), dtype=torch.float64))
    assert torch.allclose(pull[:, 1:].real, torch.tensor(-1 / (40 * 86400.0), dtype=torch.float64))


def test_a_member_does_not_depend_on_the_others():
    options = {"height": 16, "width": 32, "truncation": 10, "dt_s": 900.0, "spin_up_days": 0.5}
    together = list(SphericalShallowWater(**options).trajectories([0, 1, 2], 2, 6.0))
    alone = list(SphericalShallowWater(**options).trajectories([2], 2, 6.0))
    assert together[1].shape == (3, len(FIELDS), 16, 32)
    assert torch.allclose(together[1][2], alone[1][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[1][0], together[1][1], atol=1e-2)
    other = list(SphericalShallowWater(**options, seed=1).trajectories([2], 1, 6.0))
    assert not torch.allclose(other[0], alone[0], atol=1e-2)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="dt_s=1200: the scheme is stable up to 7"):
        SphericalShallowWater(dt_s=1200)
    with pytest.raises(ValueError, match="truncation=30: products alias on a grid of 32 x 64; use at most 21"):
        SphericalShallowWater(truncation=30, dt_s=300)
    with pytest.raises(ValueError, match=r"interval_h=0\.25: must be a whole number of time steps of 600"):
        next(SphericalShallowWater(spin_up_days=0).trajectories([0], 1, 0.25))
    # Both limits that the specification states.
    assert stable_step(21, 8000, EARTH_RADIUS_M) > 600 and 300 < stable_step(42, 8000, EARTH_RADIUS_M) < 600
