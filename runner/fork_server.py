"""Processes on the CPU begin where the imports end: they are forked from one that has imported torch and Lightning.

The import takes every process about 5 s of CPU, more than many a job of a sweep. The fork server does it once for all
processes of all jobs. It trains nothing, starts no thread and touches no device, so what it forks is as good as new.
The environment is that of the supervisor at the moment, not the one that the server began with.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from pathlib import Path

_SERVES = "WATTLIGHT_FORK_SERVER"  # set in the environment of the server alone
_PR_SET_PDEATHSIG = 1
_ROOT = str(Path(__file__).parents[1])
# A signal for a whole process group is not meant for the server.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1}


def is_safe(accelerator: str) -> bool:
    """Whether processes may be forked: CUDA and the frameworks of macOS ask for fresh interpreters."""
    return accelerator == "cpu" and sys.platform == "linux"


def start() -> None:
    """Start the server if there is none yet; it imports while the caller goes on."""
    from multiprocessing import forkserver

    multiprocessing.set_forkserver_preload([__name__])
    path = os.environ.get("PYTHONPATH")
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, path))), _SERVES: "1"}
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[_SERVES], os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def adopt(environment: dict[str, str]) -> None:
    """In a forked process: take over the supervisor's ``environment``, but for what was set since the fork."""
    own = {key: value for key, value in os.environ.items() if _began_with.get(key) != value}
    os.environ.clear()
    os.environ.update(environment | own)


def _serve() -> dict[str, str]:
    """Import what every process needs; returns the environment before that."""
    # It would wait for its processes when the supervisor is killed; they end with it (torch asks the kernel for that).
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS))
    del os.environ[_SERVES]
    environment = dict(os.environ)
    with contextlib.suppress(Exception):  # a process that needs it reports it in its own words
        import lightning.pytorch  # noqa: F401
        import torch.distributed.elastic.multiprocessing.errors
        import torch.multiprocessing.spawn  # noqa: F401
    gc.freeze()  # what is imported stays shared memory, which the collector of a process would write into
    return environment


_began_with = _serve() if _SERVES in os.environ else {}
