"""The published layout of data sets: ``tokens.json``, ``materials/*.csv``, ``{train,test}/*.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """One file: ``spectra`` (N, 3, W) float16 and ``thin_films`` (N, S) int64."""

    spectra: Tensor
    tokens: Tensor


def write_shard(path: str | Path, spectra: Tensor, tokens: Tensor) -> None:
    """Write a safetensors file; spectra are rounded to float16."""
    raise NotImplementedError


def read_shard(path: str | Path) -> Shard:
    """Read a safetensors file, memory-mapped.

    Raises:
        ValueError: For a file that is no safetensors file or lacks a tensor.
    """
    raise NotImplementedError
