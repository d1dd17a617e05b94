"""Linear layers whose weight, input and output are cut into blocks over a grid of ranks.

With g ranks in the *gather* group and r in the *reduce* group, a rank stores ``out/g x in/r`` of the weight, has
``in/r`` features of the input at ``1/g`` of the positions, and gets ``out/r`` features of the output at the same
positions. For a layer on channels positions are tokens, the gather group the ranks of equal channels (T of them) and
the reduce group the ranks of a band (C); for a layer on tokens positions are channels and the groups change places. So
nothing is ever transposed between ranks.

Two ways through such a layer cost different traffic (`parallel.sharding.cost`):

- ``weights`` travel: a rank sees all rows of the weight for its features in turn, and partial sums are reduced.
- ``activations`` travel: the weight stays where it is stored, positions are gathered and results sent back.

Here both are written with whole collectives, which is the oracle of the pipelined `parallel.sharding.ring`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import Transfer, num_bytes
from parallel.groups import Group
from parallel.sharding import products
from parallel.sharding.grid import JigsawGrid
from parallel.sharding.layout import Axis, Piece, ceil_div, pieces
from parallel.sharding.precision import autocast_dtype, without_autocast
from parallel.sharding.products import FeatureDim
from parallel.sharding.traffic import Direction, Flow, Kind

Variant = Literal["weights", "activations"]


@dataclass(frozen=True)
class Plan:
    """How one layer is computed on a grid.

    Attributes:
        name: Of the layer, for the record of the traffic.
        grid: Ranks.
        gather: Axis over which the rows of the weight are stored, and positions spread.
        features: Features of the output on each rank.
        rows: Rows of the weight that each rank stores; those beyond ``features`` times the ranks are padding.
        variant: What travels.
        pipelined: Whether transfers and products overlap, block by block.
    """

    name: str
    grid: JigsawGrid
    gather: Axis
    features: int
    rows: int
    variant: Variant = "weights"
    pipelined: bool = True

    @property
    def dim(self) -> FeatureDim:
        """Dimension of the features: channels are last."""
        return -1 if self.gather == "token" else -2

    @property
    def reduce(self) -> Axis:
        """Axis over which features are spread."""
        return "channel" if self.gather == "token" else "token"

    @property
    def gather_size(self) -> int:
        """G."""
        return self.grid.parts[self.gather]

    @property
    def reduce_size(self) -> int:
        """R."""
        return self.grid.parts[self.reduce]

    @property
    def gather_index(self) -> int:
        """Of this rank."""
        return self.grid.place[self.gather]

    @property
    def reduce_index(self) -> int:
        """Of this rank."""
        return self.grid.place[self.reduce]

    @property
    def gather_group(self) -> Group:
        """Ranks that store the other rows of the same columns."""
        return self.grid.token_group if self.gather == "token" else self.grid.channel_group

    @property
    def reduce_group(self) -> Group:
        """Ranks with other features at the same positions."""
        return self.grid.channel_group if self.gather == "token" else self.grid.token_group

    def pieces(self) -> list[list[Piece]]:
        """See `parallel.sharding.layout.pieces`."""
        return pieces(self.gather_size, self.rows, self.reduce_size, self.features)

    def received(self, direction: Direction, kind: Kind, tensors: float) -> None:
        """Count bytes that came from other ranks."""
        self.grid.traffic.add(Flow(self.name, direction, kind), tensors)

    def wide(self, partial: Tensor) -> Tensor:
        """Partial sums of 16 bits are added up in float32 where more than two ranks have a part."""
        narrow = partial.dtype in (torch.bfloat16, torch.float16) and self.grid.size > 2
        return partial.float() if narrow else partial


def rows_of(out_local: int, gather: int, reduce: int) -> int:
    """Rows of the weight that each rank stores for ``out_local`` features of the output."""
    return ceil_div(out_local * reduce, gather)


def sharded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Map the features of ``x``.

    Args:
        x: Local block ``(batch, token, channel)``.
        weight: Local block ``(rows, in/r)``.
        bias: Local part ``(features,)``, the same on all ranks of the gather group.
        plan: See `Plan`.

    Returns:
        Local block of the output, with ``plan.features`` features.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, plan)


class _Linear(torch.autograd.Function):
    """Saves the input block and the stored block of the weight, nothing that was gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        with without_autocast(x):
            x = x.contiguous()
            ctx.save_for_backward(x, weight)
            ctx.plan, ctx.has_bias = plan, bias is not None
            y = _forward_of(plan)(x, weight, plan)
            if bias is not None:
                y = y.add_(_along(bias, plan))
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x, weight = ctx.saved_tensors
        with without_autocast(x):
            grad = grad.contiguous()
            bias_grad = transfer = None
            more: tuple[Tensor, ...] = ()
            if ctx.has_bias:
                bias_grad = grad.sum((0, 1) if plan.dim == -1 else (0, 2), dtype=_sum_dtype(grad))
                if _takes_passengers(plan, bias_grad, x):
                    more = (bias_grad,)
                else:  # on its way while the products are computed
                    transfer = start_sum(bias_grad, plan.gather_group, plan, "shared_gradient")
            x_grad, weight_grad = _backward_of(plan)(grad, x, weight, plan, ctx.needs_input_grad[0], *more)
            if transfer is not None:
                transfer.wait()
            if bias_grad is not None:
                bias_grad = bias_grad.to(grad.dtype)
        return x_grad, weight_grad.to(weight.dtype), bias_grad, None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype


def _along(bias: Tensor, plan: Plan) -> Tensor:
    return bias if plan.dim == -1 else bias[:, None]


def _forward_of(plan: Plan) -> Any:
    if plan.grid.is_serial or not plan.grid.communicates:
        return _forward_alone
    if plan.variant == "activations":
        return _forward_activations
    if plan.pipelined:
        from parallel.sharding import ring

        return ring.forward
    return forward_weights


def _takes_passengers(plan: Plan, vector: Tensor, x: Tensor) -> bool:
    from parallel.sharding import ring

    return _backward_of(plan) is ring.backward and ring.carries(plan, vector, x)


def _backward_of(plan: Plan) -> Any:
    if plan.grid.is_serial or not plan.grid.communicates:
        return _backward_alone
    if plan.variant == "activations":
        return _backward_activations
    if plan.pipelined:
        from parallel.sharding import ring

        return ring.backward
    return backward_weights


# --------------------------------------------------------------------------------------------------------- one rank


def _forward_alone(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    return products.apply(x, weight, plan.dim)


def _backward_alone(grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, needs_x: bool) -> tuple[Tensor | None, Tensor]:
    x_grad = products.apply_transposed(grad, weight, plan.dim) if needs_x else None
    return x_grad, products.outer(grad, x, plan.dim)


# ---------------------------------------------------------------------------------------------------- weights travel


def forward_weights(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """All rows of the weight are gathered, partial results reduced and scattered."""
    whole = _all_gather(weight, plan.gather_group, 0, plan, "forward", "weight")
    whole = whole[: plan.features * plan.reduce_size]
    partial = plan.wide(products.apply(x, whole, plan.dim))
    return _reduce_scatter(partial, plan.reduce_group, plan.dim, plan, "forward", "partial").to(x.dtype)


def backward_weights(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the input block and of the stored block of the weight."""
    grad = _all_gather(grad, plan.reduce_group, plan.dim, plan, "backward", "activation")
    x_grad, features = None, plan.features * plan.reduce_size
    if needs_x:
        whole = _all_gather(weight, plan.gather_group, 0, plan, "backward", "weight")
        x_grad = products.apply_transposed(grad, whole[:features], plan.dim)
    weight_grad = plan.wide(products.outer(grad, x, plan.dim))
    missing = plan.rows * plan.gather_size - features
    if missing:
        weight_grad = torch.nn.functional.pad(weight_grad, (0, 0, 0, missing))
    return x_grad, _reduce_scatter(weight_grad, plan.gather_group, 0, plan, "backward", "weight_gradient")


# ------------------------------------------------------------------------------------------------ activations travel


def _forward_activations(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """The stored block meets all positions; its results are reduced, and sent to whom positions and features belong."""
    everywhere = _all_gather(x, plan.gather_group, _positions(plan), plan, "forward", "activation")
    partial = plan.wide(products.apply(everywhere, weight, plan.dim))
    mine = _reduce_scatter(partial, plan.reduce_group, plan.dim, plan, "forward", "partial").to(x.dtype)
    return _send_home(mine, plan, "forward")


def _backward_activations(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    mine = _fetch(grad, plan, "backward")
    grad = _all_gather(mine, plan.reduce_group, plan.dim, plan, "backward", "activation")
    everywhere = _all_gather(x, plan.gather_group, _positions(plan), plan, "backward", "activation")
    weight_grad = products.outer(grad, everywhere, plan.dim)
    if not needs_x:
        return None, weight_grad
    partial = plan.wide(products.apply_transposed(grad, weight, plan.dim))
    x_grad = _reduce_scatter(partial, plan.gather_group, _positions(plan), plan, "backward", "partial")
    return x_grad.to(x.dtype), weight_grad


def _positions(plan: Plan) -> FeatureDim:
    """Dimension of the positions."""
    return -2 if plan.dim == -1 else -1


def fine_owner(plan: Plan, gather_index: int, reduce_index: int) -> tuple[int, int]:
    """Whose features a rank has after the reduction, when output features are cut into g r equal parts.

    Returns:
        (index of the owner in the reduce group, number of the part within the owner's features).
    """
    return divmod(gather_index * plan.reduce_size + reduce_index, plan.gather_size)


def _rank_at(plan: Plan, gather_index: int, reduce_index: int) -> int:
    token, channel = (gather_index, reduce_index) if plan.gather == "token" else (reduce_index, gather_index)
    return plan.grid.instance_group.ranks[token * plan.grid.channel_size + channel]


def _sources(plan: Plan) -> list[int]:
    """Ranks that compute this rank's output features, in the order of the features."""
    g, r = plan.gather_size, plan.reduce_size
    fine = [plan.reduce_index * g + part for part in range(g)]
    return [_rank_at(plan, *divmod(number, r)) for number in fine]


def _targets(plan: Plan) -> list[int]:
    """Ranks that own the features that this rank computes, in the order of the positions."""
    owner, _ = fine_owner(plan, plan.gather_index, plan.reduce_index)
    return [_rank_at(plan, position, owner) for position in range(plan.gather_size)]


def _send_home(mine: Tensor, plan: Plan, direction: Direction) -> Tensor:
    """From (all positions, a fine part of the features) to (own positions, own features)."""
    parts = [part.contiguous() for part in mine.chunk(plan.gather_size, _positions(plan))]
    return torch.cat(_all_to_all(parts, _targets(plan), _sources(plan), plan, direction), plan.dim)


def _fetch(grad: Tensor, plan: Plan, direction: Direction) -> Tensor:
    """The way back."""
    parts = [part.contiguous() for part in grad.chunk(plan.gather_size, plan.dim)]
    return torch.cat(_all_to_all(parts, _sources(plan), _targets(plan), plan, direction), _positions(plan))


def _all_to_all(
    parts: list[Tensor], targets: list[int], sources: list[int], plan: Plan, direction: Direction
) -> list[Tensor]:
    """Send ``parts[i]`` to ``targets[i]`` and receive parts of the same size from ``sources``."""
    me = dist.get_rank()
    received = [torch.empty_like(parts[0]) for _ in sources]
    for source, tensor in zip(sources, received, strict=True):
        if source == me:
            tensor.copy_(parts[targets.index(me)])
    sends = [(part, to) for part, to in zip(parts, targets, strict=True) if to != me]
    receives = [(part, source) for part, source in zip(received, sources, strict=True) if source != me]
    for transfer in plan.grid.interconnect.exchange(sends, receives, plan.grid.instance_group):
        transfer.wait()
    plan.received(direction, "activation", sum(num_bytes(part) for part, _ in receives))
    return received


# ------------------------------------------------------------------------------------------------------- collectives


def start_sum(tensor: Tensor, group: Group, plan: Plan, kind: Kind) -> Transfer | None:
    """Begin to sum a tensor over a group, in place; None where there is nobody else."""
    if group.size < 2:
        return None
    plan.received("backward", kind, 2 * (group.size - 1) / group.size * num_bytes(tensor))
    return plan.grid.interconnect.all_reduce(tensor, group)


def _all_gather(part: Tensor, group: Group, dim: int, plan: Plan, direction: Direction, kind: Kind) -> Tensor:
    """Parts of all ranks, concatenated along a dimension."""
    if group.size < 2:
        return part
    part = part.contiguous()
    out = part.new_empty(group.size, *part.shape)
    plan.grid.interconnect.all_gather(out.view(-1), part.view(-1), group).wait()
    plan.received(direction, kind, (group.size - 1) * num_bytes(part))
    return out.flatten(0, 1) if dim == 0 else torch.cat(list(out), dim)


def _reduce_scatter(whole: Tensor, group: Group, dim: int, plan: Plan, direction: Direction, kind: Kind) -> Tensor:
    """The sum over all ranks, of which each gets one part along a dimension."""
    if group.size < 2:
        return whole
    parts = torch.stack(whole.chunk(group.size, dim))
    out = torch.empty_like(parts[0])
    plan.grid.interconnect.reduce_scatter(out.view(-1), parts.view(-1), group).wait()
    plan.received(direction, kind, (group.size - 1) * num_bytes(out))
    return out
