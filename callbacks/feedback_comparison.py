"""Ways to train a network side by side: the end of ``experiment=f3`` and its variants."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.comparison import finished_jobs, save_figures

# Test metric, its name in tables, and the metric of the validation over epochs.
_METRICS = (("test/error", "test error [%]", "val/error"), ("test/mse", "test MSE", "val/mse"))
# Methods that update a block without waiting for the error of the current batch.
_UNLOCKED = {"drtp", "f3", "zeros"}
_RESAMPLES = 2000
_ALGORITHM = "model.algorithm"


def gap_closed(
    bp: Sequence[float], drtp: Sequence[float], other: Sequence[float]
) -> tuple[float, float | None, float | None] | None:
    """``(err_drtp - err_other) / (err_drtp - err_bp)`` of mean errors, with a 95 % interval from resampled seeds.

    Args:
        bp: Errors of backpropagation, one per seed.
        drtp: The same of direct random target projection.
        other: The same of the method.

    Returns:
        The value and the ends of the interval (None where a method has one seed). None where drtp is not worse than
        backpropagation: there is no gap.
    """

    def closed(b: Any, d: Any, o: Any) -> Any:
        return (d - o) / (d - b)

    means = [statistics.fmean(values) for values in (bp, drtp, other)]
    if means[1] <= means[0]:
        return None
    value = closed(*means)
    if min(map(len, (bp, drtp, other))) < 2:
        return value, None, None
    generator = np.random.default_rng(0)
    drawn = []
    for values in (bp, drtp, other):
        places = generator.integers(len(values), size=(_RESAMPLES, len(values)))
        drawn.append(np.asarray(values, dtype=float)[places].mean(1))
    has_gap = drawn[1] > drawn[0]
    low, high = np.quantile(closed(*(d[has_gap] for d in drawn)), (0.025, 0.975))
    return value, float(low), float(high)


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The finished jobs of a sweep.

    Args:
        folder: Of the sweep, with its ``table.csv``.

    Returns:
        For every job ``algorithm``, ``condition`` (what else distinguishes it, seeds aside), ``label``, ``metric`` and
        ``metric_name``, ``curve`` over epochs, and, where they were noted, ``step_ms``, ``peak_mib``, ``cosine`` and
        ``epoch_j`` (joules of an epoch of training).
    """
    found = []
    for row, differing in finished_jobs(folder):
        run = Path(row["run_dir"])
        record = json.loads((run / "results.json").read_text())
        chosen = next((names for names in _METRICS if row.get(names[0])), None)
        algorithm = record["config"]["model"].get("algorithm")
        if chosen is None or algorithm is None:
            continue
        others = {key: value for key, value in differing.items() if key != _ALGORITHM}
        condition = " ".join(f"{key.removeprefix('model.')}={value}" for key, value in others.items())
        step = record.get("step", {})
        found.append(
            {
                "algorithm": algorithm,
                "condition": condition,
                "label": f"{algorithm} {condition}".strip(),
                "metric": float(row[chosen[0]]),
                "metric_name": chosen[1],
                "curve": _curve(run, chosen[2]),
                "curve_name": chosen[1].replace("test", "validation"),
                "step_ms": None if "time/step_s" not in step else 1e3 * step["time/step_s"],
                "peak_mib": step.get("memory/peak_tensors_mib"),
                "cosine": record.get("feedback", {}).get("cosine"),
                "epoch_j": _joules_of_an_epoch(record),
            }
        )
    return found


def _curve(run: Path, metric: str) -> list[float | None]:
    path = run / "history.json"
    epochs = json.loads(path.read_text())["epochs"] if path.is_file() else []
    return [row.get("metrics", {}).get(metric) for row in epochs]


def _joules_of_an_epoch(record: Mapping[str, Any]) -> float | None:
    """Energy of the training steps over the number of epochs."""
    stage = (record.get("energy") or {}).get("stages", {}).get("fit/train", {})
    epochs = record.get("epoch")
    return stage["it_j"] / epochs if "it_j" in stage and epochs else None


def summarize(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of every method, best of each condition first after backpropagation.

    Returns:
        Rows with ``label``, ``algorithm``, ``condition``, ``errors`` of the seeds, their mean ``error``, ``gap`` to
        backpropagation, ``closed`` (`gap_closed`), and the means of the costs.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for job in jobs:
        groups.setdefault((job["condition"], job["algorithm"]), []).append(job)
    errors = {key: [job["metric"] for job in group] for key, group in groups.items()}
    rows = []
    for (condition, algorithm), group in groups.items():
        own = errors[condition, algorithm]
        bp, drtp = (errors.get((condition, name)) for name in ("bp", "drtp"))
        closed = gap_closed(bp, drtp, own) if bp and drtp and algorithm not in ("bp", "drtp") else None
        row = {
            "label": group[0]["label"], "algorithm": algorithm, "condition": condition, "errors": own,
            "error": statistics.fmean(own), "metric_name": group[0]["metric_name"], "closed": closed,
            "gap": statistics.fmean(own) - statistics.fmean(bp) if bp else None,
        }  # fmt: skip
        for name in ("step_ms", "peak_mib", "cosine", "epoch_j"):
            values = [job[name] for job in group if job[name] is not None]
            row[name] = statistics.fmean(values) if values else None
        rows.append(row)
    order = list(dict.fromkeys(row["condition"] for row in rows))
    return sorted(rows, key=lambda r: (order.index(r["condition"]), r["algorithm"] != "bp", r["error"]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    if not rows:
        return "no job has a test metric to compare"
    several = any(len(row["errors"]) > 1 for row in rows)
    head = ["method", rows[0]["metric_name"], "gap to bp", "gap closed", "waits for the error"]
    head += ["cosine to bp", "tensors at the peak [MiB]", "step [ms]", "training [J/epoch]"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        error = f"{row['error']:.4g}"
        if len(row["errors"]) > 1:
            error += f" ± {statistics.stdev(row['errors']):.2g}"
        unlocked = row["algorithm"] in _UNLOCKED or row["algorithm"].startswith("delayed")
        waits = "no" if unlocked or row["algorithm"] == "llo" else "yes"
        cells = [row["label"], error, _number(row["gap"], "+.3g"), _percent(row["closed"]), waits]
        cells += [_number(row["cosine"], ".2f"), _number(row["peak_mib"], ".3g"), _number(row["step_ms"], ".3g")]
        lines.append("| " + " | ".join([*cells, _number(row["epoch_j"], ".3g")]) + " |")
    note = "gap closed: (drtp - method) / (drtp - bp) of the errors"
    note += "; 95 % intervals from resampled seeds" if several else "; one seed: seed=1,2,3 gives intervals"
    return "\n".join([*lines, "", note])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(closed: tuple[float, float | None, float | None] | None) -> str:
    if closed is None:
        return ""
    value, low, high = closed
    return f"{value:.0%}" if low is None or high is None else f"{value:.0%} ({low:.0%} to {high:.0%})"


def draw_sweep(folder: Path) -> str:
    """Draw the methods together into ``<folder>/figures``, write their table as ``gap.md``; what to print below."""
    from callbacks.figures import feedback

    jobs = read_jobs(folder)
    rows = summarize(jobs)
    text = table(rows)
    (folder / "gap.md").write_text(text + "\n")
    figures = {
        "error_and_gap": feedback.error_and_gap(rows),
        "error_against_epoch": feedback.error_against_epoch(jobs),
        "cost": feedback.cost(rows),
    }
    return "\n".join(part for part in (text, f"table  {folder / 'gap.md'}", save_figures(figures, folder)) if part)
