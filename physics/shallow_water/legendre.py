"""Gaussian latitudes and normalised associated Legendre functions with their derivatives.

Computed in extended precision where the machine has it: close to the poles ``1 - mu^2`` is small, and transforms divide
by it.
"""

from __future__ import annotations

import numpy as np


def gaussian_latitudes(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines of the Gaussian latitudes from north to south, and their weights, whose sum is 2.

    Args:
        number: How many.

    Raises:
        ValueError: For fewer than two.
    """
    if number < 2:
        raise ValueError(f"height={number}: a Gaussian grid has at least 2 latitudes")
    mu = np.polynomial.legendre.leggauss(number)[0][::-1].astype(np.longdouble)
    for _ in range(2):  # Newton's method; P' = n (P_{n-1} - mu P_n) / (1 - mu^2)
        below, value = np.ones_like(mu), mu
        for degree in range(1, number):
            below, value = value, ((2 * degree + 1) * mu * value - degree * below) / (degree + 1)
        mu = mu - value * (1 - mu**2) / (number * (below - mu * value))
    return mu, 2 * (1 - mu**2) / (number * below) ** 2


def epsilon(degree: np.ndarray | int, order: np.ndarray | int) -> np.ndarray:
    """The coefficient ``sqrt((l^2 - m^2) / (4 l^2 - 1))`` of the recurrences, 0 below the diagonal ``l = m``."""
    l2, m2 = (np.square(np.asarray(number, dtype=np.longdouble)) for number in (degree, order))
    return np.sqrt(np.maximum(l2 - m2, 0.0) / (4 * l2 - 1))


def legendre_functions(truncation: int, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Associated Legendre functions ``P[m, l, j]`` and ``H = (1 - mu^2) dP/dmu`` at the points ``mu[j]``.

    They are normalised so that the integral of ``P_lm^2`` over mu from -1 to 1 is 1 (no phase factor), and computed by
    ``eps_{l+1} P_{l+1} = mu P_l - eps_l P_{l-1}`` and ``H_l = (l + 1) eps_l P_{l-1} - l eps_{l+1} P_{l+1}``. Zero for
    l < m.

    Args:
        truncation: Largest degree and order T.
        mu: Sines of latitudes, (J,).

    Returns:
        Two arrays (T + 1, T + 1, J).
    """
    size = truncation + 2  # H needs one degree more
    p = np.zeros((truncation + 1, size, len(mu)), dtype=np.longdouble)
    diagonal = np.full(len(mu), np.sqrt(np.longdouble(0.5)))
    for m in range(truncation + 1):
        if m:
            diagonal = diagonal * np.sqrt((1 - mu**2) * np.longdouble(2 * m + 1) / (2 * m))
        p[m, m] = diagonal
        for degree in range(m + 1, size):
            lower = epsilon(degree - 1, m) * p[m, degree - 2] if degree >= m + 2 else 0.0
            p[m, degree] = (mu * p[m, degree - 1] - lower) / epsilon(degree, m)
    h = np.zeros_like(p[:, :-1])
    orders = np.arange(truncation + 1)
    for degree in range(truncation + 1):
        below = p[:, degree - 1] if degree else np.zeros_like(p[:, 0])
        h[:, degree] = (degree + 1) * epsilon(degree, orders)[:, None] * below
        h[:, degree] -= degree * epsilon(degree + 1, orders)[:, None] * p[:, degree + 1]
    valid = orders[:, None] <= orders[None]
    return p[:, :-1] * valid[..., None], h * valid[..., None]
