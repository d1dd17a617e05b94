"""Labelled images in one NumPy archive with the arrays x_train, y_train, x_test, y_test."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from datamodules.readers.stored_images import StoredImages, in_memory, require_md5


def read_image_npz(path: Path, part: str, *, num_classes: int | None, md5: str | None = None) -> StoredImages | None:
    """Read one part; None if the archive has no test part.

    Args:
        path: ``.npz`` file; images ``(image, height, width[, channel])`` uint8, labels ``(image,)`` integers.
        part: ``train`` or ``test``.
        num_classes: Number of classes; None: one more than the largest label.
        md5: Expected checksum of the file; None: not checked.

    Raises:
        ValueError: Names the file, the array and what is wrong with it.
    """
    if md5 is not None:
        require_md5(path, None, md5)
    try:
        archive = np.load(path, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from None
    if isinstance(archive, np.ndarray):
        raise ValueError(f"{path}: a single array; needed is an archive with x_train, y_train, x_test, y_test")
    with archive:
        keys = (f"x_{part}", f"y_{part}")
        missing = [key for key in keys if key not in archive.files]
        if part == "test" and len(missing) == 2:
            return None
        if missing:
            raise ValueError(f"{path}: no array {', '.join(missing)}; it has {', '.join(archive.files)}")
        pixels, labels = (archive[key] for key in keys)
    return in_memory(f"{path}, x_{part}", pixels, labels.reshape(-1), part=part, num_classes=num_classes)
