"""One run at a time in a folder: two would overwrite each other's checkpoints without a word."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


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
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(
                f"run.dir={folder}: another run is writing there; wait for it, or set RUN_STAMP or hydra.run.dir to "
                "another folder"
            ) from None
        except OSError:  # a file system without locks: go on without one
            yield
            return
        yield
