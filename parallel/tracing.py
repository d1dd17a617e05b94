"""Counts every collective of torch.distributed that this thread issues, whoever issues it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.ledger import Ledger

# Operation of `parallel.layout.ring_bytes`, and which argument holds the whole vector.
_OPERATIONS: Mapping[str, tuple[str, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "gather_": ("gather", 0),
    "scatter_": ("scatter", 1),
}
# ``gather_`` and ``scatter_`` have their lists on the root only: the other side tells the size of a part there.
_PART: Mapping[str, int] = {"gather_": 1, "scatter_": 0}


class CollectiveTrace(TorchDispatchMode):
    """While entered, counts collectives in a ledger, those of DDP's C++ reducer included.

    It looks at every operation of torch, which costs some microseconds each: for finding out, not for every run.

    Args:
        ledger: Where to count.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _OPERATIONS:
            return
        operation, index = _OPERATIONS[name]
        group = next((a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())), None)
        if group is None:
            return
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        payload = _bytes(args[index])
        if name in _PART:
            payload = _bytes(args[_PART[name]]) * len(ranks)
        self.ledger.record(operation, ranks, payload)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def traced(ledger: Ledger, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function and count its collectives."""
    with CollectiveTrace(ledger):
        return function(*args, **kwargs)
