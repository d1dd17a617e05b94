"""``table.csv`` and ``table.md`` of a sweep: overrides x metrics x status, rewritten after every job."""

from __future__ import annotations

import csv
import importlib
import itertools
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runner.record import read
from runner.sweep_figures import log_figures

# Columns of the Markdown table; the CSV file holds every metric.
SHOWN_METRICS = 12
# Columns that are never folded into one line, however alike.
OUTCOME = {"job", "status", "world_size", "seconds"}
# What a job has cost, always shown where it is known: in all, in tries before the last one (not in the former), and per
# sample of training and inference.
COSTS = (
    "time/fit_s", "comm/total_inter_node_bytes",
    "energy/total_it_kwh", "energy/earlier_kwh", "energy/fit/train/j_per_sample", "energy/predict/j_per_sample",
    "energy/test/j_per_sample",
)  # fmt: skip


class SweepTable(Callback):
    """Hydra callback. The table is on disk after each job, so a killed sweep leaves one as well.

    Args:
        epilogue: Dotted name of a function that takes the folder of a sweep and returns what to print below the table.
    """

    # Of the sweep in this process.
    folder: ClassVar[Path | None] = None
    rows: ClassVar[list[dict[str, Any]]] = []
    running: ClassVar[tuple[Path, list[str], str] | None] = None
    epilogue: ClassVar[str | None] = None

    def __init__(self, epilogue: str | None = None) -> None:
        SweepTable.epilogue = epilogue

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the job: one that ends the sweep (an interruption, ``launch.on_failure=stop``) has no other hook."""
        hydra = HydraConfig.get()
        if hydra.mode != RunMode.MULTIRUN or config.get("check"):  # where nothing runs there is nothing to tabulate
            return
        run_dir = Path(hydra.runtime.output_dir)
        # hydra.sweep.dir holds interpolations that only resolve inside the job: take the job's folder and go up.
        SweepTable.folder = run_dir.parents[len(Path(str(hydra.sweep.subdir)).parts) - 1]
        overrides = OmegaConf.to_container(hydra.overrides.task)
        SweepTable.running = run_dir, [o.lstrip("+") for o in overrides if "=" in o], str(hydra.job.num)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Add the row of the job."""
        self._add()

    @classmethod
    def _add(cls) -> None:
        if cls.running is not None and cls.folder is not None:
            cls.rows.append(job_row(*cls.running))
            cls.running = None
            write_tables(cls.rows, cls.folder)

    @classmethod
    def show(cls) -> None:
        """Print the table of the sweep that ran in this process, if one did; also after an error ended it."""
        cls._add()
        if cls.folder is not None:
            print((cls.folder / "table.md").read_text())
            print(f"table  {cls.folder / 'table.csv'}")
            if cls.epilogue is not None and any(row["status"] == "completed" for row in cls.rows):
                module, _, name = cls.epilogue.rpartition(".")
                print(f"\n{getattr(importlib.import_module(module), name)(cls.folder)}")
                finished = [Path(row["run_dir"]) for row in cls.rows if row["status"] == "completed"]
                if told := log_figures(cls.folder, finished):
                    print(f"figures are in {', '.join(told)} too")


def job_row(run_dir: Path, overrides: list[str], number: str) -> dict[str, Any]:
    """One row from the ``results.json`` of a job; a job that never wrote one has failed."""
    result = read(run_dir) or {"status": "failed", "error": "ended before results.json was written"}
    status = result.get("status", "failed")
    row: dict[str, Any] = {"job": number}
    row |= dict(o.split("=", 1) for o in overrides)
    row |= {"parameters": result.get("parameters")}
    row |= {"status": "failed" if status == "running" else status, "world_size": result.get("world_size")}
    row |= {"seconds": result.get("seconds", {}).get("total"), "run_dir": str(run_dir)}
    row |= {"error": (result.get("error") or "").splitlines()[0] if result.get("error") else ""}
    return row | result.get("metrics", {}) | _traffic(result) | result.get("energy", {}).get("costs", {})


def _traffic(result: dict[str, Any]) -> dict[str, Any]:
    """What a whole training sent (`callbacks.communication`) and its time; metrics have the bytes of the last epoch."""
    sent = result.get("communication") or {}
    totals = {f"comm/total_{name}": sent[name] for name in ("inter_node_bytes", "intra_node_bytes") if name in sent}
    fit = result.get("seconds", {}).get("fit")
    return totals | ({"time/fit_s": fit} if totals and fit is not None else {})


def write_tables(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``table.csv`` (all columns) and ``table.md`` (what differs, and the main metrics)."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    temporary = folder / ".table.csv"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(folder / "table.csv")
    # Groups may have a slash in their name as metrics do: what comes before the size of the network was chosen.
    chosen = {name for row in rows for name in itertools.takewhile(lambda c: c != "parameters", row)}
    measured = [c for c in columns if "/" in c and c not in chosen]
    metrics = [c for c in measured if c.startswith("test/")] or [c for c in measured if not c.startswith("energy/")]
    # Whole numbers before their break-down: test/mae and test/mae_scaled before test/mae_day_1.
    metrics = sorted(metrics, key=lambda c: (c.removesuffix("_scaled").count("_"), c))[:SHOWN_METRICS]
    metrics += [c for c in COSTS if c in measured]
    plain = [c for c in columns if c not in measured and c not in {"run_dir", "error"}]
    same = [c for c in plain if c not in OUTCOME and len(rows) > 1 and len({str(r.get(c)) for r in rows}) == 1]
    plain = [c for c in plain if c not in same]
    if any(row.get("error") for row in rows):
        plain.append("error")
    shown = plain + metrics
    shared = [f"{c}={rows[0][c]}" for c in same if rows[0].get(c) is not None]
    lines = ["all jobs: " + " ".join(shared), ""] if shared else []
    lines += ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in shown) + " |" for row in rows]
    (folder / "table.md").write_text("\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value if value is not None else "")
    return text.replace("|", "\\|")
