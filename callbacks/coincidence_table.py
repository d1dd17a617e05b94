"""Coincidences of a run: the comparison that its test ends with, and the list of a prediction; tables of sweeps."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.comparison import finished_jobs, save_figures
from callbacks.gathering import gather_to_rank_zero, repeats_items
from callbacks.predictions import PredictionWriter
from callbacks.run_record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

NAMES = {
    "snn": "spiking network (trained)",
    "lor_snn": "spiking network of lines (untrained)",
    "competing_lines": "spiking network of competing lines (trained)",
    "pair_scorer": "pair scorer (trained)",
    "scw_paper": "single window, 8 steps (paper)",
    "scw_raw": "single window, best",
    "scw_raw_geometry": "single window + angle",
    "scw": "calibrated single window",
    "scw_geometry": "calibrated single window + angle",
}
"""What tables call the methods; GATE's policies are called ``GATE <policy>``."""


def method_name(method: str) -> str:
    """A method as tables and figures call it."""
    return NAMES.get(method, f"GATE {method}")


class CoincidenceTable(pl.Callback):
    """Writes ``<dirpath>/comparison.md`` and ``.csv`` from ``results_table()`` of the module, and says them.

    Results.json gets the rows under ``coincidences``.

    Args:
        dirpath: Folder of the tables, made if it does not exist.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.dirpath = Path(dirpath)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows = [  # on all ranks: metrics of all are collected
            {key: value if isinstance(value, str) else float(value) for key, value in row.items()}
            for row in pl_module.results_table()
        ]
        if not trainer.is_global_zero:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.record["coincidences"] = rows
        self.dirpath.mkdir(parents=True, exist_ok=True)
        (self.dirpath / "comparison.md").write_text(markdown(rows) + "\n")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (self.dirpath / "comparison.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        log.info("coincidences of the test, pairs of one decay:\n%s", markdown(rows))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table: F1 of listed pairs with its interval, of output spikes, what the lists hold, speed."""
    head = (
        "method", "window", "angle", "precision", "recall", "F1 (95 %)", "F1 of spikes", "\\|dt\\|", "randoms",
        "scatter", "hits/s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row.get("label", method_name(row["method"])),
            f"{row['window']:.0f}" if "window" in row else "",
            f"{row['angle_degree']:.0f}" if row.get("angle_degree") else "",
            f"{row['precision']:.4f}",
            f"{row['recall']:.4f}",
            f"{row['f1']:.4f} ({row['f1_low']:.3f}-{row['f1_high']:.3f})",
            f"{row['pair_f1']:.4f}" if "pair_f1" in row else "",
            f"{row['time_error_steps']:.2f}" if "time_error_steps" in row else "",
            f"{row['randoms_fraction']:.3f}",
            f"{row['scatter_fraction']:.3f}",
            f"{row['hits_per_s']:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class CoincidenceWriter(PredictionWriter):
    """Writes the list of coincidences of a prediction, by sample and time.

    Args:
        dirpath: Folder of the list, made if it does not exist.
        filename: ``.csv``, ``.parquet``, or ``.petsird`` (`datamodules` knows the scanner; needs the package petsird).
    """

    def __init__(self, dirpath: str | Path, filename: str = "coincidences.csv") -> None:
        if Path(filename).suffix not in (".csv", ".parquet", ".petsird"):
            raise ValueError(
                f"callbacks.predictions.filename={filename!r}: use a name that ends in .csv, .parquet or .petsird."
            )
        super().__init__(dirpath, "coincidences.csv")
        self.path = Path(dirpath) / filename

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "predict":
            parts = gather_to_rank_zero([] if repeats_items(trainer) else self._tables)
            tables = [table for part in parts or () for table in part]
            if tables:
                import pandas as pd

                whole = pd.concat(tables, ignore_index=True)
                whole = whole.sort_values(["sample", "step", "crystal_a"], kind="stable", ignore_index=True)
                self._store(whole, trainer.datamodule)
        self._tables = []

    def _store(self, table: pd.DataFrame, datamodule: Any) -> None:
        if self.path.suffix == ".petsird":
            self.path.parent.mkdir(parents=True, exist_ok=True)
            datamodule.write_petsird(table, self.path)
        else:
            self._write(table)


def draw_sweep(folder: Path) -> str:
    """One table of all jobs of a sweep, F1 over what was swept as a figure; what to print below the sweep's table."""
    from callbacks.figures.coincidence import f1_against_setting

    points = [
        (differing, row)
        for job, differing in finished_jobs(Path(folder))
        for row in json.loads((Path(job["run_dir"]) / "results.json").read_text()).get("coincidences") or []
    ]
    if not points:
        return "no job has compared coincidences"
    rows = sweep_rows(points)
    (Path(folder) / "comparison.md").write_text(markdown(rows) + "\n")
    figures = {"f1_against_setting": f1_against_setting(points)}
    return "\n".join(["coincidences, pairs of one decay:", markdown(rows), save_figures(figures, Path(folder))])


def sweep_rows(points: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several jobs in one table, with what differs in their labels.

    A method that has found the same in several jobs, as sorters do where networks differ, has one row.

    Args:
        points: What differs in a job, and a row of its table, for each method.
    """

    def result(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(sorted((name, value) for name, value in row.items() if name not in ("hits_per_s", "seconds")))

    times = Counter(result(row) for _, row in points)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for differing, row in points:
        label = " ".join(f"{name.rsplit('.', 1)[-1]}={value}" for name, value in differing.items())
        name = method_name(row["method"])
        rows.setdefault(result(row), {**row, "label": name if times[result(row)] > 1 else f"{name} ({label})"})
    return list(rows.values())
