"""How vectors are averaged over nodes: who sends, in which precision, and how the others get to know the mean."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from parallel.collectives import Interconnect
from parallel.groups import ClusterGroups, Group

Variant = Literal["rotate", "sharded"]
WIRE_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Mean(Protocol):
    """A mean over the ranks of a group, on its way.

    Attributes:
        sent: What the group has received from this rank, ``(n,)``: rounded where the wire is narrow.
    """

    sent: Tensor

    def advance(self) -> None:
        """Begin the second half of the way, if there is one; to be called after the same step on all ranks."""

    def result(self) -> Tensor:
        """Wait and return the mean, ``(n,)``, the same bits on every rank."""


class FullMean:
    """By one all-reduce in the precision of the vector."""

    def __init__(self, vector: Tensor, group: Group, interconnect: Interconnect, sharing: int = 1) -> None:
        self.sent, self._total, self._size = vector, vector.clone(), group.size
        self._transfer = interconnect.all_reduce(self._total, group, sharing)

    def advance(self) -> None:
        """Nothing: it is one collective."""

    def result(self) -> Tensor:
        """See `Mean`."""
        self._transfer.wait()
        return self._total.div_(self._size)


class NarrowMean:
    """With a 16-bit type on the wire, sums in full precision.

    An all-to-all gives every rank one part of all vectors; it sums, and an all-gather spreads the rounded means: the
    bytes of a 16-bit ring all-reduce without its rounding at every hop. Two ranks simply gather.

    Args:
        vector: Float32 or float64, ``(n,)``.
        dtype: On the wire.
        group: Ranks.
        interconnect: Counts and delays.
        sharing: Groups that use the same links at the same time.
    """

    def __init__(
        self, vector: Tensor, dtype: torch.dtype, group: Group, interconnect: Interconnect, sharing: int = 1
    ) -> None:
        self._group, self._interconnect, self._sharing = group, interconnect, sharing
        self._numel, self._like = vector.numel(), vector
        sent = vector.to(dtype)
        self.sent = sent.to(vector.dtype)
        self._parts = -(-self._numel // group.size) if group.size > 2 else self._numel
        if group.size > 2:
            sent = torch.nn.functional.pad(sent, (0, self._parts * group.size - self._numel))
            self._received = torch.empty_like(sent)
            self._transfer = interconnect.all_to_all(self._received, sent, group, sharing)
            self._gathering = False
        else:
            self._received = sent.new_empty(group.size * self._numel)
            self._transfer = interconnect.all_gather(self._received, sent, group, sharing)
            self._gathering = True

    def advance(self) -> None:
        """Wait for the parts and spread their mean.

        Not as soon as they have arrived, which is after another step on every rank: collectives of one group must
        begin in the same order everywhere, and others may come in between (a validation, a checkpoint).
        """
        if not self._gathering:
            self._spread()

    def _spread(self) -> None:
        self._transfer.wait()
        mean = self._mean_of_rows().to(self._received.dtype)
        out = mean.new_empty(self._parts * self._group.size)
        self._transfer = self._interconnect.all_gather(out, mean, self._group, self._sharing)
        self._received, self._gathering = out, True

    def _mean_of_rows(self) -> Tensor:
        return self._received.view(self._group.size, self._parts).to(self._like.dtype).mean(0)

    def result(self) -> Tensor:
        """See `Mean`."""
        if not self._gathering:
            self._spread()
        self._transfer.wait()
        if self._group.size > 2:
            return self._received[: self._numel].to(self._like.dtype)
        return self._mean_of_rows().to(self._received.dtype).to(self._like.dtype)


class Exchange:
    """Averages a vector of ``numel`` elements, which all ranks of a node hold alike, over the nodes.

    ``rotate``, the paper's: one rank of each node exchanges the whole vector, a different one every turn, and
    broadcasts within its node. ``sharded``: every rank exchanges its share at the same time, and the shares are
    gathered within the node; better where every rank has a network interface of its own.

    Args:
        groups: Of the cluster.
        interconnect: Counts and delays.
        numel: Elements.
        variant: ``rotate`` or ``sharded``.
    """

    def __init__(self, groups: ClusterGroups, interconnect: Interconnect, numel: int, variant: Variant) -> None:
        self.groups, self.interconnect, self.numel, self.variant = groups, interconnect, numel, variant
        self.local_size = groups.node.size
        shard = -(-numel // self.local_size)
        self._padding = shard * self.local_size - numel if variant == "sharded" else 0
        self._shard = slice(shard * groups.place.local, shard * (groups.place.local + 1))
        self._whole = slice(0, numel)

    def mine(self, turn: int) -> slice | None:
        """The elements that this rank exchanges in a turn; None: another rank of the node does it all."""
        if self.variant == "sharded":
            return self._shard
        return self._whole if turn % self.local_size == self.groups.place.local else None

    def part(self, vector: Tensor, turn: int) -> Tensor | None:
        """This rank's part of a vector ``(numel,)``, zeros behind its end."""
        mine = self.mine(turn)
        if mine is None:
            return None
        return torch.nn.functional.pad(vector, (0, self._padding))[mine] if self._padding else vector[mine]

    def start(self, part: Tensor, wire_dtype: torch.dtype | None) -> Mean:
        """Begin to average a part over the nodes."""
        sharing = self.local_size if self.variant == "sharded" else 1
        if wire_dtype is None:
            return FullMean(part, self.groups.across, self.interconnect, sharing)
        return NarrowMean(part, wire_dtype, self.groups.across, self.interconnect, sharing)

    def distribute(self, part: Tensor | None, turn: int, like: Tensor) -> Tensor:
        """Give all ranks of the node the whole vector ``(numel,)``, of which each has its part of this turn."""
        if self.local_size == 1:
            assert part is not None
            return part
        if self.variant == "sharded":
            whole = like.new_empty(self.numel + self._padding)
            self.interconnect.all_gather(whole, part.contiguous(), self.groups.node).wait()
            return whole[: self.numel]
        whole = like.new_empty(self.numel) if part is None else part
        self.interconnect.broadcast(whole, self.groups.node.ranks[turn % self.local_size], self.groups.node).wait()
        return whole
