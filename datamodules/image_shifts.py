"""Shifted test images in five severities, as CIFAR-10-C has them (Hendrycks and Dietterich, ICLR 2019), for any images.

Every shift is a pure function of a batch and of numbers drawn per sample, so that a shifted test set is the same on any
number of processes, at any batch size, and on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_SEVERITIES = 5


class Shift(NamedTuple):
    """A kind of shift.

    Attributes:
        levels: Strength at severities 1 to 5.
        apply: Function of ``(batch, channel, height, width)`` images in [0, 1], draws ``(batch, num)`` and the level.
        num_draws: Random numbers per image of a shape (channel, height, width).
    """

    levels: tuple[float, ...]
    apply: Callable[[Tensor, Tensor, float], Tensor]
    num_draws: Callable[[tuple[int, int, int]], int]


def shift_images(images: Tensor, draws: Tensor, shift: str, severity: int) -> Tensor:
    """Shift a batch.

    Args:
        images: ``(batch, channel, height, width)`` float in [0, 1].
        draws: ``(batch, num)`` uniform in [0, 1), num = `num_draws`.
        shift: A name of `SHIFTS`.
        severity: 1 to 5.

    Returns:
        Images of the same shape in [0, 1].
    """
    kind = SHIFTS[shift]
    return kind.apply(images, draws.to(images), kind.levels[severity - 1]).clamp(0, 1)


def num_draws(shift: str, shape: tuple[int, int, int]) -> int:
    """Random numbers that `shift_images` needs for an image of shape (channel, height, width)."""
    return SHIFTS[shift].num_draws(shape)


def gaussian_noise(images: Tensor, draws: Tensor, level: float) -> Tensor:
    """Noise with a standard deviation of ``level`` of the range."""
    # Numbers are multiples of 2^-53; an exact 0 would give minus infinity, and float32 may round up to 1.
    normal = torch.special.ndtri(draws.clamp(1e-7, 1 - 1e-7))
    return images + level * normal.view_as(images).to(images)


def _gaussian_blur(images: Tensor, draws: Tensor, level: float) -> Tensor:
    """Convolution with a Gaussian of ``level`` pixels, in proportion more above 32 pixels; edges are continued."""
    sigma = level * max(1.0, images.shape[-1] / 32)
    radius = max(1, math.ceil(3 * sigma))
    place = torch.arange(-radius, radius + 1).to(images)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    planes = F.pad(images.flatten(0, 1).unsqueeze(1), (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel), kernel.mT).view_as(images)


def _brightness(images: Tensor, draws: Tensor, level: float) -> Tensor:
    return images + level


def _contrast(images: Tensor, draws: Tensor, level: float) -> Tensor:
    """Differences from the mean of the image times ``level``."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + level * (images - mean)


def _rotation(images: Tensor, draws: Tensor, level: float) -> Tensor:
    """A turn by ``level`` degrees to either side."""
    angle = math.radians(level) * (2 * (draws[:, 0] < 0.5).to(images) - 1)
    zero = torch.zeros_like(angle)
    rows = [torch.stack([angle.cos(), angle.sin(), zero], 1), torch.stack([-angle.sin(), angle.cos(), zero], 1)]
    return _resampled(images, torch.stack(rows, 1))


def _translation(images: Tensor, draws: Tensor, level: float) -> Tensor:
    """A move by ``level`` pixels in any direction."""
    direction = 2 * math.pi * draws[:, 0]
    size = torch.tensor([images.shape[-1], images.shape[-2]]).to(images)
    move = torch.stack([direction.cos(), direction.sin()], 1) * (2 * level / size)
    return _resampled(images, torch.cat([torch.eye(2).to(images).expand(len(images), 2, 2), move.unsqueeze(2)], 2))


def _resampled(images: Tensor, maps: Tensor) -> Tensor:
    """Bilinear values at the places that ``(batch, 2, 3)`` affine maps lead to; black outside."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _pixelate(images: Tensor, draws: Tensor, level: float) -> Tensor:
    """Means over blocks: ``level`` of the height in blocks is left."""
    blocks = max(1, round(level * images.shape[-1]))
    return F.interpolate(F.adaptive_avg_pool2d(images, blocks), images.shape[-2:], mode="nearest-exact")


def _salt_and_pepper(images: Tensor, draws: Tensor, level: float) -> Tensor:
    """A share ``level`` of the pixels black or white, in all channels."""
    place = draws.view(len(images), 1, *images.shape[-2:])
    return torch.where(place < level / 2, 0.0, torch.where(place < level, 1.0, images))


def _none(shape: tuple[int, int, int]) -> int:
    return 1  # `uniform_per_sample` gives at least one


SHIFTS: dict[str, Shift] = {
    "gaussian_noise": Shift((0.1, 0.2, 0.3, 0.4, 0.5), gaussian_noise, math.prod),
    "gaussian_blur": Shift((0.4, 0.6, 0.8, 1.1, 1.5), _gaussian_blur, _none),
    "brightness": Shift((0.1, 0.2, 0.3, 0.4, 0.5), _brightness, _none),
    "contrast": Shift((0.75, 0.6, 0.45, 0.3, 0.15), _contrast, _none),
    "rotation": Shift((15.0, 26.25, 37.5, 48.75, 60.0), _rotation, _none),
    "translation": Shift((1.0, 1.75, 2.5, 3.25, 4.0), _translation, _none),
    "pixelate": Shift((0.75, 0.6, 0.5, 0.4, 0.3), _pixelate, _none),
    "salt_and_pepper": Shift((0.02, 0.05, 0.1, 0.2, 0.3), _salt_and_pepper, lambda shape: shape[1] * shape[2]),
}
