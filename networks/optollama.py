"""OptoLlama's denoiser, which fills in masked layers of a stack for a spectrum (arXiv 2604.01106)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.bayes.noise import counter_uniform
from networks.diffusion import (
    LossName,
    LossTerms,
    Sampler,
    Schedule,
    ScheduleName,
    antithetic_times,
    denoising_loss,
    sample,
)
from networks.spectrum_encoders import ChannelTokens
from networks.stack_generator import (
    SAMPLING,
    TRAINING,
    Attention,
    Condition,
    Shown,
    StackGenerator,
    feed_forward,
    sinusoidal,
)
from networks.token_choice import Constraints

# Of what modulates layer normalisations and gates at the start.
_SCALE_STD, _SHIFT_STD = 1.2e-3, 8e-4


class AdaptiveNorm(nn.Module):
    """Layer normalisation without weights, scaled and shifted by linear functions of a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale, self.shift = nn.Linear(width, width), nn.Linear(width, width)
        for layer, std in ((self.scale, _SCALE_STD), (self.shift, _SHIFT_STD)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``(B, T, width)`` with a condition ``(B or 1, width)``."""
        normal = F.layer_norm(x, (self.width,))
        return torch.addcmul(self.shift(condition)[:, None], normal, 1 + self.scale(condition)[:, None])


class DenoiserBlock(nn.Module):
    """Cross-attention to the spectrum, self-attention, feed-forward layer, with norms and gates that time sets.

    Args:
        width: Of a token.
        heads: Of the attention.
        hidden: Of the feed-forward layer.
        dropout: Of attention and feed-forward layer.
        rotary: Whether the self-attention knows places by turning queries and keys.
        cross: Whether there is cross-attention.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, rotary: bool, cross: bool = True) -> None:
        super().__init__()
        attentions = 1 + cross
        self.norms = nn.ModuleList(AdaptiveNorm(width) for _ in range(attentions + 1))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(attentions))
        for gate in self.gates:
            nn.init.normal_(gate.weight, std=_SHIFT_STD)
            nn.init.zeros_(gate.bias)
        self.cross = Attention(width, heads, dropout) if cross else None
        self.attention = Attention(width, heads, dropout, rotary)
        self.feed_forward = feed_forward(width, hidden, dropout)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None, condition: Tensor) -> Tensor:
        """One block.

        Args:
            x: ``(B, N, L, width)``: N sequences for each spectrum.
            memory: Keys and values of the spectrum's tokens, where there is cross-attention.
            condition: Embedding of time, ``(B, width)``, or ``(1, width)`` for all.
        """
        shape = x.shape
        # All sequences of a spectrum ask its keys together.
        x = x.flatten(1, 2)
        gates = [1 + gate(condition)[:, None] for gate in self.gates]
        if self.cross is not None:
            x = x + gates[0] * self.cross(self.norms[0](x, condition), memory)
        y = self.norms[-2](x, condition).view(-1, *shape[2:])
        x = x + gates[-1] * self.attention(y, self.attention.memory(y)).view(x.shape)
        return (x + self.feed_forward(self.norms[-1](x, condition))).view(shape)


class MaskedDiffusionDenoiser(StackGenerator):
    """OptoLlama: a bidirectional transformer that guesses masked layers, conditioned on a spectrum (section 2.4).

    The defaults are the published network at its full size, 155.5 million parameters; departures are options.

    Args:
        num_tokens: V, special tokens included.
        length: L, EOS included.
        num_wavelengths: W.
        width: Of a token.
        depth: Number of blocks.
        heads: Of the attention; must divide ``width``.
        hidden: Of the feed-forward layers.
        dropout: Of attention and feed-forward layers.
        encoder: Maps (B, 3, W) to tokens (B, K, width); None: `ChannelTokens`, as published.
        condition: How the spectrum enters: ``cross`` (published) or ``add``, see `StackGenerator`.
        position: ``sinusoidal``, added to the tokens as published; ``learned``; ``rotary``, in the self-attention.
        time_scale: Factor of t in its embedding. As published it is 1, with frequencies of 1 and below, which hardly
            tells times apart; 1000 does.
        final_norm: Whether a layer normalisation stands before the output.
        schedule: Of the mask rate: ``quadratic`` (published), ``linear``, ``cosine``.
        loss: ``all`` (published), ``masked``, ``elbo``.
        sampler: How stacks are drawn; None: the published settings with 20 steps.

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
        encoder: nn.Module | None = None,
        condition: Condition = "cross",
        position: Literal["sinusoidal", "learned", "rotary"] = "sinusoidal",
        time_scale: float = 1.0,
        final_norm: bool = False,
        schedule: ScheduleName = "quadratic",
        loss: LossName = "all",
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__(num_tokens, length, num_wavelengths, condition)
        if position not in ("sinusoidal", "learned", "rotary"):
            raise ValueError(f"model.net.position={position!r} is unknown; choose sinusoidal, learned or rotary")
        if loss not in ("all", "masked", "elbo"):
            raise ValueError(f"model.net.loss={loss!r} is unknown; choose all, masked or elbo")
        if width % 2:
            raise ValueError(f"model.net.width={width}: must be even")
        self.width, self.position, self.time_scale = width, position, time_scale
        self.schedule, self.loss = Schedule(schedule), loss
        self.sampler = sampler or Sampler()
        if self.sampler.redraw == "all" and self.sampler.kind in ("remask", "greedy") and loss != "all":
            raise ValueError(
                f"model.net.sampler.redraw=all asks for visible tokens, which model.net.loss={loss} does not teach; "
                "set model.net.sampler.redraw=masked"
            )
        self.encoder = encoder or ChannelTokens(num_wavelengths, width)
        self.embed = nn.Embedding(num_tokens, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        rotary, cross = position == "rotary", condition == "cross"
        self.blocks = nn.ModuleList(DenoiserBlock(width, heads, hidden, dropout, rotary, cross) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if final_norm else nn.Identity()
        self.head = nn.Linear(width, num_tokens)
        places = sinusoidal(torch.arange(length), width)
        if position == "learned":
            self.places = nn.Parameter(0.02 * torch.randn(length, width))
        else:
            self.register_buffer("places", torch.zeros_like(places) if rotary else places, persistent=False)

    def _time(self, t: Tensor) -> Tensor:
        return self.time(sinusoidal(t * self.time_scale, 256))

    def _logits(self, shown: Shown, tokens: Tensor, t: Tensor) -> Tensor:
        """Logits of ``(B, N, L)`` tokens at times ``(B,)``, or one for all, ``(1,)``."""
        condition = self._time(t)
        x = self.embed(tokens) + self.places + condition[:, None, None]
        x = x if shown.added is None else x + shown.added
        for block, memory in zip(self.blocks, shown.memory, strict=True):
            x = block(x, memory, condition)
        return self.head(self.norm(x))

    def forward(self, spectrum: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """Logits ``(B, L, V)`` of tokens ``(B, L)``, some of them MSK, at times ``(B,)``."""
        return self._logits(self._show(spectrum), tokens[:, None], t)[:, 0]

    def log_probs(self, spectrum: Tensor, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        """See `StackGenerator`; t is needed."""
        return self(spectrum, tokens, t).log_softmax(-1)

    def loss_terms(
        self, spectrum: Tensor, tokens: Tensor, index: Tensor, key: Sequence[int], place: Tensor, count: int
    ) -> LossTerms:
        """See `StackGenerator`: masks a batch and compares what the network makes of it."""
        numbers = counter_uniform((*key, TRAINING), [0], index, (1 + self.length,))[0]
        t = antithetic_times(numbers[:, 0], place, count)
        masked = numbers[:, 1:] < self.schedule.rate(t)[:, None]
        logits = self(spectrum, tokens.masked_fill(masked, self.special.mask), t.to(spectrum.dtype))
        return denoising_loss(logits, tokens, masked, t, self.schedule, self.loss, self.special.pad)

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
        """See `StackGenerator`; the spectrum is encoded once for all steps and draws."""
        shown = self._show(spectrum)

        def denoise(tokens: Tensor, t: float) -> Tensor:
            return self._logits(shown, tokens, torch.tensor([t], dtype=spectrum.dtype, device=spectrum.device))

        def uniform(step: int, purpose: int) -> Tensor:
            numbers = counter_uniform((seed, SAMPLING, step, purpose), draws, index, (self.length,))
            return numbers.transpose(0, 1)

        return sample(
            denoise,
            uniform,
            self._table(constraints, spectrum.device),
            self.special,
            self.schedule,
            sampler or self.sampler,
            (len(spectrum), len(draws)),
            record,
        )
