"""What a rank holds while it trains: bytes of parameters and what belongs to them, bytes that autograd saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from parallel.sharding.blocks import block_of


def held_bytes(parameters: Iterable[Tensor], optimizers: Iterable[torch.optim.Optimizer] = ()) -> int:
    """Bytes of parameters, of their gradients and of the state of optimizers, this rank's blocks.

    Args:
        parameters: Those of the model.
        optimizers: Whose state counts, as far as there is one: before the first step it is empty.
    """
    tensors = [tensor for p in parameters for tensor in (p, p.grad) if tensor is not None]
    tensors += [leaf for o in optimizers for state in o.state.values() for leaf in tree_leaves(state)]
    blocks = [block_of(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    return sum(block.numel() * block.element_size() for block in blocks)


class SavedBytes:
    """A context that counts what autograd saves in it for the backward pass, this rank's blocks.

    A storage counts once, whoever saves it. Casts and gathered copies of parameters count, parameters do not. What is
    computed in the context has to be alive at its end: storages that are freed in it may be used again.

    Args:
        parameters: Whose storages do not count.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._without = {_storage(parameter)._cdata for parameter in parameters}
        self._kept: dict[int, int] = {}
        self._hooks: Any = None

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._kept.values())

    def __enter__(self) -> Self:
        self._hooks = saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in self._without:
            self._kept[storage._cdata] = storage.nbytes()
        return tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return block_of(tensor).untyped_storage()
