"""Augmentation of whole batches of images with plain tensor operations, reproducible sample by sample."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NUM_DRAWS = 4
"""Random numbers of one view: flip, angle, row and column of the cut."""

SIZE_DRAWS = 2
"""Further ones of a cut of random size: area and shape."""


def uniform_per_sample(seed: int, epoch: int, index: np.ndarray, num: int = NUM_DRAWS, stream: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, epoch, stream, index) alone.

    They are the same whichever batch, process or device a sample falls to, and after a restart; no random state is
    drawn from or kept (SplitMix64 of a counter, Steele, Lea and Flood, OOPSLA 2014).

    Args:
        seed: Of the run.
        epoch: Every epoch has its own numbers.
        index: ``(batch,)`` integers, the samples.
        num: Numbers per sample.
        stream: Independent views of a sample within an epoch have different ones.

    Returns:
        ``(batch, num)`` float64.
    """
    key = np.random.SeedSequence((seed, epoch, stream)).generate_state(1, np.uint64)
    counter = np.asarray(index, dtype=np.uint64)[:, None] * np.uint64(num) + np.arange(num, dtype=np.uint64)
    z = key + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_views(
    images: Tensor,
    draws: Tensor,
    *,
    size: int,
    flip_probability: float = 0.5,
    rotation_degrees: float = 30.0,
    padding: int = 10,
) -> Tensor:
    """Flip, rotate about the middle, pad with zeros and cut out a square, each sample its own way.

    The four steps are one affine map, so that every pixel is interpolated (bilinearly) once.

    Args:
        images: ``(batch, channel, stored, stored)`` float.
        draws: ``(batch, 4)`` in [0, 1), see `uniform_per_sample`.
        size: Height and width of the views, at most ``stored + 2 * padding``.
        flip_probability: Of a horizontal flip.
        rotation_degrees: Angles are uniform between minus and plus this.
        padding: Pixels added at every side.

    Returns:
        ``(batch, channel, size, size)``.
    """
    stored = images.shape[-1]
    draws = draws.to(images)
    flip, angle, row, column = draws.unbind(1)
    turn = _orientation(flip, angle, flip_probability, rotation_degrees)
    # Offset of the cut in whole pixels, then the distance of its middle from that of the image.
    places = stored + 2 * padding - size + 1
    middle = torch.stack([(column * places).floor(), (row * places).floor()], 1) + (size - stored) / 2 - padding
    # `affine_grid` counts in halves of the images, the view's on the right and the stored image's on the left.
    map_ = torch.cat([turn * (size / stored), turn @ middle.unsqueeze(2) * (2 / stored)], 2)
    grid = F.affine_grid(map_, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def resized_views(
    images: Tensor,
    draws: Tensor,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
    rotation_degrees: float = 0.0,
) -> Tensor:
    """Flip, rotate about the middle, cut out a rectangle of random size and shape and resize it to a square.

    The part of the area is uniform in ``scale`` and the logarithm of width over height uniform in that of ``ratio``
    (Szegedy et al., CVPR 2015). A side that would be longer than the image is as long as the image; others draw again
    then. Places are uniform and not bound to whole pixels. The steps are one affine map, so that every pixel is
    interpolated (bilinearly) once; the cuts should have no more pixels than the views, which are not smoothed.

    Args:
        images: ``(batch, channel, stored, stored)`` float.
        draws: ``(batch, 6)`` in [0, 1), see `uniform_per_sample`: flip, angle, row, column, area, shape.
        size: Height and width of the views.
        scale: Least and largest part of the area.
        ratio: Least and largest width over height.
        flip_probability: Of a horizontal flip.
        rotation_degrees: Angles are uniform between minus and plus this; what lies beyond the image is zero.

    Returns:
        ``(batch, channel, size, size)``.
    """
    flip, angle, row, column, area, shape = draws.to(images).unbind(1)
    turn = _orientation(flip, angle, flip_probability, rotation_degrees)
    area = scale[0] + (scale[1] - scale[0]) * area
    shape = math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape
    # Width and height as parts of the image, then the middle, in halves of the image from its own.
    extent = torch.stack([(area * shape.exp()).sqrt(), (area * (-shape).exp()).sqrt()], 1).clamp(max=1)
    middle = (2 * torch.stack([column, row], 1) - 1) * (1 - extent)
    map_ = torch.cat([turn * extent.unsqueeze(1), turn @ middle.unsqueeze(2)], 2)
    grid = F.affine_grid(map_, [len(images), images.shape[1], size, size], align_corners=False)
    # An enlarged cut at the edge looks half a pixel beyond the outermost ones.
    beyond = "zeros" if rotation_degrees else "border"
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=beyond, align_corners=False)


def _orientation(flip: Tensor, angle: Tensor, flip_probability: float, rotation_degrees: float) -> Tensor:
    """``(batch, 2, 2)``: from directions in a view to those in the image, both x before y."""
    angle = torch.deg2rad((2 * angle - 1) * rotation_degrees)
    mirror = torch.where(flip < flip_probability, -1.0, 1.0)
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    return turn * torch.stack([mirror, torch.ones_like(mirror)], 1).unsqueeze(2)


def cut_out(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Set a square to zero, each sample at its own place; it may reach beyond the edge (DeVries and Taylor, 2017).

    Args:
        images: ``(batch, channel, height, width)`` float, normalised, so that zero is the mean.
        draws: ``(batch, 2)`` in [0, 1): row and column of the middle.
        size: Height and width of the square.

    Returns:
        New images.
    """
    inside = []
    for draw, length in zip(draws.to(images.device).unbind(1), images.shape[-2:], strict=True):
        start = (draw * length).long() - size // 2
        place = torch.arange(length, device=images.device)
        inside.append((place >= start[:, None]) & (place < start[:, None] + size))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square, 0.0)
