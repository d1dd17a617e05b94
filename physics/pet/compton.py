"""Compton scattering of photons: angles by Klein and Nishina, energies, new directions."""

from __future__ import annotations

import numpy as np

ELECTRON_KEV = 510.99895
"""Rest energy of the electron, which is that of an annihilation photon."""


def remaining_share(cosine: np.ndarray, energy_kev: np.ndarray | float = ELECTRON_KEV) -> np.ndarray:
    """Energy after a scatter over that before: ``p = 1 / (1 + k (1 - cos))``, k in rest energies."""
    return 1 / (1 + np.asarray(energy_kev) / ELECTRON_KEV * (1 - cosine))


def klein_nishina(cosine: np.ndarray, energy_kev: np.ndarray | float = ELECTRON_KEV) -> np.ndarray:
    """Density of the cosine of the scattering angle, 1 at 0 degrees: ``p^2 (p + 1/p - sin^2) / 2``."""
    p = remaining_share(cosine, energy_kev)
    return p * p * (p + 1 / p - (1 - cosine * cosine)) / 2


def sample_cosine(energy_kev: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cosines of scattering angles by rejection, one for each energy."""
    cosine = np.empty(len(energy_kev))
    left = np.arange(len(energy_kev))
    while len(left):
        trial = rng.uniform(-1, 1, len(left))
        accepted = rng.random(len(left)) < klein_nishina(trial, energy_kev[left])
        cosine[left[accepted]] = trial[accepted]
        left = left[~accepted]
    return cosine


def perpendicular(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors at right angles to unit vectors (n, 3) and to each other."""
    axis = np.zeros_like(direction)
    axis[np.arange(len(direction)), np.abs(direction).argmin(-1)] = 1.0
    first = np.cross(direction, axis)
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    return first, np.cross(direction, first)


def turned(direction: np.ndarray, cosine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors (n, 3) turned by angles, about a random azimuth."""
    azimuth = rng.uniform(0, 2 * np.pi, len(direction))
    first, second = perpendicular(direction)
    sine = np.sqrt(np.maximum(1 - cosine * cosine, 0))[:, None]
    new = cosine[:, None] * direction + sine * (np.cos(azimuth)[:, None] * first + np.sin(azimuth)[:, None] * second)
    return new / np.linalg.norm(new, axis=-1, keepdims=True)
