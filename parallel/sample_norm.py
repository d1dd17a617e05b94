"""Batch normalisation whose statistics are those of all ranks of a group, on any device.

torch's SyncBatchNorm runs on accelerators alone. Counts, means and sums of squared deviations are gathered and merged
(Chan, Golub, LeVeque, 1979), never sums of squares; the gradient passes through the merged statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from parallel.sample_collectives import all_gather, group_sum
from parallel.sample_layout import SampleShare


def share_statistics(model: nn.Module, share: Callable[[], SampleShare]) -> Callable[[], None]:
    """Let every batch normalisation of a model train on the statistics of all ranks of a group.

    The modules, their parameters and their names stay as they are. Ranks may hold unequal numbers of samples.

    Args:
        model: Whose modules are looked through.
        share: Gives the group in every forward pass; in a group of one rank a module computes as it always does.

    Returns:
        A function that undoes it.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    for norm in norms:
        norm.forward = partial(_forward, norm, share)

    def undo() -> None:
        for norm in norms:
            norm.__dict__.pop("forward", None)

    return undo


def _forward(norm: _BatchNorm, share_now: Callable[[], SampleShare], x: Tensor) -> Tensor:
    share = share_now()
    if not norm.training or share.size < 2:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    y, mean, variance, count = _Normalize.apply(x, norm.weight, norm.bias, norm.eps, share)
    if norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
            norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var), momentum)
    return y


class _Normalize(torch.autograd.Function):
    """Mean and variance over everything but dimension 1, over all ranks; the gradient passes through them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, share: SampleShare
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        dims = [d for d in range(x.ndim) if d != 1]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(wide, dims, correction=0)
        parts = all_gather(torch.cat([mean, variance * count, mean.new_tensor([count])]), share)
        means, squares, counts = parts.split([len(mean), len(mean), 1], 1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        scale = (variance + eps).rsqrt()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        unit = (wide - mean.view(shape)) * scale.view(shape)
        y = unit if weight is None else unit * weight.view(shape)
        y = y if bias is None else y + bias.view(shape)
        ctx.save_for_backward(unit, weight, scale, total)
        ctx.share, ctx.dims, ctx.shape, ctx.affine, ctx.dtype = share, dims, shape, bias is not None, x.dtype
        ctx.mark_non_differentiable(mean, variance, total)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        unit, weight, scale, total = ctx.saved_tensors
        gradient = gradient.to(unit.dtype)
        own = torch.cat([gradient.sum(ctx.dims), (gradient * unit).sum(ctx.dims)])
        first, second = (group_sum(own, ctx.share) / total).chunk(2)
        factor = scale if weight is None else scale * weight
        dx = (gradient - first.view(ctx.shape) - unit * second.view(ctx.shape)) * factor.view(ctx.shape)
        of_bias, of_weight = own.chunk(2)
        return (
            dx.to(ctx.dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias if ctx.affine else None,
            None,
            None,
        )
