"""The jobs of a sweep side by side, as figures: the end of ``experiment=daso/compare`` and its like."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRIC = "test/accuracy"


def read_sweep(folder: Path, metric: str = METRIC) -> list[dict[str, Any]]:
    """The finished jobs of a sweep that have a training history (`callbacks.training_history`).

    Args:
        folder: Of the sweep, with its ``table.csv``.
        metric: Column of the table that figures show.

    Returns:
        For every job ``label`` (what distinguishes it from the others, seeds aside), ``epochs`` of its history,
        ``metric`` and ``metric_name``, and ``inter_node_bytes`` of all ranks.
    """
    found = []
    for row, differing in finished_jobs(folder):
        run_dir = Path(row["run_dir"])
        path = run_dir / "history.json"
        if not path.is_file():
            continue
        sent = json.loads((run_dir / "results.json").read_text()).get("communication", {}).get("inter_node_bytes")
        values = [value if len(differing) == 1 else f"{name}={value}" for name, value in differing.items()]
        found.append(
            {
                "label": " ".join(values) or "all",
                "epochs": json.loads(path.read_text())["epochs"],
                "metric": float(row[metric]) if row.get(metric) else None,
                "metric_name": metric,
                "inter_node_bytes": sent,
            }
        )
    return found


def finished_jobs(folder: Path) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Rows of the table of a sweep, each with the settings that not all finished jobs share, seeds aside."""
    rows = _completed(folder)
    chosen = list(rows[0])[: list(rows[0]).index("parameters")] if rows else []
    differing = [c for c in chosen if c not in ("job", "seed") and len({row[c] for row in rows}) > 1]
    return [(row, {c: row[c] for c in differing}) for row in rows]


def _completed(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["status"] == "completed"]


def draw_sweep(folder: Path) -> str:
    """Draw strategies together into ``<folder>/figures``; what to print below the sweep's table."""
    from callbacks.figures import strategies

    runs = read_sweep(folder)
    figures = {name: getattr(strategies, name)(runs) for name in strategies.FIGURES}
    return save_figures(figures, folder) or "no job has left a history to draw"


def draw_low_rank(folder: Path) -> str:
    """Draw methods that make a network low-rank together, as ``experiment=oialr/compare`` does; what to print."""
    from callbacks.figures.low_rank import accuracy_against_stored

    figures = {"accuracy_against_stored": accuracy_against_stored(_completed(folder), METRIC)}
    return save_figures(figures, folder) or f"no job has both {METRIC} and test/stored_fraction to draw"


def save_figures(figures: Mapping[str, Any], folder: Path) -> str:
    """Save figures (None: there is nothing to draw) as ``<folder>/figures/<name>.png``; lines to print."""
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / "figures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=150)
            paths.append(path)
    return "\n".join(f"figure {path}" for path in paths)
