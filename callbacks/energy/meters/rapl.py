"""Energy counters of processors and memory in Linux' powercap tree (RAPL; Intel, and AMD under the same names)."""

from __future__ import annotations

import errno
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, Component, Meter, MeterError
from callbacks.energy.meters.sysfs import NumberFile, entries, number, open_all, text

log = logging.getLogger(__name__)

MIRRORED_J = 1.0
"""Counters of different zones that are closer than this are one counter shown twice; apart they differ by kJ."""

# Zones of the register interface (MSR, TPMI) only: those of intel-rapl-mmio show the same counters again.
ZONE = re.compile(r"intel-rapl:\d+")
SUBZONE = re.compile(r"intel-rapl:\d+:\d+")
PACKAGE = re.compile(r"package-(\d+)(?:-die-(\d+))?")


@dataclass(frozen=True)
class _Zone:
    folder: Path
    kind: Literal["package", "dram", "psys"]
    name: str  # of the channel

    @property
    def counter(self) -> Path:
        return self.folder / "energy_uj"


class RaplMeter(Meter):
    """Packages (``cpu0``, ``cpu1``, ...) and their memory (``dram0``, ...).

    Sub-zones ``core`` and ``uncore`` are parts of the package and never read. A counter that is shown more than once
    (memory-mapped twins, the dies of one AMD package) is read once.

    Args:
        root: The powercap tree.
        psys: Whether the platform's counter is read as well, as the total of the machine. Ask for it only where the
            board feeds it from its power supplies: on many machines it leaves out the GPUs.
    """

    def __init__(self, root: str = "/sys/class/powercap", psys: bool = False) -> None:
        self.root, self.psys = Path(root), psys
        self._files: list[NumberFile] = []

    @override
    def probe(self) -> Availability:
        if not self.root.is_dir():
            return Availability(False, f"{self.root} does not exist (a virtual machine, or no RAPL driver)")
        zones = self._zones()
        if not any(zone.kind == "package" for zone in zones):
            if any(path.name.startswith("intel-rapl") for path in entries(self.root)):
                return Availability(
                    False,
                    f"{self.root}/intel-rapl is hidden from this container; start it with "
                    "--security-opt systempaths=unconfined, or --volume /sys/devices/virtual/powercap:"
                    "/sys/devices/virtual/powercap:ro",
                    present=True,
                )
            return Availability(False, f"{self.root} has no zone of a processor package")
        for zone in zones:
            try:
                os.close(os.open(zone.counter, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                return Availability(False, _reason(zone.counter, error), present=True)
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        found = self.probe()
        if not found.ok:
            raise MeterError(found.reason)
        zones = self._zones()
        files = [NumberFile(zone.counter, 1e-6) for zone in zones]
        try:
            open_all(files)
        except OSError as error:
            raise MeterError(_reason(Path(error.filename or zones[0].counter), error)) from error
        self._files = []
        channels = []
        for zone, file in _distinct(zones, files):
            self._files.append(file)
            channels.append(_channel(zone))
        return channels

    @override
    def read(self) -> list[float]:
        return [file.read() for file in self._files]

    @override
    def close(self) -> None:
        for file in self._files:
            file.close()

    def _zones(self) -> list[_Zone]:
        """Packages, memory and, if asked for, the platform; the first of each name."""
        zones: dict[str, _Zone] = {}
        for folder in entries(self.root):
            if not ZONE.fullmatch(folder.name):
                continue
            name = text(folder / "name")
            if name == "psys":
                if self.psys:
                    zones.setdefault("node", _Zone(folder, "psys", "node"))
            elif package := PACKAGE.fullmatch(name):
                number_of = package[1] if package[2] is None else f"{package[1]}_die{package[2]}"
                if f"cpu{number_of}" in zones:
                    log.debug("energy: %s shows %s a second time and is not read", folder.name, name)
                    continue
                zones[f"cpu{number_of}"] = _Zone(folder, "package", f"cpu{number_of}")
                for part in self._parts(folder):
                    if text(part / "name") == "dram":
                        zones.setdefault(f"dram{number_of}", _Zone(part, "dram", f"dram{number_of}"))
        return list(zones.values())

    def _parts(self, folder: Path) -> list[Path]:
        """Sub-zones: in the folder of their zone, in the flat class folder, or in both."""
        nested = {path.name: path for path in entries(folder) if SUBZONE.fullmatch(path.name)}
        flat = {path.name: path for path in entries(self.root) if path.name.startswith(f"{folder.name}:")}
        return list((flat | nested).values())


def _distinct(zones: list[_Zone], files: list[NumberFile]) -> list[tuple[_Zone, NumberFile]]:
    """Zones with counters of their own; closes the files of the others."""
    kept: list[tuple[_Zone, NumberFile, float]] = []
    for zone, file in zip(zones, files, strict=True):
        value = file.read()
        twin = next(
            (
                other
                for other, _, seen in kept
                if other.kind == zone.kind and value > 0 and abs(value - seen) < MIRRORED_J
            ),
            None,
        )
        if twin is None:
            kept.append((zone, file, value))
        else:
            log.info("energy: %s mirrors %s and is not read", zone.folder.name, twin.folder.name)
            file.close()
    return [(zone, file) for zone, file, _ in kept]


def _channel(zone: _Zone) -> Channel:
    component: Component = {"package": "cpu", "dram": "dram", "psys": "node"}[zone.kind]
    modulus = number(zone.folder / "max_energy_range_uj")
    # The processor may take its short-term limit for a while, so the largest of its limits is what it cannot exceed.
    limits = [
        value
        for path in entries(zone.folder)
        if re.fullmatch(r"constraint_\d+_(max_power|power_limit)_uw", path.name) and (value := number(path))
    ]
    return Channel(
        name=zone.name,
        component=component,
        kind="counter",
        measured=True,
        source=f"rapl ({zone.kind})",
        modulus_j=modulus * 1e-6 if modulus else None,
        max_power_w=max(limits) * 1e-6 if limits else None,
        device=text(zone.folder / "name") or None,
    )


def _reason(path: Path, error: OSError) -> str:
    if error.errno not in (errno.EACCES, errno.EPERM):
        return f"{path} cannot be read: {error.strerror}"
    return (
        f"{path} may be read by root only (the kernel's default since 2020). An administrator can allow it until the "
        "next boot: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj "
        "/sys/class/powercap/intel-rapl:*/intel-rapl:*/energy_uj; or for good, as a line of "
        '/etc/udev/rules.d/70-rapl.rules: SUBSYSTEM=="powercap", ACTION=="add", KERNEL=="intel-rapl:*", '
        'RUN+="/bin/chmod a+r /sys%p/energy_uj". Nothing is guessed in silence: an estimate is reported as one'
    )
