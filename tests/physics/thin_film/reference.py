"""Thin-film optics once more, by other algorithms in plain numpy, one stack at a time."""

from __future__ import annotations

import math

import numpy as np


def cosines(index: np.ndarray, tangential: float) -> np.ndarray:
    """Snell's law, the branch whose wave decays forwards; ``tangential`` is n sin(theta), the same in all media."""
    cosine = np.sqrt(1 - (tangential / index) ** 2 + 0j)
    return np.where((index * cosine).imag < 0, -cosine, cosine)


def airy(
    index: np.ndarray,
    thickness_nm: np.ndarray,
    wavelength_nm: np.ndarray,
    incident: complex | np.ndarray = 1.0,
    exit: complex | np.ndarray = 1.0,
    angle_rad: float = 0.0,
    polarization: str = "s",
    tangential: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """R and T by the recursion of Fresnel coefficients from the back (Airy's sum), which cannot overflow.

    Index ``(L, W)``, thickness ``(L,)``; ``tangential`` in place of the angle where the light begins in a plate.
    """
    ones = np.ones_like(wavelength_nm, dtype=complex)
    media = np.concatenate([[incident * ones], index, [exit * ones]])
    cos = cosines(media, incident * math.sin(angle_rad) if tangential is None else tangential)

    def interface(a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        na, nb, ca, cb = media[a], media[b], cos[a], cos[b]
        if polarization == "s":
            return (na * ca - nb * cb) / (na * ca + nb * cb), 2 * na * ca / (na * ca + nb * cb)
        return (nb * ca - na * cb) / (nb * ca + na * cb), 2 * na * ca / (nb * ca + na * cb)

    last = len(media) - 1
    r, t = interface(last - 1, last)
    for j in range(last - 2, -1, -1):
        rho, tau = interface(j, j + 1)
        phase = np.exp(2j * math.pi * media[j + 1] * cos[j + 1] * thickness_nm[j] / wavelength_nm)
        below = 1 + rho * r * phase**2
        r, t = (rho + r * phase**2) / below, tau * t * phase / below
    flux = media * (cos if polarization == "s" else cos.conj())
    return np.abs(r) ** 2, np.abs(t) ** 2 * flux[-1].real / flux[0].real


def matrices(
    index: np.ndarray, thickness_nm: np.ndarray, wavelength_nm: np.ndarray, exit: complex = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """R and T in air at normal incidence by products of the characteristic matrices, for layers that are not thick."""
    total = np.broadcast_to(np.eye(2, dtype=complex), (len(wavelength_nm), 2, 2))
    for n, d in zip(index, thickness_nm, strict=True):
        delta = 2 * math.pi * n * d / wavelength_nm
        layer = np.array([[np.cos(delta), -1j * np.sin(delta) / n], [-1j * n * np.sin(delta), np.cos(delta)]])
        total = total @ layer.transpose(2, 0, 1)
    b, c = (total @ np.array([1.0, exit])).T
    return np.abs((b - c) / (b + c)) ** 2, 4 * np.real(exit) / np.abs(b + c) ** 2


def on_plate(
    index: np.ndarray,
    thickness_nm: np.ndarray,
    wavelength_nm: np.ndarray,
    plate: np.ndarray,
    plate_nm: float,
    angle_rad: float,
    polarization: str,
) -> tuple[np.ndarray, np.ndarray]:
    """R and T of a stack on a thick plate in air: intensities of one round trip after the other are added."""
    none = (np.zeros((0, len(wavelength_nm))), np.zeros(0))
    tangential = math.sin(angle_rad)
    at = {"wavelength_nm": wavelength_nm, "polarization": polarization, "tangential": tangential}
    front_r, front_t = airy(index, thickness_nm, exit=plate, **at)
    back_r, back_t = airy(index[::-1], thickness_nm[::-1], incident=plate, exit=1.0, **at)
    rear_r, rear_t = airy(*none, incident=plate, exit=1.0, **at)
    decay = np.exp(-4 * math.pi * (plate * cosines(plate, tangential)).imag * plate_nm / wavelength_nm)
    light, r, t = front_t, front_r, 0.0
    for _ in range(400):
        light = light * decay
        t = t + light * rear_t
        light = light * rear_r * decay
        r = r + light * back_t
        light = light * back_r
    return r, t
