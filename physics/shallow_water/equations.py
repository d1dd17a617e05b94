"""Rotating shallow water on the sphere in vorticity-divergence form, stepped by Adams-Bashforth of third order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from physics.shallow_water.transform import SphericalTransform

OMEGA_PER_S = 7.292e-5
GRAVITY_M_S2 = 9.80616

# Weights of the tendencies, the latest first: Euler, then Adams-Bashforth of second order, then of third.
_ADAMS_BASHFORTH = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12))


@dataclass
class State:
    """Coefficients of the three fields in one tensor.

    Attributes:
        coefficients: (3, ..., m, l): vorticity (1/s), divergence (1/s), geopotential of the depth (m^2/s^2).
    """

    coefficients: Tensor

    @property
    def vorticity(self) -> Tensor:
        """Coefficients of the relative vorticity, 1/s."""
        return self.coefficients[0]

    @property
    def divergence(self) -> Tensor:
        """Coefficients of the divergence, 1/s."""
        return self.coefficients[1]

    @property
    def geopotential(self) -> Tensor:
        """Coefficients of g times the depth, m^2/s^2."""
        return self.coefficients[2]


class ShallowWaterEquations:
    """Tendencies and time steps.

    ``dzeta/dt = -div(u (zeta + f))``, ``ddelta/dt = curl(u (zeta + f)) - lap(|u|^2 / 2 + phi + g h_s)``,
    ``dphi/dt = -div(u phi)``, with ``phi`` g times the depth of the water. After each step vorticity and divergence are
    multiplied by ``exp(-(dt / tau) (lap / lap_max)^4)``.

    Args:
        transform: Of the grid.
        orography_m: Height of the ground h_s, (lat, lon); None: flat.
        dt_s: Time step, seconds; see `stable_step`.
        diffusion_hours: tau of the smallest waves; None: no filter.
        forcing: ``forcing(state) -> tendency`` (3, ..., m, l), added to that of the equations; None: none.

    Raises:
        ValueError: For a time step that is not positive.
    """

    def __init__(
        self,
        transform: SphericalTransform,
        orography_m: Tensor | None = None,
        dt_s: float = 600.0,
        diffusion_hours: float | None = 12.0,
        forcing: Callable[[State], Tensor] | None = None,
    ) -> None:
        if dt_s <= 0:
            raise ValueError(f"dt_s={dt_s}: a time step is positive")
        self.transform, self.dt_s, self.forcing = transform, dt_s, forcing
        self.coriolis = (2 * OMEGA_PER_S * transform.mu)[:, None]
        ground = transform.mu.new_zeros(transform.height, transform.width) if orography_m is None else orography_m
        self.ground = transform.analysis(GRAVITY_M_S2 * ground)
        self.filter = None
        if diffusion_hours is not None:
            relative = transform.laplacian_eigenvalues / transform.laplacian_eigenvalues.min()
            self.filter = torch.exp(-(dt_s / (3600 * diffusion_hours)) * relative**4)

    def tendency(self, state: State) -> Tensor:
        """Time derivative of the coefficients, (3, ..., m, l)."""
        grid = self.transform
        (u, v), (vorticity, phi) = grid.synthesis_with_winds(
            state.vorticity, state.divergence, torch.stack([state.vorticity, state.geopotential])
        )
        absolute = vorticity + self.coriolis
        pairs_a = torch.stack([u * absolute, u * phi])
        pairs_b = torch.stack([v * absolute, v * phi])
        divergence, curl = grid.divergence_and_curl(pairs_a, pairs_b)
        energy = grid.analysis((u * u + v * v) / (2 * grid.cos_latitude[:, None] ** 2))
        pressure = grid.laplacian(energy + state.geopotential + self.ground)
        out = torch.stack([-divergence[0], curl[0] - pressure, -divergence[1]])
        return out if self.forcing is None else out + self.forcing(state)

    def run(self, state: State, steps: int, past: list[Tensor] | None = None) -> tuple[State, list[Tensor]]:
        """Advance by some time steps.

        Args:
            state: The state now.
            steps: How many.
            past: Tendencies of earlier steps, the latest first, as an earlier call returned them; None: a cold start
                (Euler, then second order).

        Returns:
            The state then, and the tendencies that a following call continues with.
        """
        past = [] if past is None else past
        now = state.coefficients
        for _ in range(steps):
            past = [self.tendency(State(now)), *past[:2]]
            weights = _ADAMS_BASHFORTH[len(past) - 1]
            for weight, rate in zip(weights, past, strict=True):
                now = torch.add(now, rate, alpha=self.dt_s * weight)
            if self.filter is not None:
                now = torch.cat([now[:2] * self.filter, now[2:]])
        return State(now), past


def stable_step(truncation: int, depth_m: float, radius_m: float) -> float:
    """Largest time step, in seconds, for which gravity waves of the smallest scale do not grow.

    The third-order Adams-Bashforth scheme is stable for ``omega dt < 0.72`` with
    ``omega = sqrt(g H T (T + 1)) / a``.
    """
    return 0.72 * radius_m / math.sqrt(GRAVITY_M_S2 * depth_m * truncation * (truncation + 1))
