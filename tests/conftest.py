"""Fixtures and hygiene: no test leaves variables, threads, processes, handlers, process groups or files behind."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as parallel.array does where it is first imported
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are taken by the other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.ranks import POOL_NAME, Ranks

ROOT = Path(__file__).parents[1]

# Threads that libraries start once and keep for the life of the process.
_KEPT_THREADS = (
    "QueueFeederThread",
    "pydevd",
    "tqdm",
    "ThreadPoolExecutor",
    "wandb",
    "asyncio",
    "pytest_timeout",
    "zarr_io",
)
# Variables that libraries set on import or first use, and that no later test reads. They keep their new value.
_KEPT_VARIABLES = {
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TQDM_MININTERVAL",
    "CRC32C_SW_MODE",
    "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
}
# Variables that a Trainer or a W&B run leaves in the process by design: undone here, not reported.
_UNDONE_VARIABLES = ("WANDB_", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
_CACHES = {".pytest_cache", ".ruff_cache", "__pycache__"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGALRM is pytest-timeout's


class _Writes:
    """Paths below the repository that this process opened for writing or made, as Python's audit events tell.

    Looking at folders instead would miss nested files, and blame a test for what an editor or another program wrote.
    """

    def __init__(self) -> None:
        self.paths: set[Path] | None = None  # None: not watching
        self._root = str(ROOT) + os.sep
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.paths is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        path = args[1] if event == "os.rename" else args[0]
        writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(path, str | os.PathLike):
            full = os.path.abspath(os.fspath(path))
            if isinstance(full, str) and full.startswith(self._root):
                self.paths.add(Path(full))

    def left(self) -> list[str]:
        """What is still there, caches aside."""
        found = {p for p in self.paths or () if p.exists() and not _CACHES & set(p.relative_to(ROOT).parts)}
        return sorted(str(p.relative_to(ROOT)) for p in found)


_writes = _Writes()


@pytest.fixture(autouse=True, scope="module")
def settled() -> None:
    """What is there when the tests of a file begin stays: the collector need not look at it again and again.

    These are the modules, the tests, and what pytest keeps of those that have run: a collection took 0.3 s in the end.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def hygiene() -> Iterator[None]:
    """Fail a test that leaks; put back what a run changes by design (threads of torch, seeds, log handlers)."""
    variables, threads = dict(os.environ), set(threading.enumerate())
    handlers = {s: signal.getsignal(s) for s in _SIGNALS}
    root_log, level = list(logging.getLogger().handlers), logging.getLogger().level
    torch_state = _torch_state()
    python_state = random.getstate()
    _writes.paths = set()
    yield
    new_files, _writes.paths = _writes.left(), None
    complaints = [f"files in the repository: {new_files}"] if new_files else []
    complaints += [*_left_variables(variables), *_left_group(), *_left_handlers(handlers)]
    complaints += [*_left_processes(), *_left_threads(threads)]
    random.setstate(python_state)
    _restore_torch(torch_state)
    logging.captureWarnings(False)
    for handler in logging.getLogger().handlers[:]:
        if getattr(handler, "_wattlight", False) and handler not in root_log:
            logging.getLogger().removeHandler(handler)
            handler.close()
    logging.getLogger().setLevel(level)
    if complaints:
        pytest.fail("the test left behind: " + "; ".join(complaints))


def _torch_state() -> tuple[int, Any, bool] | None:
    if (torch := sys.modules.get("torch")) is None:
        return None
    return torch.get_num_threads(), torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()


def _restore_torch(state: tuple[int, Any, bool] | None) -> None:
    if state is not None:
        import torch

        torch.set_num_threads(state[0])
        torch.set_rng_state(state[1])
        torch.use_deterministic_algorithms(state[2])


def _left_variables(before: dict[str, str]) -> Iterator[str]:
    now = dict(os.environ)
    changed = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)} - _KEPT_VARIABLES
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    if leaked := sorted(k for k in changed if not k.startswith(_UNDONE_VARIABLES)):
        yield f"environment variables {leaked}"


def _left_group() -> Iterator[str]:
    if (torch := sys.modules.get("torch")) is None or not torch.distributed.is_available():
        return
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        yield "the default process group"


def _left_handlers(before: dict[int, Any]) -> Iterator[str]:
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)
            yield f"a handler of {signal.Signals(number).name}"


def _left_processes() -> Iterator[str]:
    def alive() -> list[Any]:
        return [p for p in multiprocessing.active_children() if not p.name.startswith(POOL_NAME)]

    if alive():
        gc.collect()  # workers of a loader end with it
    if left := alive():
        for process in left:
            process.kill()
            process.join(5)
        yield f"processes {[p.name for p in left]}"


def _left_threads(before: set[threading.Thread]) -> Iterator[str]:
    deadline = time.monotonic() + 2
    while left := [t for t in set(threading.enumerate()) - before if not t.name.startswith(_KEPT_THREADS)]:
        if time.monotonic() > deadline:
            yield f"threads {[t.name for t in left]}"
            return
        time.sleep(0.02)


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Ranks]:
    """A pool of two gloo processes: ``ranks2(fn, *args) -> [result of rank 0, result of rank 1]``."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Ranks]:
    """A pool of four gloo processes."""
    pool = Ranks(4)
    yield pool
    pool.close()
