"""The runs of a pruning sweep in one table with its figures: the end of ``experiment=pruning/sweep`` and its like."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from callbacks.comparison import finished_jobs, save_figures
from callbacks.pruning_table import Table, verdicts

_TEXT = ("name", "stage", "method", "model", "label", "seed")


def read_study(folder: Path) -> list[dict[str, Any]]:
    """Rows of all finished jobs of a sweep, with ``model``, ``seed`` and a ``label`` that tells methods apart.

    Networks that several jobs share, because they begin with one dense training, come once.

    Args:
        folder: Of the sweep, with its ``table.csv``.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for job, differing in finished_jobs(folder):
        run = Path(job["run_dir"])
        if not (run / "pruning.csv").is_file():
            continue
        config = json.loads((run / "results.json").read_text())["config"]
        model = _model(config, differing)
        label = _label(config, differing)
        layers = _layers(run)
        with (run / "pruning.csv").open(newline="") as file:
            for text in csv.DictReader(file):
                row = {name: _value(name, value) for name, value in text.items() if value != ""}
                row |= {"model": model, "seed": config["seed"], "layers": layers.get(row["name"], {})}
                if row["stage"] in ("pruned", "tuned"):
                    row["label"] = label
                # The first measurement of what jobs share.
                key = (row["name"], row.get("label"), model, config["seed"])
                found.setdefault(key, row)
    return list(found.values())


def _value(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    number = float(text)
    return int(number) if number.is_integer() and "." not in text else number


def _layers(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    path = run / "pruning_layers.csv"
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["network"], {})[row["layer"]] = float(row["density"])
    return found


def _model(config: Mapping[str, Any], differing: Mapping[str, str]) -> str:
    """Which network a job is of, with the sizes that the sweep varies."""
    node = config["model"].get("net", {})
    target = node.get("backbone", node).get("_target_", config["model"]["_target_"]).rpartition(".")[2]
    sizes = [f"{n.rpartition('.')[2]}={v}" for n, v in differing.items() if n.startswith(("model.", "data."))]
    return " ".join([target, *sizes])


def _label(config: Mapping[str, Any], differing: Mapping[str, str]) -> str:
    """How a job prunes, with the settings that the sweep varies."""
    pruning = config["callbacks"]["pruning"]
    skipped = ("method", "sparsity", "densities")
    names = {n: n.rpartition(".")[2] for n in differing if n.startswith("callbacks.pruning.")}
    return " ".join([pruning["method"], *(f"{s}={differing[n]}" for n, s in names.items() if s not in skipped)])


def draw_sweep(folder: Path) -> str:
    """Write ``pruning.csv`` and ``pruning.md`` of a sweep and draw its figures; what to print below its table."""
    from callbacks.figures import pruning

    rows = read_study(folder)
    if not rows:
        return "no job has measured a pruned network"
    means = averaged(rows)  # the best seed of a pruned network beside another one of the dense network says nothing
    shown = [row | {"name": " ".join(filter(None, (row["model"], row["name"])))} for row in means]
    table = Table(shown)
    if any(row["seeds"] > 1 for row in means):
        table.verdicts.append("Means over seeds; every one is in pruning.csv.")
    models = dict.fromkeys(row["model"] for row in means)
    for model in models:
        own = [row for row in means if row["model"] == model]
        table.verdicts += [f"{model}: {line}" for line in verdicts(own)]
    columns = ["model", "seed", "label", *(c for c in Table(rows).columns() if c not in ("model", "seed", "label"))]
    with (folder / "pruning.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "pruning.md").write_text(table.text() + "\n")
    names = ("error_against_density", "error_against_cost", "layer_densities", "parameters")
    drawn = save_figures({name: getattr(pruning, name)(means) for name in names}, folder)
    return f"{table.text()}\n\n{drawn}"


def averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of every network, with their number as ``seeds``."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row.get("label"), row["model"]), []).append(row)
    found = []
    for own in groups.values():
        mean = dict(own[0])
        for name, value in own[0].items():
            numbers = [row[name] for row in own if isinstance(row.get(name), int | float)]
            if isinstance(value, int | float) and any(number != value for number in numbers):  # counts stay whole
                mean[name] = sum(numbers) / len(numbers)
        mean["seeds"] = len(own)
        found.append(mean)
    return found
