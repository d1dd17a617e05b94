"""What the user reads at the end of a run."""

from __future__ import annotations

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
        lines.append(f"best checkpoint  {best}")
    for label, pattern in (("figure", "figures/*.png"), ("predictions", "predictions/*.csv")):
        lines += [f"{label:<15}  {path}" for path in sorted(run_dir.glob(pattern))]
    if seconds := stored.get("seconds", {}).get("total"):
        lines.append(f"{'seconds':<15}  {seconds:.1f}")
    lines.append(f"{'resume':<15}  {resume_command(run_dir)}")
    return "\n".join(lines)


def resume_command(run_dir: str | Path) -> str:
    """The command that continues a run, with the script as the user called it."""
    return f"python {sys.argv[0]} resume={run_dir}"


def _order(item: tuple[str, float]) -> tuple[int, str]:
    """Short names first: ``test/mae`` before its break-down ``test/mae_day_1``."""
    return item[0].count("_day_") + item[0].count("holiday") + item[0].count("_type_"), item[0]
