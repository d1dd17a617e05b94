"""Blocks of whole tensors in distributed checkpoints: without padding, so that any grid reads what any other wrote."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from parallel.sharding.grid import JigsawGrid
from parallel.sharding.layout import Layout


def local(*tensors: Tensor) -> tuple[Tensor, ...]:
    """This rank's blocks of parameters, in autograd's sight."""
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        return _Blocks.apply(*tensors)
    return tensors


class _Blocks(torch.autograd.Function):
    """Out of DTensors and back, for all parameters of a layer at once.

    What ``to_local`` and ``from_local`` do, less the checks of every gradient, which took a tenth of a step of a small
    model: a gradient is cut like its parameter.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.specs = [tensor._spec if isinstance(tensor, DTensor) else None for tensor in tensors]
        blocks = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return tuple(block.view_as(block) for block in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(
            grad if grad is None or spec is None else DTensor(grad.contiguous(), copy(spec), requires_grad=False)
            for grad, spec in zip(grads, ctx.specs, strict=True)
        )


def block_of(tensor: Tensor) -> Tensor:
    """This rank's block of a parameter or of a tensor like it, out of autograd's sight; shares memory."""
    tensor = tensor.detach()
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class Block:
    """The part of a logical tensor that this rank holds, for torch.distributed.checkpoint.

    It implements the protocol by which that package asks for and fills parts of tensors. Ranks that hold the same part
    offer the same, of which one is written.

    Args:
        tensor: Local block or DTensor; filled in place when read.
        layout: Of the logical tensor.
        grid: Ranks.
    """

    def __init__(self, tensor: Tensor, layout: Layout, grid: JigsawGrid) -> None:
        self.layout = layout
        self.offsets, self.valid = layout.offsets(grid.place), layout.valid(grid.place)
        part = block_of(tensor)
        for dim, length in enumerate(self.valid):
            part = part.narrow(dim, 0, length)
        self.part = part

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.valid))

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if not self.part.numel():
            return []
        data = TensorWriteData(
            self._chunk(), TensorProperties.create_from_tensor(self.part), torch.Size(self.layout.sizes)
        )
        index = MetadataIndex(name, torch.Size(self.offsets))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.part.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.part


class BlockSavePlanner(DefaultSavePlanner):
    """Writes `Block` objects beside tensors."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What is written under an index."""
        found = self.state_dict.get(index.fqn)
        return found.part if isinstance(found, Block) else super().lookup_object(index)


class BlockLoadPlanner(DefaultLoadPlanner):
    """Reads into `Block` objects beside tensors; the names are flat."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the objects as they are: the default would replace what it does not know."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where what has this index is read to."""
        found = self.state_dict.get(index.fqn)
        return found.part if isinstance(found, Block) else super().lookup_tensor(index)


def whole(tensor: Tensor, layout: Layout, grid: JigsawGrid) -> Tensor:
    """The logical tensor on every rank of the instance; called on all of them."""
    part = block_of(tensor)
    if not grid.communicates:
        return part[tuple(slice(0, size) for size in layout.sizes)].clone()
    out = part.new_zeros(layout.sizes)
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in grid.instance_group.ranks]
    torch.distributed.all_gather(parts, part.contiguous(), group=grid.instance_group.handle)
    for place, one in zip(_places(grid), parts, strict=True):
        starts, valid = layout.offsets(place), layout.valid(place)
        target = tuple(slice(start, start + length) for start, length in zip(starts, valid, strict=True))
        out[target] = one[tuple(slice(0, length) for length in valid)]
    return out


def fill(tensor: Tensor, whole_tensor: Tensor, layout: Layout, grid: JigsawGrid) -> None:
    """Take this rank's block from the logical tensor; padding becomes 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if tuple(whole_tensor.shape) != layout.sizes:
        raise ValueError(f"a tensor of shape {tuple(whole_tensor.shape)} where {layout.sizes} is needed")
    part = block_of(tensor)
    starts, valid = layout.offsets(grid.place), layout.valid(grid.place)
    source = tuple(slice(start, start + length) for start, length in zip(starts, valid, strict=True))
    part.zero_()
    part[tuple(slice(0, length) for length in valid)] = whole_tensor[source].to(part)


def _places(grid: JigsawGrid) -> Iterator[dict[str, int]]:
    """Places of the ranks of an instance, in their order."""
    for token in range(grid.token_size):
        for channel in range(grid.channel_size):
            yield {"token": token, "channel": channel}
