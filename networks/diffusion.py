"""Masked (absorbing) diffusion over token sequences: schedules, masking, losses and samplers.

Time runs from 0 (clean) to 1 (everything is masked). At time t every position is masked independently with
probability beta(t). References: Austin et al., NeurIPS 2021 (absorbing diffusion); Sahoo et al., NeurIPS 2024 (the
bound used here); Chang et al., CVPR 2022 (confidence order); Schaible et al., arXiv 2604.01106 (re-masking).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from networks.token_choice import Choice, SpecialTokens, close

ScheduleName = Literal["quadratic", "linear", "cosine"]
LossName = Literal["all", "masked", "elbo"]
SamplerName = Literal["remask", "confidence", "ancestral", "greedy"]

T_MIN = 1e-3
"""Smallest time, and the probability with which a position stays visible at time 1."""


# ------------------------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class Schedule:
    """Probability beta(t) of a mask: (1 - 1e-3) times t^2, t, or 1 - cos(pi t / 2).

    Args:
        name: ``quadratic`` (the paper's), ``linear`` or ``cosine``.

    Raises:
        ValueError: For an unknown name.
    """

    name: ScheduleName = "quadratic"

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ValueError(
                f"model.net.schedule={self.name!r} is unknown; choose one of {', '.join(get_args(ScheduleName))}"
            )

    def rate(self, t: Tensor) -> Tensor:
        """beta(t)."""
        shape = {"quadratic": t.square, "linear": t.clone, "cosine": lambda: 1 - torch.cos(t * (math.pi / 2))}
        return (1 - T_MIN) * shape[self.name]()

    def slope(self, t: Tensor) -> Tensor:
        """Derivative of beta by t."""
        shape = {
            "quadratic": lambda: 2 * t,
            "linear": lambda: torch.ones_like(t),
            "cosine": lambda: (math.pi / 2) * torch.sin(t * (math.pi / 2)),
        }
        return (1 - T_MIN) * shape[self.name]()


def antithetic_times(uniform: Tensor, place: Tensor, count: int) -> Tensor:
    """Times that are spread evenly over a batch: (u_i / B + i / B) mod 1, mapped to [1e-3, 1].

    Args:
        uniform: u, ``(B,)``.
        place: i, the place of each item in the batch of all processes, ``(B,)``.
        count: B, items of the batch of all processes.
    """
    return T_MIN + (1 - T_MIN) * ((uniform + place) / count % 1.0)


# ----------------------------------------------------------------------------------------------------------------- loss


class LossTerms(NamedTuple):
    """What a loss is made of; the loss is ``total / weight``.

    Attributes:
        total: Sum of the weighted terms, a scalar.
        weight: What it is divided by: the number of terms, a scalar without gradient.
        nll: Cross-entropy of every position, ``(B, L)``.
        counted: Which positions are predicted, ``(B, L)`` bool.
        correct: Whether the likeliest token is the right one, ``(B, L)`` bool.
        rate: Mask rate of each sequence, ``(B,)``.
    """

    total: Tensor
    weight: Tensor
    nll: Tensor
    counted: Tensor
    correct: Tensor
    rate: Tensor


def denoising_loss(
    logits: Tensor, tokens: Tensor, masked: Tensor, t: Tensor, schedule: Schedule, kind: LossName, ignore: int | None
) -> LossTerms:
    """Loss of a denoiser.

    ``all``: mean cross-entropy over all positions, visible ones included, as published. ``masked``: over the masked
    ones. ``elbo``: masked ones weighted with beta'/beta and divided by the number of all positions: with
    ``ignore=None`` its expectation over t and masks bounds -log p / L from above.

    Args:
        logits: ``(B, L, V)``.
        tokens: The sequences, ``(B, L)``.
        masked: Which positions the denoiser saw as MSK, ``(B, L)`` bool.
        t: Times, ``(B,)``.
        schedule: Of the masks.
        kind: Which positions count and how much.
        ignore: Token that is no target (PAD); None: all are.
    """
    nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
    target = torch.ones_like(masked) if ignore is None else tokens != ignore
    counted = target if kind == "all" else target & masked
    rate = schedule.rate(t)
    if kind == "elbo":
        weights = (schedule.slope(t) / rate).to(nll.dtype)[:, None] * counted
        total, weight = (nll * weights).sum(), target.sum()
    else:
        total, weight = (nll * counted).sum(), counted.sum()
    correct = logits.detach().argmax(-1) == tokens
    return LossTerms(total, weight.to(nll.dtype), nll.detach(), counted, correct, rate)


# ------------------------------------------------------------------------------------------------------------- samplers


@dataclass(frozen=True)
class Sampler:
    """How a sequence is drawn from a denoiser.

    All kinds begin with masks alone and predict every position in every step.

    - ``remask``: draws a whole sequence, then masks every position again with the probability of the next time, so that
      tokens are drawn again and again (the paper's).
    - ``greedy``: the same with the likeliest tokens.
    - ``confidence``: keeps the drawn tokens that are most probable, as many as the schedule asks for, for good.
    - ``ancestral``: keeps random ones for good: the reverse of the masking process.

    Args:
        kind: ``remask``, ``confidence``, ``ancestral`` or ``greedy``.
        steps: Evaluations of the denoiser.
        temperature: Logits are divided by it; 0: the likeliest token.
        top_p: Least probability of the set of likeliest tokens that is drawn from; 1: all.
        top_k: Size of that set; 0: no limit.
        redraw: Whether ``remask`` and ``greedy`` draw ``all`` positions in a step, as published, or those that are
            ``masked``. A denoiser must have learned to judge visible tokens (loss ``all``) for the former.
        published_times: Mask with the probability of the time that was just predicted from, as published. The first
            step is then all but lost, which matters where there are few.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    kind: SamplerName = "remask"
    steps: int = 20
    temperature: float = 0.65
    top_p: float = 0.9
    top_k: int = 0
    redraw: Literal["all", "masked"] = "all"
    published_times: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplerName):
            raise ValueError(
                f"model.net.sampler.kind={self.kind!r} is unknown; choose one of {', '.join(get_args(SamplerName))}"
            )
        if self.steps < 1:
            raise ValueError(f"model.net.sampler.steps={self.steps}: must be at least 1")
        if self.redraw not in ("all", "masked"):
            raise ValueError(f"model.net.sampler.redraw={self.redraw!r} is unknown; choose all or masked")
        _ = self.choice  # checks its arguments

    @property
    def choice(self) -> Choice:
        """How a token is drawn."""
        return Choice(0.0 if self.kind == "greedy" else self.temperature, self.top_p, self.top_k)

    def times(self) -> list[tuple[float, float | None]]:
        """For every step the time it predicts from, and the one it masks for; None: it keeps what it drew."""
        if self.published_times:
            grid = torch.linspace(1.0, T_MIN, self.steps, dtype=torch.float64).tolist()
            return [(t, t) for t in grid[:-1]] + [(grid[-1], None)]
        grid = [1.0 - (1.0 - T_MIN) * i / self.steps for i in range(self.steps)]
        return [*itertools.pairwise(grid), (grid[-1], None)]


Denoise = Callable[[Tensor, float], Tensor]
"""``(tokens (B, N, L), t) -> logits (B, N, L, V)``."""
Uniform = Callable[[int, int], Tensor]
"""``(step, purpose) -> numbers in (0, 1) (B, N, L)``."""
DRAW, REMASK = 0, 1


def sample(
    denoise: Denoise,
    uniform: Uniform,
    allowed: Tensor,
    special: SpecialTokens,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, int],
    record: list[Tensor] | None = None,
) -> Tensor:
    """Draw sequences.

    Args:
        denoise: Gives logits of all positions.
        uniform: Random numbers: the same ones give the same sequences, whatever else is in the batch.
        allowed: Which token may stand where, ``(L, V)`` bool.
        special: Ids of EOS, PAD and MSK.
        schedule: The one the denoiser was trained with.
        sampler: How.
        shape: ``(B, N)``: conditions, and draws for each.
        record: A list that gets the sequence drawn in every step.

    Returns:
        ``(B, N, L)`` int64, closed: PAD behind the first EOS.
    """
    length = len(allowed)
    state = torch.full((*shape, length), special.mask, device=allowed.device)
    drawn = state
    for step, (t, following) in enumerate(sampler.times()):
        logits = denoise(state, t).masked_fill(~allowed, -math.inf)
        visible = state != special.mask
        keeps = sampler.redraw == "masked" or sampler.kind in ("confidence", "ancestral")
        if keeps:
            logits[..., special.eos].masked_fill_(_before_the_end(state, special), -math.inf)
        drawn = sampler.choice(logits, uniform(step, DRAW))
        if keeps:
            drawn = _with_end(torch.where(visible, state, drawn), special)
        drawn = close(drawn, special)
        if record is not None:
            record.append(drawn)
        if following is None:
            break
        rate = float(schedule.rate(torch.tensor(following, dtype=torch.float64)))
        if sampler.kind in ("remask", "greedy"):
            hidden = uniform(step, REMASK) < rate
        else:
            if sampler.kind == "confidence":
                score = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
                score = _of_the_end(score, drawn, special).masked_fill(visible, math.inf)
            else:
                score = uniform(step, REMASK).masked_fill(visible, math.inf)
            hidden = _lowest(score, round(rate / (1 - T_MIN) * length)) & ~visible
        state = torch.where(hidden, special.mask, drawn)
    return drawn


def _before_the_end(state: Tensor, special: SpecialTokens) -> Tensor:
    """Positions before a visible layer or EOS: EOS cannot stand there."""
    place = torch.arange(state.shape[-1], device=state.device)
    inside = (state != special.mask) & (state != special.pad)
    return place < torch.where(inside, place, 0).amax(-1, keepdim=True)


def _with_end(tokens: Tensor, special: SpecialTokens) -> Tensor:
    """Put EOS right before the first visible PAD where it was masked and no other token became EOS."""
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    first_pad = torch.where(tokens == special.pad, place, len(place)).amin(-1, keepdim=True)
    ends = ((tokens == special.eos) & (place < first_pad)).any(-1, keepdim=True)
    return tokens.masked_fill((place == first_pad - 1) & ~ends & (first_pad < len(place)), special.eos)


def _of_the_end(score: Tensor, tokens: Tensor, special: SpecialTokens) -> Tensor:
    """Scores in which PAD, which follows from EOS, is as sure as that."""
    end = tokens == special.eos
    of_eos = score.masked_fill(~end, 0.0).sum(-1, keepdim=True)  # a closed sequence has one EOS
    return torch.where(tokens == special.pad, of_eos, score)


def _lowest(score: Tensor, count: int) -> Tensor:
    """Which are the ``count`` lowest along the last dimension."""
    rank = score.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count
