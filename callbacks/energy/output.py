"""What loggers get of a run's energy: rows, power over time, figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.energy.trace import Point
from callbacks.figures import energy as plots

log = logging.getLogger(__name__)


def log_row(loggers: Sequence[Any], values: Mapping[str, float], step: int) -> None:
    """Hand one row to every logger."""
    for logger in loggers:
        logger.log_metrics(dict(values), step=step)


def log_power(loggers: Sequence[Any], points: Sequence[Point], first: bool) -> None:
    """Hand power over time to every logger, ``energy/power_w/...`` over ``energy/time_s``.

    Args:
        loggers: Of the Trainer.
        points: Of the trace, at most 2,000.
        first: Whether nothing of it has been logged before.
    """
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger" and first:
            logger.experiment.define_metric("energy/time_s")
            logger.experiment.define_metric("energy/power_w/*", step_metric="energy/time_s")
    for point in points:
        watts = {f"energy/power_w/{name}": value for name, value in point.watts.items()}
        row = {"energy/time_s": point.time_s, "energy/power_w/total": point.total_w, **watts}
        log_row(loggers, row, point.step)


def draw(
    names: Sequence[str],
    summary: Mapping[str, Any],
    points: Sequence[Point],
    folder: Path,
    loggers: Sequence[Any],
    step: int,
) -> None:
    """Draw figures of `callbacks.figures.energy` and hand them to loggers; one that fails costs nothing else.

    Args:
        names: Of the functions.
        summary: Of the run.
        points: Its power over time.
        folder: Where the figures are written.
        loggers: Who gets them.
        step: Of the optimizer, for the loggers.
    """
    from callbacks.figures.callback import hand_over

    for name in names:
        try:
            figure = getattr(plots, name)(summary, points)
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            for logger in loggers:
                hand_over(logger, f"figures/{name}", figure, [path], step)
        except Exception as error:
            log.warning("energy: figure %s was not drawn: %s: %s", name, type(error).__name__, error)
