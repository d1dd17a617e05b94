"""One run at a time in a folder: two would overwrite each other's checkpoints without a word."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another process is writing to the folder of this run."""


@contextlib.contextmanager
def exclusive(run_dir: str | Path) -> Iterator[None]:
    """Hold the folder of a run; the operating system lets go of it when the process ends, however that happens.

    Raises:
        FolderInUse: If another process holds it.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(
                f"run.dir={folder}: another run is writing there; wait for it, or set RUN_STAMP or hydra.run.dir to "
                "another folder"
            ) from None
        except OSError as error:  # a file system without locks: go on without one
            log.debug("%s cannot be locked: %s", folder, error)
        yield
    finally:
        os.close(handle)
