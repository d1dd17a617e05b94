"""Results of benchmarks on disk: ``results/<name>_<hardware>.json``, written by ``--write`` and never by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
REQUIRED = ("what", "variant", "value", "unit")
NUMBERS = ("value", "low", "high", "cpu", "at_least", "at_most")
TEXTS = ("what", "variant", "unit", "paper", "note")


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Args:
        rows: Numbers with the keys that benchmarks/README.md lists.
        settings: What was chosen: sizes, repeats, threads.
        packages: Distributions whose versions belong to the numbers, beside those that every result records.
        device: ``cuda`` if the numbers are those of a GPU.

    Raises:
        ValueError: If a row lacks a required key, has an unknown one, or a number that is not finite.
    """

    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    packages: Sequence[str] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        for row in self.rows:
            if missing := [key for key in REQUIRED if key not in row]:
                raise ValueError(f"the row {row} lacks {', '.join(missing)}")
            if unknown := [key for key in row if key not in (*NUMBERS, *TEXTS)]:
                raise ValueError(f"the row {row} has unknown keys: {', '.join(unknown)}")
            if wrong := [key for key in NUMBERS if key in row and not math.isfinite(row[key])]:
                raise ValueError(f"the row {row} is not finite in {', '.join(wrong)}")


def holds(row: Row) -> bool | None:
    """Whether the bounds of a row hold; None if it has none."""
    if "at_least" not in row and "at_most" not in row:
        return None
    return row.get("at_least", -math.inf) <= row["value"] <= row.get("at_most", math.inf)


def hardware_slug(hardware: Mapping[str, Any], device: str = "cpu") -> str:
    """Generic name of the hardware: ``cpu-amd-epyc-2-cores``, ``gpu-nvidia-h100-80gb-hbm3``; never a host name.

    Args:
        hardware: As `callbacks.run_record.hardware` gives it.
        device: ``cuda`` for the first GPU.
    """
    if device.startswith("cuda"):
        return f"gpu-{_slug(hardware['cuda'][0])}"
    model = re.sub(r"@.*|\(R\)|\(TM\)|\bCPU\b|\b\d+-Core\b|\bProcessor\b", " ", hardware["cpu"], flags=re.IGNORECASE)
    return f"cpu-{_slug(model)}-{hardware['cores']}-cores"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def content_of(name: str, claim: str, result: Result, git: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Everything that belongs to a result, as plain data.

    Args:
        name: Of the benchmark.
        claim: Its CLAIM.
        result: What it found.
        git: State of the working tree before it ran.
        seconds: How long it ran.
    """
    from callbacks.run_record import hardware, versions

    machine = hardware()
    return {
        "name": name,
        "claim": claim,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": {"slug": hardware_slug(machine, result.device), **machine},
        "git": dict(git),
        "versions": versions() | _versions(result.packages),
        "settings": dict(result.settings),
        "seconds": round(seconds, 1),
        "rows": [{k: float(v) if k in NUMBERS else v for k, v in row.items()} for row in result.rows],
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def store(content: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result; one of the same benchmark on the same hardware is replaced."""
    path = folder / f"{content['name']}_{content['hardware']['slug']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def stored(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All stored results, by name and hardware."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
