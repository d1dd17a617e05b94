"""Figures of a sweep in the loggers of its jobs, as a run of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runner.record import read

log = logging.getLogger(__name__)

# Loggers that take images.
TAKERS = ("WandbLogger", "TensorBoardLogger")


def log_figures(folder: Path, run_dirs: Iterable[Path]) -> list[str]:
    """Give ``<folder>/figures/*.png`` to the loggers that the jobs had, in the group of the sweep.

    Args:
        folder: Of the sweep.
        run_dirs: Of its jobs that have finished; the first says which loggers there are.

    Returns:
        Names of the loggers.
    """
    paths = sorted((folder / "figures").glob("*.png"))
    config = next((found for run in run_dirs if (found := read(run).get("config"))), None)
    if not paths or config is None:
        return []
    told = []
    for key, node in config.get("logger", {}).items():
        if not (isinstance(node, dict) and str(node.get("_target_", "")).endswith(TAKERS)):
            continue
        try:
            _tell(_of_the_sweep(node, config, folder), paths)
            told.append(key)
        except Exception as error:  # the figures are on disk
            log.warning("logger.%s: the figures of the sweep were not logged: %s", key, error)
    return told


def _of_the_sweep(node: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The logger's configuration with the folder of the sweep in the place of that of the job."""
    run_dir = config["run"]["dir"]
    node = {k: v.replace(run_dir, str(folder)) if isinstance(v, str) else v for k, v in node.items()}
    if node["_target_"].endswith("WandbLogger"):
        node |= {"name": f"{config['name']}-sweep", "job_type": "sweep", "id": None}
    return node


def _tell(node: dict[str, Any], paths: list[Path]) -> None:
    from callbacks.figures.callback import hand_over_files
    from runner import job

    logger = job.instantiate("logger", node)
    try:
        hand_over_files(logger, paths)
    finally:
        job.finish([logger], "completed")
