"""Random fields that a solid-body rotation carries around the sphere: weather whose best possible forecast is known.

Channel c is a sum of spherical harmonics up to degree T. Every step turns it by ``speed_c`` degrees of longitude, lets
degree l decay by ``rho_l = exp(-diffusion l (l + 1))``, and adds as much random variance as was lost, so that the
statistics stand still; what is observed has white noise on top. Of the state itself the best forecast after k steps is
``rho_l^k exp(-i m k speed) a_lm``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from physics.shallow_water import SphericalTransform


class AdvectedFields:
    """Generator of trajectories (Huber et al.'s document, section 6: variance (1 + l)^-3, 6 to 25 degrees per step).

    Args:
        height: Latitudes of the Gaussian grid.
        width: Longitudes.
        channels: Fields, independent of each other.
        truncation: T.
        slowest_deg: Rotation of the first channel in a step, degrees of longitude eastward.
        fastest_deg: Of the last channel; the others lie between.
        diffusion: Decay per step and l (l + 1).
        noise: Standard deviation of the observations' noise, relative to that of the field.
        seed: Of everything random.

    Raises:
        ValueError: If the grid cannot hold the truncation, or a number is negative.
    """

    def __init__(
        self,
        height: int = 32,
        width: int = 64,
        channels: int = 4,
        truncation: int = 10,
        slowest_deg: float = 6.0,
        fastest_deg: float = 25.0,
        diffusion: float = 2e-5,
        noise: float = 0.01,
        seed: int = 0,
    ) -> None:
        if channels < 1 or min(diffusion, noise) < 0:
            raise ValueError(
                f"channels={channels}, diffusion={diffusion}, noise={noise}: give at least one channel and no negative "
                "number"
            )
        self.transform = SphericalTransform(height, width, truncation)
        self.channels, self.noise, self.seed = channels, noise, seed
        self.speed = torch.deg2rad(torch.linspace(slowest_deg, fastest_deg, channels, dtype=torch.float64))
        degree = self.transform.degree
        self.decay = torch.exp(-diffusion * degree * (degree + 1))
        variance = (1 + degree) ** -3.0 * self.transform.valid
        variance[:, 0] = 0.0  # no mean
        # Legendre functions have the norm 1 on [-1, 1]: the mean of a square over the sphere is half of this sum.
        self.weight = torch.where(self.transform.order > 0, 2.0, 1.0) / 2
        self.variance = variance / (self.weight * variance).sum()  # of fields with a variance of one

    def propagate(self, coefficients: Tensor, steps: float = 1) -> Tensor:
        """The expected coefficients (..., channel, m, l) after some steps."""
        turn = torch.exp(-1j * self.speed[:, None, None] * self.transform.order * steps)
        return coefficients * turn * self.decay**steps

    def trajectories(self, members: Sequence[int], records: int) -> Iterator[Tensor]:
        """Observed records (member, channel, lat, lon), float32, one time after the other."""
        generators = [np.random.default_rng([self.seed, member]) for member in members]
        state = torch.stack([self._draw(generator) for generator in generators])
        lost = torch.sqrt(1 - self.decay**2)
        for record in range(records):
            if record:
                state = self.propagate(state) + lost * torch.stack([self._draw(g) for g in generators])
            fields = self.transform.synthesis(state)
            noise = torch.stack([torch.from_numpy(g.standard_normal(fields.shape[1:])) for g in generators])
            yield (fields + self.noise * noise).float()

    def least_error(self, steps: int) -> float:
        """Root mean square error that no forecast from the exact state can beat, observations' noise included.

        Args:
            steps: k; 0 gives the noise.
        """
        unknown = (self.weight * self.variance * (1 - self.decay ** (2 * steps))).sum()
        return math.sqrt(float(unknown) + self.noise**2)

    def _draw(self, generator: np.random.Generator) -> Tensor:
        size = self.transform.truncation + 1
        pair = torch.from_numpy(generator.standard_normal((2, self.channels, size, size)))
        # A zonal coefficient is real; of the others real and imaginary parts share the variance.
        zonal = (self.transform.order == 0)[None]
        real = torch.where(zonal, pair[0], pair[0] / math.sqrt(2))
        imaginary = torch.where(zonal, torch.zeros_like(pair[1]), pair[1] / math.sqrt(2))
        return torch.complex(real, imaginary) * self.variance.sqrt()
