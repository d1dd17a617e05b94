"""A slow network between simulated nodes: transfers end no earlier than bandwidth and latency would let them.

So that N nodes with M ranks each can be studied on one machine. The same rule holds for every strategy, so ratios of
their times mean something; gloo's real time on the machine is hidden below the emulated one as long as that is longer.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.layout import crossings, ring_bytes, ring_steps


@dataclass
class NetworkModel:
    """One network interface per node, full duplex, first come first served.

    Args:
        rate_mbit: Bandwidth of a node's link in Mbit/s in each direction; None: nothing is slowed down.
        latency_ms: Time that a message between two nodes takes beside its bytes.
        clock: Seconds; tests inject their own.

    Raises:
        ValueError: For a rate that is not positive, or a negative latency.
    """

    rate_mbit: float | None = None
    latency_ms: float = 0.0
    clock: Callable[[], float] = time.perf_counter
    _free_at: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rate_mbit is not None and not self.rate_mbit > 0:
            raise ValueError(f"cluster.rate_mbit={self.rate_mbit}: give Mbit/s above 0, or null for the real network")
        if not self.latency_ms >= 0:
            raise ValueError(f"cluster.latency_ms={self.latency_ms}: a latency is 0 or more")

    @property
    def active(self) -> bool:
        """Whether anything is slowed down."""
        return self.rate_mbit is not None or self.latency_ms > 0

    def seconds(self, operation: str, ranks: Sequence[int], payload: float, local_size: int, sharing: int = 1) -> float:
        """Time of a collective over the slow links, 0 if it uses none.

        Args:
            operation: See `parallel.layout.ring_bytes`.
            ranks: The group, in the order of its ring.
            payload: Bytes of the whole vector.
            local_size: Ranks of a node.
            sharing: Groups that use the links of the same nodes at the same time with as many bytes each.
        """
        slow = crossings(ranks, local_size) if self.active else 0
        if not slow:
            return 0.0
        # The busiest interface sends over this many of the ring's edges.
        edges = -(-slow // len({rank // local_size for rank in ranks}))
        sent = ring_bytes(operation, payload, len(ranks)) * edges * sharing
        over_rate = 8e-6 * sent / self.rate_mbit if self.rate_mbit else 0.0
        return over_rate + 1e-3 * self.latency_ms * ring_steps(operation, len(ranks))

    def book(self, operation: str, ranks: Sequence[int], payload: float, local_size: int, sharing: int = 1) -> float:
        """Put a transfer in the queue of this node's link and return when it ends (by ``clock``); 0 if not slowed."""
        seconds = self.seconds(operation, ranks, payload, local_size, sharing)
        if not seconds:
            return 0.0
        self._free_at = max(self._free_at, self.clock()) + seconds
        return self._free_at


def sleep_until(moment: float) -> float:
    """Sleep until ``time.perf_counter()`` reaches a moment; return the seconds slept."""
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)
    return max(left, 0.0)


class Delay:
    """Completes futures late, in a thread of its own: DDP's reducer waits for the futures of its communication hook.

    gloo's own threads must not do the waiting: there are two, and they are needed for the next collectives.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Any, Any, float] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def until(self, future: Any, moment: float, device: torch.device) -> Any:
        """A future with the value of ``future``, tensors on ``device``, that is not completed before ``moment``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="network-model", daemon=True)
            self._thread.start()
        late = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
        self._jobs.put((future, late, moment))
        return late

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, late, moment = job
            try:
                value = future.wait()
                sleep_until(moment)
                late.set_result(value)
            except Exception as error:
                late.set_exception(error)

    def close(self) -> None:
        """End the thread; pending futures are completed first."""
        if self._thread is not None:
            self._jobs.put(None)
            with contextlib.suppress(RuntimeError):
                self._thread.join(10)
            self._thread = None
