"""Reductions over samples that several ranks hold, with gradients that are exact once DDP has averaged them.

Every rank of a sample group computes the same loss L of all samples, of which it can differentiate its own alone. Its
gradient of L with respect to its own samples is multiplied by K, the number of ranks; the mean over the ranks that DDP
takes afterwards is then the gradient of L. Published code divides by K in the backward pass too, which leaves the data
term K times too weak against the prior.

Numbers of 16 bits are reduced, and returned, as float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Interconnect
from parallel.ledger import Ledger
from parallel.network_model import NetworkModel
from parallel.sample_layout import SampleShare, share_of


def log_mean_exp(values: Tensor, num_samples: int, share: SampleShare) -> Tensor:
    """A = log((1/S) sum_s exp(l_s)) over the samples of all ranks of the group.

    One all-gather of the sums of every rank, whose largest term is taken out.

    Args:
        values: l, ``(S_j, ...)``, the samples of this rank.
        num_samples: S, samples of all ranks.
        share: Which of them are this rank's.

    Returns:
        ``(...)``, the same on all ranks of the group. The gradient is K exp(l_s) / sum_s' exp(l_s').
    """
    values = _checked(values, num_samples, share)
    if share.size == 1:
        return values.logsumexp(0) - math.log(num_samples)
    return _LogSumExp.apply(values, share) - math.log(num_samples)


def sample_mean(values: Tensor, num_samples: int, share: SampleShare) -> Tensor:
    """Mean over the samples of all ranks of the group, with K times its gradient.

    Args:
        values: ``(S_j, ...)``, the samples of this rank.
        num_samples: S, samples of all ranks.
        share: Which of them are this rank's.

    Returns:
        ``(...)``, the same on all ranks of the group.
    """
    return _sum(_checked(values, num_samples, share).sum(0), share) / num_samples


def moments(values: Tensor, num_samples: int, share: SampleShare) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the samples of all ranks of the group, in two steps (mean first).

    Args:
        values: ``(S_j, ...)``, the samples of this rank.
        num_samples: S, samples of all ranks, at least 2.
        share: Which of them are this rank's.

    Returns:
        Mean and variance, ``(...)`` each, the same on all ranks of the group, with K times their gradient.

    Raises:
        ValueError: For a single sample, which has no variance.
    """
    if num_samples < 2:
        raise ValueError(f"model.num_samples={num_samples}: a variance over samples needs 2 or more")
    values = _checked(values, num_samples, share)
    mean = sample_mean(values, num_samples, share)
    # Through the mean the sum of squares has no gradient: its derivative is the sum of the deviations, which is zero
    # over all ranks though not over one.
    squares = (values - mean.detach()).square().sum(0)
    return mean, _sum(squares, share) / (num_samples - 1)


@torch.no_grad()
def mean_over_samples(values: Tensor, num_samples: int, share: SampleShare) -> Tensor:
    """Mean over the samples of all ranks of the group, without gradient, for evaluation.

    Args:
        values: ``(S_j, ...)``, the samples of this rank.
        num_samples: S, samples of all ranks.
        share: Which of them are this rank's.

    Returns:
        ``(...)``, the same on all ranks of the group.
    """
    return sample_mean(values, num_samples, share)


@torch.no_grad()
def gather_samples(values: Tensor, num_samples: int, share: SampleShare) -> Tensor:
    """The samples of all ranks in their global order, ``(S, ...)``, on every rank of the group; without gradient.

    Args:
        values: ``(S_j, ...)``, the samples of this rank.
        num_samples: S, samples of all ranks.
        share: Which of them are this rank's.
    """
    values = _checked(values.detach(), num_samples, share)
    if share.size == 1:
        return values
    longest = -(-num_samples // share.size)
    part = values.new_zeros(longest, *values.shape[1:])
    part[: len(values)] = values
    gathered = all_gather(part, share)
    return torch.cat([gathered[j, : len(share_of(num_samples, share.size, j))] for j in range(share.size)])


def _checked(values: Tensor, num_samples: int, share: SampleShare) -> Tensor:
    own = len(share.ids(num_samples))
    if len(values) != own:
        raise ValueError(
            f"{len(values)} samples on rank {share.index} of {share.size}, which evaluates {own} of {num_samples}"
        )
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _interconnect(share: SampleShare) -> Interconnect:
    return share.interconnect or Interconnect(share.size, NetworkModel(), Ledger(dist.get_rank(), share.size))


def _sum(values: Tensor, share: SampleShare) -> Tensor:
    """Sum over the ranks of the group; the gradient is K times that of the sum."""
    return values if share.size == 1 else _GroupSum.apply(values, share)


def group_sum(values: Tensor, share: SampleShare) -> Tensor:
    """Sum over the ranks of the group, a new tensor without gradient."""
    total = values.detach().clone(memory_format=torch.contiguous_format)
    _interconnect(share).all_reduce(total, share.group).wait()
    return total


def all_gather(part: Tensor, share: SampleShare) -> Tensor:
    """Parts of equal shape of all ranks of the group, ``(K, *part.shape)``; without gradient."""
    flat = part.contiguous().view(-1)
    out = flat.new_empty(share.size * flat.numel())
    _interconnect(share).all_gather(out, flat, share.group).wait()
    return out.view(share.size, *part.shape)


class _GroupSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: SampleShare) -> Tensor:
        ctx.size = share.size
        return group_sum(values, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: SampleShare) -> Tensor:
        total = all_gather(values.logsumexp(0), share).logsumexp(0)
        ctx.save_for_backward(values, total)
        ctx.size = share.size
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        values, total = ctx.saved_tensors
        return ctx.size * gradient * (values - total).exp(), None
