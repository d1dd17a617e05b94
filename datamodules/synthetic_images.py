"""Generator of images whose class is a pattern: for tests of shapes and speed at any size, where no real set fits."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter

from datamodules.readers.stored_images import StoredImages, in_memory

_MAX_SHIFT = 2  # pixels
_NOISE = 0.5  # standard deviations of a template
_GREY, _CONTRAST = 128, 40  # stored value of 0, and of one standard deviation


def synthetic_images(
    num_images: int, *, num_classes: int, num_channels: int, size: int, part: str, seed: int = 0
) -> StoredImages:
    """Draw images: the template of their class, shifted by up to two pixels (around the edges), plus noise.

    A template is Gaussian noise through a box filter of 5 x 5 pixels, with a standard deviation of 1. Both parts share
    the templates. With ten classes of 16 x 16 pixels a classifier that knows the templates makes no mistake.

    Args:
        num_images: Images; classes alternate, so that they are equally frequent.
        num_classes: Templates.
        num_channels: Channels.
        size: Height and width.
        part: ``train`` or ``test``: other images of the same classes.
        seed: Seed of everything random.
    """
    templates = np.random.default_rng((seed, 0)).normal(size=(num_classes, size, size, num_channels))
    templates = uniform_filter(templates, size=(0, 5, 5, 0), mode="wrap")
    templates /= templates.std(axis=(1, 2, 3), keepdims=True)
    rng = np.random.default_rng((seed, 1 if part == "train" else 2))
    labels = np.arange(num_images) % num_classes
    shifts = rng.integers(-_MAX_SHIFT, _MAX_SHIFT + 1, (num_images, 2))
    rows, columns = (((np.arange(size) - shifts[:, i, None]) % size) for i in range(2))
    images = templates[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    images = images + rng.normal(scale=_NOISE, size=images.shape)
    pixels = np.clip(np.rint(_GREY + _CONTRAST * images), 0, 255).astype(np.uint8)
    return in_memory("synthetic images", pixels, labels, part=part, num_classes=num_classes)
