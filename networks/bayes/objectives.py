"""Losses of networks with random weights, per item: a data term plus T KL / N.

l_{s,b} = log p(y_b | x_b, w_s) for samples s and items b. Published code minimises N times as much, which is the same
optimum; per item, gradients do not grow with the data, and a weight decay that was negligible would be some hundred
times as strong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.bayes.convert import bayesian_layers
from networks.bayes.gaussian import Prior, sum_of_kl
from parallel.sample_collectives import log_mean_exp, moments
from parallel.sample_layout import SampleShare

Objective = Literal["elbo", "predictive"]
Sync = Literal["exact", "local"]


def elbo(log_likelihood: Tensor, num_samples: int, share: SampleShare) -> Tensor:
    """Data term of the evidence lower bound, -mean over b and s of l.

    Args:
        log_likelihood: l of this rank's samples, ``(S_j, B)``.
        num_samples: S over all ranks.
        share: Which samples are this rank's. Its mean counts K S_j / S times, so that the mean over ranks is the mean
            over samples also where shares are uneven.
    """
    return -log_likelihood.mean() * share.weight(num_samples)


def predictive(log_likelihood: Tensor, num_samples: int, share: SampleShare, sync: Sync = "exact") -> Tensor:
    """Data term of the multi-sample bound, -mean over b of log((1/S) sum over s of exp(l)).

    For classes that is the cross-entropy of the mean of the probabilities. It is at most `elbo`, and the tighter the
    more samples there are.

    Args:
        log_likelihood: l of this rank's samples, ``(S_j, B)``.
        num_samples: S over all ranks.
        share: Which samples are this rank's.
        sync: ``exact``: the logarithm is of all samples, by one collective of B numbers. ``local``: every rank takes
            that of its own, as the published program does, which is another objective: with one sample on each rank it
            is `elbo`.
    """
    if sync == "local":
        local = log_mean_exp(log_likelihood, len(log_likelihood), SampleShare())
        return -local.mean() * share.weight(num_samples)
    return -log_mean_exp(log_likelihood, num_samples, share).mean()


def data_term(log_likelihood: Tensor, num_samples: int, share: SampleShare, objective: Objective, sync: Sync) -> Tensor:
    """`elbo` or `predictive`, the mean over ranks of which is the data term of all samples."""
    if objective == "elbo":
        return elbo(log_likelihood, num_samples, share)
    return predictive(log_likelihood, num_samples, share, sync)


def check_objective(objective: str, sync: str, more: tuple[str, ...] = ()) -> None:
    """Raise ValueError for unknown choices."""
    choices = (*get_args(Objective), *more)
    if objective not in choices:
        raise ValueError(f"model.objective={objective!r} is unknown; choose one of {', '.join(choices)}")
    if sync not in get_args(Sync):
        raise ValueError(f"model.sync={sync!r} is unknown; choose exact or local")


def gaussian_log_density(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log N(y; m, exp(log_variance)), entry by entry."""
    squared = (target - mean).square() * (-log_variance).exp()
    return -0.5 * (squared + log_variance + math.log(2 * math.pi))


def moment_term(
    output: Tensor, target: Tensor, noise_variance: Tensor, num_samples: int, share: SampleShare, sync: Sync
) -> Tensor:
    """-log N(y; m, v + noise) with mean and unbiased variance over the samples of the outputs, entry by entry.

    The loss of torch-blue for regression (there without noise). It fits one Gaussian to all samples and is no bound on
    the evidence.

    Args:
        output: ``(S_j, ...)``.
        target: ``(...)``.
        noise_variance: Of the observations, added to that of the samples, broadcast.
        num_samples: S over all ranks, at least 2.
        share: Which samples are this rank's.
        sync: ``local``: moments of this rank's samples alone.

    Raises:
        ValueError: For fewer than two samples.
    """
    if sync == "local":
        mean, variance = moments(output, len(output), SampleShare())
        return -gaussian_log_density(target, mean, (variance + noise_variance).log()) * share.weight(num_samples)
    mean, variance = moments(output, num_samples, share)
    return -gaussian_log_density(target, mean, (variance + noise_variance).log())


def kl_divergence(net: nn.Module) -> Tensor:
    """KL(q || p) of all Bayesian layers of a network, 0 where there is none."""
    terms = [term for _, layer in bayesian_layers(net) for term in layer.kl_terms()]
    return sum_of_kl(terms) if terms else torch.zeros(())


def l2_divergence(net: nn.Module, prior: Prior) -> Tensor:
    """KL(q || p) of dropout, but for what no weight changes: the sum of (w - m0)^2 / (2 s0^2).

    Over weights and biases of linear and convolutional layers. Gal and Ghahramani (2016) have a factor of the
    probability that the input of a weight is kept; here it is one: this is the negative logarithm of the prior.

    Args:
        net: With ordinary layers; normalisations have no prior.
        prior: Of weights and biases.
    """
    total = torch.zeros(())
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            mean, std = prior.of_layer(module.weight[0].numel())
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    kind = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
                    total = (tensor.to(kind) - mean).square().sum() / (2 * std**2) + total.to(tensor.device)
    return total


def in_chunks(count: int, size: int | None, evaluate: Callable[[slice], Tensor]) -> Tensor:
    """Evaluate samples a few at a time, ``(count, ...)``, keeping no activations but those of one chunk.

    Every chunk is computed again in the backward pass; ``evaluate`` must enter a `SampleContext` of its own, which
    makes the same noise again. The loss and its gradient are those of all samples at once.

    Args:
        count: Samples.
        size: Of a chunk; None: all at once, nothing is computed twice.
        evaluate: Maps a slice of the samples to their outputs, ``(samples of the slice, ...)``.
    """
    if size is None or size >= count:
        return evaluate(slice(0, count))
    slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    if not torch.is_grad_enabled():
        return torch.cat([evaluate(part) for part in slices])
    return torch.cat([checkpoint(evaluate, part, use_reentrant=False) for part in slices])
