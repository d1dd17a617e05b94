"""What spike trains are trained for: how many spikes, when they come, how few are needed (section 2.4).

Predictions and targets are ``(time, batch, channel)``. All losses are means over the batch. Those of `LEGACY` are the
reference's, for comparison: they are built of the places of spikes and carry **no gradient**.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from networks.spiking import choose_backend, filter_backward, filter_forward


class _ExponentialFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: float) -> Tensor:
        flat = x.reshape(len(x), -1).clone(memory_format=torch.contiguous_format)
        ctx.settings = decay, choose_backend(flat, "auto")
        return filter_forward(flat, flat.new_full(flat.shape[1:], decay), ctx.settings[1]).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        decay, backend = ctx.settings
        flat = grad.reshape(len(grad), -1).clone(memory_format=torch.contiguous_format)
        return filter_backward(flat, flat.new_full(flat.shape[1:], decay), backend).view_as(grad), None


def exponential_filter(x: Tensor, tau: float) -> Tensor:
    """Convolution over time with the causal kernel ``exp(-t / tau)``.

    Args:
        x: (T, ...).
        tau: Steps.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau}: must be above 0 steps")
    return _ExponentialFilter.apply(x, float(torch.exp(torch.tensor(-1.0 / tau, dtype=torch.float64))))


def mse_count(spikes: Tensor, target: Tensor) -> Tensor:
    """Squared difference of the numbers of spikes of a channel, mean over channels: the paper's ``L_Gamma``."""
    return (spikes.sum(0) - target.sum(0)).square().mean()


def l1_count(spikes: Tensor, target: Tensor) -> Tensor:
    """Absolute difference of the numbers of spikes, summed over channels."""
    return (spikes.sum(0) - target.sum(0)).abs().sum(-1).mean()


COUNTS = {"mse": mse_count, "l1": l1_count}


def van_rossum(spikes: Tensor, target: Tensor, tau: float = 3.0) -> Tensor:
    """Squared distance of both trains filtered with ``exp(-t / tau)``, over tau: a spike too many costs about 1/2.

    A spike that is off by a few tau costs as much as one missing and one too many; nearer ones less.
    """
    return exponential_filter(spikes - target, tau).square().sum((0, 2)).mean() / tau


def soft_timing(spikes: Tensor, target: Tensor, tau: float = 3.0) -> Tensor:
    """Squared distance of each target spike to the mean time of the spikes around it, in units of tau.

    Around is a window of ``ceil(2 tau)`` steps to both sides; targets without any spike there cost nothing, the count
    does. The gradient goes to all steps of the window, spikes or not, through the surrogate of the neurons.
    """
    reach = int(-(-2 * tau // 1))
    t, b, c = target.nonzero(as_tuple=True)
    if not len(t):
        return spikes.sum() * 0
    offsets = torch.arange(-reach, reach + 1, device=spikes.device)
    at = t[:, None] + offsets
    inside = (at >= 0) & (at < len(spikes))
    near = spikes[at.clamp(0, len(spikes) - 1), b[:, None], c[:, None]] * inside
    mass = near.sum(1)
    off = (near * offsets).sum(1) / mass.clamp_min(1) / tau
    return (off.square() * (mass.detach() > 0)).sum() / spikes.shape[1]


def legacy_timing(spikes: Tensor, target: Tensor, tau: float = 3.0) -> Tensor:
    """Squared distance of each spike to the nearest target of its channel, over T^2. No gradient. ``tau``: unused."""
    steps = len(spikes)
    return _nearest(spikes, target).square().sum() / (steps**2 * spikes.shape[1])


def chamfer(spikes: Tensor, target: Tensor, tau: float = 3.0) -> Tensor:
    """Mean distance to the nearest of the other train, both ways, over T. No gradient. ``tau``: unused."""
    both = [_nearest(a, b) for a, b in ((spikes, target), (target, spikes))]
    return sum(away.mean() if len(away) else away.new_zeros(()) for away in both) / len(spikes)


def _nearest(spikes: Tensor, target: Tensor) -> Tensor:
    """Steps from each spike to the nearest target of its channel and item; T without any."""
    steps = len(spikes)
    with torch.no_grad():
        ticks = torch.arange(steps, device=spikes.device, dtype=spikes.dtype)[:, None, None]
        big = torch.full_like(target, 2 * steps)
        before = torch.where(target > 0, ticks, -big).cummax(0).values
        after = torch.where(target > 0, ticks, big).flip(0).cummin(0).values.flip(0)
        away = torch.minimum(ticks - before, after - ticks).clamp_max(steps)
        return away[spikes > 0]


TIMINGS = {"van_rossum": van_rossum, "soft": soft_timing, "legacy": legacy_timing, "chamfer": chamfer}
LEGACY = ("legacy", "chamfer")
