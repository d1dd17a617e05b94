"""From stored values to the input of a network, on the device: normalisation, random views, shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.image_set import ImageSet, moments
from datamodules.image_shifts import gaussian_noise, num_draws, shift_images
from datamodules.random_views import (
    NUM_DRAWS,
    SIZE_DRAWS,
    cut_out,
    random_views,
    resized_views,
    uniform_per_sample,
)

# Draws of the shifted test images: an epoch that no training reaches.
_SHIFT_EPOCH = 2**31


@dataclass(frozen=True)
class Normalization:
    """Stored values to [0, 1], and those to what a network sees.

    Attributes:
        peak: The white value.
        mean: Of each stored channel, in [0, 1]: what is subtracted. None: nothing is, nor divided.
        std: Of each stored channel: what is divided by.
        to_rgb: Whether grey images are repeated to three channels.
    """

    peak: float
    mean: Sequence[float] | None
    std: Sequence[float] | None
    to_rgb: bool

    def unit(self, stored: Tensor) -> Tensor:
        """Values in [0, 1]; the gathered pixels have their channels last in memory, a batch has them first."""
        return stored.contiguous().float() / self.peak

    def __call__(self, image: Tensor) -> Tensor:
        """The input of a network of values in [0, 1], ``(batch, channel, height, width)``."""
        if self.to_rgb:
            image = image.expand(-1, 3, -1, -1)
        if self.mean is None:
            return image
        mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


def channel_statistics(images: ImageSet, peak: float, legacy: bool, name: str) -> dict[str, list[float]]:
    """Mean and standard deviation (``mean``, ``std``) of each channel over images, in units of the white value.

    Args:
        images: Those of the training.
        peak: The white value.
        legacy: Whether the standard deviation is the mean over the images of that of an image.
        name: What an error message calls the data set.

    Raises:
        ValueError: If a channel has one value everywhere.
    """
    first, second = moments(images)
    if legacy:
        std = np.sqrt(np.maximum(second - first**2, 0)).mean(0)
    else:
        std = np.sqrt(np.maximum(second.mean(0) - first.mean(0) ** 2, 0))
    if not (std > 0).all():
        raise ValueError(f"{name}: a channel has one value everywhere; set data.normalize=none")
    return {"mean": (first.mean(0) / peak).tolist(), "std": (std / peak).tolist()}


@dataclass(frozen=True)
class Augmentation:
    """Random views of training images, reproducible image by image; the attributes are the arguments of `Images`.

    Attributes:
        flip_probability: Of a horizontal flip.
        rotation_degrees: Largest angle.
        padding: Black pixels at every side before a cut.
        crop_scale: Least and largest part of the area that is cut out and resized, in place of ``padding``.
        crop_ratio: Least and largest width over height of these cuts.
        cutout: Side of a square that is set to the mean.
        noise: Standard deviation, on values in [0, 1].
        seed: Of the views.

    Raises:
        ValueError: Names the argument of the data configuration and the remedy.
    """

    flip_probability: float
    rotation_degrees: float
    padding: int
    crop_scale: tuple[float, ...] | None
    crop_ratio: tuple[float, ...]
    cutout: int
    noise: float
    seed: int

    def __post_init__(self) -> None:
        for key in ("padding", "cutout", "noise", "rotation_degrees"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key}={getattr(self, key)}: must not be negative")
        for key, most in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            values = getattr(self, key)
            if values is not None and not (len(values) == 2 and 0 < values[0] <= values[1] <= most):
                limit = " and at most 1: parts of the area" if key == "crop_scale" else ": width over height"
                raise ValueError(f"data.{key}={list(values)}: give the least and the largest, both positive{limit}")
        if self.crop_scale is not None and self.padding:
            raise ValueError(
                f"data.padding={self.padding} and data.crop_scale={list(self.crop_scale)} are two ways to cut: set "
                "data.padding=0, or data.crop_scale=null"
            )
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"data.flip_probability={self.flip_probability}: must be between 0 and 1")

    def view(self, image: Tensor, index: Tensor, normalize: Normalization, epoch: int, stream: int) -> Tensor:
        """A random view of every image, normalised.

        Args:
            image: ``(batch, channel, size, size)`` in [0, 1].
            index: ``(batch,)``, number of each image in its part.
            normalize: What follows the view; a cut-out square is set to its mean.
            epoch: Every epoch has its own views.
            stream: Independent views within an epoch have different ones.
        """
        pixels = image[0].numel() if self.noise else 0
        sizes = 0 if self.crop_scale is None else SIZE_DRAWS
        draws = _draws(epoch, index, NUM_DRAWS + 2 + pixels + sizes, self.seed, stream)
        how = {"flip_probability": self.flip_probability, "rotation_degrees": self.rotation_degrees}
        size = image.shape[-1]
        if self.crop_scale is not None:
            of_view = torch.cat([draws[:, :NUM_DRAWS], draws[:, -SIZE_DRAWS:]], 1)
            image = resized_views(image, of_view, size=size, scale=self.crop_scale, ratio=self.crop_ratio, **how)
        elif self.padding or any(how.values()):
            image = random_views(image, draws[:, :NUM_DRAWS], size=size, padding=self.padding, **how)
        if self.noise:
            image = gaussian_noise(image, draws[:, NUM_DRAWS + 2 : NUM_DRAWS + 2 + pixels], self.noise)
        image = normalize(image)
        return cut_out(image, draws[:, NUM_DRAWS : NUM_DRAWS + 2], self.cutout) if self.cutout else image


def shifted(image: Tensor, index: Tensor, shift: str, severity: int, seed: int) -> Tensor:
    """Images in [0, 1] with a shift of `datamodules.image_shifts`, the same ones whenever they are asked for.

    Args:
        image: ``(batch, channel, size, size)`` in [0, 1].
        index: ``(batch,)``, number of each image in its part.
        shift: Name of the shift.
        severity: 1 to 5.
        seed: Of its random numbers.
    """
    draws = _draws(_SHIFT_EPOCH, index, num_draws(shift, image.shape[1:]), seed)
    return shift_images(image, draws, shift, severity)


def _draws(epoch: int, index: Tensor, number: int, seed: int, stream: int = 0) -> Tensor:
    return torch.from_numpy(uniform_per_sample(seed, epoch, index.cpu().numpy(), number, stream))
