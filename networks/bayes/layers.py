"""Layers whose weights are Gaussian, and dropout that evaluates a number of masks.

Inside a `SampleContext` the S samples of a batch are computed together, rows sample after sample; outside of one, in
evaluation, the means are used.

How samples are computed was chosen by measuring, one CPU thread, float32, forward and backward:

- `BayesLinear`: one batched product. Batch 64, S = 16, 512 to 512: 36 ms, 110 ms by a product for each sample. Inputs
  that samples share are broadcast (26 ms), which is as fast as one product of all weights and needs no transposition.
- Convolutions: one after the other. Batch 32, S = 8, 3 x 3: 16 to 32 channels at 16 pixels 48 ms, grouped 48 ms; 64 to
  64 at 8 pixels 57 and 71 ms; patches of 4 pixels to 192 channels 41 and 104 ms. A single convolution of all rows with
  one kernel, which is no Bayesian layer, takes 54, 57 and 81 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from networks.bayes.context import SampleContext, current
from networks.bayes.gaussian import Init, KLTerm, Prior, sum_of_kl

_SMALLEST = 1e-30  # of a variance whose square root is taken: the derivative at 0 is infinite
_LARGE = 1 << 19  # numbers above which their products are summed sample by sample: they do not fit into a cache


class RandomTensor(NamedTuple):
    """A weight or bias of a layer as a distribution."""

    name: str
    mu: nn.Parameter
    log_sigma: nn.Parameter
    mask: Tensor | None


class BayesianLayer(nn.Module):
    """A linear map whose weight and bias are N(mu, exp(log_sigma)^2), each entry on its own.

    Parameters: ``weight_mu``, ``weight_log_sigma``, ``bias_mu``, ``bias_log_sigma`` (the last two None without bias).
    Buffer: ``weight_mask``, None where all weights are alive, else bool with the shape of the weight. A pruned weight
    is zero in every sample and has no gradient and no divergence; noise is drawn for it all the same, so that those
    alive keep theirs.

    Args:
        weight_shape: The first entry is the number of outputs; the product of the others is fan_in.
        bias: Whether there is one.
        prior: Of weight and bias.
        init: Initial values; ``keep`` draws as ``init`` does, since there is nothing to keep.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    weight_mask: Tensor | None

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        prior: Prior,
        init: Init,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prior, self.init = prior, init
        for name, shape in (("weight", weight_shape), ("bias", weight_shape[:1] if bias else None)):
            for part in ("mu", "log_sigma"):
                value = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{part}", value)
        self.register_buffer("weight_mask", None)
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """Draw initial values from torch's global generator."""
        init = init or self.init
        if init.mu == "keep":
            init = Init(init.sigma_scale)
        for _, mu, log_sigma, _ in self.random_tensors():
            init.fill(mu, log_sigma, self.fan_in, self.prior)

    @property
    def fan_in(self) -> int:
        """Inputs of an output."""
        return self.weight_mu[0].numel()

    def random_tensors(self) -> Iterator[RandomTensor]:
        """Weight, and bias if there is one."""
        yield RandomTensor("weight", self.weight_mu, self.weight_log_sigma, self.weight_mask)
        if self.bias_mu is not None:
            yield RandomTensor("bias", self.bias_mu, self.bias_log_sigma, None)

    def kl(self, prior: Prior | None = None) -> Tensor:
        """Divergence from the prior, summed over the weights that are alive."""
        return sum_of_kl(self.kl_terms(prior))

    def kl_terms(self, prior: Prior | None = None) -> list[KLTerm]:
        """What `kl` is the sum of."""
        mean, std = (prior or self.prior).of_layer(self.fan_in)
        return [KLTerm(t.mu, t.log_sigma, mean, std, t.mask) for t in self.random_tensors()]

    def mean_weight(self) -> Tensor:
        """Mean of the weight, zero where it is pruned."""
        return self.weight_mu if self.weight_mask is None else torch.where(self.weight_mask, self.weight_mu, 0.0)

    def weight_sigma(self) -> Tensor:
        """Deviation of the weight, zero where it is pruned."""
        log_sigma = self.weight_log_sigma
        if self.weight_mask is not None:  # before the exponential, the slope of which may be infinite
            log_sigma = torch.where(self.weight_mask, log_sigma, -torch.inf)
        return log_sigma.exp()

    def sample(self, context: SampleContext) -> tuple[Tensor, Tensor | None]:
        """Weights ``(S, out, ...)`` and biases ``(S, out)`` of the context's samples."""
        noise, bias_noise = self._noise(context)
        weight = _Reparametrized.apply(self.weight_mu, self.weight_log_sigma, self.weight_mask, noise)
        if self.bias_mu is None:
            return weight, None
        return weight, _Reparametrized.apply(self.bias_mu, self.bias_log_sigma, None, bias_noise)

    def _noise(self, context: SampleContext) -> tuple[Tensor, Tensor]:
        """Of the weight ``(S, out, ...)``, and of the bias ``(S, out)`` or empty, in one draw."""
        weight, bias = self.weight_mu.numel(), 0 if self.bias_mu is None else self.bias_mu.numel()
        drawn = context.noise((weight + bias,), self.weight_mu)
        return self._as_weights(drawn[:, :weight]), drawn[:, weight:]

    def _as_weights(self, numbers: Tensor) -> Tensor:
        """Arrange ``(S, weights)`` as ``(S, out, ...)``."""
        return numbers.unflatten(1, self.weight_mu.shape)

    # ----------------------------------------------------------------------------------------------------- estimators

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ...)`` or, sample after sample, ``(S B, ...)`` to ``(S B, ...)``.

        Outside of a context and in evaluation the means map ``(B, ...)`` to ``(B, ...)``.

        Raises:
            RuntimeError: In training without a context.
        """
        context = current()
        if context is None:
            if self.training:
                raise RuntimeError(
                    f"{type(self).__name__} was called in training without weight samples: enter a "
                    "networks.bayes.SampleContext, or use a module of lightning_modules.bayes"
                )
            return self._map(x, self.mean_weight(), self.bias_mu)
        estimate = {"weight": self._by_weights, "lrt": self._by_outputs, "flipout": self._by_flips}
        return estimate[context.estimator](x, context, context.is_folded(x))

    def _by_weights(self, x: Tensor, context: SampleContext, folded: bool) -> Tensor:
        return self._map_each(x, *self.sample(context), folded)

    def _by_outputs(self, x: Tensor, context: SampleContext, folded: bool) -> Tensor:
        mean = self._map(x, self.mean_weight(), self.bias_mu)
        per_sample = len(x) // context.samples if folded else len(x)
        if self._uses_per_row(mean) * per_sample > context.batch and not context.allow_shared_lrt:
            raise ValueError(
                f"model.estimator=lrt: {type(self).__name__} uses its weights at several places of an item, where "
                "random outputs would be independent though the weights are not; use model.estimator=weight or "
                "flipout, or accept the approximation with model.allow_shared_lrt=true"
            )
        std = self._output_variance(x).clamp_min(_SMALLEST).sqrt().to(mean.dtype)
        noise = context.item_noise(mean.shape[1:], mean, per_sample)
        if folded:
            mean, std = context.by_sample(mean), context.by_sample(std)
        return torch.addcmul(mean, std, noise).flatten(0, 1)

    def _output_variance(self, x: Tensor) -> Tensor:
        """Variance of the outputs over the weights; float32 at least, 16 bits make squares of small deviations zero."""
        sigma, log_sigma = self.weight_sigma(), self.bias_log_sigma
        kind = torch.float32 if sigma.dtype in (torch.float16, torch.bfloat16) else sigma.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias_variance = None if log_sigma is None else (2 * log_sigma.to(kind)).exp()
            return self._map(x.to(kind).square(), sigma.to(kind).square(), bias_variance)

    def _by_flips(self, x: Tensor, context: SampleContext, folded: bool) -> Tensor:
        mean = self._map(x, self.mean_weight(), self.bias_mu)
        per_sample = len(x) // context.samples if folded else len(x)
        noise, bias_noise = self._noise(context)
        deviation = self.weight_sigma() * noise
        signs = context.item_signs(self._sign_shape(x), x, per_sample)
        flipped = (context.by_sample(x) if folded else x) * signs
        out = context.by_sample(self._map_each(flipped.flatten(0, 1), deviation, None, True))
        out = out * context.item_signs(self._sign_shape(mean), out, per_sample)
        if self.bias_mu is not None:
            bias = self.bias_log_sigma.exp() * bias_noise
            out = out + bias.to(out.dtype).view(context.samples, 1, *self._sign_shape(mean))
        return ((context.by_sample(mean) if folded else mean) + out).flatten(0, 1)

    # ----------------------------------------------------------------------------------------------------- linear maps

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One weight for all rows."""
        raise NotImplementedError

    def _map_each(self, x: Tensor, weight: Tensor, bias: Tensor | None, folded: bool) -> Tensor:
        """Weight s for the rows of sample s, or for all rows where they are shared; ``(S B, ...)``."""
        raise NotImplementedError

    def _uses_per_row(self, out: Tensor) -> int:
        """At how many places of a row the weights are used."""
        raise NotImplementedError

    def _sign_shape(self, rows: Tensor) -> tuple[int, ...]:
        """Shape of one sign per feature, without the rows."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over whether there is a mask."""
        mask = state_dict.get(f"{prefix}weight_mask")
        own = self.weight_mask
        if mask is None:
            self.weight_mask = None
        elif own is None or own.shape != mask.shape:
            with torch.inference_mode(False):  # a mask may change outside of an evaluation
                self.weight_mask = torch.empty(mask.shape, dtype=mask.dtype, device=self.weight_mu.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BayesLinear(BayesianLayer):
    """`torch.nn.Linear` with Gaussian weights.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is one.
        prior: Of weight and bias.
        init: Initial values.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        prior: Prior | None = None,
        init: Init | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), bias, prior or Prior(), init or Init(), device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @override
    def _as_weights(self, numbers: Tensor) -> Tensor:
        # Inputs first in memory, as the batched product reads weights and writes their gradients.
        return numbers.unflatten(1, (self.in_features, self.out_features)).mT

    @override
    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @override
    def _map_each(self, x: Tensor, weight: Tensor, bias: Tensor | None, folded: bool) -> Tensor:
        samples = len(weight)
        inner = x.shape[1:-1]
        x = x.reshape(samples, -1, x.shape[-1]) if folded else x.reshape(1, -1, x.shape[-1]).expand(samples, -1, -1)
        out = torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
        return out.reshape(-1, *inner, out.shape[-1])

    @override
    def _uses_per_row(self, out: Tensor) -> int:
        return out.shape[1:-1].numel()

    @override
    def _sign_shape(self, rows: Tensor) -> tuple[int, ...]:
        return (*(1,) * (rows.ndim - 2), rows.shape[-1])

    def extra_repr(self) -> str:
        """Sizes, as `torch.nn.Linear` gives them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_mu is not None}"


class _BayesConv(BayesianLayer):
    """A convolution with Gaussian kernels."""

    dimensions: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        prior: Prior | None = None,
        init: Init | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # The plain layer checks the arguments and knows its padding; it costs nothing on the meta device.
        plain = self._plain()(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        super().__init__(tuple(plain.weight.shape), bias, prior or Prior(), init or Init(), device, dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding, self.padding_mode = plain.padding, padding_mode
        self._reversed_padding = list(plain._reversed_padding_repeated_twice)

    @classmethod
    def _plain(cls) -> type[nn.Module]:
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[cls.dimensions - 1]

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding, mode=self.padding_mode), 0
        return function(x, weight, bias, self.stride, padding, self.dilation, groups)

    @override
    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv(x, weight, bias, self.groups)

    @override
    def _map_each(self, x: Tensor, weight: Tensor, bias: Tensor | None, folded: bool) -> Tensor:
        samples = len(weight)
        parts = x.unflatten(0, (samples, -1)) if folded else [x] * samples
        biases = [None] * samples if bias is None else bias
        return torch.cat([self._map(*one) for one in zip(parts, weight, biases, strict=True)])

    @override
    def _uses_per_row(self, out: Tensor) -> int:
        return out.shape[2:].numel()

    @override
    def _sign_shape(self, rows: Tensor) -> tuple[int, ...]:
        return (rows.shape[1], *(1,) * self.dimensions)

    def extra_repr(self) -> str:
        """Sizes that differ from the defaults of `torch.nn.Conv2d`."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{text}, padding={self.padding}, groups={self.groups}, bias={self.bias_mu is not None}"


class BayesConv1d(_BayesConv):
    """`torch.nn.Conv1d` with Gaussian kernels; the arguments are its, further ``prior`` and ``init``."""

    dimensions = 1


class BayesConv2d(_BayesConv):
    """`torch.nn.Conv2d` with Gaussian kernels; the arguments are its, further ``prior`` and ``init``."""

    dimensions = 2


class BayesConv3d(_BayesConv):
    """`torch.nn.Conv3d` with Gaussian kernels; the arguments are its, further ``prior`` and ``init``."""

    dimensions = 3


class MCDropout(nn.Module):
    """Dropout whose masks belong to the samples of a `SampleContext`, in evaluation as well (Gal and Ghahramani, 2016).

    A sample is one mask for all items of a batch, hence one function. In training the items may have masks of their
    own instead, as in ordinary dropout.

    Args:
        p: Part of the entries that become zero; the others are divided by 1 - p.
        dimensions: Trailing dimensions that a mask has in common: 0 as `torch.nn.Dropout`, 2 as `torch.nn.Dropout2d`.
        per_item: Whether every item of a training batch has its own mask.
        in_evaluation: False: masks are a means of training alone, as in ordinary dropout.
    """

    def __init__(self, p: float = 0.5, dimensions: int = 0, per_item: bool = False, in_evaluation: bool = True) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p}: must be at least 0 and below 1")
        self.p, self.dimensions, self.per_item, self.in_evaluation = p, dimensions, per_item, in_evaluation

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ...)`` or ``(S B, ...)`` to ``(S B, ...)``; outside of a context and in evaluation: nothing.

        Raises:
            RuntimeError: In training without a context.
        """
        context = current()
        if context is None:
            if self.training and self.p:
                raise RuntimeError("MCDropout was called in training without samples: enter a SampleContext")
            return x
        if self.p == 0 or not (self.training or self.in_evaluation):
            return x
        folded = context.is_folded(x)
        rows = len(x) // context.samples if folded else len(x)
        shape = x.shape[1 : x.ndim - self.dimensions] + (1,) * self.dimensions
        if self.per_item and self.training:
            draws = context.item_uniform(shape, x, rows)
        else:
            draws = context.uniform(shape, x).unsqueeze(1)
        kept = (draws >= self.p).to(x.dtype) / (1 - self.p)
        return ((context.by_sample(x) if folded else x) * kept).flatten(0, 1)

    def extra_repr(self) -> str:
        """Probability."""
        return f"p={self.p}, per_item={self.per_item}"


class _Reparametrized(torch.autograd.Function):
    """w_s = mu + exp(log_sigma) eps_s, ``(S, ...)``, zero outside of the mask.

    One node of the graph in place of four; gradients of large tensors are summed over samples without a copy.
    """

    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_sigma: Tensor, mask: Tensor | None, noise: Tensor) -> Tensor:
        sigma = log_sigma.exp()
        if mask is not None:
            mu, sigma = (torch.where(mask, t, 0.0) for t in (mu, sigma))
        ctx.turned = noise.stride(-1) != 1
        if ctx.turned:  # as the noise lies in memory: copied once for all samples
            mu, sigma, noise = mu.mT.contiguous(), sigma.mT.contiguous(), noise.mT
        ctx.save_for_backward(noise, sigma, mask)
        weights = torch.addcmul(mu, sigma, noise)
        return weights.mT if ctx.turned else weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        noise, sigma, mask = ctx.saved_tensors
        if ctx.turned:
            gradient = gradient.mT
        of_mu = gradient.sum(0)
        if gradient.numel() < _LARGE:
            of_log_sigma = (gradient * noise).sum(0)
        else:
            of_log_sigma = gradient[0] * noise[0]
            for one, eps in zip(gradient[1:], noise[1:], strict=True):
                of_log_sigma.addcmul_(one, eps)
        of_log_sigma.mul_(sigma)
        if ctx.turned:
            of_mu, of_log_sigma = of_mu.mT, of_log_sigma.mT
        if mask is not None:
            of_mu, of_log_sigma = (g.masked_fill_(~mask, 0.0) for g in (of_mu, of_log_sigma))
        return of_mu, of_log_sigma, None, None
