"""Controls and transplants side by side: the end of ``experiment=bayesian_lottery/control`` and ``/transplant``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.comparison import save_figures
from networks.lottery.tickets import load_ticket

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("accuracy", "nll", "brier", "ece", "mace")


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The finished jobs of a sweep, and the searches that they began with or are compared with, if these were tested.

    Args:
        folder: Of the sweep, with its ``table.csv``.

    Returns:
        For every ticket ``series``, ``seed``, ``level``, ``remaining``, ``cost_s`` where it is known, and the test
        metrics by their short names, means over the evaluation seeds.
    """
    with (folder / "table.csv").open(newline="") as file:
        runs = [Path(row["run_dir"]) for row in csv.DictReader(file) if row["status"] == "completed"]
    found, sources = [], {}
    for run in runs:
        config = _record(run)["config"]
        found += _levels(run, _series(run))
        pruning = config["callbacks"].get("iterative_pruning", {})
        for path in (config["model"].get("ticket"), pruning.get("compare")):
            if path:
                sources[_source(path)] = None
    for source in sources:
        if (source / "results.json").is_file():
            found += _levels(source, f"ticket ({_search(source)})")
    return found


def _record(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _source(ticket: str) -> Path:
    """The run that a ticket, or its folder, is of."""
    path = Path(ticket)
    path = path.parent if path.is_file() else path
    return path.parent if path.name == "tickets" else path


def _epochs(config: Mapping[str, Any]) -> int | None:
    """Epochs of a level; None: not known."""
    pruning = config.get("callbacks", {}).get("iterative_pruning", {})
    return pruning.get("epochs_per_level") or config.get("trainer", {}).get("max_epochs")


def _series(run: Path) -> str:
    """What was done to the ticket."""
    config = _record(run)["config"]
    model, pruning = config["model"], config["callbacks"].get("iterative_pruning", {})
    if not model.get("ticket"):
        return _search(run)
    kind = "" if model["bayesian"] else " (ordinary network)"
    if (epochs := _epochs(config)) and epochs != _epochs(_record(_source(model["ticket"])).get("config", {})):
        kind = f", {epochs} epochs{kind}"
    if model["control"] != "none":
        return model["control"] + kind
    again = f", {pruning['score']}" if pruning.get("levels") else ""
    return f"weights: {model['source']}{again}{kind}"


def _search(run: Path) -> str:
    config = _record(run)["config"]
    pruning = config["callbacks"].get("iterative_pruning", {})
    score = pruning.get("score", "auto")
    if score == "auto":
        score = "snr" if config["model"].get("bayesian") else "ordinary network"
    return score if pruning.get("rewind", "init") == "init" else f"{score}, {pruning['rewind']}"


def _levels(run: Path, series: str) -> list[dict[str, Any]]:
    """The tickets of one run that were tested, by its last test."""
    record = _record(run)
    parts = [record, *reversed(record.get("earlier", []))]
    metrics = next((p["metrics"] for p in parts if any(n.startswith("test/level_") for n in p["metrics"])), {})
    rows = []
    levels = sorted({name.split("/")[1] for name in metrics if name.startswith("test/level_")})
    for level in levels:
        row = {"series": series, "seed": record["config"]["seed"], "level": int(level.removeprefix("level_"))}
        row["remaining"] = metrics[f"test/{level}/remaining"]
        row |= {name: metrics[key] for name in METRICS if (key := f"test/{level}/{name}") in metrics}
        if (path := run / "tickets" / f"{level}.pt").is_file():
            row["ticket"] = path
            if (cost := load_ticket(path).about.get("cost_s")) is not None:
                row["cost_s"] = cost
        rows.append(row)
    return rows


def table(rows: Iterable[Mapping[str, Any]], metric: str = "accuracy") -> str:
    """Means over seeds, a line per level and a column per series, as Markdown."""
    rows = list(rows)
    series = list(dict.fromkeys(row["series"] for row in rows))
    lines = [f"| level (left), test {metric} | {' | '.join(series)} |", "|---" * (len(series) + 1) + "|"]
    for level in sorted({row["level"] for row in rows}):
        own = [row for row in rows if row["level"] == level and metric in row]
        cells = []
        for name in series:
            values = [row[metric] for row in own if row["series"] == name]
            cells.append(f"{np.mean(values):.3f}" if values else "")
        left = np.mean([row["remaining"] for row in own]) if own else float("nan")
        lines.append(f"| {level} ({left:.3f}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared_masks(rows: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """A level and its masks by series: the sparsest one that most series have, of one seed and one architecture."""
    rows = [row for row in rows if "ticket" in row and row["level"]]
    groups: dict[tuple[int, int], dict[str, Path]] = {}
    for row in rows:
        groups.setdefault((row["level"], row["seed"]), {}).setdefault(row["series"], row["ticket"])
    if not groups:
        return 0, {}
    level, seed = max(groups, key=lambda key: (len(groups[key]), key[0], -key[1]))
    masks = {name: load_ticket(path).masks for name, path in groups[level, seed].items()}
    first = next(iter(masks.values()))
    same = {name: own for name, own in masks.items() if own.keys() == first.keys()}
    return level, same if all(own[k].shape == first[k].shape for own in same.values() for k in first) else {}


def draw_sweep(folder: Path) -> str:
    """Draw the tickets of a sweep into ``<folder>/figures``; what to print below the sweep's table."""
    from callbacks.figures import lottery

    rows = read_jobs(Path(folder))
    if not rows:
        return "no job has tested a ticket"
    shown = [name for name in ("accuracy", "nll", "ece") if any(name in row for row in rows)]
    figures = {"tickets": lottery.compared(rows, shown)}
    costs = [row for row in rows if "cost_s" in row]
    figures["cost"] = lottery.against_cost(costs, cost="cost_s") if costs else None
    level, masks = compared_masks(rows)
    figures["overlaps"] = lottery.mask_overlaps(masks, f"masks of level {level}")
    printed = [table(rows), *([table(rows, "nll")] if "nll" in shown else [])]
    return "\n\n".join([*printed, save_figures(figures, Path(folder))])
