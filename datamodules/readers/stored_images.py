"""What every reader of labelled images returns, and what they have in common: selection, checksums, square images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class StoredImages(NamedTuple):
    """Labelled images of one part, whose pixels are read when it is known which of them are wanted.

    Attributes:
        labels: ``(image,)`` int64, positions in ``class_names``.
        names: What the images are called in tables and messages.
        class_names: Names of the classes.
        load: Returns the pixels of some rows, ``(row, height, width, channel)`` uint8, possibly mapped from a file.
        peak: The stored value that is white.
    """

    labels: np.ndarray
    names: Sequence[str]
    class_names: list[str]
    load: Callable[[np.ndarray], np.ndarray]
    peak: int = 255


def in_memory(
    where: str, pixels: np.ndarray, labels: np.ndarray, *, part: str, num_classes: int | None, peak: int = 255
) -> StoredImages:
    """Wrap arrays, after a look at their shapes, types and labels.

    Args:
        where: Names the source in messages.
        pixels: ``(image, height, width)`` or ``(image, height, width, channel)`` uint8.
        labels: ``(image,)`` integers.
        part: How names of the images begin.
        num_classes: Number of classes; None: one more than the largest label.
        peak: The stored value that is white.

    Raises:
        ValueError: Names the source and what is wrong with it.
    """
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise ValueError(
            f"{where}: images are {pixels.dtype} of shape {pixels.shape}; needed are uint8 values of shape "
            "(image, height, width) or (image, height, width, channel)"
        )
    if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{where}: {len(pixels)} images, but labels are {labels.dtype} of shape {labels.shape}; needed is one "
            "integer per image"
        )
    require_square(where, pixels.shape[1:3])
    if num_classes is None:
        num_classes = int(labels.max(initial=-1)) + 1
    if (outside := (labels < 0) | (labels >= num_classes)).any():
        row = int(np.argmax(outside))
        raise ValueError(
            f"{where}: label {labels[row]} of image {row} is outside 0..{num_classes - 1}; correct the file or "
            "data.num_classes"
        )
    return StoredImages(
        labels.astype(np.int64),
        [f"{part}_{i:05d}" for i in range(len(labels))],
        [str(c) for c in range(num_classes)],
        lambda rows: pixels if len(rows) == len(pixels) and (np.diff(rows) == 1).all() else pixels[rows],
        peak,
    )


def first_of_each_class(labels: np.ndarray, number: int) -> np.ndarray:
    """Rows of the first images of every class, ``number`` in all, in the order of the file.

    Every class gives the same number; where one has fewer, the others make up for it.
    """
    occurrence = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        occurrence[rows] = np.arange(len(rows))
    return np.sort(np.lexsort((labels, occurrence))[:number])


def require_square(where: str, shape: Sequence[int]) -> None:
    """Refuse images whose height is not their width."""
    if shape[0] != shape[1]:
        raise ValueError(
            f"{where}: images of {shape[0]} x {shape[1]} pixels; square ones are needed. Set data.stored_size to cut "
            "squares out of image files"
        )


def require_md5(path: Path, content: bytes | None, expected: str) -> None:
    """Refuse content whose MD5 is not the expected one.

    Args:
        path: The file, for the message; it is read if there is no ``content``.
        content: What is checked: for compressed files that which was compressed.
        expected: Hexadecimal digits.
    """
    if content is None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    else:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected.lower():
        raise ValueError(
            f"{path}: MD5 {found}, expected {expected}: the file is damaged or another one; fetch it again, or set "
            "data.md5=null to take it as it is"
        )
