"""Times as whole numbers, as stores of weather keep them."""

from __future__ import annotations

import numpy as np


def whole_units(hours: np.ndarray) -> tuple[np.ndarray, str]:
    """Hours as whole numbers of the largest of hours, minutes and seconds that allows it.

    Args:
        hours: Any shape; parts of a second are rounded.

    Returns:
        (numbers, int64, of the same shape; name of the unit as the CF conventions write it).
    """
    seconds = np.round(hours * 3600).astype(np.int64)
    for name, length in (("hours", 3600), ("minutes", 60)):
        if not (seconds % length).any():
            return seconds // length, name
    return seconds, "seconds"
