"""A power that is known beforehand: a wall meter's mean, a machine without sensors, a function of time in tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import get_args

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, Component, Meter


class ConstantMeter(Meter):
    """One gauge with a given power.

    Args:
        watts: Power, W; or a function of the seconds since `open`.
        name: Name of the channel.
        component: What consumes it: cpu, gpu, dram, node or other.
        measured: Whether an instrument has told the figure.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        watts: float | Callable[[float], float],
        name: str = "constant",
        component: Component = "other",
        measured: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if component not in get_args(Component):
            raise ValueError(
                f"ConstantMeter: component={component!r} is unknown; choose one of {', '.join(get_args(Component))}."
            )
        if not callable(watts) and not 0 <= watts < math.inf:
            raise ValueError(f"ConstantMeter: watts={watts} is no power; use 0 or more.")
        self.watts, self.name, self.component, self.measured = watts, name, component, measured
        self.clock = clock
        self._begin = math.nan

    @override
    def probe(self) -> Availability:
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        self._begin = self.clock()
        source = "constant (function of time)" if callable(self.watts) else f"constant ({self.watts:g} W)"
        return [Channel(self.name, self.component, "gauge", self.measured, source)]

    @override
    def read(self) -> list[float]:
        return [float(self.watts(self.clock() - self._begin) if callable(self.watts) else self.watts)]
