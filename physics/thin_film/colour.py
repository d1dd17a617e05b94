"""The colour in which a reflectance spectrum appears in daylight."""

from __future__ import annotations

from torch import Tensor


def srgb(reflectance: Tensor, wavelength_nm: Tensor) -> Tensor:
    """Colour as sRGB in [0, 1] of reflectances ``(..., W)`` under D65, ``(..., 3)``."""
    raise NotImplementedError
