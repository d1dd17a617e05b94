"""What each layer has received from other ranks, by direction and kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Direction = Literal["forward", "backward"]
# Parts of weights, of their gradients, of activations and of gradients of activations, partial sums, statistics of
# normalisation, gradients of what all ranks of an axis share.
Kind = Literal["weight", "weight_gradient", "activation", "partial", "statistics", "shared_gradient"]


class Flow(NamedTuple):
    """Where something was received."""

    layer: str
    direction: Direction
    kind: Kind


@dataclass
class Traffic:
    """Calls and received bytes of this rank.

    Attributes:
        calls: Exchanges, by flow.
        received: Bytes, by flow; of an all-reduce those of the ring algorithm, ``2 (p-1)/p`` of the tensor.
    """

    calls: dict[Flow, int] = field(default_factory=dict)
    received: dict[Flow, float] = field(default_factory=dict)
    _paused: bool = False
    _everything: float = 0.0

    def add(self, flow: Flow, received: float) -> None:
        """Count one exchange."""
        if self._paused:
            return
        self.calls[flow] = self.calls.get(flow, 0) + 1
        self.received[flow] = self.received.get(flow, 0.0) + received
        self._everything += received

    def total(self, layer: str | None = None, direction: Direction | None = None) -> float:
        """Received bytes, of one layer or direction or of all; that of all is known and costs nothing."""
        if layer is None and direction is None:
            return self._everything
        return sum(
            received
            for flow, received in self.received.items()
            if layer in (None, flow.layer) and direction in (None, flow.direction)
        )

    def by_layer(self) -> dict[tuple[str, Direction], tuple[int, float]]:
        """(calls, received bytes) of every layer and direction."""
        found: dict[tuple[str, Direction], tuple[int, float]] = {}
        for flow, received in self.received.items():
            calls, before = found.get((flow.layer, flow.direction), (0, 0.0))
            found[flow.layer, flow.direction] = (calls + self.calls[flow], before + received)
        return found

    def clear(self) -> None:
        """Begin again."""
        self.calls.clear()
        self.received.clear()
        self._everything = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
