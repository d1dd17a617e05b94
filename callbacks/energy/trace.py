"""Power over time in bounded memory: long runs keep their peaks and valleys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from callbacks.energy.accounting import Tally

SHORTEST_S = 0.05
"""Shorter intervals are joined to the next one: over a few milliseconds a counter's step size is all one sees."""


@dataclass(frozen=True)
class Point:
    """Mean power of one interval.

    Attributes:
        time_s: Middle of the interval, seconds since the recorder started.
        label: What went on.
        watts: Power of each channel, W.
        total_w: Power of the machine, W.
        step: Optimiser steps done.
    """

    time_s: float
    label: str
    watts: dict[str, float]
    total_w: float
    step: int


class Trace:
    """At most ``2 * limit`` points; when they are full, two of every four stay: the least and the greatest power.

    Args:
        limit: Points that `points` returns at most.
    """

    def __init__(self, limit: int = 2000) -> None:
        self.limit = limit
        self._points: list[Point] = []
        self._pending: Tally | None = None
        self._label = ""

    def add(self, end_s: float, interval: Tally, label: str, step: int) -> None:
        """Add the interval that ended at ``end_s``."""
        if self._pending is None or label != self._label:
            self._pending = Tally()
        self._label = label
        self._pending.add(interval)
        if (seconds := self._pending.seconds) < SHORTEST_S:
            return
        watts = {name: joules / seconds for name, joules in self._pending.joules.items()}
        self._points.append(Point(end_s - seconds / 2, label, watts, self._pending.total_j / seconds, step))
        self._pending = None
        if len(self._points) >= 2 * self.limit:
            self._points = thinned(self._points)

    def points(self, since_s: float = 0.0) -> list[Point]:
        """Points after a time, at most ``limit``."""
        found = [point for point in self._points if point.time_s > since_s]
        while len(found) > self.limit:
            found = thinned(found)
        return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """Of every four points the one of least and the one of greatest total power, in the order of time."""
    kept: list[Point] = []
    for start in range(0, len(points), 4):
        block = points[start : start + 4]
        ends = {min(block, key=lambda p: p.total_w).time_s, max(block, key=lambda p: p.total_w).time_s}
        kept += [point for point in block if point.time_s in ends]
    return kept
