"""Fits of energy: proportional to device hours (the paper's claim), and as a sum of four costs.

The four-term model (section 3.3 of docs/experiments/energy_scaling.md, not the paper's own) is

    E = P_node M + P_device H + e_s S + e_u n U

with powers in kW, hours, and energies per sample and per device update. Errors are relative: costs span two orders of
magnitude, and an unweighted fit would be one of the largest runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import norm as normal
from scipy.stats import t as student

from physics.energy_cost.configuration import Record
from physics.energy_cost.intervals import Uncertainty, uncertainty

Array = NDArray[np.float64]

J_PER_KWH = 3.6e6
TERMS: dict[str, str] = {
    "node": "P_node [kW]",
    "device": "P_device [kW]",
    "samples": "e_s [J per sample]",
    "updates": "e_u [J per device update]",
}
"""Terms of the model -> symbol and unit of their coefficients."""

NESTED: tuple[tuple[str, ...], ...] = (
    ("device",),
    ("device", "updates"),
    ("node", "device"),
    ("node", "device", "samples"),
    ("node", "device", "samples", "updates"),
)
"""Models that are compared, from the paper's to the whole one."""

COLLINEAR = 0.01
"""Smallest singular value of the weighted columns, each of length one, below which terms cannot be told apart."""

_MERGES = (("node", "device"), ("samples", "updates"))


def column(term: str, record: Record) -> float:
    """Energy in kWh that a coefficient of one stands for."""
    return {
        "node": record.node_hours,
        "device": record.device_hours,
        "samples": record.samples / J_PER_KWH,
        "updates": record.device_updates / J_PER_KWH,
    }[term]


@dataclass(frozen=True)
class Proportional:
    """E = kappa H through the origin, least squares (section 2.1).

    Attributes:
        kappa_kw: Power per device.
        low, high: 95 % interval, by bootstrap over repetitions, from the residuals where nothing was repeated; 0 to
            infinity for a single run.
        r_squared: 1 - residual / total sum of squares about the mean; NaN for one run.
        errors: Of each record, (predicted - measured) / measured: a high R^2 hides them.
    """

    kappa_kw: float
    low: float
    high: float
    r_squared: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class CostFit:
    """A fitted sum of costs.

    Attributes:
        terms: Names of the columns; merged ones are ``node+device`` and ``samples+updates``.
        coefficients: Of each term, >= 0, in the units of `TERMS`; ``node+device`` is P_device + P_node / n_node [kW],
            ``samples+updates`` is e_s + e_u / LBS [J per sample].
        intervals: 95 % intervals per term, by bootstrap over repetitions, without any from the residuals.
        errors: Of each record, (predicted - measured) / measured.
        condition: Largest / smallest singular value of the weighted columns before anything was merged.
        warnings: What the runs cannot tell apart.
        devices_per_node: n / m of all runs, where ``node+device`` is merged: it holds for full nodes only.
        local_batch_size: LBS of all runs, where ``samples+updates`` is merged.
        unidentified: Directions of the weighted columns that no run has anything of; a configuration that needs them
            cannot be predicted.
        scale: Lengths of the weighted columns.
        uncertainty: Of forecasts.
    """

    terms: tuple[str, ...]
    coefficients: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    errors: tuple[float, ...]
    condition: float
    warnings: tuple[str, ...] = ()
    devices_per_node: float | None = None
    local_batch_size: float | None = None
    unidentified: tuple[tuple[float, ...], ...] = ()
    scale: tuple[float, ...] = ()
    uncertainty: Uncertainty | None = None

    @property
    def mean_error(self) -> float:
        """Mean of the absolute relative errors."""
        return float(np.mean(np.abs(self.errors)))

    @property
    def max_error(self) -> float:
        """Largest absolute relative error."""
        return float(np.max(np.abs(self.errors)))

    def parts(self, record: Record) -> dict[str, float]:
        """Energy of each term in kWh.

        Raises:
            ValueError: If the fit says nothing about such a configuration; names the runs that would be needed.
        """
        self._check(record)
        row = _row(self.terms, record)
        return dict(zip(self.terms, (float(c * x) for c, x in zip(self.coefficients, row, strict=True)), strict=True))

    def predict(self, record: Record) -> float:
        """E in kWh; `record`'s own energy is not looked at.

        Raises:
            ValueError: See `parts`.
        """
        return math.fsum(self.parts(record).values())

    def half_width(self, record: Record) -> float:
        """Relative half width of the 95 % interval of the energy of a run whose hours are known.

        Raises:
            ValueError: See `parts`.
        """
        assert self.uncertainty is not None
        row = np.array(_row(self.terms, record))
        return self.uncertainty.half_width(row / self.predict(record))

    def _check(self, record: Record) -> None:
        if self.devices_per_node is not None and not math.isclose(record.devices_per_node, self.devices_per_node):
            raise ValueError(
                f"{record.devices} devices on {record.nodes} nodes: all runs of the fit have {self.devices_per_node:g} "
                "devices per node, so what a node costs by itself is unknown; add a run on a partly filled node"
            )
        if self.local_batch_size is not None and record.local_batch_size != self.local_batch_size:
            raise ValueError(
                f"{record.local_batch_size} samples per device and step: all runs of the fit have "
                f"{self.local_batch_size:g}, so samples and updates cannot be told apart; add runs at another local "
                "batch size"
            )
        row = np.array(_row(self.terms, record)) * np.array(self.scale) if self.scale else np.zeros(0)
        for direction in self.unidentified:
            share = abs(float(row @ np.array(direction))) / float(np.linalg.norm(row))
            if share > 10 * COLLINEAR:
                names = [t for t, d in zip(self.terms, direction, strict=True) if abs(d) > 0.1]
                raise ValueError(
                    f"the runs of the fit cannot tell {' and '.join(names)} apart, and this configuration "
                    f"({record.devices} devices, {record.local_batch_size} samples each) needs them; add runs like it"
                )


def _row(terms: Sequence[str], record: Record) -> list[float]:
    """Merged columns are those of their second part for devices, of their first for samples."""
    return [column({"node+device": "device", "samples+updates": "samples"}.get(term, term), record) for term in terms]


def fit_proportional(records: Sequence[Record], draws: Sequence[Sequence[Record]] = ()) -> Proportional:
    """Fit E = kappa H.

    Args:
        records: At least one.
        draws: Resampled records for the interval (`bootstrap`); without any it comes from the residuals.
    """
    hours = np.array([record.device_hours for record in records])
    energy = np.array([record.energy_kwh for record in records])
    kappa = float(hours @ energy / (hours @ hours))
    residual, total = ((energy - kappa * hours) ** 2).sum(), ((energy - energy.mean()) ** 2).sum()
    low, high = _interval([fit_proportional(draw).kappa_kw for draw in draws])
    if not draws and len(records) > 1:
        width = float(student.ppf(0.975, len(records) - 1)) * math.sqrt(residual / (len(records) - 1) / (hours @ hours))
        low, high = max(0.0, kappa - width), kappa + width
    return Proportional(
        kappa, low, high, float(1 - residual / total) if total > 0 else math.nan, tuple(kappa * hours / energy - 1)
    )


def fit_cost(
    records: Sequence[Record], terms: Sequence[str] = tuple(TERMS), draws: Sequence[Sequence[Record]] = ()
) -> CostFit:
    """Fit a sum of costs by non-negative least squares of relative errors.

    Columns that no run tells apart are merged (all nodes full; all runs at one local batch size), other collinear
    directions are remembered and refused in predictions.

    Args:
        records: Each configuration once; at least as many as terms.
        terms: Of `TERMS`.
        draws: Resampled records for the intervals (`bootstrap`); without any they come from the residuals.

    Raises:
        ValueError: If there are fewer runs than terms, or runs on different hardware.
    """
    _check_records(records, terms)
    terms = tuple(terms)
    full = _weighted(terms, records)
    values = np.linalg.svd(full / np.linalg.norm(full, axis=0), compute_uv=False)
    condition = float(values[0] / values[-1]) if values[-1] > 0 else math.inf
    warnings: list[str] = []
    constants: dict[str, float] = {}
    for pair in _MERGES:
        if set(pair) <= set(terms) and _inseparable(pair, records):
            merged = "+".join(pair)
            terms = tuple(merged if term == pair[1] else term for term in terms if term != pair[0])
            first = records[0]
            if pair[0] == "node":
                constants["devices_per_node"] = first.devices_per_node
                warnings.append(
                    f"every run has {first.devices_per_node:g} devices per node: P_node and P_device cannot be told "
                    "apart; their sum per device is fitted, and partly filled nodes cannot be predicted"
                )
            else:
                constants["local_batch_size"] = first.local_batch_size
                warnings.append(
                    f"every run has {first.local_batch_size} samples per device and step: e_s and e_u cannot be told "
                    "apart; their sum per sample is fitted, and other local batch sizes cannot be predicted"
                )
    matrix = _weighted(terms, records)
    lengths = np.linalg.norm(matrix, axis=0)
    _, values, directions = np.linalg.svd(matrix / lengths, full_matrices=True)
    weak = [directions[i] for i in range(len(terms)) if i >= len(values) or values[i] < COLLINEAR]
    for direction in weak:
        names = [term for term, weight in zip(terms, direction, strict=True) if abs(weight) > 0.1]
        warnings.append(
            f"these runs hardly tell {' and '.join(names)} apart; only configurations like theirs can be predicted"
        )
    coefficients = _solve(matrix)
    errors = matrix @ coefficients - 1
    samples = [_solve(_weighted(terms, draw)) for draw in draws]
    spread = uncertainty(matrix, errors, COLLINEAR)
    widths = spread.of_coefficients()
    return CostFit(
        terms,
        tuple(float(value) for value in coefficients),
        tuple(
            _interval([sample[i] for sample in samples]) if draws else (max(0.0, float(c) - width), float(c) + width)
            for i, (c, width) in enumerate(zip(coefficients, widths, strict=True))
        ),
        tuple(float(value) for value in errors),
        condition,
        tuple(warnings),
        unidentified=tuple(tuple(float(x) for x in direction) for direction in weak),
        scale=tuple(float(1 / length) for length in lengths),
        uncertainty=spread,
        **constants,
    )


def leave_one_out(records: Sequence[Record], terms: Sequence[str] = tuple(TERMS)) -> list[float]:
    """Relative error of each run as the others predict it.

    The columns are those of the fit to all: what a fold cannot tell apart shows as its error, not as a refusal.
    """
    terms = fit_cost(records, terms).terms
    matrix = _weighted(terms, records)
    return [float(row @ _solve(np.delete(matrix, i, axis=0)) - 1) for i, row in enumerate(matrix)]


def nested_models(records: Sequence[Record]) -> list[tuple[CostFit, list[float]]]:
    """Every model of `NESTED` that there are runs for, with its leave-one-out errors; the choice is the reader's."""
    return [(fit_cost(records, terms), leave_one_out(records, terms)) for terms in NESTED if len(terms) < len(records)]


def bootstrap(groups: Sequence[Sequence[Record]], count: int, seed: int = 0) -> list[list[Record]]:
    """Draw means of configurations: repetitions with replacement; a published mean from a normal distribution.

    Repetitions are few, often two: their deviations are those from their own mean, too small by sqrt((n - 1) / n), and
    know their spread badly. They are widened by sqrt(n / (n - 1)), and by the quantile of Student's t of all
    configurations together, sum of n - 1, over the normal one.

    Args:
        groups: Runs of each configuration, or the one record of its mean and deviation.
        count: Draws.
        seed: Of the draws.

    Returns:
        ``count`` lists of a record per group.
    """
    generator = np.random.default_rng(seed)
    repetitions = [len(members) if len(members) > 1 else members[0].repetitions for members in groups]
    freedom = sum(n - 1 for n in repetitions)
    few = float(student.ppf(0.975, freedom) / normal.ppf(0.975)) if freedom else 1.0
    out = []
    for _ in range(count):
        drawn = []
        for members, n in zip(groups, repetitions, strict=True):
            first = members[0]
            if len(members) > 1:
                measured = np.array([(member.energy_kwh, member.device_hours) for member in members])
                mean = measured.mean(axis=0)
                shift = measured[generator.integers(n, size=n)].mean(axis=0) - mean
                energy, hours = (float(x) for x in mean + few * math.sqrt(n / (n - 1)) * shift)
            else:
                share = few / math.sqrt(max(n - 1, 1))
                energy = first.energy_kwh + share * first.energy_rms_kwh * float(generator.standard_normal())
                hours = first.device_hours + share * first.device_hours_rms * float(generator.standard_normal())
            drawn.append(replace(first, energy_kwh=energy, device_hours=hours))
        out.append(drawn)
    return out


def _weighted(terms: Sequence[str], records: Sequence[Record]) -> Array:
    """Columns divided by the energies: the target is one everywhere."""
    rows = np.array([_row(terms, record) for record in records], dtype=np.float64)
    return rows / np.array([record.energy_kwh for record in records])[:, None]


def _solve(matrix: Array) -> Array:
    lengths = np.linalg.norm(matrix, axis=0)
    found: Array = nnls(matrix / lengths, np.ones(len(matrix)))[0]
    return found / lengths


def _inseparable(pair: Sequence[str], records: Sequence[Record]) -> bool:
    """The columns are in one proportion but for incomplete batches."""
    key = "devices_per_node" if pair[0] == "node" else "local_batch_size"
    return len({getattr(record, key) for record in records}) == 1


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return (0.0, math.inf)
    low, high = np.quantile(np.array(values), [0.025, 0.975])
    return (float(low), float(high))


def _check_records(records: Sequence[Record], terms: Sequence[str]) -> None:
    if unknown := [term for term in terms if term not in TERMS]:
        raise ValueError(f"terms={unknown}: choose among {', '.join(TERMS)}")
    if len(records) < len(terms):
        raise ValueError(
            f"{len(records)} configurations for {len(terms)} costs ({', '.join(terms)}); add runs with other numbers "
            "of devices or other batch sizes"
        )
    if len(kinds := sorted({record.hardware for record in records})) > 1:
        raise ValueError(f"runs on different hardware ({'; '.join(kinds)}): fit each by itself")
