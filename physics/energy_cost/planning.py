"""What a planned training will cost, from fitted runs: hours, energy, carbon dioxide; which plans are worth a look.

Time is fitted as device hours H = t_s S + t_o n U + t_u [n > 1] n U + t_r n U log2 n + t_e n * epochs: computation per
sample, what every step costs a device besides, communication per device update (also as it grows with the number of
devices), and what every epoch costs each device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from physics.energy_cost.configuration import Configuration, Record
from physics.energy_cost.fitting import COLLINEAR, CostFit
from physics.energy_cost.intervals import Uncertainty, uncertainty

TIME_TERMS: dict[str, str] = {
    "samples": "t_s [s per sample]",
    "steps": "t_o [s per device update]",
    "updates": "t_u [s per device update, n > 1]",
    "growth": "t_r [s per device update and doubling of n]",
    "epochs": "t_e [s per device and epoch]",
}


@dataclass(frozen=True)
class TimeFit:
    """Fitted device hours.

    Attributes:
        coefficients: In seconds, in the order of `TIME_TERMS`, >= 0.
        errors: Of each record, (predicted - measured) / measured.
        left_out: The same when the others predict it.
        unidentified: Directions of the weighted columns that no run has anything of.
        scale: Factors of the columns.
        uncertainty: Of forecasts.
    """

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]
    left_out: tuple[float, ...]
    uncertainty: Uncertainty
    unidentified: tuple[tuple[float, ...], ...] = ()
    scale: tuple[float, ...] = ()

    def device_hours(self, plan: Configuration) -> float:
        """H of a plan.

        Raises:
            ValueError: If the runs cannot tell apart what such a plan needs, as communication per step and its growth
                with the number of devices where all have one or two; names them.
        """
        row = np.array(_time_row(plan.devices, plan.samples, plan.updates, plan.epochs))
        scaled = row * np.array(self.scale) if self.scale else row
        for direction in self.unidentified:
            if abs(float(scaled @ np.array(direction))) > 10 * COLLINEAR * float(np.linalg.norm(scaled)):
                names = [t for t, d in zip(TIME_TERMS.values(), direction, strict=True) if abs(d) > 0.1]
                raise ValueError(
                    f"the runs say too little about {' and '.join(names)} to predict the hours of {plan.devices} "
                    f"devices with {plan.local_batch_size} samples each; add runs with more numbers of devices and "
                    "batch sizes"
                )
        return float(np.dot(row, self.coefficients)) / 3600

    def half_width(self, plan: Configuration) -> float:
        """Relative half width of the 95 % interval of the hours of a plan.

        Raises:
            ValueError: See `device_hours`.
        """
        row = np.array(_time_row(plan.devices, plan.samples, plan.updates, plan.epochs)) / 3600
        return self.uncertainty.half_width(row / self.device_hours(plan))


@dataclass(frozen=True)
class Forecast:
    """Of a planned training.

    Attributes:
        plan: What was asked for.
        hours: T, wall time; ``hours_low``, ``hours_high``: 95 % interval.
        energy_kwh: E; ``energy_low``, ``energy_high``: 95 % interval, from both fits. Intervals widen with the distance
            from the runs (`intervals.Uncertainty`); they reach from 0 to infinity where a fit was not tested.
        parts_kwh: Energy by term.
        co2_kg: Of the energy, if the carbon intensity was given.
        extrapolates: What of the plan lies outside of the runs, in words.
    """

    plan: Configuration
    hours: float
    hours_low: float
    hours_high: float
    energy_kwh: float
    energy_low: float
    energy_high: float
    parts_kwh: Mapping[str, float]
    co2_kg: float | None
    extrapolates: tuple[str, ...]


def fit_time(records: Sequence[Record]) -> TimeFit:
    """Fit device hours by non-negative least squares of relative errors.

    Raises:
        ValueError: If there are fewer than two runs.
    """
    if len(records) < 2:
        raise ValueError(f"{len(records)} configuration: the time of others needs at least two")
    rows = np.array([_time_row(r.devices, r.samples, r.updates, r.epochs) for r in records])
    matrix = rows / 3600 / np.array([record.device_hours for record in records])[:, None]
    coefficients = _solve(matrix)
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1.0
    _, values, directions = np.linalg.svd(matrix / lengths, full_matrices=True)
    weak = [directions[i] for i in range(matrix.shape[1]) if i >= len(values) or values[i] < COLLINEAR]
    left_out = [float(row @ _solve(np.delete(matrix, i, axis=0)) - 1) for i, row in enumerate(matrix)]
    errors = matrix @ coefficients - 1
    return TimeFit(
        tuple(float(c) for c in coefficients),
        tuple(float(e) for e in errors),
        tuple(left_out),
        uncertainty(matrix, errors, COLLINEAR),
        tuple(tuple(float(x) for x in direction) for direction in weak),
        tuple(float(1 / length) for length in lengths),
    )


def forecast(
    plan: Configuration,
    cost: CostFit,
    time: TimeFit,
    records: Sequence[Record],
    kg_co2_per_kwh: float | None = None,
) -> Forecast:
    """Hours and energy of a plan.

    Args:
        plan: What is to be trained.
        cost: Fitted to ``records``.
        time: Fitted to ``records``.
        records: The runs.
        kg_co2_per_kwh: Carbon intensity of the electricity.

    Raises:
        ValueError: If the runs say nothing about such a plan (`CostFit.parts`).
    """
    hours = time.device_hours(plan)
    planned = as_record(plan, hours)
    parts = cost.parts(planned)
    energy = math.fsum(parts.values())
    # Energy follows the device hours in some terms, the rest is fixed by the plan.
    moving = math.fsum(value for term, value in parts.items() if term in ("node", "device", "node+device"))
    spread_time = time.half_width(plan)
    spread = math.hypot(cost.half_width(planned), spread_time * moving / energy if moving else 0.0)
    return Forecast(
        plan,
        hours=hours / plan.devices,
        hours_low=hours / plan.devices * max(0.0, 1 - spread_time),
        hours_high=hours / plan.devices * (1 + spread_time),
        energy_kwh=energy,
        energy_low=energy * max(0.0, 1 - spread),
        energy_high=energy * (1 + spread),
        parts_kwh=parts,
        co2_kg=None if kg_co2_per_kwh is None else energy * kg_co2_per_kwh,
        extrapolates=tuple(_outside(plan, records)),
    )


def as_record(plan: Configuration, device_hours: float) -> Record:
    """A plan as if it had been run; its energy is a placeholder that no prediction looks at."""
    return Record(
        series="planned",
        devices=plan.devices,
        nodes=plan.nodes,
        local_batch_size=plan.local_batch_size,
        num_samples=plan.num_samples,
        epochs=plan.epochs,
        samples=plan.samples,
        updates=plan.updates,
        energy_kwh=1.0,
        device_hours=device_hours,
    )


def knee(batch_sizes: Sequence[int], metrics: Sequence[float], mode: str = "max", tolerance: float = 0.01) -> int:
    """The largest batch up to which the metric stays within ``tolerance`` of the best (relative), from the best one on.

    A training that diverged (NaN) is as bad as can be.

    Args:
        batch_sizes: Global batch sizes.
        metrics: Quality at each, means over seeds.
        mode: ``max`` where more is better, else ``min``.
        tolerance: Share of the best that may be lost.

    Raises:
        ValueError: If there is nothing to compare, or ``mode`` is neither.
    """
    if mode not in ("max", "min"):
        raise ValueError(f"mode={mode!r}: choose max or min")
    if not batch_sizes:
        raise ValueError("no run has a metric; set optimized_metric or the metric of the analysis")
    if all(math.isnan(value) for value in metrics):
        raise ValueError("the metric of every run is NaN: all of them diverged")
    sign = 1.0 if mode == "max" else -1.0
    pairs = sorted(
        (size, -math.inf if math.isnan(v) else sign * v) for size, v in zip(batch_sizes, metrics, strict=True)
    )
    best = max(value for _, value in pairs)
    first = next(i for i, (_, value) in enumerate(pairs) if value == best)
    good = itertools.takewhile(lambda pair: best - pair[1] <= tolerance * abs(best), pairs[first:])
    return [size for size, _ in good][-1]


def better_is(metric: str) -> str:
    """``min`` for what its name calls a loss or an error, else ``max``."""
    name = metric.rsplit("/", 1)[-1].lower()
    return "min" if any(word in name for word in ("loss", "error", "mse", "mae", "rmse", "nll", "crps")) else "max"


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of points that no other one beats in some coordinate without being worse in another; less is better."""
    values = np.asarray(points, dtype=np.float64)
    front = []
    for i, point in enumerate(values):
        beaten = (values <= point).all(axis=1) & (values < point).any(axis=1)
        if not beaten.any():
            front.append(i)
    return front


def _time_row(devices: int, samples: float, updates: int, epochs: float) -> list[float]:
    work = devices * updates
    return [samples, float(work), float(work * (devices > 1)), work * math.log2(devices), devices * epochs]


def _solve(matrix: np.ndarray) -> np.ndarray:
    used = matrix.any(axis=0)
    lengths = np.where(used, np.linalg.norm(matrix, axis=0), 1.0)
    found: np.ndarray = nnls(matrix / lengths, np.ones(len(matrix)))[0]
    return found / lengths


def _outside(plan: Configuration, records: Sequence[Record]) -> list[str]:
    names = {"devices": "devices", "local_batch_size": "samples per device and step", "num_samples": "samples"}
    out = []
    for key, name in names.items():
        seen = [getattr(record, key) for record in records]
        value = getattr(plan, key)
        if not min(seen) <= value <= max(seen):
            out.append(f"{value:,} {name}; the runs have {min(seen):,} to {max(seen):,}")
    return out
