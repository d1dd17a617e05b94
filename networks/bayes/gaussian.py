"""The Gaussian that stands for a weight: prior, initial values, divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Prior:
    """N(m0, s0^2) of every weight.

    Attributes:
        mean: m0.
        std: s0.
        rescale: Whether both are multiplied by 1 / sqrt(3 fan_in) of the layer.
    """

    mean: float = 0.0
    std: float = 1.0
    rescale: bool = False

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"model.prior.std={self.std}: must be above 0")

    def of_layer(self, fan_in: int) -> tuple[float, float]:
        """m0 and s0 in a layer whose outputs have ``fan_in`` inputs."""
        factor = 1 / math.sqrt(3 * fan_in) if self.rescale else 1.0
        return self.mean * factor, self.std * factor


@dataclass(frozen=True)
class Init:
    """Initial mean and deviation of the weights.

    Attributes:
        sigma_scale: Deviations are this times 1 / sqrt(3 fan_in), for biases this times 1 / sqrt(fan_in).
        mu: ``init``: uniform in +-1 / sqrt(fan_in). ``keep``: what the deterministic layer has. ``prior``: the prior's
            mean, and its deviation for ``sigma`` too, whatever ``sigma_scale`` is.
    """

    sigma_scale: float = 0.01
    mu: Literal["init", "keep", "prior"] = "init"

    def __post_init__(self) -> None:
        if self.sigma_scale <= 0:
            raise ValueError(f"model.init.sigma_scale={self.sigma_scale}: must be above 0")
        if self.mu not in ("init", "keep", "prior"):
            raise ValueError(f"model.init.mu={self.mu!r} is unknown; choose one of init, keep, prior")

    @torch.no_grad()
    def fill(self, mu: Tensor, log_sigma: Tensor, fan_in: int, prior: Prior) -> None:
        """Set the parameters of one tensor; ``keep`` leaves ``mu`` as it is."""
        mean, std = prior.of_layer(fan_in)
        if self.mu == "prior":
            nn.init.constant_(mu, mean)
            nn.init.constant_(log_sigma, math.log(std))
            return
        if self.mu == "init":
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(mu, -bound, bound)
        spread = fan_in if mu.ndim == 1 else 3 * fan_in
        nn.init.constant_(log_sigma, math.log(self.sigma_scale / math.sqrt(spread)))


class KLTerm(NamedTuple):
    """A tensor of Gaussian weights and its prior, see `gaussian_kl`."""

    mu: Tensor
    log_sigma: Tensor
    mean: float
    std: float
    mask: Tensor | None = None


def gaussian_kl(mu: Tensor, log_sigma: Tensor, mean: float, std: float, mask: Tensor | None = None) -> Tensor:
    """KL(N(mu, sigma^2) || N(mean, std^2)) = ln(s0 / sigma) + (sigma^2 + (mu - m0)^2) / (2 s0^2) - 1/2, summed.

    Parameters of 16 bits are summed, and the sum returned, as float32.

    Args:
        mu: Means.
        log_sigma: Logarithms of the deviations.
        mean: m0.
        std: s0.
        mask: Entries that count; the others are no weights any more, whatever their parameters are.
    """
    return sum_of_kl([KLTerm(mu, log_sigma, mean, std, mask)])


def sum_of_kl(terms: Sequence[KLTerm]) -> Tensor:
    """`gaussian_kl` of several tensors, one of them at least, in one node of the graph."""
    return _KL.apply(terms, *(t.mu for t in terms), *(t.log_sigma for t in terms))


class _KL(torch.autograd.Function):
    """In closed form in both directions: a third of the time, and pruned entries cannot make a gradient NaN."""

    @staticmethod
    def forward(ctx: Any, terms: Sequence[KLTerm], *parameters: Tensor) -> Tensor:
        saved, total = [], None
        for mu, log_sigma, mean, std, mask in terms:
            if mu.dtype in (torch.float16, torch.bfloat16):  # sums of millions need more than 8 bits
                mu, log_sigma = mu.float(), log_sigma.float()
            variance = (2 * log_sigma).exp_()
            deviation = mu - mean if mean else mu
            kl = torch.addcmul(variance, deviation, deviation).mul_(0.5 * std**-2).sub_(log_sigma)
            alive = kl.numel()
            if mask is not None:
                kl.masked_fill_(~mask, 0.0)
                alive = mask.sum().to(kl.dtype)  # a number times a count would be of torch's default type
            kl = kl.sum() + (math.log(std) - 0.5) * alive
            total = kl if total is None else total + kl
            saved += [deviation, variance, mask]
        ctx.save_for_backward(*saved)
        ctx.kinds = [(term.std**-2, term.mu.dtype) for term in terms]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_mu, of_log_sigma, saved = [], [], ctx.saved_tensors
        for i, (precision, dtype) in enumerate(ctx.kinds):
            deviation, variance, mask = saved[3 * i : 3 * i + 3]
            factor = gradient * precision
            of_mu.append(deviation * factor)
            of_log_sigma.append((variance * factor).sub_(gradient))
            for found in (of_mu, of_log_sigma):
                found[-1] = (found[-1] if mask is None else found[-1].masked_fill_(~mask, 0.0)).to(dtype)
        return None, *of_mu, *of_log_sigma
