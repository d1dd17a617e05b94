"""Nine quantiles of the next week of road traffic, calibrated on the weeks before each origin.

Acceptance 12. ``experiment=recycle/quantile``, raw and calibrated (rolling, and once on validation) from the same
settings. The published program cannot train its quantile options; a network with an unordered head and no calibration
let 3.6 % of its quantiles cross and covered 71 % with its 80 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.record import Result
from benchmarks.trained import SEEDS, runs

CLAIM: str = (
    "Nine quantiles of the next week of traffic have a mean scaled pinball loss of at most 0.090 and a median with an "
    "MAE of at most 0.215, never cross, and their calibrated 80 % intervals hold 75 % to 85 %."
)

BOUNDS = {
    "test/pinball_scaled": {"at_most": 0.090},
    "test/mae_scaled": {"at_most": 0.215},
    "test/crossing_rate": {"at_most": 0.0},
    "test/coverage_80": {"at_least": 0.75, "at_most": 0.85},
    "test/width_80_scaled": {},
    "test/crps_scaled": {},
}


def run(seeds: Sequence[int] = SEEDS) -> Result:
    """Train with every seed, with and without calibration."""
    rows = []
    for variant, calibrate in (("calibrated", "rolling"), ("calibrated once", "conformal"), ("raw", "none")):
        found = runs("experiment=recycle/quantile", f"model.calibrate={calibrate}", seeds=seeds)
        for metric, bound in BOUNDS.items():
            extra = bound if variant == "calibrated" else {}
            rows.append(found.row(metric.removeprefix("test/").replace("_", " "), variant, metric, **extra))
    return Result(rows, {"seeds": ", ".join(map(str, seeds)), "threads": 1, "quantiles": 9})
