"""IDX files, the format of MNIST: a magic number, sizes (big endian), then bytes; plain or compressed with gzip."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from datamodules.readers.stored_images import StoredImages, in_memory, require_md5

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
_NUM_SIZES = {IMAGES_MAGIC: 3, LABELS_MAGIC: 1}
_CONTENT = {IMAGES_MAGIC: "images", LABELS_MAGIC: "labels"}


def read_idx(path: Path, magic: int, md5: str | None = None) -> np.ndarray:
    """Read one file.

    Args:
        path: File; compressed if its name ends in ``.gz``.
        magic: 2051 for images, 2049 for labels.
        md5: Expected checksum of the uncompressed content; None: not checked.

    Returns:
        ``(image, row, column)`` or ``(label,)``, uint8.

    Raises:
        ValueError: Names the file and what is wrong with it.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable gzip file ({error})") from None
    num_sizes = _NUM_SIZES[magic]
    header = np.frombuffer(content[: 4 * (1 + num_sizes)], dtype=">u4")
    if len(header) < 1 + num_sizes or header[0] != magic:
        found = f"the number {header[0]}" if len(header) else "nothing"
        raise ValueError(
            f"{path}: an IDX file of {_CONTENT[magic]} begins with the number {magic}, this one with {found}; "
            "data.file names images and labels of the training part, then of the test part"
        )
    sizes = [int(n) for n in header[1:]]
    expected = 4 * len(header) + int(np.prod(sizes))
    if len(content) != expected:
        raise ValueError(f"{path}: {len(content):,} bytes, but its header announces {expected:,}: it is incomplete")
    if md5 is not None:
        require_md5(path, content, md5)
    return np.frombuffer(content, dtype=np.uint8, offset=4 * len(header)).reshape(sizes)


def read_idx_pair(
    images: Path, labels: Path, *, part: str, num_classes: int | None, md5: tuple[str, str] | None = None
) -> StoredImages:
    """Read images and their labels.

    Args:
        images: File of the images.
        labels: File of the labels.
        part: How names of the images begin.
        num_classes: Number of classes; None: one more than the largest label.
        md5: Expected checksums of both.
    """
    sums = md5 or (None, None)
    pixels, classes = read_idx(images, IMAGES_MAGIC, sums[0]), read_idx(labels, LABELS_MAGIC, sums[1])
    return in_memory(f"{images}, {labels.name}", pixels, classes.astype(np.int64), part=part, num_classes=num_classes)
