"""Skill of a forecast and of its baselines in one table: a CSV file, a few lines of the log, a table for W&B."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

log = logging.getLogger(__name__)

COLUMNS = ("forecast", "channel", "lead", "rmse", "acc")


class SkillTable(pl.Callback):
    """Writes ``pl_module.skill`` after the test, rows of forecast, channel, lead, rmse and acc.

    Args:
        dirpath: Folder.
        filename: Of the table.
        channel: Whose rows are shown in the log; None: of the first.
    """

    def __init__(self, dirpath: str | Path, filename: str = "skill.csv", channel: str | None = None) -> None:
        self.path, self.channel = Path(dirpath) / filename, channel

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        rows = pl_module.skill
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        for line in shown(rows, self.channel or rows[0]["channel"]):
            log.info(line)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                data = [[row[column] for column in COLUMNS] for row in rows]
                logger.log_table(key="skill", columns=list(COLUMNS), data=data)


def shown(rows: Sequence[dict[str, Any]], channel: str) -> list[str]:
    """Lines of a table of one channel: a forecast a line, RMSE and ACC by lead."""
    mine = [row for row in rows if row["channel"] == channel]
    leads = list(dict.fromkeys(row["lead"] for row in mine))
    names = list(dict.fromkeys(row["forecast"] for row in mine))
    found = {(row["forecast"], row["lead"]): row for row in mine}
    lines = [f"{channel + ': RMSE (ACC)':<22}" + "".join(f"{lead:>18}" for lead in leads)]
    for name in names:
        cells = (found[name, lead] for lead in leads)
        lines.append(f"{name:<22}" + "".join(f"{cell['rmse']:>10.4g} ({cell['acc']:5.3f})" for cell in cells))
    return lines
