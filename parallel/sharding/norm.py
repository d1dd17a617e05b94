"""Layer normalisation over a channel axis that is cut into parts: exact, with one message in each direction.

Forward, a rank sends mean and sum of squared deviations of its channels for every token, which are merged as by Chan et
al. (1983): as accurate as two passes over all channels, with one collective instead of two. Backward, two sums for
every token. Saved are the normalised values and the reciprocal deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import num_bytes
from parallel.sharding.grid import JigsawGrid
from parallel.sharding.layout import ceil_div
from parallel.sharding.precision import without_autocast
from parallel.sharding.traffic import Direction, Flow, Kind


@dataclass(frozen=True)
class NormPlan:
    """Which channels share statistics.

    Attributes:
        name: Of the layer, for the record of the traffic.
        grid: Ranks.
        sizes: Logical channels of every part of the axis; several where tensors are normalised together as if they were
            concatenated.
        local: Channels of every part on each rank, padding included.
        groups: Statistics are taken over this many groups of channels, each on its own; a group has its share of every
            part, whatever the grid. 1: over all channels.
        eps: Added to the variance.
    """

    name: str
    grid: JigsawGrid
    sizes: tuple[int, ...]
    local: tuple[int, ...]
    groups: int = 1
    eps: float = 1e-5

    def groups_at(self, channel_index: int) -> list[int]:
        """Group of every channel on the rank with this place in the channel group; -1 for padding."""
        found: list[int] = []
        for size, local in zip(self.sizes, self.local, strict=True):
            share, start = ceil_div(size, self.groups), channel_index * local
            found += [channel // share if channel < size else -1 for channel in range(start, start + local)]
        return found

    @cached_property
    def mine(self) -> list[int]:
        """Group of every channel of this rank."""
        return self.groups_at(self.grid.channel)

    @cached_property
    def counts(self) -> list[list[int]]:
        """Channels of every group, ``[rank of the channel group][group]``."""
        return [[self.groups_at(c).count(group) for group in range(self.groups)] for c in range(self.grid.channel_size)]

    @cached_property
    def totals(self) -> list[int]:
        """Channels of every group over all ranks."""
        return [sum(column) for column in zip(*self.counts, strict=True)]

    @cached_property
    def is_local(self) -> bool:
        """Whether every group lies on one rank: then nothing is sent."""
        return all(sum(count > 0 for count in column) <= 1 for column in zip(*self.counts, strict=True))

    @cached_property
    def is_plain(self) -> bool:
        """Whether all channels of every rank belong to one group without padding."""
        return self.groups == 1 and sum(self.local) * self.grid.channel_size == self.totals[0]

    @cached_property
    def members(self) -> list[list[int]]:
        """Local channels of every group."""
        return [[i for i, found in enumerate(self.mine) if found == group] for group in range(self.groups)]

    def received(self, direction: Direction, kind: Kind, size: float) -> None:
        """Count bytes that came from other ranks."""
        self.grid.traffic.add(Flow(self.name, direction, kind), size)

    def spread(self, statistics: Tensor) -> Tensor:
        """Values of groups ``(..., group)`` as values of channels; 0 for padding."""
        if self.is_plain:
            return statistics
        padded = torch.nn.functional.pad(statistics, (0, 1))
        return padded[..., torch.tensor(self.mine, device=statistics.device)]

    def sums(self, x: Tensor) -> Tensor:
        """Sums over the local channels of every group, ``(..., group)``."""
        if self.is_plain:
            return x.sum(-1, keepdim=True)
        return torch.stack([x[..., channels].sum(-1) for channels in self.members], -1)


def sharded_layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, plan: NormPlan) -> Tensor:
    """Normalise over channels, then scale and shift.

    Args:
        x: Local block ``(..., channel)``.
        gamma: Local part ``(channel,)``; padding is 0, as the result is there.
        beta: Likewise.
        plan: See `NormPlan`.
    """
    with without_autocast(x):
        return _LayerNorm.apply(x, gamma, beta, plan)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, plan: NormPlan) -> Tensor:
        ctx.plan, ctx.dtype = plan, x.dtype
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        x = x.contiguous()
        ctx.native = plan.is_plain and not _talks(plan)
        if ctx.native:
            y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gamma.to(x.dtype), beta.to(x.dtype), plan.eps)
            ctx.save_for_backward(x, mean, rstd, gamma, beta)
            return y.to(ctx.dtype)
        mean, squares = _local_moments(x, plan)
        if _talks(plan) and not plan.is_local:
            mean, squares = _merged(mean, squares, plan)
        totals = torch.tensor(plan.totals, dtype=x.dtype, device=x.device)
        rstd = (squares / totals + plan.eps).rsqrt_()
        normal = (x - plan.spread(mean)).mul_(plan.spread(rstd))
        ctx.save_for_backward(normal, rstd, gamma)
        return torch.addcmul(beta.to(x.dtype), normal, gamma.to(x.dtype)).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: NormPlan = ctx.plan
        if ctx.native:
            x, mean, rstd, gamma, beta = ctx.saved_tensors
            found = torch.ops.aten.native_layer_norm_backward(
                grad.to(x.dtype).contiguous(), x, x.shape[-1:], mean, rstd, gamma.to(x.dtype), beta.to(x.dtype),
                [True, True, True],
            )  # fmt: skip
            return found[0].to(ctx.dtype), found[1].to(gamma.dtype), found[2].to(gamma.dtype), None
        normal, rstd, gamma = ctx.saved_tensors
        grad = grad.to(normal.dtype)
        weighted = grad * normal
        shared = torch.stack([weighted.flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)])
        of_parameters = of_tokens = None
        if _talks(plan) and plan.grid.token_size > 1:
            of_parameters = _start_sum(shared, plan, "token", "shared_gradient")
        scaled, gamma = grad * gamma.to(grad.dtype), gamma.to(grad.dtype)
        sums = torch.stack([plan.sums(scaled), plan.sums(weighted.mul_(gamma))])
        if _talks(plan) and not plan.is_local:
            of_tokens = _start_sum(sums, plan, "channel", "statistics")
        if of_tokens is not None:
            of_tokens.wait()
        sums /= torch.tensor(plan.totals, dtype=sums.dtype, device=sums.device)
        first, second = plan.spread(sums[0]), plan.spread(sums[1])
        x_grad = scaled.sub_(first).sub_(second * normal).mul_(plan.spread(rstd))
        if of_parameters is not None:
            of_parameters.wait()
        return x_grad.to(ctx.dtype), shared[0].to(gamma.dtype), shared[1].to(gamma.dtype), None


def _talks(plan: NormPlan) -> bool:
    return plan.grid.communicates


def _local_moments(x: Tensor, plan: NormPlan) -> tuple[Tensor, Tensor]:
    """(mean, sum of squared deviations) of this rank's channels in every group, ``(..., group)``."""
    if plan.is_plain:
        width = x.shape[-1]  # faster than var_mean, although it normalises as well
        _, mean, rstd = torch.native_layer_norm(x, (width,), None, None, 0.0)
        return mean, rstd.pow(-2).mul_(width)
    means, squares = [], []
    for channels in plan.members:
        part = x[..., channels]
        mean = part.mean(-1, keepdim=True) if channels else part.new_zeros(*part.shape[:-1], 1)
        means.append(mean)
        squares.append((part - mean).square_().sum(-1, keepdim=True))
    return torch.cat(means, -1), torch.cat(squares, -1)


def _merged(mean: Tensor, squares: Tensor, plan: NormPlan) -> tuple[Tensor, Tensor]:
    """Moments of the channels of all ranks."""
    group = plan.grid.channel_group
    message = torch.stack([mean, squares])
    every = message.new_empty(group.size, *message.shape)
    plan.grid.interconnect.all_gather(every.view(-1), message.view(-1), group).wait()
    plan.received("forward", "statistics", (group.size - 1) * num_bytes(message))
    counts = torch.tensor(plan.counts, dtype=mean.dtype, device=mean.device)  # (rank, group)
    counts = counts.view(group.size, *[1] * (mean.dim() - 1), -1)
    means, parts = every[:, 0], every[:, 1]
    mean = (counts * means).sum(0) / counts.sum(0)
    return mean, parts.sum(0).add_((counts * (means - mean).square_()).sum(0))


def _start_sum(tensor: Tensor, plan: NormPlan, axis: str, kind: Kind) -> Any:
    group = plan.grid.token_group if axis == "token" else plan.grid.channel_group
    plan.received("backward", kind, 2 * (group.size - 1) / group.size * num_bytes(tensor))
    return plan.grid.interconnect.all_reduce(tensor, group)
