"""What was communicated: calls and bytes of every kind of collective, apart for fast and slow links."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from parallel.layout import crossings, ring_bytes

LINKS = ("intra_node", "inter_node")
_KEPT = 1024  # transfers whose times wait to be read


@dataclass
class Entry:
    """Sums of one kind of collective over one class of links.

    Attributes:
        calls: Collectives.
        payload_bytes: Bytes of their tensors.
        wire_bytes: Bytes over the edges of the ring that belong to the class of links, all edges together, counted
            once per direction.
    """

    calls: int = 0
    payload_bytes: float = 0.0
    wire_bytes: float = 0.0


@dataclass
class Ledger:
    """Traffic of the groups of which this process is the first rank, so that sums over all ranks count nothing twice.

    Args:
        rank: Of this process.
        local_size: Ranks of a node.

    Attributes:
        entries: By (operation, class of links).
        blocked_s: Time in which this process stood waiting for communication that it had to wait for.
        transfer_s: Time from the begin to the end of transfers, blocked or not, where it is known.
    """

    rank: int
    local_size: int
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    blocked_s: float = 0.0
    transfer_s: float = 0.0
    # Of transfers whose times only the device knows; each gives (blocked, transfer) in seconds once it has ended.
    pending: list[Callable[[], tuple[float, float]]] = field(default_factory=list)
    restored: bool = False  # continues the ledger of a checkpoint
    mark: dict[str, float] = field(default_factory=dict)  # `sums` and ``epoch`` when the running epoch began
    _paused: bool = False

    def record(self, operation: str, ranks: Sequence[int], payload: int) -> None:
        """Count one collective of the group ``ranks`` with ``payload`` bytes (`parallel.layout.ring_bytes`)."""
        if len(ranks) < 2 or ranks[0] != self.rank or self._paused:
            return
        slow = crossings(ranks, self.local_size)
        fast = len(ranks) - slow
        per_edge = ring_bytes(operation, payload, len(ranks))
        if operation == "send":  # from the first to the second rank, and nothing back
            per_edge /= 2
        for link, edges in zip(LINKS, (fast, slow), strict=True):
            # The collective itself belongs to its slowest links.
            mine = (link == "inter_node") == (slow > 0)
            if edges == 0 and not mine:
                continue
            entry = self.entries.setdefault((operation, link), Entry())
            entry.calls += mine
            entry.payload_bytes += payload * mine
            entry.wire_bytes += per_edge * edges

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no collectives within the block: what a checkpoint asks for is not training."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def defer(self, times: Callable[[], tuple[float, float]]) -> None:
        """Add the times of a transfer, (blocked, transfer) in seconds, when they are known."""
        self.pending.append(times)
        if len(self.pending) > _KEPT:  # nobody reads them for long; the older half has ended long ago
            self.settle(_KEPT // 2)

    def settle(self, number: int | None = None) -> None:
        """Add the times of the oldest pending transfers (None: of all); waits for the device where they go on."""
        number = len(self.pending) if number is None else number
        settled, self.pending = self.pending[:number], self.pending[number:]
        for times in settled:
            blocked, transfer = times()
            self.blocked_s += blocked
            self.transfer_s += transfer

    def totals(self) -> dict[str, float]:
        """``<link>_bytes``, ``<link>_calls``, ``<link>_payload_bytes`` of all operations of this process's groups."""
        found = {f"{link}_{what}": 0.0 for link in LINKS for what in ("bytes", "calls", "payload_bytes")}
        for (_, link), entry in self.entries.items():
            found[f"{link}_bytes"] += entry.wire_bytes
            found[f"{link}_calls"] += entry.calls
            found[f"{link}_payload_bytes"] += entry.payload_bytes
        return found

    def sums(self) -> dict[str, float]:
        """`totals`, ``blocked_s`` and ``transfer_s``."""
        self.settle()
        return self.totals() | {"blocked_s": self.blocked_s, "transfer_s": self.transfer_s}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        self.settle()
        entries = {
            f"{operation}/{link}": [entry.calls, entry.payload_bytes, entry.wire_bytes]
            for (operation, link), entry in self.entries.items()
        }
        times = {"blocked_s": self.blocked_s, "transfer_s": self.transfer_s}
        return {"entries": entries, "mark": dict(self.mark), **times}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a ledger."""
        self.entries = {
            tuple(key.split("/")): Entry(int(calls), payload, wire)
            for key, (calls, payload, wire) in state["entries"].items()
        }
        self.blocked_s, self.transfer_s, self.mark = state["blocked_s"], state["transfer_s"], dict(state["mark"])
        self.restored = True
