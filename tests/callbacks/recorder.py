"""A logger that keeps what it gets."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers.logger import Logger


class Recorder(Logger):
    """Keeps the rows of metrics, and the images by key."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.images: dict[str, list[str]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        self.images[key] = images

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass
