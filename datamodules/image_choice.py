"""Which images are wanted, of what kind, and which part they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from datamodules.image_set import ImageSet, block_means, stratified, stratified_subset
from datamodules.readers.stored_images import StoredImages, first_of_each_class
from datamodules.synthetic_images import synthetic_images


@dataclass(frozen=True)
class ImageChoice:
    """Makes the parts train, val and test of what a data set stores.

    Attributes:
        name: What error messages call the data set.
        classes: To keep, by label, in the order of their new labels; None: all.
        num_classes: That the kept ones are checked against; None: they are not.
        num_channels: That a network expects; None: whatever there are.
        to_rgb: Whether grey images become three channels.
        max_images: Of the parts train (with val) and test, the first of every class; None: all.
        image_size: Height and width; stored images of a multiple of it are averaged over blocks. None: as they are.
        test_size: Images of the test part where the data set has none of its own; None: it has.
        test_from: Where those are taken from, ``end`` or ``random`` places.
        val_fraction: Part of the training images of every class that validation takes.
        split_seed: Of random places, of validation, of synthetic images.

    Raises:
        ValueError: Names the argument of the data configuration and the remedy.
    """

    name: str
    classes: Sequence[int] | None
    num_classes: int | None
    num_channels: int | None
    to_rgb: bool
    max_images: Mapping[str, int | None]
    image_size: int | None
    test_size: int | None
    test_from: Literal["end", "random"]
    val_fraction: float
    split_seed: int

    def __post_init__(self) -> None:
        sizes = {f"max_{part}": number for part, number in self.max_images.items()}
        sizes |= {
            "num_classes": self.num_classes,
            "num_channels": self.num_channels,
            "test_size": self.test_size,
            "image_size": self.image_size,
        }
        for key, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction}: must be at least 0 and below 1")
        if self.classes is not None and (len(set(self.classes)) < len(self.classes) or not self.classes):
            raise ValueError(f"data.classes={self.classes}: name every class once, at least one")
        if self.to_rgb and self.num_channels not in (None, 3):
            raise ValueError(f"data.num_channels={self.num_channels}: data.to_rgb=true gives 3; set it to 3")

    def generated(self, part: Literal["train", "test"]) -> StoredImages:
        """A part of synthetic images: as many as are wanted, of the wanted kind."""
        return synthetic_images(
            self.max_images[part],
            num_classes=self.num_classes if self.classes is None else max(self.classes) + 1,
            num_channels=1 if self.to_rgb else self.num_channels,
            size=self.image_size,
            part=part,
            seed=self.split_seed,
        )

    def parts(
        self, train: StoredImages, test: StoredImages | None, val: StoredImages | None = None
    ) -> dict[str, ImageSet]:
        """The images of all parts.

        Args:
            train: What is stored to train on.
            test: What is stored to test; None: a part of ``train``.
            val: What is stored to validate; None: a part of ``train`` too (``val_fraction``).

        Raises:
            ValueError: Names the argument and the remedy.
        """
        if (test is None) != (self.test_size is not None):
            raise ValueError(
                f"{self.name}: there is no test part; set data.test_size to the number of images it shall have"
                if test is None
                else f"data.test_size={self.test_size}: {self.name} has a test part; set data.test_size=null"
            )
        self._check_classes(train.class_names)
        rows = self._rows_of_classes(train.labels)
        if test is None:
            rows, test_rows = self._cut_off_test(rows)
            test = train
        else:
            test_rows = self._rows_of_classes(test.labels)
        sets = {"test": self._load(test, self._limited(test, test_rows, "test"))}
        chosen = self._load(train, self._limited(train, rows, "train"))
        if val is not None:
            if self.val_fraction:
                raise ValueError(f"data.val_fraction={self.val_fraction}: data.val_folder has the images; set it to 0")
            return {"train": chosen, "val": self._load(val, self._rows_of_classes(val.labels)), **sets}
        in_val = stratified(chosen.labels, self.val_fraction, self.split_seed)
        if self.val_fraction and not in_val.any():
            raise ValueError(f"data.val_fraction={self.val_fraction} leaves no image for validation; increase it")
        for part, mask in (("train", ~in_val), ("val", in_val)):
            sets[part] = chosen.take(np.flatnonzero(mask))
        if not len(sets["train"].rows) or not len(sets["test"].rows):
            raise ValueError(f"{self.name}: nothing is left to train on or to test; see data.classes and data.max_test")
        return sets

    def class_names(self, names: list[str]) -> list[str]:
        """Of the classes that are kept, in the order of their labels here."""
        return names if self.classes is None else [names[c] for c in self.classes]

    def checked_shape(self, sets: Mapping[str, ImageSet]) -> tuple[int, int, int]:
        """Channel, height, width of the stored images of all parts.

        Raises:
            ValueError: If they differ, or have other channels than are wanted.
        """
        shape = sets["train"].pixels.shape[1:]
        for part in ("test", "val"):
            if (other := sets[part].pixels.shape[1:]) != shape:
                raise ValueError(f"{self.name}: training images have the shape {shape}, {part} images {other}")
        height, width, stored = shape
        if self.to_rgb and stored != 1:
            raise ValueError(f"data.to_rgb=true: {self.name} has {stored} channels already; set data.to_rgb=false")
        channels = 3 if self.to_rgb else stored
        if self.num_channels not in (None, channels):
            remedy = "set data.to_rgb=true, or " if (stored, self.num_channels) == (1, 3) else ""
            raise ValueError(
                f"the model expects {self.num_channels} channels (data.num_channels), {self.name} has {stored}: "
                f"{remedy}set data.num_channels={channels}"
            )
        return stored, height, width

    def _check_classes(self, names: list[str]) -> None:
        if self.classes is not None and (unknown := [c for c in self.classes if not 0 <= c < len(names)]):
            raise ValueError(f"data.classes: {self.name} has no class {unknown[0]}; it has 0 to {len(names) - 1}")
        number = len(names if self.classes is None else self.classes)
        if self.num_classes not in (None, number):
            chosen = f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
            raise ValueError(
                f"data.num_classes={self.num_classes}, but {self.name} has {number} classes"
                + (f" ({chosen})" if self.classes is None else f" (data.classes={self.classes})")
                + f": set data.num_classes={number}"
            )

    def _rows_of_classes(self, labels: np.ndarray) -> np.ndarray:
        if self.classes is None:
            return np.arange(len(labels))
        return np.flatnonzero(np.isin(labels, self.classes))

    def _cut_off_test(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on and rows to test, of a data set without a test part."""
        if len(rows) <= self.test_size:
            raise ValueError(
                f"data.test_size={self.test_size}: {self.name} has {len(rows)} images; leave some to train on"
            )
        if self.test_from == "random":
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed))
            rows = rows[order.numpy()]
        return rows[: -self.test_size], rows[-self.test_size :]

    def _limited(self, stored: StoredImages, rows: np.ndarray, part: Literal["train", "test"]) -> np.ndarray:
        number = self.max_images[part]
        if number is None:
            return rows
        if number > len(rows):
            raise ValueError(
                f"data.max_{part}={number} is larger than the {part} part of {self.name} ({len(rows)} images); use at "
                f"most {len(rows)}, or null for all"
            )
        return rows[first_of_each_class(stored.labels[rows], number)]

    def _load(self, stored: StoredImages, rows: np.ndarray) -> ImageSet:
        """Pixels of the chosen images at ``image_size``, with the labels they have here."""
        labels = stored.labels[rows]
        if self.classes is not None:
            new = np.full(len(stored.class_names), -1, dtype=np.int64)
            new[self.classes] = np.arange(len(self.classes))
            labels = new[labels]
        pixels = stored.load(rows)
        if self.image_size is not None and pixels.shape[1] != self.image_size:
            pixels = self._averaged(pixels)
        return ImageSet(pixels, np.arange(len(rows)), labels, [stored.names[i] for i in rows])

    def _averaged(self, pixels: np.ndarray) -> np.ndarray:
        """Means over blocks, so that ``image_size`` is left."""
        size, stored = self.image_size, pixels.shape[1]
        if stored % size:
            fitting = [str(n) for n in range(1, stored + 1) if stored % n == 0]
            raise ValueError(
                f"data.image_size={size} does not divide the {stored} pixels of {self.name}; use one of "
                f"{', '.join(fitting)}, or null"
            )
        return block_means(pixels, size)


def grown(images: ImageSet, samples_per_device: int, devices: int, seed: int, name: str) -> ImageSet:
    """The training images of that many devices, every class in proportion (``data.samples_per_device``).

    Args:
        images: All of them.
        samples_per_device: Images of each device.
        devices: Their number.
        seed: Of the choice.
        name: What an error message calls the data set.

    Raises:
        ValueError: If there are too few.
    """
    wanted = samples_per_device * devices
    if wanted > len(images.rows):
        raise ValueError(
            f"data.samples_per_device={samples_per_device} on {devices} devices: {name} has {len(images.rows)} "
            f"training images; use at most {len(images.rows) // devices}"
        )
    return images.take(stratified_subset(images.labels, wanted, seed))


def cut_alike(images: ImageSet, share: float, seed: int) -> ImageSet:
    """The share of the validation images that `grown` has left of the training images, at least one.

    Args:
        images: All of them.
        share: 0 to 1.
        seed: Of the choice.
    """
    number = max(round(share * len(images.rows)), min(1, len(images.rows)))
    return images if number == len(images.rows) else images.take(stratified_subset(images.labels, number, seed))
