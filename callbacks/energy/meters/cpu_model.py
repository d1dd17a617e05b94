"""Energy of the processors where it cannot be read: a model of power over load."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from typing_extensions import override

from callbacks.energy.meters import machine
from callbacks.energy.meters.base import Availability, Channel, Meter

WATTS_PER_THREAD = 4.0
"""Power of a hardware thread of a processor that is unknown or shared with others, W (codecarbon's figure)."""

IDLE_FRACTION = 0.1


def power_w(tdp_w: float, load: float) -> float:
    """P = TDP (0.1 + 0.9 load^3): the model of codecarbon's ``cpu_load`` mode."""
    return tdp_w * (IDLE_FRACTION + (1 - IDLE_FRACTION) * load**3)


class CpuModelMeter(Meter):
    """Estimated energy of all processors (``cpu``), from the load of the whole machine between two readings.

    The thermal design power (TDP) is ``tdp_w``, else that of the processor's name in codecarbon's table times the
    sockets, else 4 W per thread. In a virtual machine or a container with fewer threads than the machine it is at most
    4 W per visible thread: the name is that of the host's processor, which others share.

    Args:
        tdp_w: TDP of all processors of the machine together, W; None: find it out.
        threads: Threads that count, in place of the visible ones.
        root: Where ``proc`` and ``sys`` are.
        clock: Monotonic seconds.
    """

    SHORTEST_WINDOW_S = 0.1
    """Ticks of 10 ms make the load of shorter windows meaningless; they take over the last known one."""

    def __init__(
        self,
        tdp_w: float | None = None,
        threads: int | None = None,
        root: str = "/",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("tdp_w", tdp_w), ("threads", threads)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"callbacks.energy.options.cpu_model.{name}={value} must be positive; null finds it out."
                )
        self.tdp_w, self.threads, self.root, self.clock = tdp_w, threads, Path(root), clock
        self._watts = 0.0
        self._joules = 0.0
        self._descriptor: int | None = None

    @override
    def probe(self) -> Availability:
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        self._watts, source = self._assumption()
        with contextlib.suppress(OSError):
            self._descriptor = os.open(self.root / "proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._joules = 0.0
        self._load = 0.0
        self._read_at = self._window_from = self.clock()
        self._ticks = self._busy_and_total()
        return [Channel("cpu", "cpu", "counter", False, f"model ({source})")]

    @override
    def read(self) -> list[float]:
        now = self.clock()
        if now - self._window_from >= self.SHORTEST_WINDOW_S:
            ticks = self._busy_and_total()
            busy, total = ticks[0] - self._ticks[0], ticks[1] - self._ticks[1]
            if total > 0:
                self._load = min(max(busy / total, 0.0), 1.0)
                self._ticks, self._window_from = ticks, now
        self._joules += power_w(self._watts, self._load) * (now - self._read_at)
        self._read_at = now
        return [self._joules]

    @override
    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _assumption(self) -> tuple[float, str]:
        """TDP and where it is from."""
        if self.tdp_w is not None:
            return self.tdp_w, f"{self.tdp_w:g} W, configured"
        processor = machine.processor(self.root)
        visible, total = machine.threads(self.root)
        count = self.threads or visible
        by_thread = WATTS_PER_THREAD * count
        if known := _table(processor.model):
            name, watts = known
            of_table = watts * processor.sockets
            many = f"{processor.sockets} x " if processor.sockets > 1 else ""
            shared = processor.virtual or visible < total or self.threads is not None
            if not shared or of_table <= by_thread:
                return of_table, f"{many}{watts:g} W, {name}"
        if self.threads is not None:
            reason = "configured"
        elif processor.virtual:
            reason = "virtual machine"
        elif visible < total:
            reason = f"of {total} of the machine"
        else:
            reason = f"unknown processor {processor.model}".rstrip()
        return by_thread, f"{WATTS_PER_THREAD:g} W x {count} threads, {reason}"

    def _busy_and_total(self) -> tuple[float, float]:
        """Time that processors worked, and all time, since boot; any unit. Time that a hypervisor took is not work."""
        if self._descriptor is not None:
            # cpu user nice system idle iowait irq softirq steal guest guest_nice; guests are in user and nice already.
            fields = [float(v) for v in os.pread(self._descriptor, 256, 0).split(b"\n", 1)[0].split()[1:9]]
            idle = sum(fields[3:5]) + sum(fields[7:8])
            return sum(fields) - idle, sum(fields)
        import psutil

        times = psutil.cpu_times()
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "steal", 0.0)
        return total - idle, total


def _table(model: str) -> tuple[str, float] | None:
    from callbacks.energy.meters.codecarbon import processor_power

    return processor_power(model)
