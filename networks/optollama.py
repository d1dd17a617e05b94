"""Networks that turn a spectrum into a stack of thin films: OptoLlama (arXiv 2604.01106) and the decoder of OptoGPT.

Both are called in the same way: ``loss_terms`` for training, ``log_probs``, and ``sample``, which draws many stacks for
many spectra at once. A spectrum is ``(B, 3, W)``: reflectance, absorptance and transmittance at W wavelengths. A
stack is a sequence of L tokens: layers from the light side on, EOS, then PAD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

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
from networks.token_choice import Choice, Constraints, SpecialTokens, close

_SCALE_STD, _SHIFT_STD = 1.2e-3, 8e-4  # of what modulates layer normalisations and gates at the start
_TRAINING, _SAMPLING = 1, 2  # streams of random numbers


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


class ChannelTokens(nn.Module):
    """The published encoder: one token for each of R, A and T.

    Args:
        num_wavelengths: W.
        width: Of a token.
    """

    places: Tensor

    def __init__(self, num_wavelengths: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_wavelengths, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.register_buffer("places", sinusoidal(torch.arange(3), width), persistent=False)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, 3, width)``."""
        return self.layers(spectrum) + self.places


class PatchTokens(nn.Module):
    """A token for each window of wavelengths, of all three channels, and attention between the windows.

    Args:
        num_wavelengths: W.
        width: Of a token.
        patch: Wavelengths of a window; the last window is filled with the last values.
        depth: Blocks of attention.
        heads: Of the attention.
    """

    places: Tensor

    def __init__(self, num_wavelengths: int, width: int, patch: int = 8, depth: int = 1, heads: int = 4) -> None:
        super().__init__()
        if not 1 <= patch <= num_wavelengths:
            raise ValueError(f"model.net.encoder.patch={patch}: must be 1 to {num_wavelengths}, the wavelengths")
        self.patch = patch
        self.count = -(-num_wavelengths // patch)
        self.embed = nn.Linear(3 * patch, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("places", sinusoidal(torch.arange(self.count), width), persistent=False)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, patches, width)``."""
        missing = self.count * self.patch - spectrum.shape[-1]
        padded = F.pad(spectrum, (0, missing), mode="replicate") if missing else spectrum
        patches = padded.unflatten(2, (self.count, self.patch)).transpose(1, 2).flatten(2)
        x = self.embed(2 * patches - 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Whitening(nn.Module):
    """Reflectance and transmittance shifted and turned so that all directions vary alike.

    Spectra of neighbouring wavelengths vary together: what tells thicknesses apart is a small part of the variance,
    which a network learns last. Absorptance follows from the other two and is left out.

    Until `fit` has seen spectra, values are only mapped from [0, 1] to [-1, 1].

    Args:
        num_wavelengths: W.
        floor: Added to the variances: directions that vary less stay small.
    """

    mean: Tensor
    map: Tensor

    def __init__(self, num_wavelengths: int, floor: float = 1e-4) -> None:
        super().__init__()
        if floor <= 0:
            raise ValueError(f"model.net.encoder.floor={floor}: must be above 0")
        self.floor = floor
        self.register_buffer("mean", torch.full((2 * num_wavelengths,), 0.5))
        self.register_buffer("map", 2 * torch.eye(2 * num_wavelengths))

    @torch.no_grad()
    def fit(self, spectra: Tensor) -> None:
        """Take mean and covariance C from spectra ``(N, 3, W)``; the map is (C + floor)^(-1/2)."""
        x = spectra[:, [0, 2]].flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        self.mean.copy_(x.mean(0))
        self.map.copy_(vectors @ torch.diag((values.clamp(min=0) + self.floor).rsqrt()) @ vectors.T)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, 2 W)``."""
        return (spectrum[:, [0, 2]].flatten(1) - self.mean) @ self.map


class DenseTokens(nn.Module):
    """Tokens that a residual perceptron reads off the whole spectrum.

    It sees a spectrum once, however many tokens and steps a stack takes: most weights for least time.

    Args:
        num_wavelengths: W.
        width: Of a token.
        hidden: Width of the perceptron.
        depth: Residual blocks.
        count: Number of tokens.
        floor: Of the variances of the whitened spectrum, see `Whitening`.
    """

    def __init__(
        self,
        num_wavelengths: int,
        width: int,
        hidden: int = 512,
        depth: int = 2,
        count: int = 8,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.count = count
        self.whitening = Whitening(num_wavelengths, floor)
        self.embed = nn.Linear(2 * num_wavelengths, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, count * width))
        self.norm = nn.LayerNorm(width)

    def fit(self, spectra: Tensor) -> None:
        """Learn from spectra ``(N, 3, W)`` how they vary, before training."""
        self.whitening.fit(spectra)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(B, 3, W)`` to ``(B, count, width)``."""
        x = self.embed(self.whitening(spectrum))
        for block in self.blocks:
            x = x + block(x)
        return self.norm(self.out(x).unflatten(1, (self.count, -1)))


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


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward layer, each behind a layer normalisation and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = Attention(width, heads), feed_forward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same shape."""
        y = self.norm1(x)
        x = x + self.attention(y, self.attention.memory(y))
        return x + self.feed_forward(self.norm2(x))


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


# ------------------------------------------------------------------------------------------------------------ OptoLlama


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
        numbers = counter_uniform((*key, _TRAINING), [0], index, (1 + self.length,))[0]
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
            numbers = counter_uniform((seed, _SAMPLING, step, purpose), draws, index, (self.length,))
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


# -------------------------------------------------------------------------------------------------------------- OptoGPT


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
        numbers = counter_uniform((seed, _SAMPLING), draws, index, (self.length,)).transpose(0, 1)
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
