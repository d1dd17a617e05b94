"""Power of the memory where it cannot be read: a constant per GiB."""

from __future__ import annotations

import math
from pathlib import Path

from typing_extensions import override

from callbacks.energy.meters import machine
from callbacks.energy.meters.base import Availability, Channel, Meter

GIB = 2**30


class DramModelMeter(Meter):
    """Estimated power of the memory that the job may use (``dram``): 0.3725 W/GiB.

    The constant is that of Lannelongue, Grealey and Inouye ("Green Algorithms", Advanced Science, 2021), whose figure
    is per GB; the difference of 7 % is less than what it leaves out (number of modules, load).

    Args:
        watts_per_gib: Power of 1 GiB, W.
        memory_gib: Memory, GiB; None: that of the machine, or of the container if it has less.
        root: Where ``proc`` and ``sys`` are.
    """

    def __init__(self, watts_per_gib: float = 0.3725, memory_gib: float | None = None, root: str = "/") -> None:
        for name, value in (("watts_per_gib", watts_per_gib), ("memory_gib", memory_gib)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"callbacks.energy.options.dram_model.{name}={value} must not be negative.")
        self.watts_per_gib, self.memory_gib, self.root = watts_per_gib, memory_gib, Path(root)
        self._watts = math.nan

    @override
    def probe(self) -> Availability:
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        if self.memory_gib is not None:
            memory, limited = self.memory_gib, ", configured"
        else:
            usable, total = machine.memory_bytes(self.root)
            memory = usable / GIB
            limited = f" of {total / GIB:.4g} GiB of the machine" if usable < total else ""
        self._watts = self.watts_per_gib * memory
        source = f"model ({self.watts_per_gib:g} W/GiB x {memory:.4g} GiB{limited}; Lannelongue et al. 2021)"
        return [Channel("dram", "dram", "gauge", False, source)]

    @override
    def read(self) -> list[float]:
        return [self._watts]
