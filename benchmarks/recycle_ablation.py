"""What each idea of ReCycle is worth on road traffic.

Acceptance 9. ``experiment=recycle/ablation``: residual input, residual forecast and zero start, on and off. The paper's
own ablation removes the profile from input and output; the zero start is ours. Compression is not switched off here:
a Transformer on 504 hourly tokens needs minutes per epoch (`pcc_gain`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.record import Result
from benchmarks.trained import SEEDS, best_of, runs

CLAIM: str = "With residual input, residual forecast and the zero start together ReCycle has its lowest error."

MAE = "test/mae_scaled"
SWITCHES = ("residual_input", "residual_forecast", "zero_init")
FULL = "full"


def run(seeds: Sequence[int] = SEEDS) -> Result:
    """Train all eight combinations with every seed."""
    table = {}
    for choice in itertools.product((True, False), repeat=len(SWITCHES)):
        without = [name for name, on in zip(SWITCHES, choice, strict=True) if not on]
        name = f"without {', '.join(without)}" if without else FULL
        overrides = [f"model.net.{switch}=false" for switch in without]
        table[name] = runs("experiment=recycle", *overrides, seeds=seeds)
    best = best_of(table, MAE, [name for name in table if name != FULL])
    rows = [found.row("test MAE, scaled", name, MAE) for name, found in table.items()]
    ratio = table[FULL].mean(MAE) / table[best].mean(MAE)
    rows.append({"what": "test MAE, ratio", "variant": f"{FULL} / {best}", "value": ratio, "unit": "", "at_most": 1.0})
    return Result(rows, {"seeds": ", ".join(map(str, seeds)), "threads": 1})
