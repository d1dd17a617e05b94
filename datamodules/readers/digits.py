"""The embedded handwritten digits: 1,797 grey images of 8 x 8 pixels, values 0 to 16."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datamodules.readers.stored_images import StoredImages, in_memory

DIGITS = Path(__file__).parents[1] / "embedded" / "digits.csv.gz"
_PEAK = 16  # a pixel counts the black ones among 4 x 4 of the scan


def read_digits() -> StoredImages:
    """Read the images in the order of the file (see ``datamodules/embedded/SOURCE.md``)."""
    table = np.loadtxt(DIGITS, delimiter=",", dtype=np.float32).astype(np.uint8)
    return in_memory(
        str(DIGITS),
        table[:, :64].reshape(-1, 8, 8),
        table[:, 64].astype(np.int64),
        part="digit",
        num_classes=10,
        peak=_PEAK,
    )
