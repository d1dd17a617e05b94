"""What each idea of ReCycle is worth, on three series.

Acceptance 9. ``experiment=recycle/ablation``: residual input, residual forecast and zero start, on and off. The paper's
own ablation removes the profile from input and output; the zero start is ours. Compression is not switched off here:
a Transformer on 504 hourly tokens needs minutes per epoch (`pcc_gain`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from benchmarks.record import Result, Row
from benchmarks.trained import SEEDS, Runs, best_of, data_available, ratio_of_means, runs

CLAIM: str = (
    "Over traffic, electricity and bikes (geometric mean of the errors) no combination that lacks residual input, "
    "residual forecast or zero start is better than all three together."
)

MAE = "test/mae_scaled"
SWITCHES = ("residual_input", "residual_forecast", "zero_init")
FULL = "full"
SERIES = ("traffic", "electricity", "bikes")


def run(seeds: Sequence[int] = SEEDS, series: Sequence[str] = SERIES) -> Result:
    """Train all eight combinations on every series with every seed; bikes only where their file is."""
    missing = [name for name in series if not data_available(name)]
    tables = {name: _trained(name, seeds) for name in series if name not in missing}
    rows: list[Row] = []
    for name, table in tables.items():
        best = best_of(table, MAE, [variant for variant in table if variant != FULL])
        rows += [found.row(f"{name}: test MAE, scaled", variant, MAE) for variant, found in table.items()]
        # The promise was made for traffic.
        bound = {"at_most": 1.0} if name == "traffic" else {}
        rows.append(ratio_of_means(f"{name}: test MAE", table, FULL, best, MAE, **bound))
    overall = {
        variant: statistics.geometric_mean(
            table[variant].mean(MAE) / table[FULL].mean(MAE) for table in tables.values()
        )
        for variant in next(iter(tables.values()))
    }
    for variant, value in overall.items():
        bound = {} if variant == FULL else {"at_least": 1.0}
        rows.append(
            {"what": "all series: test MAE, ratio", "variant": f"{variant} / {FULL}", "value": value, "unit": ""}
            | bound
        )
    return Result(rows, {"seeds": ", ".join(map(str, seeds)), "threads": 1, "not there": ", ".join(missing) or "-"})


def _trained(series: str, seeds: Sequence[int]) -> dict[str, Runs]:
    table = {}
    for choice in itertools.product((True, False), repeat=len(SWITCHES)):
        without = [name for name, on in zip(SWITCHES, choice, strict=True) if not on]
        name = f"without {', '.join(without)}" if without else FULL
        overrides = [f"model.net.{switch}=false" for switch in without]
        table[name] = runs("experiment=recycle", f"data={series}", *overrides, seeds=seeds)
    return table
