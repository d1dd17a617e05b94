"""Colours of reflectances."""

from __future__ import annotations

import pytest
import torch

from physics.thin_film.colour import srgb
from physics.thin_film.transfer_matrix import transfer_matrix
from tests.physics.thin_film.stacks import WAVELENGTHS, catalog


def hexadecimal(reflectance: torch.Tensor, wavelength: torch.Tensor = WAVELENGTHS) -> list[int]:
    return (255 * srgb(reflectance, wavelength)).round().int().tolist()


def test_grey_is_grey():
    for level, value in ((0.0, 0), (1.0, 255), (0.5, 188), (0.001, 3)):
        assert hexadecimal(torch.full((171,), level)) == [value] * 3


def test_bands_have_their_colours():
    for centre, largest in ((450, 2), (540, 1), (630, 0)):
        colour = srgb(torch.exp(-0.5 * ((WAVELENGTHS - centre) / 20) ** 2), WAVELENGTHS)
        assert colour.argmax() == largest and colour.max() > 0.4
    yellow = srgb((WAVELENGTHS > 510).double(), WAVELENGTHS)
    assert yellow[0] > 0.9 and yellow[1] > 0.85 and yellow[2] < 0.3
    infrared = srgb((WAVELENGTHS > 790).double(), WAVELENGTHS)
    assert infrared.max() < 1e-3


def test_grids_and_batches():
    reflectance = 0.5 + 0.3 * torch.sin(WAVELENGTHS / 200)
    fine = torch.arange(300.0, 2001.0, 1.0, dtype=torch.float64)
    a, b = srgb(reflectance, WAVELENGTHS), srgb(0.5 + 0.3 * torch.sin(fine / 200), fine)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
    assert srgb(reflectance.expand(2, 4, 171), WAVELENGTHS).shape == (2, 4, 3)
    with pytest.raises(ValueError, match="from 400 to 700 nm; there are 500 to 2000"):
        srgb(reflectance[20:], WAVELENGTHS[20:])


def test_silver_is_bright_and_neutral():
    bulk = transfer_matrix(catalog().index("Ag", WAVELENGTHS)[None], torch.tensor([500.0]), WAVELENGTHS)
    colour = srgb(bulk[0], WAVELENGTHS)
    assert colour.min() > 0.9 and colour.max() - colour.min() < 0.05
