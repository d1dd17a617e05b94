"""One process per device around a job, in fresh processes that share nothing with the next job."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from runner import fork_server

# Variables that describe ranks; a supervisor that inherits some of them must not pass them on.
_RANK_VARIABLES = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
# Exit codes of ranks that a signal ended in good order (`runner.rank`).
# What the supervisor passes on to its ranks; SIGUSR1 is SLURM's warning.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_INTERRUPTED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}


class JobFailed(Exception):
    """A rank ended with an error; the message is the root cause, `trace` its traceback if there is one.

    ``hopeless`` says that the input is wrong: another try would end the same.
    """

    def __init__(self, message: str, trace: str = "", hopeless: bool = False) -> None:
        super().__init__(message)
        self.trace, self.hopeless = trace, hopeless


class JobInterrupted(Exception):
    """The supervisor was told to stop by a signal and has stopped its ranks."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


def ranks_exist() -> bool:
    """Whether torchrun, srun or mpirun has already started one process per device."""
    env = os.environ
    tasks = max(int(env.get(key, 1)) for key in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return "LOCAL_RANK" in env or tasks > 1  # a batch script without srun is one task of its own step


def num_processes(config: Any) -> int:
    """Processes that ``trainer.devices`` and ``trainer.num_nodes`` ask for, over all nodes.

    Raises:
        ValueError: If the setting is not a number of devices on this kind of machine.
    """
    trainer = config["trainer"]
    devices, accelerator = trainer.get("devices", "auto"), str(trainer.get("accelerator", "auto"))
    nodes = int(trainer.get("num_nodes") or 1)
    if accelerator == "cpu" and devices in ("auto", None):
        local = 1
    elif isinstance(devices, int) and devices > 0:
        local = devices
    elif isinstance(devices, str) and devices.isdigit() and int(devices) > 0:
        local = int(devices)
    elif accelerator == "cpu":
        raise ValueError(f"trainer.devices={devices}: on CPU it is a number of processes, 1 or more")
    elif not isinstance(devices, str | int):
        local = len(devices)
    else:  # "auto", -1, "0,1"
        import torch

        listed = [d for d in str(devices).split(",") if d.strip()]
        local = len(listed) if len(listed) > 1 else max(1, torch.cuda.device_count())
    if nodes > 1 and not ranks_exist():
        raise ValueError(
            f"trainer.num_nodes={nodes}: start one process per device with srun or torchrun "
            "(docs/distributed.md); run.py alone starts processes on one node only"
        )
    return local * nodes


def launch(config: dict[str, Any], processes: int) -> dict[str, Any]:
    """Run `runner.job.run` on the resolved ``config`` in fresh processes of this machine.

    Ranks above 0 write their output to ``<run.dir>/ranks``. All ranks end when one fails, when the supervisor gets
    SIGINT, SIGTERM or SIGHUP (they get 30 s to save a checkpoint; a second Ctrl-C ends them at once), or when the
    supervisor dies.

    Returns:
        What the job returned on rank 0.

    Raises:
        JobFailed: With the root cause, not the wrapper's message.
        JobInterrupted: After a signal.
        TimeoutError: After ``launch.timeout_s``.
    """
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    forked = fork_server.is_safe(config["trainer"]["accelerator"])
    if forked:
        fork_server.start()  # its imports go on during ours
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from runner.rank import run_rank

    log_dir = Path(config["run"]["dir"]) / "ranks"
    log_dir.mkdir(parents=True, exist_ok=True)
    specs = DefaultLogsSpecs(
        log_dir=str(log_dir), redirects={rank: Std.ALL for rank in range(1, processes)} if processes > 1 else Std.NONE
    )
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        start_method="forkserver" if forked else "spawn",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=specs,
        signals_to_handle=",".join(number.name for number in _SIGNALS),
    )
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the root cause is reported below, without the wrapper
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    timeout_s = config["launch"]["timeout_s"]
    try:
        with _alarm(timeout_s), _second_ctrl_c():
            environment = dict(os.environ) if forked else None
            return elastic_launch(settings, run_rank)(config, processes, environment)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in _INTERRUPTED:  # the ranks were told to stop, and this process was not
            raise JobInterrupted(failure.exitcode - 128) from None
        raise _failed(rank, failure, log_dir) from None
    except SignalException as error:
        raise JobInterrupted(int(error.sigval)) from None
    except KeyboardInterrupt:
        raise JobInterrupted(signal.SIGINT) from None
    finally:
        for child in multiprocessing.active_children():  # only after a second signal or a timeout
            child.kill()
            child.join(10)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _remove_empty(log_dir)


def _failed(rank: int, failure: Any, log_dir: Path) -> JobFailed:
    """The root cause that the failing rank left in its error file."""
    message = failure.message
    trace = ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        detail = json.loads(Path(failure.error_file).read_text())["message"]
        message, trace = detail["message"], detail["extraInfo"]["py_callstack"]
    kind, _, text = str(message).partition(": ")
    if kind.endswith("InputError"):
        return JobFailed(text, hopeless=True)
    return JobFailed(f"rank {rank}: {message}", trace)


@contextlib.contextmanager
def _alarm(seconds: float | None):
    """Raise TimeoutError in the main thread after ``seconds``."""
    if not seconds:
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise TimeoutError(f"launch.timeout_s={seconds}: the job took longer and was stopped")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _second_ctrl_c():
    """Kill the ranks on a second SIGINT: the elastic agent, told twice, would only begin to wait for them anew.

    Its handlers replace ours, so a thread listens where Python announces signals.
    """
    listening, announcing = socket.socketpair()
    announcing.setblocking(False)

    def listen() -> None:
        presses = 0
        while byte := listening.recv(1):
            presses += byte[0] == signal.SIGINT
            if presses >= 2:
                for child in multiprocessing.active_children():
                    child.kill()

    listener = threading.Thread(target=listen, name="second-ctrl-c", daemon=True)
    before = signal.set_wakeup_fd(announcing.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        announcing.close()
        listener.join()
        listening.close()


def _remove_empty(folder: Path) -> None:
    """Remove log files that nothing was written to, and the folders that then hold nothing."""
    time.sleep(0)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path.stat().st_size == 0:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
