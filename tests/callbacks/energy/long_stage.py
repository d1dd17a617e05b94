"""A callback for runs that are to be killed in a certain stage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class LongStage(pl.Callback):
    """Stays in a stage for a minute, and writes a file when it has come there.

    Args:
        stage: ``startup``, ``fit/train``, ``fit/val``, ``test`` or ``predict``.
        mark: The file.
    """

    def __init__(self, stage: str, mark: str) -> None:
        self.stage, self.mark = stage, Path(mark)

    def _stay(self, stage: str) -> None:
        if stage == self.stage:
            self.mark.touch()
            time.sleep(60)

    def begin_run(self) -> None:
        self._stay("startup")

    def on_train_batch_end(self, *args: Any) -> None:
        self._stay("fit/train")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._stay("fit/val")

    def on_test_batch_start(self, *args: Any) -> None:
        self._stay("test")

    def on_predict_batch_start(self, *args: Any) -> None:
        self._stay("predict")
