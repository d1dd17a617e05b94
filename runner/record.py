"""Reads ``results.json``, and amends it from outside where the job itself could not say why it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(run_dir: str | Path) -> dict[str, Any]:
    """The record of a run; empty if there is none (yet)."""
    try:
        return json.loads((Path(run_dir) / "results.json").read_text())
    except (OSError, ValueError):
        return {}


def restore(run_dir: Path, record: dict[str, Any]) -> None:
    """Put back a record: that of a run which a job could not continue."""
    temporary = run_dir / ".results.json.supervisor"
    temporary.write_text(json.dumps(record, indent=2))
    temporary.replace(run_dir / "results.json")


def mark(run_dir: Path, status: str, error: str) -> None:
    """Set status and error of a run's record, which is created if the job never wrote one."""
    record = read(run_dir) or {"run_dir": str(run_dir), "metrics": {}}
    record |= {"status": status, "error": error}
    run_dir.mkdir(parents=True, exist_ok=True)
    restore(run_dir, record)
