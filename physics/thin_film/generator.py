"""Random stacks, deterministic from (seed, index): a stream, a fixed set and shards are the same code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from physics.thin_film.tokens import Vocabulary


@dataclass(frozen=True)
class Space:
    """Which stacks there are.

    Attributes:
        materials: Names.
        thicknesses_nm: Grid, the same for every material.
        max_layers: Lmax; sequences have Lmax + 1 positions.
        min_layers: Least number of layers.
    """

    materials: tuple[str, ...]
    thicknesses_nm: tuple[float, ...]
    max_layers: int
    min_layers: int = 1

    def vocabulary(self) -> Vocabulary:
        """Tokens of the space."""
        return Vocabulary.build(self.materials, self.thicknesses_nm)


SPACES: dict[str, Space] = {}  # paper, metal6, dielectric10, ...


class StackGenerator:
    """Stacks of a space (paper, section 6): length, first material, each next material among the others, thickness.

    Args:
        vocabulary: Tokens.
        max_layers: Lmax.
        min_layers: Least number of layers.
        seed: Of the set.
        mixture: Weights of kinds of stacks: ``random``, ``dbr`` (pairs), ``fabry_perot``, ``absorber``; None: all random.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_layers: int,
        min_layers: int = 1,
        seed: int = 0,
        mixture: Mapping[str, float] | None = None,
    ) -> None:
        raise NotImplementedError

    def tokens(self, index: Tensor | np.ndarray | range) -> Tensor:
        """Stacks with these numbers, ``(N, Lmax + 1)`` int64: layers, EOS, PAD; N any subset in any order."""
        raise NotImplementedError
