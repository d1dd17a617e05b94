"""A parallel training as the cost model sees it: what was planned, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


def gradient_updates(num_samples: int, devices: int, local_batch_size: int, epochs: float) -> int:
    """U = epochs * ceil(floor(N / n) / LBS): optimizer steps of a data-parallel training (section 2.1)."""
    return round(epochs * math.ceil((num_samples // devices) / local_batch_size))


@dataclass(frozen=True)
class Configuration:
    """A training, planned or run.

    Attributes:
        devices: n, processes with a device each.
        local_batch_size: LBS, samples of a step on one device.
        num_samples: N, size of the training set.
        epochs: Passes over it.
        devices_per_node: Of the machine; fewer devices than that still occupy one node.

    Raises:
        ValueError: If a number is not positive, or a device has less than one sample.
    """

    devices: int
    local_batch_size: int
    num_samples: int
    epochs: float
    devices_per_node: int = 4

    def __post_init__(self) -> None:
        for name in ("devices", "local_batch_size", "num_samples", "epochs", "devices_per_node"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        if self.num_samples < self.devices:
            raise ValueError(f"num_samples={self.num_samples} on devices={self.devices}: some would have no sample")

    @property
    def nodes(self) -> int:
        """M = max(1, n / devices_per_node), rounded up: nodes are occupied whole."""
        return math.ceil(self.devices / self.devices_per_node)

    @property
    def global_batch_size(self) -> int:
        """GBS = n LBS."""
        return self.devices * self.local_batch_size

    @property
    def samples(self) -> float:
        """S = N * epochs."""
        return self.num_samples * self.epochs

    @property
    def updates(self) -> int:
        """U."""
        return gradient_updates(self.num_samples, self.devices, self.local_batch_size, self.epochs)


@dataclass(frozen=True)
class Record:
    """A training that was measured: one run, or the mean of its repetitions.

    Attributes:
        series: Runs that belong together, for proportional fits and figures.
        devices: n.
        nodes: m.
        local_batch_size: LBS.
        num_samples: N.
        epochs: Of the training.
        samples: S that went through training.
        updates: U.
        energy_kwh: E of all nodes, in training.
        device_hours: H.
        energy_rms_kwh: Root mean square deviation of repetitions (population form); 0 for one run.
        device_hours_rms: The same of H.
        repetitions: Runs that this is the mean of.
        metric: Quality of the trained model, if it is known.
        seed: Of a single run.
        hardware: What it ran on: fits never mix two.
        estimated: Share of the energy that no instrument measured, 0 to 1.
        name: Of the run, for messages.
        sources: What the energy was read from.
        phases: (name, mean seconds of a step) of its parts, where they were timed.

    Raises:
        ValueError: If energy or time are not positive and finite.
    """

    series: str
    devices: int
    nodes: int
    local_batch_size: int
    num_samples: int
    epochs: float
    samples: float
    updates: int
    energy_kwh: float
    device_hours: float
    energy_rms_kwh: float = 0.0
    device_hours_rms: float = 0.0
    repetitions: int = 1
    metric: float | None = None
    seed: int | None = None
    hardware: str = ""
    estimated: float = 0.0
    name: str = ""
    sources: tuple[str, ...] = ()
    phases: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for key in ("energy_kwh", "device_hours", "samples", "updates", "devices", "nodes"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{self.name or self.series}: {key}={value} cannot be; leave this run out")

    @property
    def global_batch_size(self) -> int:
        """GBS = n LBS."""
        return self.devices * self.local_batch_size

    @property
    def hours(self) -> float:
        """T = H / n, wall time."""
        return self.device_hours / self.devices

    @property
    def node_hours(self) -> float:
        """M = m T."""
        return self.nodes * self.hours

    @property
    def device_updates(self) -> int:
        """N U."""
        return self.devices * self.updates

    @property
    def kappa_kw(self) -> float:
        """Kappa = E / H."""
        return self.energy_kwh / self.device_hours

    @property
    def key(self) -> tuple[int, int, int, int, float]:
        """What makes two records repetitions of one configuration."""
        return (self.devices, self.nodes, self.local_batch_size, self.num_samples, self.epochs)

    @property
    def devices_per_node(self) -> float:
        """N / m."""
        return self.devices / self.nodes


def distinct(records: Iterable[Record]) -> list[Record]:
    """Each configuration once, the first one met: a run that two series share counts once in a common fit."""
    found: dict[tuple[int, int, int, int, float], Record] = {}
    for record in records:
        found.setdefault(record.key, record)
    return list(found.values())


def _mean_phases(members: Sequence[Record]) -> tuple[tuple[str, float], ...]:
    timed = [dict(member.phases) for member in members if member.phases]
    names = timed[0] if timed else {}
    return tuple((name, math.fsum(phases.get(name, 0.0) for phases in timed) / len(timed)) for name in names)


def mean_over_seeds(records: Sequence[Record]) -> list[Record]:
    """Means and root mean square deviations (population form) of repetitions, in the order of configurations met."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record.series, record.hardware, *record.key), []).append(record)
    out = []
    for members in groups.values():
        first, count = members[0], len(members)

        def moments(key: str, members: list[Record] = members) -> tuple[float, float]:
            values = [getattr(member, key) for member in members]
            mean = math.fsum(values) / len(values)
            return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))

        if count == 1:
            out.append(first)
            continue
        energy, energy_rms = moments("energy_kwh")
        hours, hours_rms = moments("device_hours")
        metrics = [member.metric for member in members if member.metric is not None]
        out.append(
            replace(
                first,
                energy_kwh=energy,
                energy_rms_kwh=energy_rms,
                device_hours=hours,
                device_hours_rms=hours_rms,
                repetitions=count,
                metric=math.fsum(metrics) / len(metrics) if metrics else None,
                estimated=math.fsum(member.estimated for member in members) / count,
                sources=tuple(sorted({source for member in members for source in member.sources})),
                phases=_mean_phases(members),
                seed=None,
            )
        )
    return out
