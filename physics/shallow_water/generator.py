"""Trajectories of a restored, turbulent circulation: a stand-in for the weather that any machine can make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from physics.shallow_water.circulation import Relaxation, balanced_flow, mountains, two_jets
from physics.shallow_water.equations import GRAVITY_M_S2, ShallowWaterEquations, State, stable_step
from physics.shallow_water.transform import EARTH_RADIUS_M, SphericalTransform

FIELDS = ("depth", "zonal_wind", "meridional_wind", "vorticity")
"""What a record holds: depth h (m), u and v (m/s), relative vorticity (1e-5 / s)."""


class SphericalShallowWater:
    """Generator of trajectories.

    Each begins from the two-jet state with a random vorticity of its own, is spun up, and is then recorded. Members are
    integrated together; a member does not depend on how many others there are.

    Args:
        height: Latitudes of the Gaussian grid.
        width: Longitudes.
        truncation: T.
        dt_s: Time step, seconds.
        depth_m: Mean depth.
        jet_m_s: Speed of the jets that are restored.
        jet_latitude_rad: Where they are, in both hemispheres.
        jet_width_rad: Their width.
        jet_days: Time scale of the restoring of the zonal mean.
        eddy_days: The same of the eddies.
        diffusion_hours: Time scale of the diffusion of the smallest waves.
        mountains_m: Heights of the mountains.
        noise_per_s: Standard deviation of the random vorticity.
        noise_truncation: Its degrees are below this.
        spin_up_days: Not recorded.
        seed: Of the random vorticity.

    Raises:
        ValueError: If the time step is too long for the grid, or the grid too coarse for the truncation.
    """

    def __init__(
        self,
        height: int = 32,
        width: int = 64,
        truncation: int = 21,
        dt_s: float = 600.0,
        depth_m: float = 8000.0,
        jet_m_s: float = 80.0,
        jet_latitude_rad: float = 0.75,
        jet_width_rad: float = 0.14,
        jet_days: float = 4.0,
        eddy_days: float = 40.0,
        diffusion_hours: float = 12.0,
        mountains_m: Sequence[float] = (1500.0, 1200.0, 900.0, 750.0),
        noise_per_s: float = 2e-6,
        noise_truncation: int = 14,
        spin_up_days: float = 40.0,
        seed: int = 0,
    ) -> None:
        limit = stable_step(truncation, depth_m, EARTH_RADIUS_M)
        if not 0 < dt_s <= limit:
            raise ValueError(
                f"dt_s={dt_s}: the scheme is stable up to {limit:.0f} s at truncation={truncation}, depth_m={depth_m}"
            )
        if 3 * truncation + 1 > min(width, 2 * height):
            raise ValueError(
                f"truncation={truncation}: products alias on a grid of {height} x {width}; use at most "
                f"{(min(width, 2 * height) - 1) // 3}, or height={-(-(3 * truncation + 1) // 2)} and "
                f"width={3 * truncation + 1} at least"
            )
        self.transform = SphericalTransform(height, width, truncation)
        self.orography_m = mountains(self.transform, mountains_m)
        wind = two_jets(self.transform, jet_m_s, jet_latitude_rad, jet_width_rad)
        self.target = balanced_flow(self.transform, wind, depth_m)
        self.equations = ShallowWaterEquations(
            self.transform, self.orography_m, dt_s, diffusion_hours, Relaxation(self.target, jet_days, eddy_days)
        )
        self.dt_s, self.spin_up_days, self.seed = dt_s, spin_up_days, seed
        self.noise_per_s, self.noise_truncation = noise_per_s, noise_truncation

    def initial(self, members: Sequence[int]) -> State:
        """The target with the random vorticity of each member, (3, member, m, l)."""
        size = self.transform.truncation + 1
        states = []
        for member in members:
            random = np.random.default_rng([self.seed, member]).standard_normal((2, size, size))
            noise = torch.complex(*torch.from_numpy(random)) * self.transform.valid
            noise[0] = noise[0].real.to(noise.dtype)
            noise[:, 0] = 0.0
            noise = noise * (self.transform.degree < self.noise_truncation)
            field = self.transform.synthesis(noise)
            state = self.target.coefficients.clone()
            state[0] += noise * (self.noise_per_s / self.transform.mean(field**2).sqrt())
            states.append(state)
        return State(torch.stack(states, 1))

    def fields(self, state: State) -> Tensor:
        """`FIELDS` of a state, (..., 4, lat, lon), float64."""
        grid = self.transform
        (u, v), (vorticity, phi) = grid.synthesis_with_winds(
            state.vorticity, state.divergence, torch.stack([state.vorticity, state.geopotential])
        )
        cos = grid.cos_latitude[:, None]
        return torch.stack([phi / GRAVITY_M_S2, u / cos, v / cos, 1e5 * vorticity], -3)

    def trajectories(self, members: Sequence[int], records: int, interval_h: float) -> Iterator[Tensor]:
        """Records of all members, one time after the other.

        Args:
            members: Numbers of the members.
            records: How many.
            interval_h: Hours between them.

        Yields:
            (member, 4, lat, lon), float32.

        Raises:
            ValueError: If a record is not a whole number of time steps after the other.
            FloatingPointError: If the integration has become unstable.
        """
        steps = round(interval_h * 3600 / self.dt_s)
        if steps < 1 or abs(steps * self.dt_s - interval_h * 3600) > 1e-6:
            raise ValueError(f"interval_h={interval_h}: must be a whole number of time steps of {self.dt_s} s")
        state, past = self.equations.run(self.initial(members), round(self.spin_up_days * 86400 / self.dt_s))
        for record in range(records):
            if record:
                state, past = self.equations.run(state, steps, past)
            fields = self.fields(state)
            if not bool(torch.isfinite(fields).all()):
                raise FloatingPointError(f"record {record}: the integration is unstable; use a smaller dt_s")
            yield fields.float()
