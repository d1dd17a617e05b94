"""The decoder of OptoGPT, which writes a stack of thin films layer by layer for a spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.bayes.noise import counter_uniform
from networks.diffusion import LossTerms, Sampler
from networks.stack_generator import SAMPLING, Attention, Condition, StackGenerator, feed_forward, sinusoidal
from networks.token_choice import Choice, Constraints, close


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the condition, feed-forward layer; norms before, shortcuts beside them.

    Args:
        width: Of a token.
        heads: Of the attention.
        hidden: Of the feed-forward layer.
        dropout: Everywhere.
        activation: Of the feed-forward layer, see `feed_forward`.
        cross: Whether there is attention to the condition.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, activation: str, cross: bool = True
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + cross))
        self.attention = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout) if cross else None
        self.feed_forward = feed_forward(width, hidden, dropout, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: tuple[Tensor, Tensor] | None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One block.

        Args:
            x: ``(B, N, T, width)``: the new places of N sequences for each spectrum.
            memory: Keys and values of the condition, where there is attention to it.
            past: Keys and values of earlier places; then T is 1.

        Returns:
            The same shape, and keys and values of all places.
        """
        shape = x.shape
        y = self.norms[0](x).flatten(0, 1)
        keys, values = self.attention.memory(y)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = x + self.dropout(self.attention(y, (keys, values), causal=past is None)).view(shape)
        if self.cross is not None:
            x = x + self.dropout(self.cross(self.norms[1](x).flatten(1, 2), memory)).view(shape)
        return x + self.dropout(self.feed_forward(self.norms[-1](x))), (keys, values)


class OptoGPT(StackGenerator):
    """The decoder of OptoGPT, which writes a stack layer by layer (section 2.7).

    The defaults are those of the paper's comparison, 103.2 million parameters. The published feed-forward layers have
    no non-linearity; ``ffn=silu`` puts one there.

    Args:
        num_tokens: V, special tokens included.
        length: L, EOS included.
        num_wavelengths: W.
        width: Of a token.
        depth: Number of blocks.
        heads: Of the attention; must divide ``width``.
        hidden: Of the feed-forward layers.
        dropout: Everywhere in the blocks.
        ffn: ``linear`` (as published) or ``silu``.
        encoder: Maps (B, 3, W) to tokens (B, K, width); None: one token, linear in the spectrum, as published.
        condition: How the spectrum enters: ``cross`` (published) or ``add``, see `StackGenerator`.
        label_smoothing: Part of the target that is spread over all tokens; 0.1 in the original OptoGPT.
        choice: How a token is drawn; None: temperature 0.65, top-p 0.9.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    places: Tensor

    def __init__(
        self,
        num_tokens: int = 903,
        length: int = 21,
        num_wavelengths: int = 171,
        width: int = 1024,
        depth: int = 6,
        heads: int = 8,
        hidden: int = 4096,
        dropout: float = 0.0,
        ffn: Literal["linear", "silu"] = "linear",
        encoder: nn.Module | None = None,
        condition: Condition = "cross",
        label_smoothing: float = 0.0,
        choice: Choice | None = None,
    ) -> None:
        super().__init__(num_tokens, length, num_wavelengths, condition)
        if ffn not in ("linear", "silu"):
            raise ValueError(f"model.net.ffn={ffn!r} is unknown; choose linear (as published) or silu")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.net.label_smoothing={label_smoothing}: must be at least 0 and below 1")
        self.label_smoothing, self.choice = label_smoothing, choice or Choice()
        self.encoder = encoder or nn.Sequential(
            nn.Flatten(), nn.Linear(3 * num_wavelengths, width), nn.Unflatten(1, (1, width))
        )
        self.embed = nn.Embedding(num_tokens, width)
        cross = condition == "cross"
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, hidden, dropout, ffn, cross) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens)
        self.register_buffer("places", sinusoidal(torch.arange(length), width), persistent=False)

    def forward(self, spectrum: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``(B, L, V)`` of every place, given the tokens ``(B, L)`` before it."""
        begin = tokens.new_full((len(tokens), 1), self.special.mask)
        x = (self.embed(torch.cat([begin, tokens[:, :-1]], 1)) + self.places)[:, None]
        shown = self._show(spectrum)
        x = x if shown.added is None else x + shown.added
        for block, memory in zip(self.blocks, shown.memory, strict=True):
            x, _ = block(x, memory)
        return self.head(self.norm(x))[:, 0]

    def log_probs(self, spectrum: Tensor, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        """See `StackGenerator`; t is not used."""
        return self(spectrum, tokens).log_softmax(-1)

    def loss_terms(
        self, spectrum: Tensor, tokens: Tensor, index: Tensor, key: Sequence[int], place: Tensor, count: int
    ) -> LossTerms:
        """See `StackGenerator`: cross-entropy of the next token, PAD aside; nothing is drawn."""
        logits, labels = self(spectrum, tokens), tokens.flatten()
        counted = tokens != self.special.pad
        nll = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none", label_smoothing=self.label_smoothing)
        nll = nll.view(tokens.shape)
        correct = logits.detach().argmax(-1) == tokens
        rate = torch.ones(len(tokens), dtype=torch.float64, device=tokens.device)
        return LossTerms((nll * counted).sum(), counted.sum().to(nll.dtype), nll.detach(), counted, correct, rate)

    @torch.no_grad()
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
        """See `StackGenerator`; keys and values of earlier places are kept, those of the spectrum are shared."""
        choice = self.choice if sampler is None else sampler.choice
        allowed, shown = self._table(constraints, spectrum.device), self._show(spectrum)
        shape = (len(spectrum), len(draws))
        numbers = counter_uniform((seed, SAMPLING), draws, index, (self.length,)).transpose(0, 1)
        token = torch.full(shape, self.special.mask, device=spectrum.device)
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        written = []
        for place in range(self.length):
            x = (self.embed(token) + self.places[place])[:, :, None]
            x = x if shown.added is None else x + shown.added[:, :, place : place + 1]
            for i, block in enumerate(self.blocks):
                x, past[i] = block(x, shown.memory[i], past[i])
            logits = self.head(self.norm(x))[:, :, 0].masked_fill(~allowed[place], -math.inf)
            token = choice(logits, numbers[..., place])
            written.append(token)
            if record is not None:
                rest = [torch.full_like(token, self.special.mask)] * (self.length - len(written))
                record.append(close(torch.stack([*written, *rest], -1), self.special))
        return close(torch.stack(written, -1), self.special)
