"""How long the phases of training steps take, on the clock of the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_KEPT = 1024  # moments of a phase


class PhaseTimes:
    """Seconds of named phases, summed until somebody takes them.

    On CUDA a moment is an event of the current stream, which costs next to nothing until it is read.

    Args:
        device: Whose clock counts.
        clock: Seconds where that is the CPU; ``time.process_time`` leaves out what other processes took.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_stream, self._clock = device.type == "cuda", clock
        self._phases: dict[str, list[tuple[Any, Any]]] = {}
        self._sums: dict[str, float] = {}

    def now(self) -> Any:
        """A moment."""
        if not self._on_stream:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, begin: Any) -> None:
        """Add the time since a moment to a phase."""
        moments = self._phases.setdefault(name, [])
        moments.append((begin, self.now()))
        if len(moments) > _KEPT:  # nobody takes them; these ended long ago
            old = _KEPT // 2
            self._sums[name] = self._sums.get(name, 0.0) + sum(self._between(*pair) for pair in moments[:old])
            del moments[:old]

    def seconds(self, name: str) -> list[float]:
        """The latest times that were added to a phase since the last `take`; waits for the device."""
        return [self._between(begin, end) for begin, end in self._phases.get(name, [])]

    def take(self) -> dict[str, float]:
        """Sums by phase since the last call; waits for the device."""
        sums = {name: self._sums.get(name, 0.0) + sum(self.seconds(name)) for name in self._phases}
        self._phases, self._sums = {}, {}
        return sums

    def _between(self, begin: Any, end: Any) -> float:
        if not self._on_stream:
            return end - begin
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)
