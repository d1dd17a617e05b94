"""Energy arithmetic: from readings at moments to joules of stages (energy measurement paper, section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from callbacks.energy.meters.base import Channel

TOLERANCE = 1.5
"""Counters may exceed ``max_power_w`` by this factor before an interval is invalid."""


def counter_energy(before: float, after: float, seconds: float, channel: Channel) -> float:
    """Energy between two readings of a cumulative counter, J; NaN if it cannot be told.

    A counter that went down has started again from zero once; which of the wraps is not guessed: without a known
    modulus, or if more came out than the device can draw, the interval is invalid.
    """
    energy = after - before
    if energy < 0:
        if channel.modulus_j is None:
            return math.nan
        energy += channel.modulus_j
    limit = math.inf
    if channel.max_power_w is not None:
        # Counters are updated in steps: two readings that are close may enclose a whole step.
        limit = channel.max_power_w * TOLERANCE * (seconds + channel.update_s)
    return energy if 0 <= energy <= limit else math.nan


def gauge_energy(before: float, after: float, seconds: float, channel: Channel) -> float:
    """Energy under the straight line between two readings of power, J; NaN if one is missing or impossible."""
    limit = math.inf if channel.max_power_w is None else channel.max_power_w * TOLERANCE
    if not (0 <= before <= limit and 0 <= after <= limit and max(before, after) < math.inf):
        return math.nan
    return (before + after) / 2 * seconds


@dataclass
class Tally:
    """What one stage has cost on one machine.

    Attributes:
        seconds: Time in the stage.
        joules: Energy of each channel; intervals without a valid reading count nothing.
        valid_seconds: Time with a valid reading of each channel.
        total_j: Energy of the machine: the node channel where it is valid, else the sum of the components and the
            configured overhead.
        estimated_j: The part of ``total_j`` that no instrument has measured.
        covered_seconds: Time in which every channel that makes up the total was valid.
        max_w: Largest mean power of times long enough for the steps of a counter not to matter.
    """

    seconds: float = 0.0
    joules: dict[str, float] = field(default_factory=dict)
    valid_seconds: dict[str, float] = field(default_factory=dict)
    total_j: float = 0.0
    estimated_j: float = 0.0
    covered_seconds: float = 0.0
    max_w: float = 0.0

    def add(self, other: Tally) -> None:
        """Add another tally to this one, in place."""
        self.seconds += other.seconds
        self.total_j += other.total_j
        self.estimated_j += other.estimated_j
        self.covered_seconds += other.covered_seconds
        self.max_w = max(self.max_w, other.max_w)
        for mine, theirs in ((self.joules, other.joules), (self.valid_seconds, other.valid_seconds)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value

    def minus(self, earlier: Tally) -> Tally:
        """What was added since ``earlier``, an older state of this tally; ``max_w`` is unknown and kept."""
        return Tally(
            self.seconds - earlier.seconds,
            {k: v - earlier.joules.get(k, 0.0) for k, v in self.joules.items()},
            {k: v - earlier.valid_seconds.get(k, 0.0) for k, v in self.valid_seconds.items()},
            self.total_j - earlier.total_j,
            self.estimated_j - earlier.estimated_j,
            self.covered_seconds - earlier.covered_seconds,
            self.max_w,
        )

    def copy(self) -> Tally:
        """An independent copy."""
        copied = Tally()
        copied.add(self)
        return copied


def shortest_for_maximum(channels: Sequence[Channel]) -> float:
    """Time over which the mean power of counters that are updated in steps means something, s."""
    return max((5 * channel.update_s for channel in channels if channel.kind == "counter"), default=0.05)


class Maximum:
    """Joins intervals of one label until they are long enough to tell a power.

    Args:
        shortest_s: See `shortest_for_maximum`.
    """

    def __init__(self, shortest_s: float) -> None:
        self.shortest_s = shortest_s
        self._label = ""
        self._seconds = self._joules = 0.0

    def add(self, interval: Tally, label: str) -> float:
        """Power since the last one, W; 0 while that cannot be told."""
        if label != self._label:
            self._label, self._seconds, self._joules = label, 0.0, 0.0
        self._seconds += interval.seconds
        self._joules += interval.total_j
        if self._seconds < self.shortest_s - 1e-6:
            return 0.0
        power = self._joules / self._seconds
        self._seconds = self._joules = 0.0
        return power


class Ledger:
    """Books the energy between two readings to the label that was in force: the labels' sum is the total.

    Args:
        channels: All channels of the machine.
        overhead_w: Power of what no component meter covers (fans, boards), W; counts as estimated and only while no
            node channel is valid.
    """

    def __init__(self, channels: Sequence[Channel], overhead_w: float = 0.0) -> None:
        self.channels = tuple(channels)
        self.overhead_w = overhead_w
        self.tallies: dict[str, Tally] = {}
        self.invalid = {channel.name: 0 for channel in channels}
        self._time: float | None = None
        self._values: list[float] = []
        self._maximum = Maximum(shortest_for_maximum(self.channels))

    def add(self, time_s: float, values: Sequence[float], label: str) -> Tally | None:
        """Book the interval since the last call to ``label``.

        Args:
            time_s: Monotonic time of the reading.
            values: One reading per channel; NaN: none.
            label: What went on since the last call.

        Returns:
            The interval as a tally; None for the first reading.
        """
        before, previous = self._time, self._values
        self._time, self._values = time_s, list(values)
        if before is None:
            return None
        interval = self._interval(time_s - before, previous, values)
        interval.max_w = self._maximum.add(interval, label)
        self.tallies.setdefault(label, Tally()).add(interval)
        return interval

    def _interval(self, seconds: float, before: Sequence[float], after: Sequence[float]) -> Tally:
        out = Tally(seconds)
        node: list[tuple[float, bool]] = []
        parts: list[tuple[float, bool]] = []
        complete_parts = not any(channel.component == "node" for channel in self.channels)
        for channel, old, new in zip(self.channels, before, after, strict=True):
            energy = (counter_energy if channel.kind == "counter" else gauge_energy)(old, new, seconds, channel)
            valid = not math.isnan(energy)
            if not valid:
                self.invalid[channel.name] += 1
            out.joules[channel.name] = energy if valid else 0.0
            out.valid_seconds[channel.name] = seconds if valid else 0.0
            if channel.component == "node":
                if valid:
                    node.append((energy, channel.measured))
            elif valid:
                parts.append((energy, channel.measured))
            else:
                complete_parts = False
        if node:
            out.total_j = node[0][0]
            out.estimated_j = 0.0 if node[0][1] else out.total_j
            out.covered_seconds = seconds
        else:
            overhead = self.overhead_w * seconds
            out.total_j = math.fsum(energy for energy, _ in parts) + overhead
            out.estimated_j = math.fsum(energy for energy, measured in parts if not measured) + overhead
            out.covered_seconds = seconds if complete_parts and parts else 0.0
        return out

    def total(self) -> Tally:
        """Sum over all labels."""
        out = Tally()
        for tally in self.tallies.values():
            out.add(tally)
        return out
