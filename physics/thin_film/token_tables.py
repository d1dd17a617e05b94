"""The transfer-matrix method for stacks of tokens: everything that costs an exponential is looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from physics.thin_film.materials import MaterialCatalog
from physics.thin_film.surroundings import Surroundings
from physics.thin_film.tokens import Vocabulary


class TokenTables:
    """Simulator of token sequences (paper, section 2.3, token form).

    PAD, MSK, EOS and everything after the first EOS count as no layer.

    Args:
        vocabulary: Tokens.
        catalog: Optical constants of the vocabulary's materials.
        wavelength_nm: ``(W,)``.
        surroundings: None: air on both sides, normal incidence.
        dtype: complex128, or complex64 for about twice the speed at errors of 1e-5.
        device: Of the tables; tokens are moved there.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        catalog: MaterialCatalog,
        wavelength_nm: Tensor,
        surroundings: Surroundings | None = None,
        dtype: torch.dtype = torch.complex128,
        device: torch.device | str = "cpu",
    ) -> None:
        raise NotImplementedError

    def __call__(self, tokens: Tensor) -> Tensor:
        """R, A and T of sequences ``(..., S)`` int64: ``(..., 3, W)`` in the real type of ``dtype``."""
        raise NotImplementedError
