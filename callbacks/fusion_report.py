"""FusionReport: the table of a test of fused networks, and the figures of how they were made and trained."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from callbacks.comparison import save_figures
from callbacks.figures import fusion
from callbacks.figures.callback import hand_over_files

log = logging.getLogger(__name__)

COLUMNS = ("name", "epoch", "accuracy", "nll", "recovery")


class FusionReport(pl.Callback):
    """Writes what a module with ``results_table()``, ``history`` and ``about`` knows after a test.

    Files: ``fusion.csv`` (name, epochs after the fusion, accuracy, NLL, recovery), ``fusion.json`` (the same with the
    history in validation, and for every candidate the seconds of its fusion and how many channels came from which
    member), ``figures/<name>.png``. Other modules are left alone.

    Args:
        dirpath: Folder of the run.
        figures: Functions of `callbacks.figures.fusion` that draw the report.

    Raises:
        ValueError: A figure is unknown.
    """

    def __init__(self, dirpath: str | Path, figures: Sequence[str] = ("accuracy_after_fusion", "provenance")) -> None:
        for name in figures:
            if name not in fusion.FIGURES:
                raise ValueError(
                    f"callbacks.fusion_report.figures: {name!r} is unknown; choose among {', '.join(fusion.FIGURES)}"
                )
        self.dirpath, self.figures = Path(dirpath), list(figures)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not hasattr(pl_module, "results_table"):
            return
        rows = pl_module.results_table()  # on all ranks together
        if not trainer.is_global_zero:
            return
        report = {"results": rows, "history": pl_module.history, "candidates": pl_module.about}
        report["settings"] = {name: dict(one) for name, one in pl_module.candidates.items()}
        self.dirpath.mkdir(parents=True, exist_ok=True)
        with (self.dirpath / "fusion.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        (self.dirpath / "fusion.json").write_text(json.dumps(report, indent=1))
        log.info("test of the fused networks\n%s", table(rows))
        for name in self.figures:
            try:
                save_figures({name: getattr(fusion, name)(report)}, self.dirpath)
            except Exception as error:  # figures never cost a run its results
                rank_zero_warn(f"figure {name!r} was not drawn: {type(error).__name__}: {error}")
        drawn = [self.dirpath / "figures" / f"{name}.png" for name in self.figures]
        for logger in trainer.loggers:
            hand_over_files(logger, [path for path in drawn if path.is_file()])


def table(rows: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> str:
    """The results as a Markdown table: a line per network, a column per epoch after the fusion."""
    epochs = sorted({row["epoch"] for row in rows if row["epoch"] is not None})
    heads = [f"{epoch} epochs" if epoch != 1 else "1 epoch" for epoch in epochs]
    lines = [f"| test {metric} | {' | '.join(heads)} |", "|---" * (len(epochs) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["epoch"]: row for row in rows if row["name"] == name}
        shown = [own.get(epoch, own.get(None) if i == 0 else None) for i, epoch in enumerate(epochs)]
        cells = [f"{row[metric]:.4f}" if row is not None and metric in row else "" for row in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
