"""Comm: every message of split arrays passes here, is counted, and has a time limit."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Interconnect, num_bytes
from parallel.groups import Group
from parallel.network_model import sleep_until

_PATIENCE_S = 5e-3  # before a process goes to sleep until its message is there
_offer_core = getattr(os, "sched_yield", lambda: time.sleep(0))
# The name changed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "prod": dist.ReduceOp.PRODUCT, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class CommError(RuntimeError):
    """A collective failed or took too long: another rank has raised, or its program has gone another way."""


class Comm:
    """Collectives of one group of ranks that all run the same program.

    Without a group there is one rank, and nothing is sent. Tensors are those of the ranks' devices; results are
    returned, arguments stay as they are.

    Args:
        group: Ranks; None: this process alone.
        timeout_s: A collective that takes longer raises `CommError` (gloo; nccl has the time limit of its group).
        interconnect: Counts the same messages for the strategy of a training, and delays them on an emulated network.

    Attributes:
        calls: Collectives by name.
        received: Bytes that this rank received, by name; of an all-reduce those of the ring algorithm,
            ``2 (P - 1) / P`` of the tensor.
        waited_s: Seconds in which this rank stood in collectives.
    """

    def __init__(
        self, group: Group | None = None, timeout_s: float = 600.0, interconnect: Interconnect | None = None
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: give seconds above 0")
        self.group = group if group is not None and group.size > 1 else None
        self.timeout_s, self.interconnect = timeout_s, interconnect
        self.size = 1 if self.group is None else self.group.size
        self.rank = 0 if self.group is None else self.group.ranks.index(dist.get_rank())
        self.calls: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.waited_s = 0.0

    @classmethod
    def world(cls, timeout_s: float = 600.0) -> Comm:
        """All ranks of the default process group; this process alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(timeout_s=timeout_s)
        return cls(Group(tuple(range(dist.get_world_size())), dist.group.WORLD), timeout_s)

    @classmethod
    def of_strategy(cls, strategy: Any) -> Comm:
        """The processes of a training, whose messages its strategy counts.

        Args:
            strategy: May have ``groups`` (`parallel.groups.ClusterGroups`) and ``interconnect``; None, or one without:
                all processes there are.
        """
        groups, interconnect = (getattr(strategy, name, None) for name in ("groups", "interconnect"))
        return cls.world() if groups is None else cls(groups.world, interconnect=interconnect)

    def reset(self) -> None:
        """Count from zero."""
        self.calls.clear()
        self.received.clear()
        self.waited_s = 0.0

    @property
    def received_bytes(self) -> int:
        """Bytes that this rank received in all."""
        return sum(self.received.values())

    # -------------------------------------------------------------------------------------------------- collectives

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Elementwise ``sum``, ``prod``, ``max`` or ``min`` over the ranks."""
        if self.size == 1 or not tensor.numel():
            return tensor
        out = (
            tensor.to(torch.uint8)
            if tensor.dtype == torch.bool
            else tensor.clone(memory_format=torch.contiguous_format)
        )
        moved = int(2 * num_bytes(out) * (self.size - 1) / self.size)
        self._run(
            "all_reduce",
            moved,
            num_bytes(out),
            lambda: dist.all_reduce(out, _OPS[op], self.group.handle, async_op=True),
        )
        return out.to(tensor.dtype)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have the same shape, ``(size, *shape)``."""
        if self.size == 1:
            return tensor[None]
        part = tensor.contiguous()
        out = part.new_empty((self.size, *part.shape))
        if part.numel():
            self._run(
                "all_gather",
                num_bytes(part) * (self.size - 1),
                num_bytes(out),
                lambda: _all_gather(_raw(out), _raw(part), group=self.group.handle, async_op=True),
            )
        return out

    def all_gather_rows(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """The rows (first dimension) of all ranks, in the order of the ranks; ``rows`` says how many each has."""
        if self.size == 1:
            return tensor
        if len(set(rows)) == 1:
            return self.all_gather(tensor).flatten(0, 1)
        out = tensor.new_empty((sum(rows), *tensor.shape[1:]))
        for source, part in enumerate(out.split(list(rows))):
            if source == self.rank:
                part.copy_(tensor)
            if part.numel():
                moved = 0 if source == self.rank else num_bytes(part)
                self._run(
                    "broadcast", moved, num_bytes(part), lambda part=part, source=source: self._broadcast(part, source)
                )
        return out

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of the rank ``source``; those of the others tell shape and type."""
        if self.size == 1 or not tensor.numel():
            return tensor
        out = tensor.clone(memory_format=torch.contiguous_format)
        self._run(
            "broadcast",
            0 if source == self.rank else num_bytes(out),
            num_bytes(out),
            lambda: self._broadcast(out, source),
        )
        return out

    def _broadcast(self, out: Tensor, source: int) -> Any:
        return dist.broadcast(_raw(out), self.group.ranks[source], group=self.group.handle, async_op=True)

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send ``parts[i]`` to rank ``i``; returns what came, whose shapes are known: ``shapes[i]`` from rank ``i``."""
        if self.size == 1:
            return list(parts)
        flat = torch.cat([part.reshape(-1) for part in parts])
        given = [part.numel() for part in parts]
        wanted = [_count(shape) for shape in shapes]
        out = flat.new_empty(sum(wanted))
        width = flat.element_size()
        from_others = width * (sum(wanted) - wanted[self.rank])
        to_others = width * (sum(given) - given[self.rank])
        self._run(
            "all_to_all",
            from_others,
            to_others * self.size // (self.size - 1),
            lambda: dist.all_to_all_single(
                _raw(out),
                _raw(flat),
                [width * n for n in wanted],
                [width * n for n in given],
                group=self.group.handle,
                async_op=True,
            ),
        )
        return [part.view(tuple(shape)) for part, shape in zip(out.split(wanted), shapes, strict=True)]

    def exchange_rows(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`all_to_all` of parts that differ in their number of rows only; nobody knows yet how many will come."""
        if self.size == 1:
            return list(parts)
        counts = self.exchange_counts([len(part) for part in parts])
        return self.all_to_all(parts, [(n, *parts[0].shape[1:]) for n in counts])

    def exchange_counts(self, counts: Sequence[int]) -> list[int]:
        """Give number ``i`` to rank ``i``; returns what came from each."""
        if self.size == 1:
            return list(counts)
        numbers = torch.tensor(list(counts), dtype=torch.int64, device=self.device)
        came = self.all_to_all(numbers.split(1), [(1,)] * self.size)
        return torch.cat(came).tolist()

    def gather_counts(self, count: int) -> tuple[int, ...]:
        """A number of every rank, on every rank."""
        if self.size == 1:
            return (count,)
        return tuple(self.all_gather(torch.tensor(count, dtype=torch.int64, device=self.device)).tolist())

    def exscan(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Sum or product of the tensors of all ranks before this one; on the first rank 0 or 1."""
        parts = self.all_gather(tensor)[: self.rank]
        return parts.sum(0).to(tensor.dtype) if op == "sum" else parts.prod(0).to(tensor.dtype)

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """Sum over ranks of the parts meant for this rank; added in the order of the ranks."""
        if self.size == 1:
            return parts[0]
        came = self.all_to_all(parts, [parts[self.rank].shape] * self.size)
        return torch.stack(came).sum(0)

    def shift(self, tensor: Tensor, rows: int, by: int = 1) -> Shift:
        """Begin to pass a tensor to rank ``rank - by`` (around the ring) and to receive that of rank ``rank + by``.

        Args:
            tensor: Whose other dimensions are the same on all ranks.
            rows: Length of the first dimension of what will come.
            by: How far.
        """
        if self.size == 1 or by % self.size == 0:
            return Shift(self, [], tensor, tensor)
        to, source = (self.rank - by) % self.size, (self.rank + by) % self.size
        return self.swap(tensor, to, (rows, *tensor.shape[1:]), source)

    def swap(self, tensor: Tensor | None, to: int, shape: Sequence[int] | None, source: int) -> Shift:
        """Begin to send a tensor to one rank and to receive one of ``shape`` from another; None: nothing."""
        sent = None if tensor is None else tensor.contiguous()
        out = None if shape is None else torch.empty(tuple(shape), dtype=self._dtype_of(tensor), device=self.device)
        operations = []
        if sent is not None and sent.numel():
            operations.append(dist.P2POp(dist.isend, _raw(sent), self.group.ranks[to], self.group.handle))
        if out is not None and out.numel():
            operations.append(dist.P2POp(dist.irecv, _raw(out), self.group.ranks[source], self.group.handle))
        moved = 0 if out is None else num_bytes(out)
        self._count("send", moved, moved)
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise self._failure("send", error) from error
        return Shift(self, works, out, sent)

    def _dtype_of(self, tensor: Tensor | None) -> torch.dtype:
        return torch.get_default_dtype() if tensor is None else tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where small numbers of this class live: what the backend sends."""
        if self.group is not None and dist.get_backend(self.group.handle) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    # ------------------------------------------------------------------------------------------------------ counting

    def _count(self, name: str, received: int, payload: int) -> float:
        self.calls[name] += 1
        self.received[name] += received
        return 0.0 if self.interconnect is None else self.interconnect.book(name, self.group, payload)

    def _run(self, name: str, received: int, payload: int, begin: Any) -> None:
        ready_at = self._count(name, received, payload)
        started = time.perf_counter()
        try:
            self._await(begin())
        except RuntimeError as error:
            raise self._failure(name, error) from error
        sleep_until(ready_at)
        self._book_time(started)

    def _await(self, work: Any, patience_s: float = _PATIENCE_S) -> None:
        if self.device.type == "cpu":
            # A process that sleeps is woken late, often by more than a small message takes: offer the core first.
            until = time.perf_counter() + min(patience_s, self.timeout_s)
            while not work.is_completed() and time.perf_counter() < until:
                _offer_core()
            work.wait(timedelta(seconds=self.timeout_s))
        else:  # orders streams; nccl's own watchdog has the time limit
            work.wait()

    def _book_time(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self.waited_s += seconds
        if self.interconnect is not None:
            self.interconnect.ledger.blocked_s += seconds
            self.interconnect.ledger.transfer_s += seconds

    def _failure(self, name: str, error: Exception) -> CommError:
        return CommError(
            f"{name} number {self.calls[name]} of rank {self.rank} of {self.size} failed or took more than "
            f"{self.timeout_s:g} s: another rank has ended or does not call it. ({error})"
        )


class Shift:
    """A message under way; `wait` gives what came.

    Args:
        comm: Whose message.
        works: Of torch.distributed.
        out: What is being filled.
        sent: What must live until the end.
    """

    def __init__(self, comm: Comm, works: list[Any], out: Tensor | None, sent: Tensor | None) -> None:
        self._comm, self._works, self._out, self._sent = comm, works, out, sent

    def wait(self) -> Tensor | None:
        """Wait for both directions and return what came."""
        started = time.perf_counter()
        try:
            for work in self._works:
                self._comm._await(work, 0.0)  # gloo completes a message only in its wait
        except RuntimeError as error:
            raise self._comm._failure("send", error) from error
        if self._works:
            self._comm._book_time(started)
        self._works, self._sent = [], None
        return self._out


def _raw(tensor: Tensor) -> Tensor:
    """The same memory as a vector of bytes: transports need not know all types."""
    tensor = tensor.as_strided((tensor.numel(),), (1,))  # it is contiguous, whatever strides axes of length 1 have
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def _count(shape: Sequence[int]) -> int:
    number = 1
    for length in shape:
        number *= length
    return number
