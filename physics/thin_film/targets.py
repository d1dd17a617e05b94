"""Spectra that engineers wish for, made by hand, with weights for what they leave open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def make_target(name: str, wavelength_nm: Tensor, **options: Any) -> Target:
    """One of `TARGETS` by name: bandpass, double_bandpass, narrow_bandpass, bandstop, gaussian_peak, flat_absorber,
    flat_reflector, perfect_absorber, nir_reflector, vis_transmit_nir_reflect, ar_coating, dbr, morpho; options are
    keyword arguments of that function (centre_nm, width_nm, ...)."""  # noqa: D205, D209
    raise NotImplementedError


def weighted_mae(spectrum: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of |difference| over channels and wavelengths, weighted: ``(..., 3, W)`` -> ``(...)``."""
    raise NotImplementedError
