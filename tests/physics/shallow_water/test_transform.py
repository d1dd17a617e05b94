from __future__ import annotations

import math

import pytest
import torch

from physics.shallow_water import SphericalTransform


@pytest.fixture(scope="module")
def grid() -> SphericalTransform:
    return SphericalTransform(32, 64, 21)


def random_coefficients(grid: SphericalTransform, *lead: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    size = grid.truncation + 1
    parts = torch.randn(2, *lead, size, size, dtype=torch.float64, generator=generator)
    found = torch.complex(parts[0], parts[1]) * grid.valid
    found[..., 0, :] = found[..., 0, :].real.to(found.dtype)
    return found


def test_a_known_field(grid):
    """Y_00, Y_10 and Y_22 by their closed forms."""
    mu, cos = grid.mu[:, None], grid.cos_latitude[:, None]
    lon = grid.longitude
    field = 3.0 + 2.0 * mu + 5.0 * cos**2 * torch.cos(2 * lon) + 7.0 * cos**2 * torch.sin(2 * lon)
    found = grid.analysis(field)
    expected = torch.zeros_like(found)
    expected[0, 0] = 3 * math.sqrt(2)
    expected[0, 1] = 2 / math.sqrt(1.5)
    expected[2, 2] = (5 - 7j) / 2 / math.sqrt(15 / 16)
    assert (found - expected).abs().max() < 1e-13


def test_laplacian_and_mean(grid):
    field = grid.cos_latitude[:, None] ** 2 * torch.cos(2 * grid.longitude)  # of degree 2
    coefficients = grid.analysis(field)
    laplacian = grid.synthesis(grid.laplacian(coefficients))
    assert torch.allclose(laplacian, -6 / grid.radius_m**2 * field, atol=1e-26, rtol=1e-10)
    back = grid.synthesis(grid.inverse_laplacian(grid.laplacian(coefficients)))
    assert torch.allclose(back, field, atol=1e-12)
    assert float(grid.mean(field + 4)) == pytest.approx(4, abs=1e-13)


def test_solid_rotation(grid):
    """u = U cos(lat) has the vorticity 2 U sin(lat) / a and no divergence."""
    speed = 40.0
    u = speed * grid.cos_latitude[:, None] ** 2 * torch.ones(64, dtype=torch.float64)
    divergence, vorticity = grid.divergence_and_curl(u, torch.zeros_like(u))
    expected = 2 * speed / grid.radius_m * grid.mu[:, None].expand(32, 64)
    assert (grid.synthesis(vorticity) - expected).abs().max() < 1e-18
    assert divergence.abs().max() < 1e-19
    image_u, image_v = grid.winds(vorticity, divergence)
    assert (image_u - u).abs().max() < 1e-11 and image_v.abs().max() < 1e-11


def test_gradient_of_a_potential_flow(grid):
    """v = dchi/dlat / a: images from divergence alone."""
    chi = random_coefficients(grid)
    chi[..., 15:] = 0
    divergence = grid.laplacian(chi)
    u, v = grid.winds(torch.zeros_like(chi), divergence)
    back, curl = grid.divergence_and_curl(u, v)
    scale = divergence.abs().max()
    assert (back - divergence).abs().max() < 1e-12 * scale and curl.abs().max() < 1e-12 * scale


def test_leading_dimensions_are_independent(grid):
    coefficients = random_coefficients(grid, 2, 3)
    fields = grid.synthesis(coefficients)
    assert fields.shape == (2, 3, 32, 64)
    assert torch.allclose(fields[1, 2], grid.synthesis(coefficients[1, 2]), atol=1e-13)
    assert torch.allclose(grid.analysis(fields), coefficients, atol=1e-13)


def test_a_grid_too_coarse_is_refused():
    with pytest.raises(ValueError, match="truncation=40: a grid of 32 x 64 holds degrees from 1 to 31"):
        SphericalTransform(32, 64, 40)
