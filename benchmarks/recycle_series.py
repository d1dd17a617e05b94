"""One setting of ReCycle with a linear path for series of different nature.

Acceptance 11 and 13. ``experiment=recycle/ensemble`` (one network with, one without the linear path) with nothing
changed but the series: road traffic, the mean electricity load of 321 clients, and bike rentals and half-hourly demand
where their files are in WATTLIGHT_DATA. All windows and splits are those of ``experiment=recycle``; errors are MAE on
the z-scaled axis.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.record import Result, Row
from benchmarks.trained import SEEDS, Runs, best_of, data_available, ratio_of_means, runs

CLAIM: str = (
    "One setting of ReCycle, half of it with a linear path, stays within 5 % of the best model of the table on traffic "
    "(MAE at most 0.215), electricity (0.135) and bike rentals (0.415)."
)

MAE = "test/mae_scaled"
OURS = "recycle_ensemble"
TRAINED = (OURS, "recycle", "recycle_linear_skip", "rhp_linear", "dlinear", "nlinear", "cyclenet")
UNTRAINED = ("seasonal_naive_week", "rhp")
AT_MOST = {"traffic": 0.215, "electricity": 0.135, "bikes": 0.415, "elecdemand": None}
WEEK = {"elecdemand": 336}


def run(seeds: Sequence[int] = SEEDS, series: Sequence[str] = tuple(AT_MOST)) -> Result:
    """Train every model on every series that is there."""
    rows: list[Row] = []
    missing = [name for name in series if not data_available(name)]
    for name in series:
        if name not in missing:
            rows += _rows(name, {model: _runs(name, model, seeds) for model in (*TRAINED, *UNTRAINED)})
    return Result(rows, {"seeds": ", ".join(map(str, seeds)), "threads": 1, "not there": ", ".join(missing) or "-"})


def _runs(series: str, model: str, seeds: Sequence[int]) -> Runs:
    overrides = ["experiment=recycle/ensemble", f"data={series}", f"model={model}"]
    if model == "cyclenet":
        overrides.append(f"model.net.backbone.cycle_length={WEEK.get(series, 168)}")
    return runs(*overrides, seeds=seeds[:1] if model in UNTRAINED else seeds)


def _rows(series: str, table: dict[str, Runs]) -> list[Row]:
    limit = AT_MOST[series]
    what = f"{series}: test MAE"
    rows = []
    for model, found in table.items():
        bound = {"at_most": limit} if model == OURS and limit is not None else {}
        rows.append(found.row(f"{what}, scaled", model, MAE, **bound))
    bound = {"at_most": 1.05} if limit is not None else {}
    return [*rows, ratio_of_means(what, table, OURS, best_of(table, MAE), MAE, **bound)]
