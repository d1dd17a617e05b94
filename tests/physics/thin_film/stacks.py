"""Stacks that several tests use."""

from __future__ import annotations

import functools
import warnings

import torch

from physics.thin_film.generator import SPACES, StackGenerator
from physics.thin_film.materials import MaterialCatalog
from physics.thin_film.tokens import Vocabulary

WAVELENGTHS = torch.arange(300.0, 2001.0, 10.0, dtype=torch.float64)


@functools.cache
def catalog() -> MaterialCatalog:
    """The materials that ship with the program, without the warning that some tables end within the range."""
    found = MaterialCatalog.default()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.indices(found.names, WAVELENGTHS)
    return found


def random_stacks(number: int, seed: int = 0, min_layers: int = 1) -> tuple[Vocabulary, torch.Tensor]:
    """Vocabulary and tokens ``(N, 21)`` of the paper's space."""
    vocabulary = SPACES["paper"].vocabulary()
    return vocabulary, StackGenerator(vocabulary, 20, min_layers, seed).tokens(range(number))


def arrays(vocabulary: Vocabulary, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index ``(N, S, W)`` and thickness ``(N, S)``, 0 beyond the last layer."""
    material, thickness = vocabulary.layers(tokens)
    return catalog().indices(vocabulary.materials, WAVELENGTHS)[material.clamp(min=0)], thickness
