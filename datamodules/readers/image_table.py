"""Images listed in a table: a CSV file of names and labels beside a folder of files of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F


def read_labels(
    path: Path, *, image_column: str = "image", label_column: str = "label", positive: str = "positive"
) -> tuple[list[str], Tensor | None]:
    """Read names and labels.

    Args:
        path: CSV file.
        image_column: Column of the file names.
        label_column: Column of the labels. A file without it is a held-out set.
        positive: The label that counts as 1; there must be one other at most, which counts as 0.

    Returns:
        Names, and labels ``(image,)`` int64 (None for a held-out set).

    Raises:
        ValueError: Names file, column, line and remedy.
    """
    try:
        table = pd.read_csv(path, dtype=str, skip_blank_lines=False)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty") from None
    table = table[~table.isna().all(axis=1)]
    if image_column not in table.columns:
        raise ValueError(
            f"{path}: no column {image_column!r}; the header has {', '.join(map(repr, table.columns))}. Correct "
            "data.image_column"
        )
    if table.empty:
        raise ValueError(f"{path}: the file lists no images")
    for column in (image_column, label_column):
        if column in table.columns and (empty := table[column].isna()).any():
            line = int(table.index[int(np.argmax(empty))]) + 2
            raise ValueError(f"{path}, column {column!r}, line {line}: empty; fill the cell or remove the row")
    names = table[image_column].str.strip().tolist()
    if label_column not in table.columns:
        return names, None
    found = table[label_column].str.strip()
    others = sorted(set(found) - {positive})
    if len(others) > 1 or (positive not in set(found) and len(set(found)) > 1):
        raise ValueError(
            f"{path}, column {label_column!r}: labels {', '.join(map(repr, sorted(set(found))))}; two classes are "
            f"needed, data.positive={positive!r} and one other"
        )
    return names, torch.from_numpy((found == positive).to_numpy(dtype=np.int64))


def read_grey(path: Path, size: int) -> Tensor:
    """Read an image file as grey values, resized to a square.

    Args:
        path: PNG, JPEG or whatever else Pillow reads; 16-bit grey images keep their full range.
        size: Height and width; the aspect ratio is not kept, as in the study.

    Returns:
        ``(1, size, size)`` uint8.

    Raises:
        ImportError: If Pillow is missing.
        ValueError: If the file is no image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError("reading images needs Pillow: pip install -c constraints.txt pillow") from None
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I") or image.mode == "F":  # 16 bit: Pillow's own conversion would clip it
                grey = np.asarray(image, dtype=np.float32)
                grey = grey * (255 / (65535 if grey.max() > 255 else 255))
            else:
                grey = np.asarray(image.convert("L"), dtype=np.float32)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image; correct the table or data.image_folder") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    pixels = torch.from_numpy(grey)[None, None]
    resized = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)
