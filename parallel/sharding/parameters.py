"""Parameters cut into blocks over a grid: how they begin, and exact sums over all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from parallel.sharding.blocks import block_of
from parallel.sharding.counter import uniform_
from parallel.sharding.grid import JigsawGrid
from parallel.sharding.layout import Layout


def make_parameter(
    layout: Layout,
    grid: JigsawGrid,
    key: int = 0,
    bound: float = 0.0,
    value: float = 0.0,
    diagonal: float | None = None,
) -> nn.Parameter:
    """A parameter of which this rank holds its block: a DTensor where the grid has a mesh, else a plain tensor.

    Args:
        layout: Of the parameter.
        grid: Ranks.
        key: Of the random numbers, see `parallel.sharding.counter`.
        bound: Uniform in [-bound, bound); 0: all elements are ``value``.
        value: Of all elements.
        diagonal: A matrix with this number on its diagonal and 0 elsewhere.
    """
    block = torch.empty(layout.local)
    if diagonal is not None:
        _set_diagonal(block, layout, grid, diagonal)
    elif bound:
        uniform_(block, layout, grid.place, key, bound)
    elif block.device.type != "meta":
        block.zero_()
        block[tuple(slice(0, length) for length in layout.valid(grid.place))] = value
    if grid.mesh is None:
        return nn.Parameter(block)
    axes = ("token", "channel")
    placements = [Shard(layout.axes.index(axis)) if axis in layout.axes else Replicate() for axis in axes]
    shape = layout.padded(grid.parts)
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(block, grid.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return nn.Parameter(whole)


def _set_diagonal(block: Tensor, layout: Layout, grid: JigsawGrid, value: float) -> None:
    if block.device.type == "meta":
        return
    (first, left), (rows, columns) = layout.offsets(grid.place), layout.valid(grid.place)
    block.zero_()
    for number in range(max(first, left), min(first + rows, left + columns)):
        block[number - first, number - left] = value


def copies(parameter: Tensor) -> int:
    """Ranks of the instance that hold the same block."""
    if not isinstance(parameter, DTensor):
        return 1
    count = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        count *= size if placement.is_replicate() else 1
    return count


def grad_norm(parameters: Iterable[Tensor], grid: JigsawGrid) -> Tensor:
    """Euclidean norm of all gradients, every element of the model counted once; called on all ranks of the instance."""
    total = torch.zeros((), dtype=torch.float64)
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_copies.setdefault(copies(parameter), []).append(block_of(parameter.grad))
    for number, gradients in by_copies.items():
        norms = torch.stack(torch._foreach_norm(gradients))
        total = total.to(norms.device) + norms.double().square().sum() / number
    return grid.sum_over_instance(total).sqrt()


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, grid: JigsawGrid) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most ``max_norm``; one all-reduce.

    Args:
        parameters: Of the network, those of this rank.
        max_norm: Limit.
        grid: Ranks.

    Returns:
        The norm before, the same on every rank.
    """
    parameters = list(parameters)
    norm = grad_norm(parameters, grid)
    gradients = [block_of(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    return norm
