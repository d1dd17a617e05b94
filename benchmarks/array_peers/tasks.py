"""What the programs of `benchmarks.array_peers` share: sizes, files, repeats. Imports numpy alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS, COLUMNS, CLUSTERS, ITERATIONS = 200_000, 18, 8, 30
LASSO_COLUMNS, LASSO_SWEEPS, LASSO_PENALTY = 64, 5, 0.1
DISTANCE_ROWS, RANK = 6000, 5
MORE = 5  # times as many rows where one process is compared with two


def files(folder: str | Path) -> dict[str, np.ndarray]:
    """Data that `benchmarks.arrays` has written; mapped, so that each process reads its part."""
    names = ("blobs", "start", "susy", "lasso_x", "lasso_y")
    return {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in names}


def part(array: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Rows of a process."""
    return np.array(array[len(array) * rank // size : len(array) * (rank + 1) // size])


def timed(
    call: Callable[[], Any],
    repeats: int,
    warm: bool = True,
    barrier: Callable[[], Any] = lambda: None,
    after: Callable[[], Any] | None = None,
) -> tuple[float, Any]:
    """Seconds of the fastest call, and what the last one returned: other programs on the machine only ever add."""
    if warm:
        call()
    laps, value = [], None
    for _ in range(repeats):
        barrier()
        begin = time.perf_counter()
        value = call()
        (after or barrier)()
        laps.append(time.perf_counter() - begin)
    return min(laps), value


def report(out: str, seconds: dict[str, float], values: dict[str, Any]) -> None:
    """Write what was found."""
    plain = {name: np.asarray(value, dtype=np.float64).tolist() for name, value in values.items()}
    Path(out).write_text(json.dumps({"seconds": seconds, "values": plain}))


def arguments() -> tuple[str, str]:
    """Folder of the data, file of the results."""
    return sys.argv[1], sys.argv[2]
