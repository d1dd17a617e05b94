"""Numbers in files of the kernel, read through descriptors that stay open."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path


class NumberFile:
    """A file that begins with a number: ``52000000``, ``12345 J 1620000000 us``.

    Args:
        path: The file.
        scale: Factor from the file's unit to J or W.
    """

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        self.path, self.scale = path, scale
        self._descriptor: int | None = None

    def open(self) -> None:
        """Open the file, once.

        Raises:
            OSError: If it cannot be opened.
        """
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> float:
        """The number at this moment; NaN if there is none."""
        if self._descriptor is None:
            return math.nan
        try:
            # Position 0 makes the kernel compute the content anew.
            return float(os.pread(self._descriptor, 64, 0).split(maxsplit=1)[0]) * self.scale
        except (OSError, ValueError, IndexError):
            return math.nan

    def close(self) -> None:
        """Close the file; twice without harm."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def open_all(files: Iterable[NumberFile]) -> None:
    """Open all files or none.

    Raises:
        OSError: That of the first file that cannot be opened.
    """
    files = list(files)
    try:
        for file in files:
            file.open()
    except OSError:
        for file in files:
            file.close()
        raise


def text(path: Path) -> str:
    """Content of a small file without the blanks around it; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def number(path: Path) -> float | None:
    """The number that a small file holds; None if there is none."""
    try:
        return float(text(path).split(maxsplit=1)[0])
    except (ValueError, IndexError):
        return None


def entries(folder: Path) -> list[Path]:
    """Content of a folder in numerical order (``hwmon2`` before ``hwmon10``); empty if it cannot be listed."""
    try:
        return sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))
    except OSError:
        return []
