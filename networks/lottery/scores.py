"""Scores: which of the weights, Gaussians perhaps, are worth keeping. Higher is kept.

Everything is computed in float64, so that equal numbers have equal scores whatever the precision of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Posterior:
    """What a score may know of one weight tensor.

    Attributes:
        mu: Weights or their means.
        log_sigma: Logarithm of their standard deviations, of the same shape; None in an ordinary network.
        fan_in: Inputs of one output of the layer.
        gradient_sq: Mean square of the gradient of the loss by ``mu``; None if it is not known.
        prior_mean: m0 of the prior N(m0, s0^2).
        prior_sigma: s0.
        c: Weight of sigma in ``mu_plus_sigma``.
        generator: Source of ``random``.
    """

    mu: Tensor
    log_sigma: Tensor | None = None
    fan_in: int = 1
    gradient_sq: Tensor | None = None
    prior_mean: float = 0.0
    prior_sigma: float = 1.0
    c: float = 1.0
    generator: torch.Generator | None = None

    @property
    def absolute(self) -> Tensor:
        """abs(mu), float64."""
        return self.mu.detach().double().abs()

    @property
    def lambda_(self) -> Tensor:
        """Log sigma, float64."""
        assert self.log_sigma is not None
        return self.log_sigma.detach().double()


def _magnitude(p: Posterior) -> Tensor:
    return p.absolute


def _mu_scaled(p: Posterior) -> Tensor:
    return p.absolute * math.sqrt(p.fan_in)


def _snr(p: Posterior) -> Tensor:
    """log(abs(mu) / sigma): sigma of any size without overflow, and minus infinity for mu = 0."""
    return p.absolute.log() - p.lambda_


def _square(p: Posterior) -> Tensor:
    """Log sqrt(mu^2 + sigma^2), which orders like the square and does not overflow."""
    return torch.logaddexp(2 * p.absolute.log(), 2 * p.lambda_) / 2


def _sigma(p: Posterior) -> Tensor:
    return p.lambda_


def _mu_plus_sigma(p: Posterior) -> Tensor:
    return p.absolute + p.c * p.lambda_.exp()


def _loss_change(p: Posterior) -> Tensor:
    """mu^2 E[g^2], the expected change of the loss with the squared gradient in the place of the curvature."""
    assert p.gradient_sq is not None
    return p.absolute.square() * p.gradient_sq.detach().double()


def _sign(p: Posterior) -> Tensor:
    """Probability of the sign, Phi(abs(mu) / sigma), as -log(1 - Phi), which does not saturate at 1."""
    return -torch.special.log_ndtr(-_snr(p).exp())


def _kl_gain(p: Posterior) -> Tensor:
    """What removing the weight costs in evidence (Bayesian model reduction): log p(0) - log q(0)."""
    z0 = p.prior_mean / p.prior_sigma
    log_prior = -0.5 * (z0 * z0 + _LOG_2PI) - math.log(p.prior_sigma)
    z = _snr(p).exp()
    log_posterior = -0.5 * (z * z + _LOG_2PI) - p.lambda_
    return log_prior - log_posterior


def _random(p: Posterior) -> Tensor:
    return torch.rand(p.mu.shape, generator=p.generator, dtype=torch.float64).to(p.mu.device)


SCORES: dict[str, Callable[[Posterior], Tensor]] = {
    "magnitude": _magnitude,
    "mu": _magnitude,
    "mu_scaled": _mu_scaled,
    "snr": _snr,
    "square": _square,
    "sigma": _sigma,
    "mu_plus_sigma": _mu_plus_sigma,
    "loss_change": _loss_change,
    "sign": _sign,
    "kl_gain": _kl_gain,
    "random": _random,
}
"""Score by name. ``magnitude`` and ``mu`` are abs(mu); ``mu_scaled`` = abs(mu) sqrt(fan_in), to which ``snr`` comes
down as long as sigma has hardly moved from its initial c / sqrt(fan_in)."""
NEEDS_SIGMA = frozenset({"snr", "square", "sigma", "mu_plus_sigma", "sign", "kl_gain"})


def known(name: str, key: str = "score") -> str:
    """The name of a score.

    Raises:
        ValueError: There is no such score.
    """
    if name not in SCORES:
        raise ValueError(f"{key}={name!r} is unknown; choose one of {', '.join(SCORES)}")
    return name


def score(name: str, posteriors: Sequence[Posterior], labels: Sequence[str] = ()) -> list[Tensor]:
    """Scores of several weight tensors, float64, higher is kept.

    Args:
        name: One of `SCORES`.
        posteriors: The tensors.
        labels: Their names, for messages.

    Raises:
        ValueError: The score is unknown, needs what the network does not have, or is not a number somewhere.
    """
    function = SCORES[known(name)]
    values = []
    for i, posterior in enumerate(posteriors):
        label = labels[i] if labels else f"tensor {i}"
        if name in NEEDS_SIGMA and posterior.log_sigma is None:
            raise ValueError(
                f"score={name!r} needs a standard deviation, but {label} is deterministic; choose magnitude, or "
                "model.bayesian=true"
            )
        if name == "loss_change" and posterior.gradient_sq is None:
            raise ValueError(
                f"score={name!r} needs the mean squared gradient of {label}, which Adam and its kin keep; choose "
                "optimizer=adam, or another score"
            )
        value = function(posterior)
        if bool(value.isnan().any()):
            raise ValueError(f"score={name!r} of {label} is not a number: the training has diverged")
        values.append(value)
    return values


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of two scores of the same weights; equal scores share their mean rank.

    NaN where one of them is constant, or with fewer than two weights.
    """
    a, b = (_ranks(x.flatten()) for x in (one, other))
    if len(a) < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
