"""Means of gradients over the instances of a model, under way while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from parallel.collectives import Interconnect, Transfer
from parallel.flat import FlatTensors
from parallel.groups import Group
from parallel.sharding.blocks import block_of


class BucketedMean:
    """Averages the gradients of parameters over ranks that hold the same blocks.

    A bucket leaves when the last of its gradients is there; `finish` waits and writes the means back.

    Args:
        parameters: In the order of the forward pass; gradients arrive the other way round.
        group: Ranks with the same blocks and different samples.
        interconnect: Counts what is sent.
        bucket_bytes: Of the gradients that travel together.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: Group, interconnect: Interconnect, bucket_bytes: int
    ) -> None:
        self.enabled = True
        self._group, self._interconnect = group, interconnect
        self._buckets: list[list[nn.Parameter]] = [[]]
        room = bucket_bytes
        for parameter in reversed(parameters):
            size = block_of(parameter).numel() * parameter.element_size()
            if self._buckets[-1] and size > room:
                self._buckets.append([])
                room = bucket_bytes
            self._buckets[-1].append(parameter)
            room -= size
        self._of = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._arrived: list[set[int]] = [set() for _ in self._buckets]
        self._flying: dict[int, tuple[FlatTensors, Tensor, Transfer]] = {}
        self._next = 0  # all ranks send their buckets in this order
        self._handles = [p.register_post_accumulate_grad_hook(self._arrive) for p in parameters]

    def _arrive(self, parameter: nn.Parameter) -> None:
        if not self.enabled:
            return
        number = self._of[id(parameter)]
        self._arrived[number].add(id(parameter))
        while self._next < len(self._buckets) and len(self._arrived[self._next]) == len(self._buckets[self._next]):
            self._send(self._next)
            self._next += 1

    def _send(self, number: int) -> None:
        gradients = [block_of(p.grad) for p in self._buckets[number] if p.grad is not None]
        if not gradients:
            return
        flat = FlatTensors(gradients)
        vector = flat.pack()
        self._flying[number] = (flat, vector, self._interconnect.all_reduce(vector, self._group))

    def finish(self) -> None:
        """Send what is left, wait for everything and put the means in place; called after every backward pass."""
        if not self.enabled:
            return
        while self._next < len(self._buckets):  # some parameters had no gradient
            self._send(self._next)
            self._next += 1
        for flat, vector, transfer in self._flying.values():
            transfer.wait()
            flat.unpack(vector.div_(self._group.size))
        self._flying.clear()
        self._next = 0
        for arrived in self._arrived:
            arrived.clear()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
