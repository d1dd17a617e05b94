"""Devices that are not there: power and energy of a cost model, driven by what the run really does."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable

from typing_extensions import override

from callbacks.energy.identity import local_processes
from callbacks.energy.meters.base import Availability, Channel, Meter, Progress


class SimulatedDevices(Meter):
    """A node with devices that draw ``node_w + n * device_w``, and take energy for every sample and update of training.

    For machines without sensors: an analysis of the runs must find the coefficients that were put in
    (docs/experiments/energy_scaling.md). Nothing about the machine at hand is measured, and the channel says so. The
    defaults are those of ResNet-50 on nodes of four A100 (fitted to published energies).

    Args:
        node_w: Power of a node without its devices, W.
        device_w: Of each device that does nothing, W.
        j_per_sample: Energy of a sample in training, J.
        j_per_update: Energy of an optimizer step on one device, J.
        devices: Of this node; None: the processes of the run on it.
        noise: Relative standard deviation of the energy between two readings.
        seed: Of the noise, a number or any text: runs that are compared need different ones, or all err alike.

    Raises:
        ValueError: If a number is negative or not finite.
    """

    def __init__(
        self,
        node_w: float = 215.3,
        device_w: float = 69.0,
        j_per_sample: float = 0.4525,
        j_per_update: float = 1.781,
        devices: int | None = None,
        noise: float = 0.0,
        seed: int | str = 0,
    ) -> None:
        numbers = {
            "node_w": node_w,
            "device_w": device_w,
            "j_per_sample": j_per_sample,
            "j_per_update": j_per_update,
            "noise": noise,
        }
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"SimulatedDevices: {name}={value}: give a number of 0 or more.")
        if devices is not None and devices < 1:
            raise ValueError(f"SimulatedDevices: devices={devices}: give a number of at least 1, or null.")
        self.node_w, self.device_w = node_w, device_w
        self.j_per_sample, self.j_per_update = j_per_sample, j_per_update
        self.devices, self.noise = devices, noise
        self.clock: Callable[[], float] = time.perf_counter
        self._random = random.Random(seed)
        self._progress: Callable[[], Progress] = Progress
        self._total_j = 0.0

    @override
    def probe(self) -> Availability:
        return Availability(True)

    @override
    def follow(self, progress: Callable[[], Progress]) -> None:
        self._progress = progress

    @override
    def open(self) -> list[Channel]:
        devices = self.devices or local_processes(os.environ)
        self._watts = self.node_w + devices * self.device_w
        self._last, self._total_j, self._done = self.clock(), 0.0, self._progress()
        source = (
            f"simulated ({self.node_w:g} W + {devices} x {self.device_w:g} W, {self.j_per_sample:g} J per sample, "
            f"{self.j_per_update:g} J per device update)"
        )
        return [Channel("node", "node", "counter", False, source)]

    @override
    def read(self) -> list[float]:
        now, done = self.clock(), self._progress()
        used = self._watts * (now - self._last)
        used += self.j_per_sample * (done.samples - self._done.samples)
        used += self.j_per_update * (done.device_updates - self._done.device_updates)
        if self.noise:
            used *= max(0.0, 1 + self.noise * self._random.gauss(0, 1))
        self._last, self._done, self._total_j = now, done, self._total_j + used
        return [self._total_j]
