"""Which meters a run reads: the best instrument for every component, a model where there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from callbacks.energy.meters import registry
from callbacks.energy.meters.base import Channel, Meter, MeterError
from callbacks.energy.node import NodeProfile

log = logging.getLogger(__name__)

Choice = Literal["auto", "estimates"]
# In the order of preference; a component that an earlier one measures is not read from a later one.
INSTRUMENTS = ("nvml", "rapl", "cray_pm", "hwmon", "ipmi", "slurm")
MODELS = ("cpu_model", "dram_model")


class Selected(Meter):
    """Some channels of an open meter: the others are measured elsewhere."""

    def __init__(self, meter: Meter, channels: Sequence[Channel], keep: Sequence[int]) -> None:
        self.meter, self.channels, self.keep = meter, [channels[i] for i in keep], list(keep)

    def probe(self) -> Any:
        """See the meter."""
        return self.meter.probe()

    def open(self) -> list[Channel]:
        """The chosen channels; the meter is open already."""
        return self.channels

    def read(self) -> list[float]:
        """Values of the chosen channels."""
        values = self.meter.read()
        return [values[i] for i in self.keep]

    def refresh(self) -> None:
        """See the meter."""
        self.meter.refresh()

    def close(self) -> None:
        """Close the meter."""
        self.meter.close()


@dataclass
class Selection:
    """Open meters and what there is to say about them.

    Attributes:
        meters: Ready for `recorder.Recorder`.
        absent: Name of a meter -> why it is not read.
    """

    meters: list[Meter] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        """Close all meters."""
        for meter in self.meters:
            meter.close()


def check_choice(
    meters: str | Sequence[str],
    extra_meters: Mapping[str, Meter],
    options: Mapping[str, Mapping[str, Any]],
    gpu_scope: str,
) -> None:
    """Refuse settings of `callbacks.energy.callback.EnergyCallback` that name no meter.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if gpu_scope not in ("auto", "job", "node"):
        raise ValueError(f"callbacks.energy.gpu_scope={gpu_scope!r} is unknown; choose auto, job or node.")
    if isinstance(meters, str) and meters not in ("auto", "estimates"):
        raise ValueError(
            f"callbacks.energy.meters={meters!r} is unknown; choose auto, estimates, or a list: [{meters}]."
        )
    if not meters and not extra_meters:
        raise ValueError("callbacks.energy.meters is empty: nothing would be read; use auto, or remove the callback.")
    if unknown := [name for name in options if name not in registry.names()]:
        raise ValueError(
            f"callbacks.energy.options: no meter {', '.join(unknown)}; there are {', '.join(registry.names())}."
        )
    if wrong := [name for name, meter in extra_meters.items() if not isinstance(meter, Meter)]:
        raise ValueError(
            f"callbacks.energy.extra_meters.{wrong[0]} is no meter; give an object of a class that derives from "
            "callbacks.energy.meters.base.Meter (_target_: ...)."
        )


def meter_options(
    given: Mapping[str, Mapping[str, Any]], node: NodeProfile | None, gpu_scope: str
) -> dict[str, Mapping[str, Any]]:
    """Constructor arguments by name of the meter: what is given, then what follows from node and scope.

    Args:
        given: As the user has set them.
        node: What kind of machine this is, for the models.
        gpu_scope: GPUs that count, ``auto``, ``job`` or ``node``.
    """
    from callbacks.energy.meters.nvml import job_devices

    options = dict(given)
    if node is not None:
        options["cpu_model"] = {"tdp_w": node.sockets * node.cpu_tdp_w, **options.get("cpu_model", {})}
        if node.dram_w:
            power = {"watts_per_gib": node.dram_w, "memory_gib": 1.0}
            options["dram_model"] = {**power, **options.get("dram_model", {})}
    options["nvml"] = {"devices": job_devices(gpu_scope, os.environ), **options.get("nvml", {})}
    return options


def select(
    choice: Choice | Sequence[str], extra: Mapping[str, Meter], options: Mapping[str, Mapping[str, Any]]
) -> Selection:
    """Open the meters of a run.

    Args:
        choice: ``auto``: every instrument that can be read, and models for processor and memory where none can.
            ``estimates``: models only. A list of names: exactly these.
        extra: Further meters, by name; their components are not read from anything else.
        options: Constructor arguments by name of the meter.

    Raises:
        MeterError: If a meter that was asked for by name cannot be read; names the remedy.
        ValueError: If a name is unknown.
    """
    chosen = Selection()
    try:
        for name, meter in extra.items():
            _require(name, meter)
            _add(chosen, meter, set())
        if choice == "auto":
            _add_instruments(chosen, options)
        elif choice != "estimates":
            for name in choice:
                meter = registry.make(name, **options.get(name, {}))
                _require(name, meter)
                _add(chosen, meter, set())
            _refuse_doubles(chosen)
            return chosen
        for name in MODELS:
            _add(chosen, registry.make(name, **options.get(name, {})), _components(chosen))
    except BaseException:
        chosen.close()
        raise
    return chosen


def _require(name: str, meter: Meter) -> None:
    if not (found := meter.probe()).ok:
        raise MeterError(
            f"callbacks.energy.meters: {name!r} cannot be read here: {found.reason}. auto takes what there is."
        )


def _refuse_doubles(chosen: Selection) -> None:
    sources: dict[str, str] = {}
    for meter in chosen.meters:
        for component in sorted({channel.component for channel in meter.open()} - {"other"}):
            name = type(meter.meter).__name__
            if component in sources:
                raise MeterError(
                    f"callbacks.energy.meters: {sources[component]} and {name} both read {component!r}, which would "
                    "count it twice; keep one of them."
                )
            sources[component] = name


def _add_instruments(chosen: Selection, options: Mapping[str, Mapping[str, Any]]) -> None:
    for name in INSTRUMENTS:
        meter = registry.make(name, **options.get(name, {}))
        found = meter.probe()
        if found.ok:
            try:
                _add(chosen, meter, _components(chosen))
                continue
            except MeterError as error:
                found = type(found)(False, str(error), present=True)
        chosen.absent[name] = found.reason
        if found.present:
            log.warning("energy: %s is not read: %s", name, found.reason)


def _add(chosen: Selection, meter: Meter, taken: set[str]) -> None:
    channels = meter.open()
    keep = [i for i, channel in enumerate(channels) if channel.component not in taken]
    if not keep:
        meter.close()
        return
    chosen.meters.append(Selected(meter, channels, keep))


def _components(chosen: Selection) -> set[str]:
    return {channel.component for meter in chosen.meters for channel in meter.open()}


def describe(channels: Sequence[Channel], absent: Mapping[str, str]) -> str:
    """One line: what is measured and with what, what is estimated and why."""
    parts = []
    for component in ("node", "gpu", "cpu", "dram", "other"):
        found = [channel for channel in channels if channel.component == component]
        if not found:
            continue
        kind = "measured" if all(channel.measured for channel in found) else "estimated"
        many = f"{len(found)} x " if len(found) > 1 else ""
        parts.append(f"{component} {kind} ({many}{found[0].source})")
    estimated = [channel.component for channel in channels if not channel.measured]
    why = [f"{name}: {absent[name]}" for name in ("rapl",) if name in absent and "cpu" in estimated]
    return "; ".join([", ".join(parts) or "nothing is read", *why])
