"""The images of one part in memory or in a mapped file: gathering batches, block means, a stratified split, moments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.loading import WholeBatches

_AT_ONCE = 1024  # images that are worked on at once: a mapped file may be larger than the memory


@dataclass
class ImageSet:
    """The images of one part.

    Attributes:
        pixels: ``(stored image, height, width, channel)`` uint8, possibly mapped from a file.
        rows: ``(image,)`` int64, where the images of the part lie in ``pixels``.
        labels: ``(image,)`` int64.
        names: What the images are called.
    """

    pixels: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    names: list[str]

    def take(self, places: np.ndarray) -> ImageSet:
        """The images at some places of the part; pixels are not copied."""
        names = [self.names[i] for i in places]
        return ImageSet(self.pixels, self.rows[places], self.labels[places], names)


class ImageBatches(WholeBatches):
    """An image set as a data set of whole batches, uint8."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.labels = torch.from_numpy(images.labels)

    def __len__(self) -> int:
        return len(self.images.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""
        index = torch.as_tensor(indices)
        pixels = self.images.pixels[self.images.rows[indices]]
        image = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return {"image": image, "label": self.labels[index], "index": index}


def block_means(pixels: np.ndarray, size: int) -> np.ndarray:
    """Average blocks of pixels, so that images of ``size`` are left.

    Args:
        pixels: ``(image, height, width, channel)`` uint8, square, of a multiple of ``size``.
        size: Height and width of the result.

    Returns:
        ``(image, size, size, channel)`` uint8, rounded.
    """
    block = pixels.shape[1] // size
    out = np.empty((len(pixels), size, size, pixels.shape[3]), dtype=np.uint8)
    for start in range(0, len(pixels), _AT_ONCE):
        part = pixels[start : start + _AT_ONCE]
        sums = part.reshape(len(part), size, block, size, block, -1).sum(axis=(2, 4), dtype=np.int64)
        out[start : start + _AT_ONCE] = (2 * sums + block * block) // (2 * block * block)
    return out


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose ``fraction`` of every class, to the nearest number, by a generator of its own.

    Args:
        labels: ``(image,)``.
        fraction: 0 to 1.
        seed: Of the choice.

    Returns:
        ``(image,)`` bool.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    generator = torch.Generator().manual_seed(seed)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = torch.randperm(len(rows), generator=generator).numpy()
        chosen[rows[order[: round(fraction * len(rows))]]] = True
    return chosen


def stratified_subset(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Choose images with every class in proportion (Huber et al., arXiv 2508.07706, section on weak scaling).

    A class of N_c has N_c number / N, rounded down; what is left goes to the classes with the largest remainders.

    Args:
        labels: ``(image,)``.
        number: At most all.
        seed: Of the choice; a larger subset contains the smaller ones but for a rounded class.

    Returns:
        Places of the chosen ones, ascending.
    """
    classes, counts = np.unique(labels, return_counts=True)
    shares = counts * (number / len(labels))
    sizes = np.floor(shares).astype(int)
    left = number - int(sizes.sum())
    sizes[np.argsort(sizes - shares, kind="stable")[:left]] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, size in zip(classes, sizes, strict=True):
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[torch.randperm(len(rows), generator=generator).numpy()[:size]])
    return np.sort(np.concatenate(chosen))


def moments(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of the stored values of every image and channel, from exact sums.

    Returns:
        Two arrays ``(image, channel)`` float64.
    """
    sums = []
    for start in range(0, len(images.rows), _AT_ONCE):
        values = images.pixels[images.rows[start : start + _AT_ONCE]].astype(np.int64)
        sums.append(np.stack([values.sum(axis=(1, 2)), (values * values).sum(axis=(1, 2))]))
    first, second = np.concatenate(sums, axis=1) / (images.pixels.shape[1] * images.pixels.shape[2])
    return first, second
