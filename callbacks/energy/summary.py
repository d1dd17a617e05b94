"""From joules per machine and stage to the numbers that a user asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from callbacks.energy.accounting import Tally
from callbacks.energy.record import Counts, HostEnergy

J_PER_KWH = 3.6e6
STARTUP, IDLE = "startup", "idle"
TRAIN, VALIDATION, SANITY, OTHER = "fit/train", "fit/val", "fit/sanity", "fit/other"
LABELS = (STARTUP, SANITY, TRAIN, VALIDATION, OTHER, "validate", "test", "predict", IDLE)


@dataclass(frozen=True)
class Facility:
    """What turns IT energy into energy of the building and CO2.

    Attributes:
        pue: Power usage effectiveness, facility energy / IT energy.
        intensity_g_per_kwh: CO2 equivalents of the electricity.
        intensity_source: Where that number is from, with its year.
    """

    pue: float = 1.0
    intensity_g_per_kwh: float = 0.0
    intensity_source: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.pue < math.inf:
            raise ValueError(f"callbacks.energy.pue={self.pue}: no building uses less than its computers; use >= 1.")
        if not 0 <= self.intensity_g_per_kwh < math.inf:
            raise ValueError(
                f"callbacks.energy.carbon_intensity={self.intensity_g_per_kwh} g/kWh: use a number, 0 or more."
            )


def facility_of(pue: float, carbon_intensity: float | None, country: str | None) -> Facility:
    """A building in a country, or one whose electricity is known.

    Args:
        pue: Power usage effectiveness.
        carbon_intensity: CO2 equivalents, g/kWh; None: that of the country.
        country: ISO 3166 code of three letters; None: the mean of the world.

    Raises:
        ValueError: If a number is impossible or the country is unknown.
    """
    from callbacks.energy.meters.codecarbon import intensity

    grams, source, year = intensity(country)  # refuses unknown countries
    if carbon_intensity is not None:
        return Facility(pue, carbon_intensity, "callbacks.energy.carbon_intensity")
    return Facility(pue, grams, f"{source}, {year}")


def summarize(hosts: Sequence[HostEnergy], counts: Counts, facility: Facility) -> dict[str, Any]:
    """Everything about a run's energy, as plain data.

    Args:
        hosts: All machines.
        counts: Samples and updates of all ranks.
        facility: PUE and carbon intensity.

    Returns:
        Totals, ``stages`` (by label, and ``fit`` for the sum of its parts), ``channels`` (``<host>/<channel>`` if there
        is more than one machine), ``hosts``. Energies in J and kWh, powers in W, times in s.
    """
    labels = [label for label in LABELS if any(label in host.tallies for host in hosts)]
    labels += sorted({label for host in hosts for label in host.tallies} - set(labels))
    world_size = max((host.world_size for host in hosts), default=1)
    stages = {label: _stage([label], hosts, counts, facility, world_size) for label in labels}
    if parts := [label for label in labels if label.startswith("fit/")]:
        stages["fit"] = _stage(parts, hosts, counts, facility, world_size)
    total = _stage(labels, hosts, Counts(), facility, world_size)
    devices = {
        (f"{host.hostname}/{channel.name}" if len(hosts) > 1 else channel.name): _channel(host, channel)
        for host in hosts
        for channel in host.channels
    }
    return {
        **{key: value for key, value in total.items() if key not in ("samples", "updates")},
        "co2_kg": total["facility_kwh"] * facility.intensity_g_per_kwh / 1000,
        "pue": facility.pue,
        "carbon_intensity_g_per_kwh": facility.intensity_g_per_kwh,
        "carbon_intensity_source": facility.intensity_source,
        "status": hosts[0].status if hosts else "completed",
        "stages": stages,
        "channels": devices,
        "hosts": {
            f"{host.hostname} {host.host_id}": {
                "it_j": math.fsum(tally.total_j for tally in host.tallies.values()),
                "segments": host.segments,
                "status": host.status,
            }
            for host in hosts
        },
    }


def _stage(
    labels: Sequence[str], hosts: Sequence[HostEnergy], counts: Counts, facility: Facility, world_size: int
) -> dict[str, Any]:
    tallies = []
    for host in hosts:
        tally = Tally()
        for label in labels:
            if label in host.tallies:
                tally.add(host.tallies[label])
        tallies.append(tally)
    seconds = max((tally.seconds for tally in tallies), default=0.0)
    host_seconds = math.fsum(tally.seconds for tally in tallies)
    it_j = math.fsum(tally.total_j for tally in tallies)
    kwh = it_j / J_PER_KWH
    samples = sum(counts.samples.get(label, 0) for label in labels)
    updates = sum(counts.updates.get(label, 0) for label in labels)
    device_hours = world_size * seconds / 3600
    out = {
        "it_j": it_j,
        "it_kwh": kwh,
        "facility_kwh": facility.pue * kwh,
        **{
            f"{component}_kwh": _of_component(component, tallies, hosts) / J_PER_KWH
            for component in ("cpu", "gpu", "dram")
        },
        "duration_s": seconds,
        "mean_w": it_j / seconds if seconds else 0.0,
        # A stage in pieces that are too short to tell their power has its mean at least.
        "max_w": math.fsum(max(tally.max_w, _mean_w(tally)) for tally in tallies),
        "device_hours": device_hours,
        "node_hours": host_seconds / 3600,
        "estimated_fraction": math.fsum(tally.estimated_j for tally in tallies) / it_j if it_j else 0.0,
        "coverage": math.fsum(t.covered_seconds for t in tallies) / host_seconds if host_seconds else 0.0,
        "energy_delay_js": it_j * seconds,
        "samples": samples,
        "updates": updates,
    }
    if samples:
        out |= {"j_per_sample": it_j / samples}
        if device_hours:
            out |= {"samples_per_device_hour": samples / device_hours}
    if updates:
        out |= {"j_per_update": it_j / updates, "device_updates": updates * world_size}
        if device_hours:
            out |= {"updates_per_device_hour": updates / device_hours}
    return out


def _mean_w(tally: Tally) -> float:
    return tally.total_j / tally.seconds if tally.seconds else 0.0


def _of_component(component: str, tallies: Sequence[Tally], hosts: Sequence[HostEnergy]) -> float:
    return math.fsum(
        tally.joules.get(channel.name, 0.0)
        for tally, host in zip(tallies, hosts, strict=True)
        for channel in host.channels
        if channel.component == component
    )


def _channel(host: HostEnergy, channel: Any) -> dict[str, Any]:
    seconds = math.fsum(tally.seconds for tally in host.tallies.values())
    joules = math.fsum(tally.joules.get(channel.name, 0.0) for tally in host.tallies.values())
    return {
        "component": channel.component,
        "measured": channel.measured,
        "source": channel.source,
        "device": channel.device,
        "j": joules,
        "mean_w": joules / seconds if seconds else 0.0,
    }


def metrics_of(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary under the names that loggers show: ``energy/<stage>/<quantity>``, ``energy/total_*``."""
    names = (
        "it_kwh", "facility_kwh", "cpu_kwh", "gpu_kwh", "dram_kwh", "duration_s", "mean_w", "max_w", "device_hours",
        "node_hours", "j_per_sample", "j_per_update", "samples_per_device_hour", "updates_per_device_hour",
    )  # fmt: skip
    out = {
        f"energy/{stage}/{name}": float(values[name])
        for stage, values in summary["stages"].items()
        for name in names
        if name in values
    }
    out |= {f"energy/total_{name}": float(summary[name]) for name in names if name in summary}
    out |= {f"energy/{name}": float(summary[name]) for name in ("co2_kg", "estimated_fraction", "coverage")}
    return out | {f"energy/codecarbon/{k}": float(v) for k, v in summary.get("codecarbon", {}).items() if _number(v)}


def main_metrics_of(summary: dict[str, Any]) -> dict[str, float]:
    """The few of `metrics_of` that stand beside accuracy in results and tables of sweeps."""
    chosen = ("it_kwh", "j_per_sample", "j_per_update", "co2_kg", "estimated_fraction", "coverage", "total_mean_w")
    out = {name: value for name, value in metrics_of(summary).items() if name.endswith(chosen)}
    return out | ({"energy/earlier_kwh": float(earlier)} if (earlier := summary.get("earlier_kwh")) else {})


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
