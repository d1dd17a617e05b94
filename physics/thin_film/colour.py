"""The colour in which a reflectance spectrum appears in daylight."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative power of CIE standard illuminant D65 from 380 to 780 nm in steps of 10 nm (CIE 15, table T.1).
_D65 = (
    49.9755, 54.6482, 82.7549, 91.4860, 93.4318, 86.6823, 104.865, 117.008, 117.812, 114.861, 115.923, 108.811,
    109.354, 107.802, 104.790, 107.689, 104.405, 104.046, 100.000, 96.3342, 95.7880, 88.6856, 90.0062, 89.5991,
    87.6987, 83.2886, 83.6992, 80.0268, 80.2146, 82.2778, 78.2842, 69.7213, 71.6091, 74.3490, 61.6040, 69.8856,
    75.0870, 63.5927, 46.4182, 66.8054, 63.3828,
)  # fmt: skip
# Gaussians (factor, centre in nm, inverse widths below and above the centre) whose sums are the colour matching
# functions of the CIE 1931 observer: Wyman, Sloan and Shirley, Journal of Computer Graphics Techniques 2(2), 2013.
_OBSERVER = {
    "x": ((0.362, 442.0, 0.0624, 0.0374), (1.056, 599.8, 0.0264, 0.0323), (-0.065, 501.1, 0.0490, 0.0382)),
    "y": ((0.821, 568.8, 0.0213, 0.0247), (0.286, 530.9, 0.0613, 0.0322)),
    "z": ((1.217, 437.0, 0.0845, 0.0278), (0.681, 459.0, 0.0385, 0.0725)),
}
# From XYZ to linear sRGB, IEC 61966-2-1.
_TO_RGB = ((3.2406, -1.5372, -0.4986), (-0.9689, 1.8758, 0.0415), (0.0557, -0.2040, 1.0570))
_STEP_NM = 5.0


def srgb(reflectance: Tensor, wavelength_nm: Tensor) -> Tensor:
    """Colour as sRGB in [0, 1]; a perfect mirror is white, colours that a screen cannot show are clamped.

    Args:
        reflectance: ``(..., W)``, interpolated linearly.
        wavelength_nm: Rising, ``(W,)``; must reach from 400 to 700 nm.

    Returns:
        ``(..., 3)`` float64.

    Raises:
        ValueError: If the wavelengths do not cover the visible.
    """
    grid, observer = _observer()
    low, high = float(wavelength_nm[0]), float(wavelength_nm[-1])
    if low > 400 or high < 700:
        raise ValueError(f"colours need wavelengths from 400 to 700 nm; there are {low:g} to {high:g}")
    linear = _interpolated(reflectance.double(), wavelength_nm.double(), grid) @ observer
    encoded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)
    return encoded.clamp(0, 1)


def _observer() -> tuple[Tensor, Tensor]:
    """A grid of wavelengths and what reflectance there adds to linear R, G, B, ``(G, 3)``."""
    grid = torch.arange(380.0, 780.0 + _STEP_NM, _STEP_NM, dtype=torch.float64)
    light = _interpolated(torch.tensor(_D65, dtype=torch.float64), torch.arange(380.0, 781.0, 10.0).double(), grid)
    columns = []
    for lobes in _OBSERVER.values():
        terms = []
        for factor, centre, below, above in lobes:
            offset = grid - centre
            terms.append(factor * torch.exp(-0.5 * (offset * torch.where(offset < 0, below, above)) ** 2))
        columns.append(light * sum(terms))
    xyz = torch.stack(columns, dim=1)
    to_rgb = torch.tensor(_TO_RGB, dtype=torch.float64)
    # What the light itself gives in sum is white: the fit and the steps shift it by less than a per cent.
    white = torch.linalg.solve(to_rgb, torch.ones(3, dtype=torch.float64))
    return grid, (xyz * (white / xyz.sum(0))) @ to_rgb.T


def _interpolated(values: Tensor, at: Tensor, grid: Tensor) -> Tensor:
    """Linear between points, constant beyond them."""
    right = torch.searchsorted(at, grid).clamp(1, len(at) - 1)
    share = ((grid - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return torch.lerp(values[..., right - 1], values[..., right], share)
