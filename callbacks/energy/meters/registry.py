"""Meters by name: ours, and those that installed packages add through the entry point group ``energy_meters``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from importlib import metadata
from typing import Any

from callbacks.energy.meters.base import Meter

GROUP = "energy_meters"
PACKAGE = "callbacks.energy.meters"
NAMES = {
    "nvml": f"{PACKAGE}.nvml.NvmlMeter",
    "rapl": f"{PACKAGE}.rapl.RaplMeter",
    "hwmon": f"{PACKAGE}.hwmon.HwmonMeter",
    "ipmi": f"{PACKAGE}.ipmi.IpmiMeter",
    "slurm": f"{PACKAGE}.slurm.SlurmMeter",
    "cray_pm": f"{PACKAGE}.cray_pm.CrayPmMeter",
    "cpu_model": f"{PACKAGE}.cpu_model.CpuModelMeter",
    "dram_model": f"{PACKAGE}.dram_model.DramModelMeter",
}


def names() -> list[str]:
    """All names that `make` knows: ours first, then those of installed packages."""
    return [*NAMES, *sorted(point.name for point in metadata.entry_points(group=GROUP) if point.name not in NAMES)]


def make(name: str, **options: Any) -> Meter:
    """Make a meter.

    Args:
        name: One of `names`.
        options: Arguments of its constructor.

    Raises:
        ValueError: If the name or an option is unknown; lists what there is.
    """
    make_it = _load(name)
    known = inspect.signature(make_it).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        for option in options:
            if option not in known:
                raise ValueError(
                    f"callbacks.energy.options.{name}.{option} is unknown{_nearest(option, list(known))}; {name} takes "
                    f"{', '.join(known) or 'no options'}."
                )
    meter = make_it(**options)
    if not isinstance(meter, Meter):
        raise ValueError(f"callbacks.energy.meters: {name!r} made a {type(meter).__name__}, which is no Meter.")
    return meter


def _load(name: str) -> Any:
    if name in NAMES:
        module, _, attribute = NAMES[name].rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    for point in metadata.entry_points(group=GROUP, name=name):
        try:
            return point.load()
        except Exception as error:
            raise ValueError(
                f"callbacks.energy.meters: {name!r} ({point.value}) cannot be imported: {type(error).__name__}: {error}"
            ) from error
    raise ValueError(
        f"callbacks.energy.meters: {name!r} is unknown{_nearest(name, names())}; there are {', '.join(names())}. "
        f"A package adds one through the entry point group {GROUP!r}, a configuration through callbacks.energy."
        "extra_meters."
    )


def _nearest(word: str, choices: list[str]) -> str:
    found = difflib.get_close_matches(str(word), choices, 1)
    return f" (did you mean {found[0]!r}?)" if found else ""
