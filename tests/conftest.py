"""Fixtures and hygiene: no test leaves variables, threads, process groups, seeds or files behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")

import pytest

from tests.ranks import Ranks

ROOT = Path(__file__).parents[1]

# Threads that libraries start once and keep for the life of the process.
_KEPT_THREADS = ("QueueFeederThread", "pydevd", "tqdm", "ThreadPoolExecutor", "wandb", "asyncio", "pytest_timeout")
# Variables that libraries set on import or first use, and that no later test reads.
_KEPT_VARIABLES = {
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TQDM_MININTERVAL",
    "CRC32C_SW_MODE",
    "TORCHINDUCTOR_CACHE_DIR",
}


@pytest.fixture(autouse=True)
def hygiene():
    """Fail a test that leaks environment variables, threads or the process group; restore the thread count."""
    before = dict(os.environ)
    threads = set(threading.enumerate())
    files = set(os.listdir(ROOT))
    yield
    if "torch" in sys.modules:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            pytest.fail("the test left the default process group initialised")
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)} - _KEPT_VARIABLES
    os.environ.clear()
    os.environ.update(before)
    if leaked := {k for k in changed if not k.startswith(("WANDB_", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"))}:
        pytest.fail(f"the test left environment variables changed: {sorted(leaked)}")
    deadline = time.monotonic() + 2
    while alive := [
        t for t in set(threading.enumerate()) - threads if t.is_alive() and not t.name.startswith(_KEPT_THREADS)
    ]:
        if time.monotonic() > deadline:
            pytest.fail(f"the test left threads running: {[t.name for t in alive]}")
        time.sleep(0.02)
    if new := set(os.listdir(ROOT)) - files - {".pytest_cache", ".ruff_cache", "__pycache__"}:
        pytest.fail(f"the test left files in the repository: {sorted(new)}")


@pytest.fixture(scope="session")
def ranks2():
    """A pool of two gloo processes: ``ranks2(fn, *args) -> [result of rank 0, result of rank 1]``."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks4():
    """A pool of four gloo processes."""
    pool = Ranks(4)
    yield pool
    pool.close()
