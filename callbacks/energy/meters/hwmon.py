"""Power and energy sensors of the kernel's hardware monitoring: NVIDIA Grace, AMD and IBM processors, board meters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, get_args

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, Component, Meter, MeterError
from callbacks.energy.meters.sysfs import NumberFile, entries, open_all, text

# (driver, label, component, name of the channel); what fits none is not counted. Left out on purpose: Grace's
# "Module Power" (includes the GPU) and "Grace Power" (includes its other sensors), per-core counters, GPUs and
# batteries, and board meters without a label, of which nobody knows what they feed.
RULES: tuple[tuple[str, str, Component, str], ...] = (
    ("*", r"CPU Power Socket (\d+)", "cpu", "cpu{}"),
    ("*", r"SysIO Power Socket (\d+)", "other", "sysio{}"),
    ("*", r"(?:DRAM|Memory) Power Socket (\d+)", "dram", "dram{}"),
    ("amd_energy", r"Esocket(\d+)", "cpu", "cpu{}"),
    ("ibmpowernv", r"Chip (\d+)", "cpu", "cpu{}"),
    ("ibmpowernv", r"System", "node", "node"),
)
FILES = re.compile(r"(?:(power\d+)_(average|input)|(energy\d+)_(input))")
# Of two files for one thing the better one: a counter misses nothing, an average misses less than an instant.
PREFERENCE = {"energy": 0, "average": 1, "input": 2}


@dataclass(frozen=True)
class _Sensor:
    path: Path
    driver: str
    label: str
    kind: Literal["counter", "gauge"]
    preference: int

    @property
    def key(self) -> str:
        return f"{self.driver}/{self.label}"


class HwmonMeter(Meter):
    """Sensors whose label says without doubt what they measure.

    Args:
        root: Folder of the devices.
        channels: Which sensors are read and as what, instead of the built-in rules: ``{"power_meter/power1": node}``.
            A key is driver and label (or, without a label, the sensor's name), with ``*`` and ``?``; a value is one of
            cpu, gpu, dram, node, other.
    """

    def __init__(self, root: str = "/sys/class/hwmon", channels: Mapping[str, Component] | None = None) -> None:
        for key, component in (channels or {}).items():
            if component not in get_args(Component):
                raise ValueError(
                    f"callbacks.energy.options.hwmon.channels[{key!r}]={component!r} is unknown; choose one of "
                    f"{', '.join(get_args(Component))}."
                )
        self.root, self.channels = Path(root), dict(channels or {})
        self._files: list[NumberFile] = []

    @override
    def probe(self) -> Availability:
        sensors = self._sensors()
        if not sensors:
            return Availability(False, f"{self.root} has no sensor of power or energy")
        chosen = self._chosen(sensors)
        if not chosen:
            names = ", ".join(sorted({sensor.key for sensor in sensors}))
            return Availability(
                False,
                f"no sensor in {self.root} says clearly what it measures, or none fits; there are: {names}. Name yours "
                'in callbacks.energy.options.hwmon.channels: {"driver/label": node}',
            )
        files = [NumberFile(sensor.path) for sensor, _, _ in chosen]
        try:
            open_all(files)
        except OSError as error:
            return Availability(
                False,
                f"{error.filename or self.root} cannot be read: {error.strerror}; an administrator can allow it: "
                f"sudo chmod a+r {error.filename or self.root}",
                present=True,
            )
        for file in files:
            file.close()
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        available = self.probe()
        if not available.ok:
            raise MeterError(available.reason)
        chosen = self._chosen(self._sensors())
        self._files = [NumberFile(sensor.path, 1e-6) for sensor, _, _ in chosen]
        try:
            open_all(self._files)
        except OSError as error:
            raise MeterError(f"{error.filename or self.root} cannot be read: {error.strerror}") from error
        return [
            Channel(name, component, sensor.kind, True, f"hwmon ({sensor.label})", device=sensor.key)
            for sensor, component, name in chosen
        ]

    @override
    def read(self) -> list[float]:
        return [file.read() for file in self._files]

    @override
    def close(self) -> None:
        for file in self._files:
            file.close()

    def _sensors(self) -> list[_Sensor]:
        out = []
        for device in entries(self.root):
            # Some drivers (ACPI's power meter, NVIDIA's Grace) put their files one level below.
            for folder in (device, device / "device"):
                driver = text(folder / "name") or text(device / "name") or device.name
                for path in entries(folder):
                    if not (match := FILES.fullmatch(path.name)):
                        continue
                    sensor = match[1] or match[3]
                    label = text(folder / f"{sensor}_label") or text(folder / f"{sensor}_oem_info") or sensor
                    kind = "gauge" if match[1] else "counter"
                    out.append(_Sensor(path, driver, label, kind, PREFERENCE[match[2] or "energy"]))
        return out

    def _chosen(self, sensors: list[_Sensor]) -> list[tuple[_Sensor, Component, str]]:
        """(sensor, component, name of the channel), one sensor for each thing."""
        found: dict[str, tuple[_Sensor, Component, str]] = {}
        for sensor in sensors:
            match = self._named(sensor) if self.channels else _known(sensor)
            if match is None:
                continue
            # By its own name a sensor is one thing wherever it hangs; unlabelled ones only in their device.
            thing = match[1] or f"{sensor.path.parent}/{sensor.label}"
            if thing not in found or sensor.preference < found[thing][0].preference:
                found[thing] = (sensor, *match)
        counts: dict[str, int] = {}
        out = []
        for sensor, component, name in found.values():
            if not name:
                counts[component] = counts.get(component, -1) + 1
                name = "node" if component == "node" and not counts[component] else f"{component}{counts[component]}"
            out.append((sensor, component, name))
        return out

    def _named(self, sensor: _Sensor) -> tuple[Component, str] | None:
        return next(((part, "") for key, part in self.channels.items() if fnmatchcase(sensor.key, key)), None)


def _known(sensor: _Sensor) -> tuple[Component, str] | None:
    for driver, label, component, name in RULES:
        if fnmatchcase(sensor.driver, driver) and (match := re.fullmatch(label, sensor.label)):
            return component, name.format(*match.groups())
    return None
