"""Spectra that engineers wish for, made by hand, with weights for what they leave open."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

R, A, T = 0, 1, 2


@dataclass(frozen=True)
class Target:
    """A wanted spectrum.

    Attributes:
        name: For tables and figures.
        spectrum: R, A, T ``(3, W)`` float64 in [0, 1] with sum 1.
        weight: ``(3, W)`` float64, 0 where nothing is asked for.
    """

    name: str
    spectrum: Tensor
    weight: Tensor


def weighted_mae(spectrum: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of |difference| over channels and wavelengths (paper, section 2.8).

    Args:
        spectrum: ``(..., 3, W)``.
        target: The same, or what broadcasts to it.
        weight: The same, not negative; None: all ones. Where their sum is 0 the mean is 0.

    Returns:
        ``(...)``.
    """
    difference = (spectrum - target).abs()
    if weight is None:
        return difference.mean((-2, -1))
    weight = weight.to(difference).expand_as(difference)
    return (difference * weight).sum((-2, -1)) / weight.sum((-2, -1)).clamp(min=torch.finfo(difference.dtype).tiny)


def make_target(name: str, wavelength_nm: Tensor, **options: Any) -> Target:
    """One of `TARGETS`.

    Args:
        name: Its key.
        wavelength_nm: ``(W,)``.
        **options: Keyword arguments of its function.

    Raises:
        ValueError: For an unknown name or option, or one that leaves the wavelengths.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is unknown; choose one of {', '.join(TARGETS)}")
    function = TARGETS[name]
    known = [p for p in inspect.signature(function).parameters if p != "wavelength_nm"]
    if unknown := options.keys() - set(known):
        raise ValueError(f"target {name} has no option {sorted(unknown)[0]!r}; it has {', '.join(known)}")
    wavelength = wavelength_nm.double()
    spectrum, weight = function(wavelength, **options)
    if not bool((weight > 0).any()):
        low, high = float(wavelength.min()), float(wavelength.max())
        raise ValueError(f"target {name} with {options} asks for nothing between {low:g} and {high:g} nm")
    return Target(name, spectrum, weight)


def bandpass(
    wavelength_nm: Tensor, centre_nm: float = 550.0, width_nm: float = 100.0, edge_nm: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Transmits a band and reflects the rest; edges fall from 88 to 12 % within 4 ``edge_nm``."""
    return double_bandpass(wavelength_nm, (centre_nm,), width_nm, edge_nm)


def double_bandpass(
    wavelength_nm: Tensor,
    centres_nm: Sequence[float] = (500.0, 800.0),
    width_nm: float = 60.0,
    edge_nm: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Transmits several bands and reflects the rest."""
    inside = sum(_band(wavelength_nm, centre, width_nm, edge_nm) for centre in centres_nm).clamp(max=1)
    return _spectrum(1 - inside, inside), _everywhere(wavelength_nm)


def narrow_bandpass(
    wavelength_nm: Tensor, centre_nm: float = 550.0, width_nm: float = 30.0, edge_nm: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Transmits a narrow band and reflects the rest."""
    return bandpass(wavelength_nm, centre_nm, width_nm, edge_nm)


def bandstop(
    wavelength_nm: Tensor, centre_nm: float = 800.0, width_nm: float = 200.0, edge_nm: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Reflects a band and transmits the rest."""
    inside = _band(wavelength_nm, centre_nm, width_nm, edge_nm)
    return _spectrum(inside, 1 - inside), _everywhere(wavelength_nm)


def gaussian_peak(
    wavelength_nm: Tensor,
    centre_nm: float = 700.0,
    sigma_nm: float = 60.0,
    height: float = 1.0,
    channel: str = "T",
) -> tuple[Tensor, Tensor]:
    """A Gaussian in ``channel`` (R, A or T); the rest is reflected, or transmitted where R has the peak."""
    _check_level("height", height)
    if channel not in ("R", "A", "T"):
        raise ValueError(f"channel={channel!r} is unknown; choose one of R, A, T")
    peak = height * torch.exp(-0.5 * ((wavelength_nm - centre_nm) / sigma_nm) ** 2)
    spectrum = torch.zeros(3, len(wavelength_nm), dtype=torch.float64)
    spectrum["RAT".index(channel)] = peak
    spectrum[T if channel == "R" else R] = 1 - peak
    return spectrum, _everywhere(wavelength_nm)


def flat_absorber(wavelength_nm: Tensor, level: float = 0.5) -> tuple[Tensor, Tensor]:
    """The same absorptance at all wavelengths; the rest is reflected."""
    _check_level("level", level)
    reflectance = torch.full_like(wavelength_nm, 1 - level)
    return _spectrum(reflectance, torch.zeros_like(wavelength_nm)), _everywhere(wavelength_nm)


def perfect_absorber(wavelength_nm: Tensor) -> tuple[Tensor, Tensor]:
    """Absorbs everything."""
    return flat_absorber(wavelength_nm, level=1.0)


def flat_reflector(wavelength_nm: Tensor, level: float = 0.5) -> tuple[Tensor, Tensor]:
    """The same reflectance at all wavelengths; the rest is transmitted."""
    _check_level("level", level)
    reflectance = torch.full_like(wavelength_nm, level)
    return _spectrum(reflectance, 1 - reflectance), _everywhere(wavelength_nm)


def nir_reflector(wavelength_nm: Tensor, edge_nm: float = 800.0) -> tuple[Tensor, Tensor]:
    """Reflects all that is longer than the edge; shorter wavelengths are left open."""
    beyond = (wavelength_nm >= edge_nm).double()
    return _spectrum(beyond, 1 - beyond), beyond.expand(3, -1).clone()


def vis_transmit_nir_reflect(
    wavelength_nm: Tensor, visible_nm: Sequence[float] = (400.0, 700.0), edge_nm: float = 800.0
) -> tuple[Tensor, Tensor]:
    """Transmits the visible and reflects all that is longer than the edge; the rest is left open."""
    beyond = (wavelength_nm >= edge_nm).double()
    visible = _window(wavelength_nm, *visible_nm)
    return _spectrum(beyond, 1 - beyond), (beyond + visible).clamp(max=1).expand(3, -1).clone()


def ar_coating(wavelength_nm: Tensor, band_nm: Sequence[float] = (400.0, 700.0)) -> tuple[Tensor, Tensor]:
    """Transmits everything within a band: nothing is reflected and nothing absorbed there."""
    zero = torch.zeros_like(wavelength_nm)
    return _spectrum(zero, 1 - zero), _window(wavelength_nm, *band_nm).expand(3, -1).clone()


def dbr(wavelength_nm: Tensor, centre_nm: float = 550.0, width_nm: float = 50.0) -> tuple[Tensor, Tensor]:
    """Reflects everything within a band, as a distributed Bragg reflector does; the rest is left open."""
    one = torch.ones_like(wavelength_nm)
    window = _window(wavelength_nm, centre_nm - width_nm / 2, centre_nm + width_nm / 2)
    return _spectrum(one, 1 - one), window.expand(3, -1).clone()


def morpho(
    wavelength_nm: Tensor, centre_nm: float = 460.0, sigma_nm: float = 45.0, height: float = 0.7, floor: float = 0.04
) -> tuple[Tensor, Tensor]:
    """Like the wing of a Morpho butterfly: blue is reflected, the rest absorbed but for a few per cent."""
    _check_level("height + floor", height + floor)
    peak = torch.exp(-0.5 * ((wavelength_nm - centre_nm) / sigma_nm) ** 2)
    return _spectrum(floor + height * peak, torch.zeros_like(peak)), _window(wavelength_nm, 300.0, 1000.0).expand(
        3, -1
    ).clone()


TARGETS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    function.__name__: function
    for function in (
        bandpass,
        double_bandpass,
        narrow_bandpass,
        bandstop,
        gaussian_peak,
        flat_absorber,
        perfect_absorber,
        flat_reflector,
        nir_reflector,
        vis_transmit_nir_reflect,
        ar_coating,
        dbr,
        morpho,
    )
}


def _spectrum(reflectance: Tensor, transmittance: Tensor) -> Tensor:
    return torch.stack([reflectance, 1 - reflectance - transmittance, transmittance]).clamp(0, 1)


def _everywhere(wavelength_nm: Tensor) -> Tensor:
    return torch.ones(3, len(wavelength_nm), dtype=torch.float64)


def _window(wavelength_nm: Tensor, low: float, high: float) -> Tensor:
    return ((wavelength_nm >= low) & (wavelength_nm <= high)).double()


def _band(wavelength_nm: Tensor, centre: float, width: float, edge: float) -> Tensor:
    """1 within the band, 0 outside, 1/2 at its ends, logistic between."""
    if width <= 0 or edge <= 0:
        raise ValueError(f"width_nm={width}, edge_nm={edge}: must be above 0")
    if not float(wavelength_nm.min()) <= centre <= float(wavelength_nm.max()):
        low, high = float(wavelength_nm.min()), float(wavelength_nm.max())
        raise ValueError(f"centre_nm={centre}: must be between {low:g} and {high:g} nm")
    return torch.sigmoid((width / 2 - (wavelength_nm - centre).abs()) / edge)


def _check_level(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must be in [0, 1]")
