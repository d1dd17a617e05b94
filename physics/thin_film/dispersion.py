"""The nine dispersion formulas of refractiveindex.info, wavelengths in micrometres.

Coefficients are listed as on the page: a leading constant, then pairs or quadruples as the formula has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def _pairs(c: Sequence[float]) -> zip:
    return zip(c[1::2], c[2::2], strict=True)


def _sellmeier(um: Array, c: Sequence[float]) -> Array:
    return np.sqrt(1 + c[0] + sum(b * um**2 / (um**2 - pole**2) for b, pole in _pairs(c)))


def _sellmeier_2(um: Array, c: Sequence[float]) -> Array:
    return np.sqrt(1 + c[0] + sum(b * um**2 / (um**2 - pole) for b, pole in _pairs(c)))


def _polynomial(um: Array, c: Sequence[float]) -> Array:
    return np.sqrt(c[0] + sum(a * um**e for a, e in _pairs(c)))


def _mixed(um: Array, c: Sequence[float]) -> Array:
    """Two rational terms B l^e / (l^2 - C^f) of four coefficients each, then a polynomial."""
    rational, powers = [c[i : i + 4] for i in (1, 5) if len(c) >= i + 4], c[9:]
    square = c[0] + sum(b * um**e / (um**2 - pole**f) for b, e, pole, f in rational)
    return np.sqrt(square + sum(a * um**e for a, e in zip(powers[::2], powers[1::2], strict=True)))


def _cauchy(um: Array, c: Sequence[float]) -> Array:
    return c[0] + sum(a * um**e for a, e in _pairs(c))


def _gases(um: Array, c: Sequence[float]) -> Array:
    return 1 + c[0] + sum(b / (pole - um**-2) for b, pole in _pairs(c))


def _herzberger(um: Array, c: Sequence[float]) -> Array:
    term = 1 / (um**2 - 0.028)
    return c[0] + c[1] * term + c[2] * term**2 + c[3] * um**2 + c[4] * um**4 + c[5] * um**6


def _retro(um: Array, c: Sequence[float]) -> Array:
    """The Clausius-Mossotti factor (n^2 - 1) / (n^2 + 2) has the form of a Sellmeier term."""
    factor = c[0] + c[1] * um**2 / (um**2 - c[2]) + c[3] * um**2
    return np.sqrt((1 + 2 * factor) / (1 - factor))


def _exotic(um: Array, c: Sequence[float]) -> Array:
    return np.sqrt(c[0] + c[1] / (um**2 - c[2]) + c[3] * (um - c[4]) / ((um - c[4]) ** 2 + c[5]))


FORMULAS: dict[str, Callable[[Array, Sequence[float]], Array]] = {
    "sellmeier": _sellmeier,
    "sellmeier_2": _sellmeier_2,
    "polynomial": _polynomial,
    "mixed": _mixed,
    "cauchy": _cauchy,
    "gases": _gases,
    "herzberger": _herzberger,
    "retro": _retro,
    "exotic": _exotic,
}
_LENGTHS = {"herzberger": 6, "retro": 4, "exotic": 6}


def refractive_index(formula: str, coefficients: Sequence[float], wavelength_nm: Array) -> Array:
    """The real refractive index n, ``(W,)``.

    Args:
        formula: One of `FORMULAS`; formula 1 of refractiveindex.info is the first, and so on.
        coefficients: As on the page.
        wavelength_nm: ``(W,)``.

    Raises:
        ValueError: For an unknown formula, a wrong number of coefficients, or where n would not be real.
    """
    if formula not in FORMULAS:
        raise ValueError(f"unknown dispersion formula {formula!r}; choose one of {', '.join(FORMULAS)}")
    number = len(coefficients)
    fits = number == _LENGTHS[formula] if formula in _LENGTHS else number % 2 == 1
    if formula == "mixed":
        fits = number in (1, 5) or (number >= 9 and number % 2 == 1)
    if not fits:
        raise ValueError(f"{number} coefficients do not fit the dispersion formula {formula!r}")
    um = np.asarray(wavelength_nm, dtype=np.float64) / 1000
    with np.errstate(invalid="ignore", divide="ignore"):
        n = FORMULAS[formula](um, [float(c) for c in coefficients]) * np.ones_like(um)
    if not np.isfinite(n).all():
        at = np.asarray(wavelength_nm)[~np.isfinite(n)][0]
        raise ValueError(f"the dispersion formula {formula!r} gives no real refractive index at {at:g} nm")
    return n
