"""Logging of one rank: console and ``run.log`` on rank 0, the rank's own output (kept by the launcher) elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

# Advice of libraries that does not hold here, or that names what the program does on purpose.
HUSHED = (
    ".*does not have many workers.*",  # small data sets in memory load faster without
    ".*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",  # resume writes where the run was
    ".*The dirpath has changed from.*",  # a moved run folder
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*`trainer.fit` cannot be called.*",
    ".*The '.*_dataloader' does not have many workers.*",
    ".*anonymous setting has no effect.*",
    ".*sync_dist=True.*",  # evaluation metrics are torchmetrics objects, synchronised exactly by themselves
)


class _NoChatter(logging.Filter):
    """Drops Lightning's lines about absent hardware, services and process groups: the runner says what matters."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or not record.name.startswith("lightning.")


def global_rank() -> int:
    """Rank of this process among all, as the launcher of the ranks said."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def set_up(run_dir: str) -> None:
    """Send log records of this process to the console and, on rank 0, to ``<run_dir>/run.log``."""
    rank = global_rank()
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "_wattlight", False) or isinstance(handler, logging.StreamHandler):
            root.removeHandler(handler)
            handler.close()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(_Short(prefix))
    console.addFilter(_NoChatter())
    handlers: list[logging.Handler] = [console]
    if rank == 0:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(run_dir) / "run.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    for handler in handlers:
        handler._wattlight = True
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for noisy in ("matplotlib", "PIL", "fsspec", "urllib3", "git"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for message in HUSHED:
        warnings.filterwarnings("ignore", message=message)


def adopt_lightning() -> None:
    """Take the handlers off that Lightning gives its loggers on import, else every line appears twice."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


class _Short(logging.Formatter):
    """The message alone; warnings and errors say what they are, without the source line of `warnings`."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == "py.warnings":
            head = text.splitlines()[0]
            _, _, text = head.partition("Warning: ")
            text = text or head
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return f"{self.prefix}{level}{text}{trace}"
