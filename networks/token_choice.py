"""Choosing tokens from logits: temperature, top-k, top-p, and which token may stand where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SpecialTokens(NamedTuple):
    """Ids of the tokens that are no layer.

    Attributes:
        eos: Ends a sequence.
        pad: Fills a sequence behind its end.
        mask: Stands for a token that is not known yet; begins a sequence of an autoregressive network.
    """

    eos: int
    pad: int
    mask: int

    @classmethod
    def last(cls, num_tokens: int) -> SpecialTokens:
        """The last three ids, as vocabularies that were not read from a file have them."""
        return cls(num_tokens - 3, num_tokens - 2, num_tokens - 1)


@dataclass(frozen=True)
class Choice:
    """How a token is drawn from its distribution.

    Args:
        temperature: Logits are divided by it; 0: the likeliest token.
        top_p: Least probability of the set of likeliest tokens that is drawn from; 1: all. 0 counts as 1.
        top_k: Size of that set; 0: no limit.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    temperature: float = 0.65
    top_p: float = 0.9
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must not be negative; 0 is greedy")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in [0, 1]; 1 leaves all tokens")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must not be negative; 0 leaves all tokens")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens ``(...)`` of logits ``(..., V)``, -inf where a token is forbidden.

        Args:
            logits: Unnormalised.
            uniform: Numbers in (0, 1), ``(...)``: the same ones give the same tokens, whatever the batch is.
        """
        if self.greedy:
            return logits.argmax(-1)
        probability = (logits / self.temperature).softmax(-1)
        if self.top_k == 0 and self.top_p in (0, 1):
            kept, order = probability, None
        else:
            kept, order = probability.sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                kept, order = kept[..., : self.top_k], order[..., : self.top_k]
            if self.top_p not in (0, 1):
                total = kept.cumsum(-1)
                kept = kept.masked_fill(total - kept >= self.top_p * total[..., -1:], 0.0)
        total = kept.cumsum(-1)
        point = uniform.to(total.dtype)[..., None] * total[..., -1:]
        place = (total <= point).sum(-1, keepdim=True)
        # Rounding may put the point on the total itself, behind the last token that is kept.
        last = torch.where(kept > 0, torch.arange(kept.shape[-1], device=kept.device), 0).amax(-1, keepdim=True)
        place = torch.minimum(place, last)
        return (place if order is None else order.gather(-1, place))[..., 0]


@dataclass(frozen=True)
class Constraints:
    """What a sequence must obey.

    Args:
        allowed: Which tokens may be emitted, ``(V,)`` bool; None: all. EOS and PAD are always allowed, MSK never is.
        max_layers: EOS stands at this position at the latest; None: the last position of the sequence.
        min_layers: EOS stands at this position at the earliest. Equal to ``max_layers``: the length is forced.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    allowed: Tensor | None = None
    max_layers: int | None = None
    min_layers: int = 1

    def __post_init__(self) -> None:
        if self.max_layers is not None and self.max_layers < 1:
            raise ValueError(f"max_layers={self.max_layers}: a stack has at least one layer")
        if self.min_layers < 0 or (self.max_layers is not None and self.min_layers > self.max_layers):
            raise ValueError(f"min_layers={self.min_layers}: must be between 0 and max_layers={self.max_layers}")

    def table(self, num_tokens: int, length: int, special: SpecialTokens, device: torch.device | str = "cpu") -> Tensor:
        """Which token may stand where, ``(length, num_tokens)`` bool.

        Behind the last place of EOS there is PAD alone; PAD is not allowed before, since it follows from EOS (`close`).

        Raises:
            ValueError: If no layer is left, or if the sequence is too short.
        """
        last = length - 1 if self.max_layers is None else self.max_layers
        if last > length - 1:
            raise ValueError(f"max_layers={last}: sequences of the network hold {length - 1} layers at most")
        layers = torch.ones(num_tokens, dtype=torch.bool) if self.allowed is None else self.allowed.clone().cpu()
        if layers.shape != (num_tokens,):
            raise ValueError(f"allowed has {len(layers)} entries, but the network has {num_tokens} tokens")
        layers[list(special)] = False
        if not layers.any():
            raise ValueError("no layer token is allowed; allow at least one")
        table = torch.zeros(length, num_tokens, dtype=torch.bool)
        table[:last] = layers
        table[self.min_layers : last + 1, special.eos] = True
        table[last, special.eos] = True
        table[last + 1 :, special.pad] = True
        return table.to(device)


def close(tokens: Tensor, special: SpecialTokens) -> Tensor:
    """PAD behind the first EOS of each sequence, ``(..., L)``."""
    ended = (tokens == special.eos).cumsum(-1) - (tokens == special.eos).long() > 0
    return tokens.masked_fill(ended, special.pad)
