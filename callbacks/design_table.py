"""The comparison that a test of stacks of thin films ends with, as a table: of one run, and of the jobs of a sweep."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.comparison import finished_jobs
from callbacks.run_record import RunRecord

log = logging.getLogger(__name__)

COLUMNS = {"first": "first draw", "best": "best of N", "refined_top1": "refined top-1", "refined": "refined top-k"}


class DesignTable(pl.Callback):
    """Writes ``<dirpath>/comparison.md`` and ``comparison.csv`` from ``results_table()`` of the module, and says them.

    Results.json gets the rows under ``thin_film``, with the stacks that each network drew in a second on this machine.

    Args:
        dirpath: Folder of the tables, made if it does not exist.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.dirpath = Path(dirpath)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows = [plain(row) for row in pl_module.results_table()]  # on all ranks: metrics of all are collected
        if not trainer.is_global_zero:
            return
        speed = {name: count / seconds for name, (count, seconds) in pl_module.sampled.items() if seconds}
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.record["thin_film"] = {"table": rows, "stacks_per_s": speed}
        self.dirpath.mkdir(parents=True, exist_ok=True)
        (self.dirpath / "comparison.md").write_text(markdown(rows) + "\n")
        with (self.dirpath / "comparison.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "N", *(f"{c}_{s}" for c in COLUMNS for s in ("mean", "median", "p90"))])
            for row in rows:
                values = [row.get(c, {}).get(s, "") for c in COLUMNS for s in ("mean", "median", "p90")]
                writer.writerow([row["method"], row.get("N", ""), *values])
        log.info("spectral MAE, mean / median over the targets of the test:\n%s", markdown(rows))


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with numbers instead of tensors."""
    return {
        name: {key: float(number) for key, number in value.items()} if isinstance(value, Mapping) else value
        for name, value in row.items()
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; mean / median in each cell."""
    lines = ["| method | N | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = [f"{row[c]['mean']:.4f} / {row[c]['median']:.4f}" if c in row else "" for c in COLUMNS]
        lines.append(f"| {row['method']} | {row.get('N', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_sweep(folder: Path) -> str:
    """One table of all jobs of a sweep, each method once; what to print below the sweep's own table."""
    rows: list[dict[str, Any]] = []
    for job, differing in finished_jobs(Path(folder)):
        stored = json.loads((Path(job["run_dir"]) / "results.json").read_text()).get("thin_film")
        label = " ".join(f"{name}={value}" if name != "model" else value for name, value in differing.items())
        for row in stored["table"] if stored else []:
            named = row if row["method"].startswith("template") else row | {"method": f"{row['method']} ({label})"}
            if named not in rows:
                rows.append(named)
    if not rows:
        return "no job has tested a network that writes stacks"
    rows.sort(key=lambda row: not row["method"].startswith("template"))
    (Path(folder) / "comparison.md").write_text(markdown(rows) + "\n")
    return "spectral MAE, mean / median over the targets of the test:\n" + markdown(rows)
