"""Flows in balance, and what drives the circulation: two jets that are restored, and mountains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from physics.shallow_water.equations import GRAVITY_M_S2, OMEGA_PER_S, State
from physics.shallow_water.transform import SphericalTransform


def balanced_flow(transform: SphericalTransform, zonal_wind_m_s: Tensor, mean_depth_m: float) -> State:
    """A steady zonal flow with the depth that balances it.

    The divergence vanishes, and ``lap(phi) = curl(u (zeta + f)) - lap(|u|^2 / 2)``; the truncated equations keep it.

    Args:
        transform: Of the grid.
        zonal_wind_m_s: u by latitude, (lat,).
        mean_depth_m: Mean depth.
    """
    zero = transform.mu.new_zeros(transform.height, transform.width)
    u = (zonal_wind_m_s * transform.cos_latitude)[:, None] + zero
    _, vorticity = transform.divergence_and_curl(u, zero)
    divergence = torch.zeros_like(vorticity)
    image_u, image_v = transform.winds(vorticity, divergence)
    absolute = transform.synthesis(vorticity) + (2 * OMEGA_PER_S * transform.mu)[:, None]
    _, curl = transform.divergence_and_curl(image_u * absolute, image_v * absolute)
    energy = transform.analysis((image_u**2 + image_v**2) / (2 * transform.cos_latitude[:, None] ** 2))
    phi = transform.inverse_laplacian(curl) - energy
    phi[0, 0] = GRAVITY_M_S2 * mean_depth_m * 2**0.5  # P_00 = sqrt(1/2)
    return State(torch.stack([vorticity, divergence, phi]))


def two_jets(transform: SphericalTransform, speed_m_s: float, latitude_rad: float, width_rad: float) -> Tensor:
    """Zonal wind (lat,) of a jet in each hemisphere, a Gaussian in latitude."""
    latitude = transform.latitude
    return speed_m_s * sum(
        torch.exp(-(((latitude - sign * latitude_rad) / width_rad) ** 2)) for sign in (1.0, -1.0)
    )  # fmt: skip


def mountains(transform: SphericalTransform, heights_m: Sequence[float]) -> Tensor:
    """Smooth ground (lat, lon), m, with one bell-shaped mountain per height.

    Two stand in the middle latitudes of each hemisphere, with a radius of 20 degrees.
    """
    places = [(0.75, 0.5), (0.70, 3.9), (-0.60, 5.2), (-0.80, 2.3)]  # latitude, longitude, rad
    ground = transform.mu.new_zeros(transform.height, transform.width)
    sin, cos = transform.mu[:, None], transform.cos_latitude[:, None]
    for i, height in enumerate(heights_m):
        latitude, longitude = places[i % len(places)]
        centre = torch.tensor(latitude, dtype=torch.float64)
        cosine = sin * torch.sin(centre) + cos * torch.cos(centre) * torch.cos(transform.longitude - longitude)
        angle = torch.acos(cosine.clamp(-1, 1))
        ground = ground + height * torch.exp(-((angle / 0.35) ** 2))
    return transform.synthesis(transform.analysis(ground))


class Relaxation:
    """Newtonian relaxation of all coefficients to a zonal state, faster for the zonal mean than for the eddies.

    Args:
        target: The state that is restored.
        mean_days: Time scale of the zonal mean (m = 0).
        eddy_days: Time scale of everything else.
    """

    def __init__(self, target: State, mean_days: float, eddy_days: float) -> None:
        self.target = target.coefficients
        size = self.target.shape[-2]
        days = torch.full((size, 1), float(eddy_days), dtype=torch.float64, device=self.target.device)
        days[0] = mean_days
        self.rate_per_s = 1 / (86400 * days)

    def __call__(self, state: State) -> Tensor:
        """Tendency (3, ..., m, l)."""
        lead = state.coefficients.dim() - self.target.dim()
        target = self.target.reshape(3, *[1] * lead, *self.target.shape[1:])
        return (target - state.coefficients) * self.rate_per_s
