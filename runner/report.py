"""What the user reads at the end of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from runner.record import read


def summary(result: dict[str, Any]) -> str:
    """Table of test metrics, best checkpoint, figures, folder, and the command that resumes the run."""
    run_dir = Path(result["run_dir"])
    lines: list[str] = []
    shown = {k: v for k, v in result["metrics"].items() if k.startswith("test/")} or result["metrics"]
    if shown:
        width = max(len(name) for name in shown)
        lines += ["", f"{'metric':<{width}}  {'value':>12}", "-" * (width + 14)]
        lines += [f"{name:<{width}}  {value:>12.6g}" for name, value in sorted(shown.items(), key=_order)]
    lines.append("")
    stored = read(run_dir)
    if best := stored.get("best_checkpoint"):
        # Without a metric to watch the callback keeps the latest.
        kept = ((stored.get("config") or {}).get("callbacks") or {}).get("checkpoint") or {}
        label = "last checkpoint" if kept and kept.get("monitor", "") is None else "best checkpoint"
        lines.append(f"{label}  {_nearby(best)}")
    for label, pattern in (("figure", "figures/*.png"), ("predictions", "predictions/*.csv")):
        lines += [f"{label:<15}  {_nearby(path)}" for path in sorted(run_dir.glob(pattern))]
    lines += _energy(stored.get("energy"))
    lines += _communication(stored.get("communication"), stored.get("world_size"))
    if seconds := stored.get("seconds", {}).get("total"):
        lines.append(f"{'seconds':<15}  {seconds:.1f}")
    lines.append(f"{'resume':<15}  {resume_command(run_dir)}")
    return "\n".join(lines)


def _communication(found: dict[str, Any] | None, processes: int | None) -> list[str]:
    """What the processes of training sent to each other."""
    if not found:
        return []
    within = f"{found['intra_node_bytes'] / 1e6:.4g} MB within"
    if processes == found["local_size"]:  # nothing can pass between nodes, which is no merit of a strategy
        sent = f"{within} the one node (cluster.local_size makes several)"
    else:
        sent = f"{found['inter_node_bytes'] / 1e6:.4g} MB between nodes, {within}"
    if (groups := found.get("between_groups_bytes")) is not None:
        sent += f", of these {groups / 1e6:.4g} MB between groups of {found['group_size']}"
    return [f"{'communication':<15}  {sent}; {found['blocked_s']:.3g} s waited for, in {found['steps']} steps"]


def _energy(energy: dict[str, Any] | None) -> list[str]:
    """What the run has cost, and how much of that an instrument has measured."""
    if not energy:
        return []
    if not energy["it_j"]:
        return [f"{'energy':<15}  nothing was read"]
    measured = 100 * (1 - energy["estimated_fraction"])
    co2 = 1000 * energy["co2_kg"]
    stages = {name: values["it_j"] for name, values in energy["stages"].items() if not name.startswith("fit/")}
    parts = ", ".join(f"{name} {joules:.3g}" for name, joules in stages.items())
    total = f"{energy['it_j']:.4g} J ({energy['it_kwh']:.3g} kWh, {co2:.3g} g CO2)"
    lines = [
        f"{'energy':<15}  {total}, {measured:.0f} % measured",
        f"{'  by stage, J':<15}  {parts}",
    ]
    if earlier := energy.get("earlier_kwh"):
        lines.append(f"{'  before, J':<15}  {3.6e6 * earlier:.4g} in the parts before the resume, not included above")
    return lines


def interrupted(run_dir: str | Path) -> str:
    """What a run has cost until it was interrupted, and the command that continues it."""
    lines = [*_energy(read(Path(run_dir)).get("energy")), f"interrupted; resume: {resume_command(run_dir)}"]
    return "\n".join(["", *lines])


def resume_command(run_dir: str | Path) -> str:
    """The command that continues a run, with interpreter, script and folder as seen from the working directory."""
    return f"{_nearby(sys.executable)} {_nearby(sys.argv[0])} resume={_nearby(run_dir)}"


def _nearby(path: str | Path) -> str:
    """A path below the working directory relative to it; other interpreters by name."""
    here, path = Path.cwd(), Path(os.path.abspath(path))  # not resolved: .venv/bin/python is a link
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return "python" if path == Path(sys.executable) else str(path)


def _order(item: tuple[str, float]) -> tuple[int, str]:
    """Short names first: ``test/mae`` before its break-down ``test/mae_day_1``."""
    return item[0].count("_day_") + item[0].count("holiday") + item[0].count("_type_"), item[0]
