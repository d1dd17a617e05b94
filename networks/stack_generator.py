"""What networks that write stacks of thin films have in common: how they are called, and their attention.

A spectrum is ``(B, 3, W)``: reflectance, absorptance and transmittance at W wavelengths. A stack is a sequence of L
tokens: layers from the light side on, EOS, then PAD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.diffusion import LossTerms, Sampler
from networks.token_choice import Constraints, SpecialTokens

# Streams of random numbers.
TRAINING, SAMPLING = 1, 2


class Shown(NamedTuple):
    """What a network makes of spectra before it writes: once for all steps and draws.

    Attributes:
        memory: Keys and values for the cross-attention of every block; None for each without one.
        added: To the tokens of the stack, ``(B, 1, L, width)``; None: nothing.
    """

    memory: list[tuple[Tensor, Tensor] | None]
    added: Tensor | None


Condition = Literal["cross", "add"]


class StackGenerator(nn.Module):
    """What networks that write stacks have in common.

    Args:
        num_tokens: V, special tokens included.
        length: L, EOS included.
        num_wavelengths: W.
        condition: How the spectrum enters: ``cross``, by attention to the tokens of its encoder, as published; ``add``:
            the encoder's token for each place of the stack is added there.

    Attributes:
        special: Ids of the special tokens: the last three, until somebody who has read a vocabulary says otherwise.
    """

    encoder: nn.Module
    blocks: nn.ModuleList

    def __init__(self, num_tokens: int, length: int, num_wavelengths: int, condition: Condition = "cross") -> None:
        super().__init__()
        if condition not in get_args(Condition):
            raise ValueError(f"model.net.condition={condition!r} is unknown; choose cross or add")
        self.condition = condition
        if num_tokens < 4:
            raise ValueError(f"model.net.num_tokens={num_tokens}: three special tokens and a layer are the least")
        if length < 2:
            raise ValueError(f"model.net.length={length}: a layer and EOS are the least")
        self.num_tokens, self.length, self.num_wavelengths = num_tokens, length, num_wavelengths
        self.special = SpecialTokens.last(num_tokens)

    def loss_terms(
        self, spectrum: Tensor, tokens: Tensor, index: Tensor, key: Sequence[int], place: Tensor, count: int
    ) -> LossTerms:
        """Loss of a batch.

        Args:
            spectrum: ``(B, 3, W)``.
            tokens: ``(B, L)``.
            index: Numbers of the items, ``(B,)``.
            key: Of the random numbers, which depend on it and on ``index`` alone.
            place: Of each item in the batch of all processes, ``(B,)``.
            count: Items of the batch of all processes.
        """
        raise NotImplementedError

    def log_probs(self, spectrum: Tensor, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        """Logarithms of the probabilities of every position's token, ``(B, L, V)``.

        Args:
            spectrum: ``(B, 3, W)``.
            tokens: ``(B, L)``: with MSK where a denoiser is to guess; whole sequences for an autoregressive network.
            t: Times of a denoiser, ``(B,)``.
        """
        raise NotImplementedError

    def sample(
        self,
        spectrum: Tensor,
        draws: Sequence[int],
        index: Tensor,
        seed: int = 0,
        sampler: Sampler | None = None,
        constraints: Constraints | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Draw stacks, ``(B, N, L)`` int64, PAD behind the first EOS.

        What is drawn depends on the spectrum, ``seed``, the numbers of draw and item, and nothing else.

        Args:
            spectrum: ``(B, 3, W)``.
            draws: Numbers of the draws, N of them.
            index: Numbers of the items, ``(B,)``.
            seed: Of the evaluation.
            sampler: How; None: as the network was built. Of it an autoregressive network uses temperature, top-p and
                top-k.
            constraints: None: any layers, up to the length of the sequence.
            record: A list that gets the sequences of every step.
        """
        raise NotImplementedError

    def _check(self, spectrum: Tensor) -> None:
        if spectrum.shape[-2:] != (3, self.num_wavelengths):
            raise ValueError(
                f"spectra of {tuple(spectrum.shape[-2:])} (channels, wavelengths), but "
                f"model.net.num_wavelengths={self.num_wavelengths}"
            )

    def _show(self, spectrum: Tensor) -> Shown:
        """Encode spectra ``(B, 3, W)`` for the blocks."""
        self._check(spectrum)
        encoded = self.encoder(spectrum)
        if self.condition == "cross":
            return Shown([block.cross.memory(encoded) for block in self.blocks], None)
        if encoded.shape[1] != self.length:
            raise ValueError(
                f"model.net.condition=add needs a token of the spectrum for each of the {self.length} places of a "
                f"stack, but the encoder gives {encoded.shape[1]}: set model.net.encoder.count={self.length}"
            )
        return Shown([None] * len(self.blocks), encoded[:, None])

    def _table(self, constraints: Constraints | None, device: torch.device) -> Tensor:
        return (constraints or Constraints()).table(self.num_tokens, self.length, self.special, device)


# ---------------------------------------------------------------------------------------------------------------- parts


def sinusoidal(places: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """Sine and cosine of ``places`` (...) at width / 2 frequencies from 1 down to 1 / base, ``(..., width)``."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=places.device) * (-math.log(base) / half))
    angles = places[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


class Attention(nn.Module):
    """Attention of several heads whose keys and values can be computed beforehand.

    Args:
        width: Of a token.
        heads: Number of heads; must divide ``width``.
        dropout: Of the attention.
        rotary: Whether queries and keys are turned by their places (RoPE).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, rotary: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads or (width // heads) % 2:
            raise ValueError(f"model.net.heads={heads}: must divide model.net.width={width} into even parts")
        self.heads, self.dropout, self.rotary = heads, dropout, rotary
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def memory(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens ``(B, T, width)``, the first of which is at place ``first``."""
        key = self._split(self.key(x))
        return rotated(key, first) if self.rotary else key, self._split(self.value(x))

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], causal: bool = False, first: int = 0) -> Tensor:
        """Attend from ``(B, T, width)`` to what `memory` gave."""
        query = self._split(self.query(x))
        query = rotated(query, first) if self.rotary else query
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, *memory, dropout_p=dropout, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotated(x: Tensor, first: int = 0) -> Tensor:
    """Turn pairs of entries of ``(..., T, E)`` by angles that grow with the place (Su et al., 2021)."""
    half = x.shape[-1] // 2
    frequencies = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000.0) / half))
    angles = (torch.arange(x.shape[-2], device=x.device) + first)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def feed_forward(width: int, hidden: int, dropout: float = 0.0, activation: str = "silu") -> nn.Sequential:
    """Two linear layers with SiLU and dropout between them; ``linear``: without SiLU."""
    middle = [nn.SiLU()] if activation == "silu" else []
    return nn.Sequential(nn.Linear(width, hidden), *middle, nn.Dropout(dropout), nn.Linear(hidden, width))
