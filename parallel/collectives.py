"""Collectives that are counted, and delayed where a slow network is emulated."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.groups import Group
from parallel.ledger import Ledger
from parallel.network_model import NetworkModel, sleep_until

# The name changed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Transfer:
    """A collective under way.

    Args:
        work: Of torch.distributed; None: nothing to wait for.
        ready_at: Moment (``time.perf_counter``) before which an emulated network does not deliver.
        ledger: Where blocked time is added.
        keep: Tensors that must live until the end (buffers); the first one tells the device.
    """

    def __init__(self, work: Any, ready_at: float, ledger: Ledger, keep: tuple[Tensor, ...] = ()) -> None:
        self._work, self._ready_at, self._ledger, self._keep = work, ready_at, ledger, keep
        self._on_stream = work is not None and bool(keep) and keep[0].is_cuda
        self._begin = time.perf_counter()
        self._issued = _event() if self._on_stream and not ready_at else None
        self.done = False

    def wait(self) -> float:
        """Wait for the end and return the seconds in which this process stood still; again: 0.

        On CUDA this orders streams and returns before the device is done, as ``Work.wait`` does; how long the stream
        stood still goes to the ledger later. On an emulated network the process waits there too.
        """
        if self.done:
            return 0.0
        if self._issued is not None:
            return self._order_streams()
        if self._on_stream:  # the process may be ahead of the device, which has not come to this point
            torch.cuda.current_stream().synchronize()
        before = time.perf_counter()
        if self._work is not None:
            self._work.wait()
        sleep_until(self._ready_at)
        now = time.perf_counter()
        self.done, self._keep = True, ()
        self._ledger.blocked_s += now - before
        self._ledger.transfer_s += max(self._ready_at, before) - self._begin if self._ready_at else now - self._begin
        return now - before

    def _order_streams(self) -> float:
        issued, before = self._issued, _event()
        self._work.wait()
        after = _event()

        def times() -> tuple[float, float]:
            after.synchronize()
            return 1e-3 * before.elapsed_time(after), 1e-3 * issued.elapsed_time(after)

        self._ledger.defer(times)
        self.done, self._keep = True, ()
        return 0.0


def _event() -> Any:
    """A moment of the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class Interconnect:
    """Issues collectives of groups, counts them and delays those over slow links.

    Args:
        local_size: Ranks of a node.
        network: Emulated network between nodes.
        ledger: What was communicated.
    """

    local_size: int
    network: NetworkModel
    ledger: Ledger

    def book(self, operation: str, group: Group, payload: int, sharing: int = 1) -> float:
        """Count a collective that somebody else issues; returns when the emulated network delivers (0: at once).

        A transfer on an emulated network begins when the device has computed what is sent, not when it is queued.
        """
        if self.network.active and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self.ledger.record(operation, group.ranks, payload)
        return self.network.book(operation, group.ranks, payload, self.local_size, sharing)

    def all_reduce(self, tensor: Tensor, group: Group, sharing: int = 1, op: Any = dist.ReduceOp.SUM) -> Transfer:
        """Sum in place, or what ``op`` of torch.distributed says."""
        if group.size < 2:
            return Transfer(None, 0.0, self.ledger)
        ready_at = self.book("all_reduce", group, num_bytes(tensor), sharing)
        work = dist.all_reduce(tensor, op=op, group=group.handle, async_op=True)
        return Transfer(work, ready_at, self.ledger, (tensor,))

    def broadcast(self, tensor: Tensor, source: int, group: Group) -> Transfer:
        """Copy the tensor of the global rank ``source`` to the group, in place."""
        if group.size < 2:
            return Transfer(None, 0.0, self.ledger)
        ready_at = self.book("broadcast", group, num_bytes(tensor))
        work = dist.broadcast(tensor, source, group=group.handle, async_op=True)
        return Transfer(work, ready_at, self.ledger, (tensor,))

    def all_gather(self, out: Tensor, part: Tensor, group: Group, sharing: int = 1) -> Transfer:
        """Concatenate the parts of all ranks in ``out``, ``(size * len(part),)``."""
        if group.size < 2:
            out.copy_(part)
            return Transfer(None, 0.0, self.ledger)
        ready_at = self.book("all_gather", group, num_bytes(out), sharing)
        work = _all_gather(as_bytes(out), as_bytes(part), group=group.handle, async_op=True)
        return Transfer(work, ready_at, self.ledger, (out, part))

    def all_to_all(self, out: Tensor, parts: Tensor, group: Group, sharing: int = 1) -> Transfer:
        """Give the i-th of ``size`` equal parts to the i-th rank; ``out`` gets one part of every rank in turn."""
        if group.size < 2:
            out.copy_(parts)
            return Transfer(None, 0.0, self.ledger)
        ready_at = self.book("all_to_all", group, num_bytes(parts), sharing)
        work = dist.all_to_all_single(as_bytes(out), as_bytes(parts), group=group.handle, async_op=True)
        return Transfer(work, ready_at, self.ledger, (out, parts))

    def reduce_scatter(self, out: Tensor, parts: Tensor, group: Group, sharing: int = 1) -> Transfer:
        """Sum ``parts``, ``(size * len(out),)``, over the ranks; the i-th rank gets the i-th part of the sum."""
        if group.size < 2:
            out.copy_(parts)
            return Transfer(None, 0.0, self.ledger)
        ready_at = self.book("reduce_scatter", group, num_bytes(parts), sharing)
        work = _reduce_scatter(out, parts, group=group.handle, async_op=True)
        return Transfer(work, ready_at, self.ledger, (out, parts))

    def exchange(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        group: Group,
        together: bool = False,
    ) -> list[Transfer]:
        """Send tensors to ranks and receive others, all under way together.

        A message between two nodes takes the emulated link of its sender. What is received is delayed as if this rank
        had sent as much, since it does not know the queue of the other: exact where all ranks do the same.

        Args:
            sends: (contiguous tensor, global rank that gets it).
            receives: (contiguous tensor to fill, global rank that sends it).
            group: That holds all of these ranks.
            together: All ranks of the group call this at the same point of their order of collectives, each with one
                message in a direction at most. Then one collective carries them, which in gloo takes a fraction of the
                time of messages.

        Returns:
            One transfer for each of ``sends`` and then one for each of ``receives``.
        """
        tensors = [tensor for tensor, _ in (*sends, *receives)]
        if not tensors and not together:
            return []
        ready = self._ready(sends, receives)
        if together:
            works = [self._as_collective(sends, receives, group)] * len(tensors)
        else:
            works = dist.batch_isend_irecv([
                dist.P2POp(op, as_bytes(tensor), peer, group=group.handle)
                for op, pairs in ((dist.isend, sends), (dist.irecv, receives))
                for tensor, peer in pairs
            ])  # fmt: skip
            if len(works) < len(tensors):  # NCCL has one for all of them
                works = works * len(tensors)
        return [
            Transfer(work, moment, self.ledger, (tensor,))
            for work, moment, tensor in zip(works, ready, tensors, strict=True)
        ]

    def _ready(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[float]:
        """Count messages and return when the emulated network delivers each."""
        rank = dist.get_rank()
        ready = [self.book("send", Group((rank, to), None), num_bytes(tensor)) for tensor, to in sends]
        slowest = max(ready, default=0.0)
        for tensor, source in receives:
            if self.network.active and not sends:
                slowest = self.network.book("send", (source, rank), num_bytes(tensor), self.local_size)
            ready.append(slowest)
        return ready

    @staticmethod
    def _as_collective(
        sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group
    ) -> Any:
        """An all-to-all in which most pairs have nothing to say."""
        assert len(sends) < 2 and len(receives) < 2, "one message in a direction"
        buffers, lengths = [], []
        for messages in (sends, receives):
            tensor, peer = messages[0] if messages else (torch.empty(0, dtype=torch.uint8), group.ranks[0])
            if not messages and (sends or receives):
                tensor = tensor.to((sends or receives)[0][0].device)
            flat = as_bytes(tensor).view(-1)
            buffers.append(flat)
            lengths.append([len(flat) if rank == peer else 0 for rank in group.ranks])
        return dist.all_to_all_single(
            buffers[1], buffers[0], lengths[1], lengths[0], group=group.handle, async_op=True
        )  # fmt: skip


def gather_objects(mine: Any, group: Group, device: torch.device, piece_bytes: int = 1 << 26) -> list[Any] | None:
    """Collect an object of every rank on the first rank of the group, in host memory; uncounted, for checkpoints.

    `torch.distributed.gather_object` needs memory of the device for as many objects as there are ranks, each as long as
    the longest one. Here they travel in pieces.

    Args:
        mine: What can be pickled, tensors in host memory; called on all ranks of the group together.
        group: Ranks.
        device: Whose memory the backend sends.
        piece_bytes: Memory of the device for one round of pieces, on the first rank.

    Returns:
        The objects in the order of the ranks; None on all but the first.
    """
    if group.size < 2:
        return [mine]
    data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in group.ranks]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device), group=group.handle)
    sizes = [int(length) for length in lengths]
    piece, is_first = max(1, piece_bytes // group.size), dist.get_rank() == group.ranks[0]
    whole = [torch.empty(size, dtype=torch.uint8) for size in sizes] if is_first else []
    sent = torch.zeros(min(piece, max(sizes)), dtype=torch.uint8, device=device)
    received = [torch.empty_like(sent) for _ in sizes] if is_first else None
    for begin in range(0, max(sizes), len(sent)):
        part = data[begin : begin + len(sent)]
        sent[: len(part)].copy_(part)
        dist.gather(sent, received, group.ranks[0], group=group.handle)
        for one, got in zip(whole, received or (), strict=True):
            of_one = one[begin : begin + len(sent)]
            of_one.copy_(got[: len(of_one)])
    return [pickle.loads(one.numpy()) for one in whole] if is_first else None


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the elements."""
    return tensor.numel() * tensor.element_size()


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: transports need not know 16-bit types."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)
