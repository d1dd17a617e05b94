from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datamodules.image_shifts import NUM_SEVERITIES, SHIFTS, num_draws, shift_images
from datamodules.random_views import uniform_per_sample


def draws(images: torch.Tensor, shift: str, seed: int = 0) -> torch.Tensor:
    shape = tuple(images.shape[1:])
    return torch.from_numpy(uniform_per_sample(seed, 0, np.arange(len(images)), num_draws(shift, shape)))


def smooth(number=4, size=16, channels=3) -> torch.Tensor:
    """Images with structure at several scales, in 0.2 to 0.8."""
    noise = torch.rand(number, channels, size, size, generator=torch.Generator().manual_seed(0))
    coarse = F.interpolate(noise[:, :, :4, :4], (size, size), mode="bilinear")
    return 0.2 + 0.6 * (0.7 * coarse + 0.3 * noise)


@pytest.mark.parametrize("shift", SHIFTS)
def test_severities_grow(shift):
    images = smooth()
    distances = [
        (shift_images(images, draws(images, shift), shift, s) - images).square().mean().sqrt().item()
        for s in range(1, NUM_SEVERITIES + 1)
    ]
    assert distances[0] > 0.005
    if shift == "rotation":  # beyond a quarter of a turn by half, fine structure is as wrong as it can be
        assert distances[0] < 0.95 * min(distances[1:])
    else:
        assert all(a < b for a, b in itertools.pairwise(distances))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shifted_images_do_not_depend_on_their_batch(shift, channels):
    images = smooth(channels=channels)
    before, numbers = images.clone(), draws(images, shift)
    whole = shift_images(images, numbers, shift, 3)
    assert whole.shape == images.shape and whole.min() >= 0 and whole.max() <= 1
    assert torch.equal(images, before)
    single = torch.cat([shift_images(images[i : i + 1], numbers[i : i + 1], shift, 3) for i in range(4)])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("severity", [1, 3])
def test_noise_has_the_deviation_of_its_level(severity):
    images = torch.full((64, 1, 32, 32), 0.5)
    added = shift_images(images, draws(images, "gaussian_noise"), "gaussian_noise", severity) - 0.5
    level = SHIFTS["gaussian_noise"].levels[severity - 1]
    # Values beyond [0, 1] are cut off: the deviation of a normal number that is.
    z = 0.5 / level
    tail = 0.5 * math.erfc(z / math.sqrt(2))
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    expected = level * math.sqrt((1 - 2 * tail) - 2 * z * density + 2 * z * z * tail)
    assert added.std().item() == pytest.approx(expected, rel=0.01) and abs(added.mean().item()) < 0.01 * level * 3


def test_blur_keeps_what_is_constant_and_spreads_a_point():
    constant = torch.full((1, 2, 16, 16), 0.3)
    for severity in range(1, 6):
        blurred = shift_images(constant, draws(constant, "gaussian_blur"), "gaussian_blur", severity)
        torch.testing.assert_close(blurred, constant)
    point = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    point[..., 32, 32] = 1
    spread = shift_images(point, draws(point, "gaussian_blur"), "gaussian_blur", 3)[0, 0]
    assert spread.sum().item() == pytest.approx(1)
    place = torch.arange(65, dtype=torch.float64) - 32
    sigma = SHIFTS["gaussian_blur"].levels[2] * 65 / 32
    assert (spread.sum(0) @ place**2).sqrt().item() == pytest.approx(sigma, rel=0.03)


def test_brightness_and_contrast():
    images = smooth()
    bright = shift_images(images, draws(images, "brightness"), "brightness", 2)
    torch.testing.assert_close(bright, (images + 0.2).clamp(max=1))
    flat = shift_images(images, draws(images, "contrast"), "contrast", 5)
    torch.testing.assert_close(flat.mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(flat.std((1, 2, 3)), 0.15 * images.std((1, 2, 3)))


def test_rotation_goes_to_both_sides_by_its_angle():
    """A spot on the right goes up or down by 60 degrees."""
    axis = torch.arange(41, dtype=torch.float64) - 20
    image = torch.exp(-0.5 * ((axis[None] - 12) ** 2 + axis[:, None] ** 2) / 2)[None, None].expand(40, -1, -1, -1)
    numbers = draws(image, "rotation")
    turned = shift_images(image, numbers, "rotation", 5)[:, 0]
    weight = turned.sum((1, 2))
    x, y = (turned.sum(1) @ axis) / weight, (turned.sum(2) @ axis) / weight
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.abs().numpy() == pytest.approx(60, abs=0.5)
    assert 8 < (angles > 0).sum() < 32
    assert ((angles > 0) == (numbers[:, 0] < 0.5)).all() or ((angles > 0) == (numbers[:, 0] >= 0.5)).all()


@pytest.mark.parametrize(("severity", "pixels"), [(1, 1.0), (5, 4.0)])
def test_translation_moves_by_its_pixels(severity, pixels):
    axis = torch.arange(31, dtype=torch.float64) - 15
    image = torch.exp(-0.5 * (axis[None] ** 2 + axis[:, None] ** 2) / 4)[None, None].expand(50, -1, -1, -1)
    moved = shift_images(image, draws(image, "translation"), "translation", severity)[:, 0]
    weight = moved.sum((1, 2))
    x, y = (moved.sum(1) @ axis) / weight, (moved.sum(2) @ axis) / weight
    assert torch.hypot(x, y).numpy() == pytest.approx(pixels, rel=0.01)
    assert len({(bool(a), bool(b)) for a, b in zip(x > 0, y > 0, strict=True)}) == 4  # to all sides


def test_pixelated_images_have_few_blocks():
    images = smooth(size=20)
    blocks = shift_images(images, draws(images, "pixelate"), "pixelate", 3)
    assert all(len(row.unique()) <= 10 for row in blocks[0, 0])
    torch.testing.assert_close(blocks.mean((2, 3)), images.mean((2, 3)))


def test_salt_and_pepper_replaces_its_share_in_all_channels():
    images = torch.full((50, 3, 20, 20), 0.5)
    spoiled = shift_images(images, draws(images, "salt_and_pepper"), "salt_and_pepper", 4)
    assert torch.equal(spoiled[:, 0], spoiled[:, 2])
    salt, pepper = (spoiled == 1).float().mean().item(), (spoiled == 0).float().mean().item()
    assert salt == pytest.approx(0.1, abs=0.008) and pepper == pytest.approx(0.1, abs=0.008)
