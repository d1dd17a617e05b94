"""``resume=DIR``: continue the run in a folder with the configuration that is stored there."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from runner.record import read

log = logging.getLogger(__name__)

GROUPS = (
    "experiment", "data", "model", "optimizer", "scheduler", "trainer", "strategy", "callbacks", "logger", "hydra",
    "hparams_search", "debug", "local", "node", "parallel",
)  # fmt: skip
# What a checkpoint of the same run must have in common with the configuration that continues it.
IDENTITY = ("name", "seed", "data", "model")


def rewrite(argv: list[str]) -> list[str]:
    """Turn ``run.py resume=DIR key=value`` into Hydra arguments that compose the stored configuration.

    Raises:
        SystemExit: If there is no run in DIR, or if a group is chosen anew (the stored configuration is composed
            already, so only values can change).
    """
    chosen = [a for a in argv[1:] if a.startswith("resume=")]
    if not chosen:
        return argv
    run = Path(chosen[-1].split("=", 1)[1]).expanduser().resolve()
    stored = run / ".hydra" / "config.yaml"
    if not stored.is_file():
        raise SystemExit(
            f"resume={run}: no run there (no .hydra/config.yaml); give the folder of a run, logs/<name>/<stamp>"
        )
    rest = [a for a in argv[1:] if "=" in a and not a.startswith(("-", "resume="))]
    flags = [a for a in argv[1:] if a not in rest and not a.startswith("resume=")]
    if any(flag in ("-m", "--multirun") for flag in flags):
        raise SystemExit("resume= continues one run; it cannot be combined with --multirun")
    for argument in rest:
        key = argument.split("=", 1)[0].lstrip("+~")
        if key in GROUPS:
            raise SystemExit(
                f"{argument}: a resumed run keeps its groups; change single values ({key}.<key>=...), "
                "or start a new run with ckpt_path=" + str(run / "checkpoints/last.ckpt")
            )
    numbers = [int(m[1]) for p in (run / ".hydra").glob("resumed_*") if (m := re.fullmatch(r"resumed_(\d+)", p.name))]
    return [
        argv[0],
        *("--config-path", str(run / ".hydra"), "--config-name", "config"),
        *flags,  # argparse wants all overrides in one piece
        f"hydra.run.dir={run}",
        f"hydra.output_subdir=.hydra/resumed_{max(numbers, default=0) + 1}",
        "hydra.mode=RUN",
        *("hydra/job_logging=none", "hydra/hydra_logging=none"),
        *([] if any(a.startswith("ckpt_path=") for a in rest) else [f"ckpt_path={_stored_checkpoint(run)}"]),
        *rest,
    ]


def _stored_checkpoint(run: Path) -> str:
    """``last``, or ``null`` for a run that was killed before it had saved anything."""
    if (run / "checkpoints" / "last.ckpt").is_file():
        return "last"
    print(f"resume={run}: nothing was saved yet, the run starts afresh")
    return "null"


def find_checkpoint(config: dict[str, Any]) -> str | None:
    """The checkpoint file that ``ckpt_path`` names, or None for a fresh start.

    ``auto``: ``<run.dir>/checkpoints/last.ckpt`` if it exists; ``last``: the same, and it must exist; ``best``;
    otherwise a path. A run that does not train takes ``best.ckpt`` instead of ``last.ckpt`` where it exists.
    ``sweep``: the best checkpoint of an earlier job of the same sweep that trained this model; where there is none, as
    outside of a sweep, a fresh start.

    Raises:
        ValueError: If the file does not exist, or if ``auto`` finds the checkpoint of another configuration.
    """
    wanted = config["ckpt_path"]
    if not wanted:
        return None
    if wanted == "sweep":
        return _of_a_sibling(config)
    folder = Path(config["run"]["dir"]) / "checkpoints"
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    found = best if not config["train"] and best.is_file() else last
    if wanted == "auto":
        if not found.is_file():
            return None
        if differing := _differences(config):
            raise ValueError(
                f"ckpt_path=auto: {folder} holds a checkpoint of another configuration (differs in {differing}); "
                "set RUN_STAMP or hydra.run.dir to another folder, or ckpt_path=null to start afresh"
            )
        return str(found)
    path = {"last": found, "best": best}.get(wanted, Path(wanted).expanduser())
    if not path.is_file():
        raise ValueError(f"ckpt_path={wanted}: no file {path}; ckpt_path=null starts afresh")
    return str(path)


def _of_a_sibling(config: dict[str, Any]) -> str | None:
    """Jobs of a sweep run one after the other, in folders side by side: what one has trained the next may evaluate."""
    own, current = Path(config["run"]["dir"]).resolve(), json.loads(json.dumps(config))
    found = []
    for path in sorted(own.parent.glob("*/results.json"), key=lambda path: path.stat().st_mtime):
        result = read(path.parent)
        stored, best = result.get("config") or {}, result.get("best_checkpoint")
        if path.parent == own or result.get("status") != "completed" or not stored.get("train"):
            continue
        if stored.get("model") != current["model"] or not best or not Path(best).is_file():
            continue
        # Of several: the same seed, then the same data.
        alike = sum(stored.get("data", {}).get(key) == value for key, value in current["data"].items())
        found.append(((stored.get("seed") == current["seed"], alike), best))
    if not found:
        log.info("ckpt_path=sweep: no job before this one has trained its model")
        return None
    return max(reversed(found), key=lambda item: item[0])[1]  # the latest of equals


def _differences(config: dict[str, Any]) -> str:
    stored = read(config["run"]["dir"]).get("config")
    if stored is None:
        return ""
    current = json.loads(json.dumps(config))
    return ", ".join(key for key in IDENTITY if stored.get(key) != current.get(key))
