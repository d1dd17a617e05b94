"""Energy counters of HPE Cray nodes, which their board controller writes ten times a second."""

from __future__ import annotations

import re
from pathlib import Path

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, Component, Meter, MeterError
from callbacks.energy.meters.sysfs import NumberFile, entries, open_all


class CrayPmMeter(Meter):
    """The node (``node``) and its parts: ``cpu``, ``dram``, ``gpu0``, ``gpu1``, ...

    The counters cover the whole node, whoever uses it. They start again from zero at unknown moments only (restart of
    the controller), so a step back is an invalid interval.

    Args:
        root: Folder of the counters.
    """

    def __init__(self, root: str = "/sys/cray/pm_counters") -> None:
        self.root = Path(root)
        self._files: list[NumberFile] = []

    @override
    def probe(self) -> Availability:
        if not self.root.is_dir():
            return Availability(False, f"{self.root} does not exist (no HPE Cray node)")
        found = self._found()
        if not found:
            return Availability(False, f"{self.root} has no file named energy or *_energy", present=True)
        files = [NumberFile(path) for path, _, _ in found]
        try:
            open_all(files)
        except OSError as error:
            return Availability(False, f"{error.filename or self.root} cannot be read: {error.strerror}", present=True)
        for file in files:
            file.close()
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        available = self.probe()
        if not available.ok:
            raise MeterError(available.reason)
        found = self._found()
        self._files = [NumberFile(path) for path, _, _ in found]
        try:
            open_all(self._files)
        except OSError as error:
            raise MeterError(f"{error.filename or self.root} cannot be read: {error.strerror}") from error
        return [Channel(name, component, "counter", True, f"cray_pm ({path.name})") for path, name, component in found]

    @override
    def read(self) -> list[float]:
        return [file.read() for file in self._files]

    @override
    def close(self) -> None:
        for file in self._files:
            file.close()

    def _found(self) -> list[tuple[Path, str, Component]]:
        """(file, name of the channel, component). ``accel_energy`` is the sum of the accelerators where both exist."""
        paths = {path.name: path for path in entries(self.root) if path.name.endswith("energy")}
        out: list[tuple[Path, str, Component]] = []
        if "energy" in paths:
            out.append((paths["energy"], "node", "node"))
        for stem, name, component in (("cpu", "cpu", "cpu"), ("memory", "dram", "dram"), ("accel", "gpu", "gpu")):
            numbered = {int(m[1]): p for n, p in paths.items() if (m := re.fullmatch(rf"{stem}(\d+)_energy", n))}
            whole = paths.get(f"{stem}_energy")
            # A processor's sum is one number less to read; accelerators are wanted one by one.
            if whole is not None and (stem != "accel" or not numbered):
                out.append((whole, name, component))
            else:
                out += [(path, f"{name}{index}", component) for index, path in sorted(numbered.items())]
        return out
