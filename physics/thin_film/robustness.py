"""Noise, smoothing and filling that turn an idealised target into variants which a network may know better.

Paper, section 2.5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(
    spectrum: Tensor,
    generator: torch.Generator,
    absolute: float = 0.01,
    relative: float = 0.0,
    channels: tuple[float, float, float] = (1.0, 0.0, 1.0),
) -> Tensor:
    """Gaussian noise on R, A, T ``(..., 3, W)``, a deviation of ``channels`` x (absolute + relative x value)."""
    raise NotImplementedError


def smooth(spectrum: Tensor, window: int = 25, sigma: float = 1.5, kind: str = "gaussian") -> Tensor:
    """Moving average over wavelengths (``gaussian`` or ``boxcar``), ``(..., 3, W)``."""
    raise NotImplementedError


def fill(
    spectrum: Tensor,
    weight: Tensor,
    generator: torch.Generator,
    mode: str = "smooth_random",
    strength: float = 0.95,
    kernel: int = 50,
) -> Tensor:
    """Random values where ``weight`` is 0: flat_random, tilted_random, smooth_random or prior_plus_noise."""
    raise NotImplementedError


def restore_sum(spectrum: Tensor, priority: str = "R>T>A") -> Tensor:
    """R + A + T = 1 again: the first channel takes the residue as far as it stays in [0, 1], then the next."""
    raise NotImplementedError


def variants(
    spectrum: Tensor,
    weight: Tensor,
    number: int,
    seed: int,
    absolute: float = 0.01,
    relative: float = 0.0,
    channels: tuple[float, float, float] = (1.0, 0.0, 1.0),
    window: int = 25,
    sigma: float = 1.5,
    mode: str | None = None,
    strength: float = 0.95,
    kernel: int = 50,
    priority: str = "R>T>A",
) -> Tensor:
    """``number`` variants of a target ``(3, W)``, ``(number, 3, W)``; number 0 is the clean target."""
    raise NotImplementedError
