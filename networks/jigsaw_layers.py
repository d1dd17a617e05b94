"""Layers that hold their block of a model cut over a grid of ranks; on a grid of one rank they are ordinary layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from parallel.sharding import JigsawGrid, NormPlan, Plan, make_parameter, sharded_layer_norm, sharded_linear
from parallel.sharding.blocks import local
from parallel.sharding.cost import MESSAGE, Shapes, can_move_activations, cheaper, received
from parallel.sharding.counter import keep_mask, key_of
from parallel.sharding.layout import Axis, Layout
from parallel.sharding.linear import rows_of

Choice = Literal["auto", "weights", "activations"]


class Width(NamedTuple):
    """Features of an activation.

    Attributes:
        size: Over all ranks.
        local: On each rank, padding included.
    """

    size: int
    local: int


class Draw(NamedTuple):
    """Which masks dropout draws.

    Attributes:
        number: Of the training forward pass.
        repetition: Of the processor within the pass.
        samples: Global index of every sample in the batch, int64.
    """

    number: int
    repetition: int
    samples: Tensor


class ShardedLayer(nn.Module):
    """A layer with a grid; ``layouts`` says for every parameter which block of it a rank holds."""

    def __init__(self, name: str, grid: JigsawGrid) -> None:
        super().__init__()
        self.name, self.grid = name, grid
        self.layouts: dict[str, Layout] = {}

    def add(self, name: str, layout: Layout, **init: Any) -> None:
        """Register a parameter, see `parallel.sharding.make_parameter`."""
        self.layouts[name] = layout
        self.register_parameter(name, make_parameter(layout, self.grid, **init))

    def received(self, batch: int, tokens: int) -> tuple[float, float]:
        """Elements that this rank receives, (forward, backward), by the closed formula.

        Args:
            batch: Samples.
            tokens: Of the whole field.
        """
        raise NotImplementedError


class ShardedLinear(ShardedLayer):
    """A linear layer on channels or tokens, for inputs that may consist of several parts side by side.

    Args:
        name: Full name within the network; keys the initial weights.
        grid: Ranks.
        axis: What it maps: ``channel`` features or ``token``s.
        inputs: Widths of the parts of the input; every part has a matrix of its own (``weight`` or ``weight_<label>``),
            since a concatenation of blocks is no block of a concatenation.
        outputs: Width of the output.
        seed: Of the initial weights: uniform in +-1/sqrt(inputs), a function of the name and the place in the matrix.
        bias: Whether to add a bias.
        bias_repeats: Outputs that share an element of the bias.
        labels: Of the parts.
        diagonals: Initial matrices with these numbers on their diagonals and no bias, instead of random ones.
        variant: What travels between ranks, see `parallel.sharding.linear`; auto: what costs less.
        positions: Positions of the whole field (``batch * width`` of the axis that is not mapped) for which ``auto``
            decides.
        message: What ``auto`` takes a message to cost, in elements.
        pipelined: Whether transfers and products overlap.
        needs_x: Whether the input wants a gradient.
    """

    def __init__(
        self,
        name: str,
        grid: JigsawGrid,
        axis: Axis,
        inputs: Sequence[Width],
        outputs: Width,
        seed: int,
        bias: bool = True,
        bias_repeats: int = 1,
        labels: Sequence[str] = ("",),
        diagonals: Sequence[float] | None = None,
        variant: Choice = "auto",
        positions: int = 1,
        message: int = MESSAGE,
        pipelined: bool = True,
        needs_x: bool = True,
    ) -> None:
        super().__init__(name, grid)
        other: Axis = "token" if axis == "channel" else "channel"
        self.axis, self.inputs, self.outputs, self.bias_repeats = axis, list(inputs), outputs, bias_repeats
        self.needs_x = needs_x
        rows = rows_of(outputs.local, grid.parts[other], grid.parts[axis])
        bound = sum(width.size for width in inputs) ** -0.5
        self.weights = ["weight" + (f"_{label}" if label else "") for label in labels]
        for number, (weight, width) in enumerate(zip(self.weights, inputs, strict=True)):
            self.add(
                weight,
                Layout((outputs.size, width.size), (other, axis), (rows, width.local)),
                key=key_of(seed, f"{name}.{weight}"),
                bound=bound,
                diagonal=None if diagonals is None else diagonals[number],
            )
        self.bias: Tensor | None
        if bias:
            layout = Layout((outputs.size // bias_repeats,), (axis,), (outputs.local // bias_repeats,))
            self.add("bias", layout, key=key_of(seed, f"{name}.bias"), bound=0.0 if diagonals else bound)
        else:
            self.bias = None
        self.plan = Plan(name, grid, other, outputs.local, rows, "weights", pipelined)
        self.plan = replace(self.plan, variant=self._chosen(variant, positions, message))

    def _chosen(self, variant: Choice, positions: int, message: int) -> Literal["weights", "activations"]:
        if variant == "auto":
            return cheaper(self.plan, self.shapes(positions), message=message)
        return variant if can_move_activations(self.plan) else "weights"

    def shapes(self, positions: int) -> Shapes:
        """Elements of the layer, padding included, for so many positions of the whole field times samples."""
        plan = self.plan
        columns = sum(width.local for width in self.inputs) * plan.reduce_size
        features = plan.features * plan.reduce_size
        bias = features if self.bias is not None else 0
        return Shapes(
            plan.rows * plan.gather_size * columns, positions * columns, positions * features, bias, self.needs_x
        )

    def received(self, batch: int, tokens: int) -> tuple[float, float]:
        """See `ShardedLayer.received`; ``tokens`` are the positions of a sample."""
        return received(self.plan, self.shapes(batch * tokens), self.plan.variant)

    def flops(self, positions: int) -> int:
        """Of the forward pass over all ranks, two for a multiply-add."""
        shapes = self.shapes(positions)
        return 2 * positions * self.plan.features * self.plan.reduce_size * (shapes.x // max(positions, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map the local block ``(batch, token, channel)``, whose features are those of all parts side by side."""
        parameters = [getattr(self, weight) for weight in self.weights]
        blocks = local(*parameters) if self.bias is None else local(*parameters, self.bias)
        count = len(parameters)
        weight = blocks[0] if count == 1 else torch.cat(blocks[:count], 1)
        bias = None if self.bias is None else blocks[count]
        if bias is not None and self.bias_repeats > 1:
            bias = bias.repeat_interleave(self.bias_repeats)
        return sharded_linear(x, weight, bias, self.plan)

    def extra_repr(self) -> str:
        """Sizes."""
        wide = " + ".join(str(width.size) for width in self.inputs)
        return f"{self.axis}: {wide} -> {self.outputs.size}, {self.plan.variant} travel"


class ChannelLinear(ShardedLinear):
    """Y = X U^T + b on the channels of every token."""

    def __init__(self, name: str, grid: JigsawGrid, inputs: Sequence[Width], outputs: Width, seed: int, **more: Any):
        super().__init__(name, grid, "channel", inputs, outputs, seed, **more)


class TokenLinear(ShardedLinear):
    """Z = W Y + b on the tokens of every channel."""

    def __init__(self, name: str, grid: JigsawGrid, inputs: Width, outputs: Width, seed: int, **more: Any):
        super().__init__(name, grid, "token", [inputs], outputs, seed, **more)


class JigsawLayerNorm(ShardedLayer):
    """Layer normalisation over the channels of every token, exact although ranks have parts of them.

    Args:
        name: Full name within the network.
        grid: Ranks.
        widths: Of the parts that are normalised together, side by side.
        groups: Groups of channels with statistics of their own; 1: all together.
        labels: Of the parts, for the names of the parameters.
    """

    def __init__(
        self, name: str, grid: JigsawGrid, widths: Sequence[Width], groups: int = 1, labels: Sequence[str] = ("",)
    ) -> None:
        super().__init__(name, grid)
        self.names = []
        for label, width in zip(labels, widths, strict=True):
            layout = Layout((width.size,), ("channel",), (width.local,))
            for kind, value in (("weight", 1.0), ("bias", 0.0)):
                full = kind + (f"_{label}" if label else "")
                self.names.append(full)
                self.add(full, layout, value=value)
        self.plan = NormPlan(name, grid, tuple(w.size for w in widths), tuple(w.local for w in widths), groups)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the local block ``(..., channel)``, the parts side by side."""
        values = local(*(getattr(self, name) for name in self.names))
        gamma = values[0] if len(values) == 2 else torch.cat(values[0::2])
        beta = values[1] if len(values) == 2 else torch.cat(values[1::2])
        return sharded_layer_norm(x, gamma, beta, self.plan)

    def received(self, batch: int, tokens: int) -> tuple[float, float]:
        """See `ShardedLayer.received`."""
        plan, grid = self.plan, self.grid
        if not grid.size > 1:
            return 0.0, 0.0
        here = 2 * batch * tokens // grid.token_size * plan.groups
        talk = 0 if plan.is_local else 1
        width = 2 * sum(plan.local)
        c, t = grid.channel_size, grid.token_size
        return talk * here * (c - 1), talk * here * 2 * (c - 1) / c + 2 * (t - 1) / t * width


@dataclass(frozen=True)
class CounterDropout:
    """Dropout whose mask is a function of the *global* place of an element, so that every grid draws the same.

    Attributes:
        name: Of the layer, keys the masks.
        grid: Ranks.
        rate: Probability of leaving out an element.
        seed: Of the masks.
    """

    name: str
    grid: JigsawGrid
    rate: float
    seed: int

    def after_gelu(self, x: Tensor, draw: Draw | None) -> Tensor:
        """GELU, then dropout unless ``draw`` is None; neither the mask nor the result between is saved."""
        if draw is None or not self.rate:
            return F.gelu(x)
        return _GeluDropout.apply(x, self, draw)

    def __call__(self, x: Tensor, draw: Draw | None) -> Tensor:
        """Dropout of the local block ``(batch, token, channel)`` unless ``draw`` is None."""
        if draw is None or not self.rate:
            return x
        return _Dropout.apply(x, self, draw)

    def mask(self, shape: torch.Size, device: torch.device, draw: Draw) -> Tensor:
        """What is kept, bool."""
        rows = torch.arange(shape[1], device=device) + self.grid.token * shape[1]
        columns = torch.arange(shape[2], device=device) + self.grid.channel * shape[2]
        key = key_of(self.seed, self.name, "dropout", draw.number, draw.repetition)
        return keep_mask(key, draw.samples, rows, columns, self.rate)

    def drop(self, x: Tensor, draw: Draw) -> Tensor:
        """Leave out and scale what remains."""
        return x.mul(self.mask(x.shape, x.device, draw)).mul_(1 / (1 - self.rate))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: CounterDropout, draw: Draw) -> Tensor:
        ctx.dropout, ctx.draw = dropout, draw
        return dropout.drop(x, draw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.dropout.drop(grad, ctx.draw), None, None


class _GeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: CounterDropout, draw: Draw) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dropout, ctx.draw = dropout, draw
        return dropout.drop(F.gelu(x), draw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(ctx.dropout.drop(grad, ctx.draw), x), None, None
