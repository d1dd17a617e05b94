"""Everything that records say, as one plain dictionary: the table, the fits, what can be predicted and what not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from physics.energy_cost.configuration import Configuration, Record, distinct, mean_over_seeds
from physics.energy_cost.fitting import (
    TERMS,
    CostFit,
    bootstrap,
    fit_cost,
    fit_proportional,
    leave_one_out,
    nested_models,
)
from physics.energy_cost.planning import TIME_TERMS, Forecast, TimeFit, fit_time, forecast, knee, pareto_front

MIXED = 0.3
"""Shares of estimated energy that differ by more than this are not fitted together: processors and memory beside
measured GPUs are often estimated, and their part changes with the number of GPUs."""


def check_sources(records: Sequence[Record], allow_mixed: bool = False) -> None:
    """Refuse to fit measured and estimated energies together.

    Raises:
        ValueError: Names the runs of the smaller part.
    """
    shares = [record.estimated for record in records]
    if allow_mixed or max(shares, default=0.0) - min(shares, default=0.0) <= MIXED:
        return
    middle = (max(shares) + min(shares)) / 2
    estimated = [record for record in records if record.estimated > middle]
    measured = [record for record in records if record.estimated <= middle]
    fewer = min(estimated, measured, key=len)
    kind = "estimated" if fewer is estimated else "measured"
    names = ", ".join(record.name or record.series for record in fewer[:5])
    raise ValueError(
        f"{len(estimated)} runs have estimated and {len(measured)} measured energies ({kind}: {names}): leave one kind "
        "out, or set data.allow_mixed=true"
    )


def analyse(
    records: Sequence[Record], draws: int = 200, seed: int = 0, metric_mode: str = "max", tolerance: float = 0.01
) -> dict[str, Any]:
    """Analyse the records of one kind of hardware.

    Args:
        records: Single runs or published means.
        draws: Of the bootstrap.
        seed: Of the draws.
        metric_mode: Whether more (``max``) or less (``min``) of the metric is better.
        tolerance: Of the metric, for the knee.

    Returns:
        ``rows`` (a configuration each: what was measured, efficiencies, residuals), ``series`` (proportional fits),
        ``cost`` and ``models`` (sums of costs), ``time``, ``plans`` (of `left_out_plans`), ``quality``, ``front``
        (numbers of the rows that nothing beats), ``refused`` (what could not be fitted -> why).
        Plain numbers and strings; not finite ones are None.
    """
    means = mean_over_seeds(records)
    unique = distinct(means)
    draws_of = _Draws(records, draws, seed)
    found: dict[str, Any] = {"refused": {}, "series": {}, "cost": None, "models": [], "time": None, "quality": {}}
    if len({record.devices for record in means}) < 2:
        found["refused"]["scaling"] = (
            f"all runs have {means[0].devices} device(s): energy over device hours needs two numbers of devices"
        )
    else:
        groups = {name: [r for r in means if r.series == name] for name in dict.fromkeys(r.series for r in means)}
        if len(groups) > 1:
            groups["all"] = list(means)
        for name, members in groups.items():
            if len(members) > 1:
                found["series"][name] = asdict(fit_proportional(members, draws_of(members)))
        _fit_costs(found, unique, draws_of)
    try:
        found["time"] = _time(fit_time(unique))
    except ValueError as error:
        found["refused"]["time"] = str(error)
    found["plans"] = left_out_plans(unique) if found["cost"] and found["time"] else None
    found["quality"] = _quality(means, metric_mode, tolerance)
    found["rows"] = _rows(means, found)
    found["front"] = _front(means, metric_mode)
    return _plain(found)


def _front(means: Sequence[Record], mode: str) -> list[int]:
    """Rows that no other one beats in wall time per sample, energy per sample and, where all know it, the metric."""
    sign = -1.0 if mode == "max" else 1.0
    known = all(record.metric is not None and math.isfinite(record.metric) for record in means)
    points = [
        (
            record.hours / (record.num_samples * record.epochs),
            record.energy_kwh / (record.num_samples * record.epochs),
            sign * record.metric if known and record.metric is not None else 0.0,
        )
        for record in means
    ]
    return pareto_front(points)


class _Draws:
    """Resampled means of the same repetitions, for any subset of the configurations."""

    def __init__(self, records: Sequence[Record], count: int, seed: int) -> None:
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for record in records:
            groups.setdefault((record.series, *record.key), []).append(record)
        self.keys = list(groups)
        repeated = any(len(members) > 1 or members[0].repetitions > 1 for members in groups.values())
        self.draws = bootstrap(list(groups.values()), count, seed) if repeated else []

    def __call__(self, records: Sequence[Record]) -> list[list[Record]]:
        places = [self.keys.index((record.series, *record.key)) for record in records]
        return [[draw[i] for i in places] for draw in self.draws]


def _fit_costs(found: dict[str, Any], unique: Sequence[Record], draws_of: _Draws) -> None:
    models = []
    for fit, left_out in nested_models(unique):
        models.append(
            {
                "terms": list(fit.terms),
                "mean_error": fit.mean_error,
                "max_error": fit.max_error,
                "left_out_mean": _mean(left_out),
                "left_out_max": _largest(left_out),
            }
        )
    found["models"] = models
    try:
        terms = cost_terms(unique)
    except ValueError as error:
        found["refused"]["cost"] = str(error)
        return
    if terms != tuple(TERMS):
        found["refused"]["cost"] = _refusal(unique, tuple(TERMS))
    fit = fit_cost(unique, terms, draws_of(unique))
    left_out = leave_one_out(unique, terms) if len(unique) > len(fit.terms) else []
    found["cost"] = _cost(fit, unique, left_out)


def cost_terms(records: Sequence[Record]) -> tuple[str, ...]:
    """The most costs that there are runs for: all four, or fewer of them in a fixed order.

    Raises:
        ValueError: If there are runs for none.
    """
    for terms in (tuple(TERMS), ("node", "device", "samples"), ("node", "device"), ("device",)):
        if not _refusal(records, terms):
            return terms
    raise ValueError(_refusal(records, ("device",)))


@dataclass(frozen=True)
class RefusedPlan:
    """A planned training that the runs say too little about.

    Attributes:
        plan: What was asked for.
        reason: Why nothing is predicted, and which runs would be needed.
    """

    plan: Configuration
    reason: str


def forecasts(
    records: Sequence[Record], plans: Sequence[Configuration], kg_co2_per_kwh: float | None = None
) -> list[Forecast | RefusedPlan]:
    """Hours and energy of plans, with the costs that `analyse` fits; a plan that is refused does not stop the others.

    Args:
        records: Single runs, or means; a configuration that occurs in two series counts once.
        plans: What is to be trained.
        kg_co2_per_kwh: Carbon intensity of the electricity.

    Returns:
        For every plan its forecast, or why there is none.
    """
    unique = distinct(mean_over_seeds(records))
    try:
        terms = cost_terms(unique)
        cost, time = fit_cost(unique, terms), fit_time(unique)
    except ValueError as error:
        return [RefusedPlan(plan, str(error)) for plan in plans]
    found: list[Forecast | RefusedPlan] = []
    for plan in plans:
        try:
            _check_dropped(plan, terms, unique)
            found.append(forecast(plan, cost, time, unique, kg_co2_per_kwh))
        except ValueError as error:
            found.append(RefusedPlan(plan, str(error)))
    return found


def left_out_plans(records: Sequence[Record]) -> dict[str, Any] | None:
    """Each configuration as a plan that the others forecast, its hours too: how well a plan is known before it has run.

    Args:
        records: Means, each configuration once.

    Returns:
        ``configurations`` (`Record.key`); of each ``errors`` and ``hours_errors``, (forecast - measured) / measured,
        None where the others refuse it, and ``refused``, why, or empty. Over those that were forecast ``mean_error``,
        ``max_error``, ``hours_mean_error``, ``hours_max_error``, ``forecast`` (their number), ``bounded`` (those with a
        finite interval of energy) and ``inside`` (those of them whose energy is in it). None if nothing was forecast.
    """
    most = max(round(record.devices_per_node) for record in records)
    errors: list[float | None] = []
    hours: list[float | None] = []
    refused: list[str] = []
    inside = []
    for i, record in enumerate(records):
        (found,) = forecasts([*records[:i], *records[i + 1 :]], [_as_plan(record, most)])
        if isinstance(found, RefusedPlan):
            errors.append(None)
            hours.append(None)
            refused.append(found.reason)
            continue
        errors.append(found.energy_kwh / record.energy_kwh - 1)
        hours.append(found.hours / record.hours - 1)
        refused.append("")
        if math.isfinite(found.energy_high):
            inside.append(found.energy_low <= record.energy_kwh <= found.energy_high)
    known, known_hours = ([e for e in values if e is not None] for values in (errors, hours))
    if not known:
        return None
    return {
        "configurations": [list(record.key) for record in records],
        "errors": errors,
        "hours_errors": hours,
        "refused": refused,
        "mean_error": _mean(known),
        "max_error": _largest(known),
        "hours_mean_error": _mean(known_hours),
        "hours_max_error": _largest(known_hours),
        "forecast": len(known),
        "bounded": len(inside),
        "inside": sum(inside),
    }


def _as_plan(record: Record, devices_per_node: int) -> Configuration:
    """A run as it would have been planned, on as many nodes."""
    if math.ceil(record.devices / devices_per_node) != record.nodes:  # not filled as far as the others
        devices_per_node = math.ceil(record.devices / record.nodes)
    return Configuration(record.devices, record.local_batch_size, record.num_samples, record.epochs, devices_per_node)


def _check_dropped(plan: Configuration, terms: Sequence[str], records: Sequence[Record]) -> None:
    """Refuse other local batch sizes than those of the runs where these are too few for the costs that tell them apart.

    Raises:
        ValueError: Names the costs and the runs that would be needed.
    """
    dropped = [TERMS[term] for term in ("samples", "updates") if term not in terms]
    seen = sorted({record.local_batch_size for record in records})
    if dropped and plan.local_batch_size not in seen:
        raise ValueError(
            f"{plan.local_batch_size} samples per device and step: the runs have {', '.join(map(str, seen))}, and "
            f"{len(records)} configurations are too few to fit {' and '.join(dropped)}; add runs at other local batch "
            f"sizes, {len(TERMS)} configurations at least"
        )


def _refusal(records: Sequence[Record], terms: tuple[str, ...]) -> str:
    try:
        fit_cost(records, terms)
    except ValueError as error:
        return str(error)
    return ""


def _cost(fit: CostFit, records: Sequence[Record], left_out: Sequence[float]) -> dict[str, Any]:
    return {
        "terms": list(fit.terms),
        "coefficients": dict(zip(fit.terms, fit.coefficients, strict=True)),
        "intervals": dict(zip(fit.terms, (list(i) for i in fit.intervals), strict=True)),
        "condition": fit.condition,
        "warnings": list(fit.warnings),
        "errors": list(fit.errors),
        "left_out": list(left_out),
        "mean_error": fit.mean_error,
        "max_error": fit.max_error,
        "left_out_mean": _mean(left_out),
        "left_out_max": _largest(left_out),
        "parts_kwh": [dict(fit.parts(record)) for record in records],
        "configurations": [list(record.key) for record in records],
    }


def _time(fit: TimeFit) -> dict[str, Any]:
    return {
        "coefficients": dict(zip(TIME_TERMS, fit.coefficients, strict=True)),
        "errors": list(fit.errors),
        "left_out": list(fit.left_out),
        "left_out_mean": _mean(fit.left_out),
        "left_out_max": _largest(fit.left_out),
    }


def _quality(means: Sequence[Record], mode: str, tolerance: float) -> dict[str, Any]:
    known = [record for record in means if record.metric is not None]
    # Batches are compared on one set: with more data (constant samples per device) larger ones would look better.
    counts = [sum(abs(other.num_samples - r.num_samples) <= 0.1 * r.num_samples for other in known) for r in known]
    if known:
        base = known[counts.index(max(counts))].num_samples
        known = [record for record in known if abs(record.num_samples - base) <= 0.1 * base]
    sizes: dict[int, list[float]] = {}
    for record in known:
        sizes.setdefault(record.global_batch_size, []).append(record.metric)  # type: ignore[arg-type]
    if len(sizes) < 2:
        return {}
    pairs = sorted((size, math.fsum(values) / len(values)) for size, values in sizes.items())
    found = knee([size for size, _ in pairs], [value for _, value in pairs], mode, tolerance)
    return {
        "points": [list(pair) for pair in pairs],
        "knee": found,
        "inside": pairs[0][0] < found < pairs[-1][0],
        "mode": mode,
        "tolerance": tolerance,
    }


def _rows(means: Sequence[Record], found: dict[str, Any]) -> list[dict[str, Any]]:
    cost = found["cost"]
    places = {tuple(key): i for i, key in enumerate(cost["configurations"])} if cost else {}
    plans = found["plans"]
    smallest = {}
    for record in means:
        best = smallest.get(record.series)
        if best is None or record.devices < best.devices:
            smallest[record.series] = record
    rows = []
    for record in means:
        base, i = smallest[record.series], places.get(record.key)
        series = found["series"].get(record.series)
        rows.append(
            {
                "series": record.series,
                "devices": record.devices,
                "nodes": record.nodes,
                "local_batch_size": record.local_batch_size,
                "global_batch_size": record.global_batch_size,
                "num_samples": record.num_samples,
                "epochs": record.epochs,
                "repetitions": record.repetitions,
                "energy_kwh": record.energy_kwh,
                "energy_rms_kwh": record.energy_rms_kwh,
                "device_hours": record.device_hours,
                "device_hours_rms": record.device_hours_rms,
                "hours": record.hours,
                "kappa_kw": record.kappa_kw,
                "samples_per_device_hour": record.samples / record.device_hours,
                "updates_per_device_hour": record.device_updates / record.device_hours,
                "energy_ratio": record.energy_kwh / base.energy_kwh,
                "device_hours_ratio": record.device_hours / base.device_hours,
                "hours_ratio": record.hours / base.hours,
                "estimated": record.estimated,
                "sources": list(record.sources),
                "metric": record.metric,
                "proportional_error": series["kappa_kw"] / record.kappa_kw - 1 if series else None,
                "cost_error": cost["errors"][i] if i is not None else None,
                "left_out_error": cost["left_out"][i] if i is not None and cost["left_out"] else None,
                "plan_error": plans["errors"][i] if i is not None and plans else None,
                "parts_kwh": cost["parts_kwh"][i] if i is not None else None,
                "phases_s": dict(record.phases),
            }
        )
    return rows


def _mean(errors: Sequence[float]) -> float | None:
    return math.fsum(abs(e) for e in errors) / len(errors) if errors else None


def _largest(errors: Sequence[float]) -> float | None:
    return max(abs(e) for e in errors) if errors else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
