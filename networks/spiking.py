"""Leaky integrate-and-fire neurons: one scan over all steps with an analytic backward, layers, spiking perceptrons.

Tensors are ``(time, batch, channel)``. A layer multiplies all steps by its weights at once and then scans over time;
the backward pass of the scan is a scan in the other direction (section 2.3), so that nothing is unrolled.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Backend = Literal["auto", "numba", "torch", "triton"]
Reset = Literal["subtract", "paper"]
Surrogate = Literal["arctan", "arctan_paper", "fast_sigmoid", "triangle"]

BACKENDS = ("auto", "numba", "torch", "triton")
RESETS = ("subtract", "paper")


def _arctan(x: Tensor) -> Tensor:
    return 1 / (1 + (math.pi * x) ** 2)


def _arctan_paper(x: Tensor) -> Tensor:
    return _arctan(x) / math.pi


def _fast_sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + 25 * x.abs()) ** 2


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


SURROGATES = {
    "arctan": _arctan, "arctan_paper": _arctan_paper, "fast_sigmoid": _fast_sigmoid, "triangle": _triangle,
}  # fmt: skip
"""Derivatives that stand for that of the step function, of the distance to the threshold.

``arctan`` is snnTorch's, ``arctan_paper`` has the paper's factor ``1 / pi``; ``fast_sigmoid`` has slope 25.
"""


# ------------------------------------------------------------------------------------------------------------ kernels


@functools.cache
def _numba_kernels() -> tuple[Any, Any, Any] | None:
    """Compiled forward scan, backward scan and filter over (T, N) arrays, None without numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    from numba import njit

    @njit(nogil=True, cache=False)
    def forward(x, beta, threshold, reset, u, s):  # no fastmath: the order of operations decides spikes
        steps, n = x.shape
        for i in range(n):
            u[0, i] = x[0, i]
            s[0, i] = 1.0 if u[0, i] > threshold else 0.0
        for t in range(1, steps):
            for i in range(n):
                v = beta[i] * u[t - 1, i] + x[t, i]
                v = v - reset[i] * s[t - 1, i]
                u[t, i] = v
                s[t, i] = 1.0 if v > threshold else 0.0

    @njit(nogil=True, cache=False)
    def backward(d, beta):
        steps, n = d.shape
        for t in range(steps - 2, -1, -1):
            for i in range(n):
                d[t, i] += beta[i] * d[t + 1, i]

    @njit(nogil=True, cache=False)
    def filtered(d, beta):
        steps, n = d.shape
        for t in range(1, steps):
            for i in range(n):
                d[t, i] += beta[i] * d[t - 1, i]

    return forward, backward, filtered


_TRITON_OPTIONS = {"enable_fp_fusion": False}  # a fused product and sum rounds once: other spikes


@functools.cache
def _triton_kernels() -> tuple[Any, Any]:
    """Forward and backward scan, a program for every block of neurons, the potential in registers."""
    import triton
    import triton.language as tl

    @triton.jit
    def forward(x, beta, reset, u, s, threshold, steps, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        b, r = tl.load(beta + i, inside, 0.0), tl.load(reset + i, inside, 0.0)
        v, z = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for t in range(steps):
            v = b * v + tl.load(x + t * n + i, inside, 0.0)
            v = v - r * z
            z = (v > threshold).to(tl.float32)
            tl.store(u + t * n + i, v, inside)
            tl.store(s + t * n + i, z, inside)

    @triton.jit
    def backward(d, beta, steps, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        b, later = tl.load(beta + i, inside, 0.0), tl.zeros((BLOCK,), tl.float32)
        for k in range(steps):
            at = d + (steps - 1 - k) * n + i
            later = tl.load(at, inside, 0.0) + b * later
            tl.store(at, later, inside)

    return forward, backward


@functools.cache
def _warn_without_numba() -> None:
    warnings.warn("numba is not installed: LIF scans run in a slower loop of torch (pip install numba)", stacklevel=3)


def choose_backend(x: Tensor, backend: Backend) -> str:
    """The backend that a scan of ``x`` runs with.

    ``auto`` takes Triton on a GPU and numba on a CPU, where they are installed and ``x`` has 32 bits, else torch.

    Raises:
        ValueError: For a backend that there is not, or that cannot run on this tensor.
        ImportError: For one that was asked for and is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and x.dtype not in (torch.float32, torch.float64)):
        return "torch"
    if backend == "numba" or (backend == "auto" and x.device.type == "cpu"):
        if x.device.type != "cpu":
            raise ValueError(f"backend='numba' runs on the CPU, the input is on {x.device}; use auto, torch or triton")
        if _numba_kernels() is not None:
            return "numba"
        if backend == "numba":
            raise ImportError("backend='numba' needs numba: pip install numba")
        _warn_without_numba()
        return "torch"
    if importlib.util.find_spec("triton") is not None and x.dtype == torch.float32:
        return "triton"
    if backend == "triton":
        raise ImportError("backend='triton' needs triton and float32; use torch")
    return "torch"


def _scan_forward(x: Tensor, beta: Tensor, threshold: float, reset: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Potentials and spikes of ``x`` (T, N) with ``beta`` and ``reset`` (N)."""
    u, s = torch.empty_like(x), torch.empty_like(x)
    if backend == "numba":
        arrays = [t.numpy() for t in (x, beta, reset, u, s)]
        _numba_kernels()[0](arrays[0], arrays[1], x.new_tensor(threshold).numpy()[()], *arrays[2:])
    elif backend == "triton":
        steps, n = x.shape
        _triton_kernels()[0][((n + 127) // 128,)](
            x, beta, reset, u, s, threshold, steps, n, BLOCK=128, **_TRITON_OPTIONS
        )
    else:
        inputs, potentials, spikes = x.unbind(0), u.unbind(0), s.unbind(0)
        potentials[0].copy_(inputs[0])
        torch.gt(potentials[0], threshold, out=spikes[0])
        back = torch.empty_like(reset)
        for t in range(1, len(inputs)):
            v = torch.mul(potentials[t - 1], beta, out=potentials[t])
            v.add_(inputs[t]).sub_(torch.mul(spikes[t - 1], reset, out=back))
            torch.gt(v, threshold, out=spikes[t])
    return u, s


def filter_backward(d: Tensor, beta: Tensor, backend: str) -> Tensor:
    """``D[t] += beta D[t + 1]`` from the last step to the first, in place, (T, N)."""
    if backend == "numba":
        _numba_kernels()[1](d.numpy(), beta.numpy())
    elif backend == "triton":
        steps, n = d.shape
        _triton_kernels()[1][((n + 127) // 128,)](d, beta, steps, n, BLOCK=128, **_TRITON_OPTIONS)
    else:
        rows = d.unbind(0)
        for t in range(len(rows) - 2, -1, -1):
            rows[t].addcmul_(rows[t + 1], beta)
    return d


def filter_forward(d: Tensor, beta: Tensor, backend: str) -> Tensor:
    """``D[t] += beta D[t - 1]`` from the first step to the last, in place on a CPU, (T, N)."""
    if backend == "numba":
        _numba_kernels()[2](d.numpy(), beta.numpy())
    elif backend == "triton":
        return filter_backward(d.flip(0), beta, backend).flip(0)
    else:
        rows = d.unbind(0)
        for t in range(1, len(rows)):
            rows[t].addcmul_(rows[t - 1], beta)
    return d


class _LIFScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, beta: Tensor, threshold: float, reset: str, surrogate: str, backend: str
    ) -> tuple[Tensor, Tensor]:
        flat = x.reshape(len(x), -1).contiguous()
        clamped = beta.clamp(0, 1)
        decay = clamped.expand(x.shape[1:]).reshape(-1).contiguous()
        taken = torch.full_like(decay, threshold) if reset == "subtract" else decay * threshold
        u, s = _scan_forward(flat, decay, threshold, taken, backend)
        u, s = u.view_as(x), s.view_as(x)
        ctx.save_for_backward(u, s if reset == "paper" else None, beta, decay)
        ctx.settings = threshold, reset, surrogate, backend
        return s, u

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        u, s, beta, decay = ctx.saved_tensors
        threshold, reset, surrogate, backend = ctx.settings
        d = SURROGATES[surrogate](u - threshold).mul_(grad_s)
        if grad_u is not None:
            d += grad_u
        d = filter_backward(d.view(len(u), -1).contiguous(), decay, backend).view_as(u)
        grad_beta = None
        if ctx.needs_input_grad[1]:
            before = u[:-1] if reset == "subtract" else u[:-1] - threshold * s[:-1]
            per_neuron = (d[1:] * before).sum(0)
            grad_beta = per_neuron.sum_to_size(beta.shape)
            grad_beta = grad_beta * ((beta >= 0) & (beta <= 1))  # the derivative of the clamp
        return d, grad_beta, None, None, None, None


class LIFTrace(NamedTuple):
    """Spikes and potentials of a scan, both (T, ...)."""

    spikes: Tensor
    potentials: Tensor


def lif_scan(
    x: Tensor,
    beta: Tensor | float,
    *,
    threshold: float = 1.0,
    reset: Reset = "subtract",
    surrogate: Surrogate = "arctan",
    backend: Backend = "auto",
) -> LIFTrace:
    """Leaky integrate-and-fire neurons over all steps of their input currents.

    ``U[t] = beta U[t-1] + I[t] - R S[t-1]``, ``S[t] = 1 if U[t] > threshold``, from ``U[-1] = S[-1] = 0``, with
    ``R = threshold`` (``subtract``: snnTorch's, spike by spike) or ``R = beta * threshold`` (``paper``: the reset
    decays with the potential). The reset is not differentiated; the derivative of S is the surrogate's.

    Args:
        x: Currents I, (T, ...), floating point.
        beta: Decay of the potential in a step, clamped to [0, 1]: a number, or a tensor that broadcasts over ``(...)``.
        threshold: Above it a neuron fires.
        reset: ``subtract`` or ``paper``.
        surrogate: One of `SURROGATES`.
        backend: ``numba``, ``torch``, ``triton`` or ``auto`` (`choose_backend`); all give the same spikes.

    Raises:
        ValueError: Names the argument and the remedy.
    """
    if x.ndim < 1 or not len(x):
        raise ValueError(f"currents of shape {tuple(x.shape)}: they need at least one step, (T, ...)")
    if reset not in RESETS:
        raise ValueError(f"reset={reset!r} is unknown; choose {', '.join(RESETS)}")
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate={surrogate!r} is unknown; choose {', '.join(SURROGATES)}")
    beta = torch.as_tensor(beta, dtype=x.dtype, device=x.device)
    return LIFTrace(*_LIFScan.apply(x, beta, threshold, reset, surrogate, choose_backend(x, backend)))


# ------------------------------------------------------------------------------------------------------------- layers


class LIF(nn.Module):
    """A population of neurons with one decay, which may be learned.

    Args:
        beta: Initial decay of the potential in a step, 0 to 1.
        learn_beta: Whether the decay is learned (clamped to [0, 1] where it is used).
        threshold: Above it a neuron fires.
        reset: See `lif_scan`.
        surrogate: See `lif_scan`.
        backend: See `lif_scan`.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        beta: float = 0.95,
        learn_beta: bool = True,
        threshold: float = 1.0,
        reset: Reset = "subtract",
        surrogate: Surrogate = "arctan",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"model.net.beta={beta}: must be between 0 and 1")
        for key, value, known in (
            ("reset", reset, RESETS), ("surrogate", surrogate, tuple(SURROGATES)), ("backend", backend, BACKENDS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"model.net.{key}={value!r} is unknown; choose {', '.join(known)}")
        self.beta = nn.Parameter(torch.tensor(float(beta)), requires_grad=learn_beta)
        self.threshold, self.reset, self.surrogate, self.backend = threshold, reset, surrogate, backend

    def forward(self, currents: Tensor) -> LIFTrace:
        """Spikes and potentials of currents (T, ...)."""
        return lif_scan(
            currents, self.beta, threshold=self.threshold, reset=self.reset, surrogate=self.surrogate,
            backend=self.backend,
        )  # fmt: skip


class Events(NamedTuple):
    """A sparse input: values at (step, item of the batch, channel), which add up.

    Args:
        step: (event,) int64, 0 to T - 1.
        item: (event,) int64, 0 to B - 1.
        channel: (event,) int64.
        value: (event,).
        num_steps: T.
        num_items: B.
    """

    step: Tensor
    item: Tensor
    channel: Tensor
    value: Tensor
    num_steps: int
    num_items: int

    def dense(self, num_channels: int) -> Tensor:
        """The same as (T, B, channel)."""
        flat = self.value.new_zeros(self.num_steps * self.num_items * num_channels)
        at = (self.step * self.num_items + self.item) * num_channels + self.channel
        return flat.index_add_(0, at, self.value).view(self.num_steps, self.num_items, num_channels)


def sparse_linear(layer: nn.Linear, events: Events) -> Tensor:
    """Currents of a linear layer, (T, B, out), for an input that is almost everywhere zero.

    Gathers the columns of the weights that the events need; equal to the dense product up to the order of sums.
    """
    at = events.step * events.num_items + events.item
    columns = layer.weight.t().index_select(0, events.channel) * events.value[:, None].to(layer.weight)
    size = events.num_steps * events.num_items
    base = layer.weight.new_zeros(()) if layer.bias is None else layer.bias
    out = base.expand(size, layer.out_features).contiguous()
    return out.index_add(0, at, columns).view(events.num_steps, events.num_items, layer.out_features)


class SpikingMLP(nn.Module):
    """Linear layers, each followed by LIF neurons; the spikes of the last ones are the prediction (section 2.3).

    Args:
        num_inputs: Channels of the input.
        hidden: Neurons of the hidden layers.
        num_outputs: Channels of the output.
        beta: Initial decay of all layers.
        learn_beta: Whether each layer learns its decay.
        threshold: Of all neurons.
        reset: See `lif_scan`.
        surrogate: See `lif_scan`.
        backend: See `lif_scan`.
    """

    def __init__(
        self,
        num_inputs: int,
        hidden: Sequence[int],
        num_outputs: int,
        beta: float = 0.95,
        learn_beta: bool = True,
        threshold: float = 1.0,
        reset: Reset = "subtract",
        surrogate: Surrogate = "arctan",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        widths = [num_inputs, *hidden, num_outputs]
        if min(widths) < 1:
            raise ValueError(f"model.net: layers of {widths} neurons; each needs at least one")
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.neurons = nn.ModuleList(
            LIF(beta, learn_beta, threshold, reset, surrogate, backend) for _ in range(len(widths) - 1)
        )

    def layers(self, x: Tensor | Events) -> list[LIFTrace]:
        """Spikes and potentials of every layer for (T, B, channel), or events of it."""
        traces: list[LIFTrace] = []
        for linear, neurons in zip(self.linear, self.neurons, strict=True):
            currents = sparse_linear(linear, x) if isinstance(x, Events) else linear(x)
            traces.append(neurons(currents))
            x = traces[-1].spikes
        return traces

    def forward(self, x: Tensor | Events) -> Tensor:
        """Output spikes, (T, B, num_outputs)."""
        return self.layers(x)[-1].spikes


class DelayLayer(nn.Module):
    """Shifts every channel by a delay of its own: ``y[t, c] = sum_k w_c(k) x[t - k, c]``.

    Args:
        delays: Initial delay of every channel in steps, (channel,), 0 to ``max_delay``.
        max_delay: Largest delay, steps.
        kernel: w: ``linear`` interpolates between whole steps; ``gaussian`` has a width, wide ones let a gradient see
            delays far from the present one; ``softmax`` has a logit for every delay.
        sigma: Initial width of the Gaussian, steps.
        learn: Whether delays are learned.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        delays: Tensor,
        max_delay: int,
        kernel: Literal["linear", "gaussian", "softmax"] = "linear",
        sigma: float = 1.0,
        learn: bool = True,
    ) -> None:
        super().__init__()
        delays = torch.as_tensor(delays, dtype=torch.get_default_dtype())
        if max_delay < 0 or (len(delays) and not (delays.min() >= 0 and delays.max() <= max_delay)):
            raise ValueError(f"delays from {delays.min():g} to {delays.max():g} are not in 0..max_delay={max_delay}")
        if kernel not in ("linear", "gaussian", "softmax"):
            raise ValueError(f"kernel={kernel!r} is unknown; choose linear, gaussian, softmax")
        if not sigma > 0:
            raise ValueError(f"sigma={sigma}: must be above 0")
        self.max_delay, self.kernel = max_delay, kernel
        self.register_buffer("sigma", torch.tensor(float(sigma)))
        self.register_buffer("steps", torch.arange(max_delay + 1, dtype=delays.dtype))
        if kernel == "softmax":
            start = -(((self.steps - delays[:, None]) / sigma) ** 2) / 2
            self.logits = nn.Parameter(start, requires_grad=learn)
        else:
            self.position = nn.Parameter(delays.clone(), requires_grad=learn)

    def weights(self) -> Tensor:
        """w, (channel, max_delay + 1); rows sum to one."""
        if self.kernel == "softmax":
            return self.logits.softmax(-1)
        away = self.steps - self.position.clamp(0, self.max_delay)[:, None]
        if self.kernel == "linear":
            return (1 - away.abs()).clamp_min(0)
        return (-((away / self.sigma) ** 2) / 2).softmax(-1)

    def delays(self) -> Tensor:
        """Present delays in steps, (channel,): the most likely one of a softmax."""
        if self.kernel == "softmax":
            return self.logits.argmax(-1).to(self.steps.dtype)
        return self.position.clamp(0, self.max_delay)

    def forward(self, x: Tensor) -> Tensor:
        """Shift (T, B, channel)."""
        channels = x.shape[-1]
        w = self.weights().flip(-1)[:, None]  # conv1d correlates
        series = F.pad(x.permute(1, 2, 0), (self.max_delay, 0))
        return F.conv1d(series, w.to(x.dtype), groups=channels).permute(2, 0, 1)
