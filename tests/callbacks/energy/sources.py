"""Meters whose truth is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from callbacks.energy.meters.base import Availability, Channel, Meter


class Source(Meter):
    """Power as a function of time, or a counter of its integral.

    Args:
        power: W at seconds since `open`, or a number.
        integral: J since `open`; given, the channel is a counter.
        modulus_j: Of the counter.
        component: See `Channel`.
        measured: See `Channel`.
        clock: Seconds.
    """

    def __init__(
        self,
        power: Callable[[float], float] | float = 75.0,
        integral: Callable[[float], float] | None = None,
        modulus_j: float | None = None,
        name: str = "cpu",
        component: str = "cpu",
        measured: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        max_power_w: float | None = None,
    ) -> None:
        self.power = power if callable(power) else lambda t: float(power)
        self.integral, self.modulus_j, self.clock = integral, modulus_j, clock
        kind = "counter" if integral else "gauge"
        self.channel = Channel(name, component, kind, measured, "test", modulus_j, max_power_w)
        self.begin: float | None = None
        self.closed = 0
        self.broken = False

    def probe(self) -> Availability:
        return Availability(True)

    def open(self) -> list[Channel]:
        if self.begin is None:
            self.begin = self.clock()
        return [self.channel]

    def read(self) -> list[float]:
        if self.broken:
            raise OSError("the device is lost")
        now = self.clock() - self.begin
        if self.integral is None:
            return [self.power(now)]
        energy = self.integral(now)
        return [energy % self.modulus_j if self.modulus_j else energy]

    def close(self) -> None:
        self.closed += 1


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def sine(mean: float, amplitude: float, period_s: float) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Power mean + amplitude sin(2 pi t / period) and its integral."""
    omega = 2 * math.pi / period_s
    return (
        lambda t: mean + amplitude * math.sin(omega * t),
        lambda t: mean * t + amplitude / omega * (1 - math.cos(omega * t)),
    )
