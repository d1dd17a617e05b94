"""What each idea of ReCycle is worth, on three series.

Acceptance 9. ``experiment=recycle/ablation``: residual input, residual forecast and zero start, on and off. The paper's
own ablation removes the profile from input and output; the zero start is ours. Compression is not switched off here:
a Transformer on 504 hourly tokens needs minutes per epoch (`pcc_gain`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.record import Result, Row
from benchmarks.trained import SEEDS, best_of, data_available, ratio_of_means, runs

CLAIM: str = "With residual input, residual forecast and the zero start together ReCycle has its lowest error."

MAE = "test/mae_scaled"
SWITCHES = ("residual_input", "residual_forecast", "zero_init")
FULL = "full"
SERIES = ("traffic", "electricity", "bikes")


def run(seeds: Sequence[int] = SEEDS, series: Sequence[str] = SERIES) -> Result:
    """Train all eight combinations on every series with every seed; bikes only where their file is."""
    missing = [name for name in series if not data_available(name)]
    rows = [row for name in series if name not in missing for row in _rows(name, seeds)]
    return Result(rows, {"seeds": ", ".join(map(str, seeds)), "threads": 1, "not there": ", ".join(missing) or "-"})


def _rows(series: str, seeds: Sequence[int]) -> list[Row]:
    table = {}
    for choice in itertools.product((True, False), repeat=len(SWITCHES)):
        without = [name for name, on in zip(SWITCHES, choice, strict=True) if not on]
        name = f"without {', '.join(without)}" if without else FULL
        overrides = [f"model.net.{switch}=false" for switch in without]
        table[name] = runs("experiment=recycle", f"data={series}", *overrides, seeds=seeds)
    best = best_of(table, MAE, [name for name in table if name != FULL])
    rows = [found.row(f"{series}: test MAE, scaled", name, MAE) for name, found in table.items()]
    return [*rows, ratio_of_means(f"{series}: test MAE", table, FULL, best, MAE, at_most=1.0)]
