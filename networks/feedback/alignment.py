"""Feedback alignment: linear and convolutional layers whose backward pass has fixed random weights of its own.

Lillicrap et al., Nature Communications 2016. All else is exact, so that any network can be trained: activations,
normalisations, attention. The gradient of a layer's input is that of its output times B (shaped as its weight W)
instead of W.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

Layer = nn.Linear | nn.Conv2d


class RandomBackward(nn.Module):
    """Fixed backward weights for all linear and convolutional layers of a network but those that see its input.

    Entries are U(-1/sqrt(n), 1/sqrt(n)) with n inputs of the layer, as initial weights.

    Args:
        net: The network.
        seed: Of the private random generator.

    Raises:
        ValueError: For layers that hide their matrices.
    """

    def __init__(self, net: nn.Module, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self._names: list[str] = []
        for name, layer in net.named_modules():
            if isinstance(layer, nn.MultiheadAttention | nn.RNNBase):
                raise ValueError(
                    f"model.algorithm=fa: {name} ({type(layer).__name__}) multiplies by its weights itself; feedback "
                    "alignment needs linear and convolutional layers (networks.vit.Attention has these)"
                )
            if isinstance(layer, Layer):
                bound = layer.weight[0].numel() ** -0.5
                drawn = (2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound
                self.register_buffer(f"b{len(self._names)}", drawn.to(layer.weight.dtype))
                self._names.append(name)

    def weights(self) -> dict[str, Tensor]:
        """Backward weights by the name of the layer."""
        return {name: getattr(self, f"b{i}") for i, name in enumerate(self._names)}

    @contextmanager
    def of(self, net: nn.Module) -> Iterator[None]:
        """Within, the layers of the network have these backward weights."""
        layers = [(net.get_submodule(name), weight) for name, weight in self.weights().items()]
        for layer, weight in layers:
            call = linear if isinstance(layer, nn.Linear) else conv2d
            layer.forward = functools.partial(call, layer, weight)
        try:
            yield
        finally:
            for layer, _ in layers:
                del layer.forward


def linear(layer: nn.Linear, backward_weight: Tensor, x: Tensor) -> Tensor:
    """What the layer gives, with other weights (out, in) in the backward pass."""
    y = F.linear(x.detach(), layer.weight, layer.bias)
    return _Through.apply(y, x, backward_weight, None) if x.requires_grad else y


def conv2d(layer: nn.Conv2d, backward_weight: Tensor, x: Tensor) -> Tensor:
    """The same for a convolution."""
    if layer.padding_mode != "zeros":
        raise ValueError(f"model.algorithm=fa: a convolution pads with {layer.padding_mode!r}; only zeros are possible")
    sizes = (layer.stride, layer.padding, layer.dilation, layer.groups)
    y = F.conv2d(x.detach(), layer.weight, layer.bias, *sizes)
    return _Through.apply(y, x, backward_weight, sizes) if x.requires_grad else y


class _Through(torch.autograd.Function):
    """Identity of ``y``, whose own graph leads to the weights alone, with a path to ``x`` through other weights."""

    @staticmethod
    @override
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, sizes: tuple[Any, ...] | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.sizes, ctx.shape, ctx.dtype = sizes, x.shape, x.dtype
        return y.view_as(y)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight = ctx.saved_tensors[0].to(gradient.dtype)
        if ctx.sizes is None:
            towards_x = gradient @ weight
        else:
            towards_x = torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.sizes)
        return gradient, towards_x.to(ctx.dtype), None, None
