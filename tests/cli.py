"""The program as a user starts it: in a process of its own, from a folder of its own."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.composing import ROOT, USER

TINY = ("--config-dir", str(USER / "conf"), "experiment=tiny")
# What describes ranks and services on the machine that runs the tests must not reach the program under test.
_FOREIGN = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "WANDB_", "PL_", "RUN_STAMP", "HYDRA_", "PYTEST_", "WATTLIGHT_")
_RANKS = {
    "LOCAL_RANK",
    "RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}


def environment(**more: str) -> dict[str, str]:
    """Environment of a user's shell that has ``PYTHONPATH`` set to the folder of tests/user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and k not in _RANKS}
    return (
        kept | {"PYTHONPATH": str(USER), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"} | more
    )


class WarmStart:
    """Starts runs without the time that imports take: see `tests.warm`, which is started with the first of them."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._codes: dict[int, int] = {}
        self._buffer = b""

    def start(self, *arguments: str, cwd: Path, env: dict[str, str], stdout: Path, stderr: Path) -> int:
        """Process id of ``python ARGUMENTS``."""
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "warm.py")],
                env={k: v for k, v in environment().items() if k != "PYTHONPATH"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            atexit.register(self._server.stdin.close)
        request = {"arguments": arguments, "cwd": str(cwd), "env": env, "stdout": str(stdout), "stderr": str(stderr)}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        while (started := self._next(180)) is None:
            continue
        return started

    def code(self, pid: int, timeout: float) -> int | None:
        """Exit code of a process, or None if it still runs after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while pid not in self._codes:
            if not self._readable(left := max(0.0, deadline - time.monotonic())):
                return None
            self._next(left)
        return self._codes[pid]

    def _readable(self, timeout: float) -> bool:
        return bool(select.select([self._server.stdout], [], [], timeout)[0])

    def _next(self, timeout: float) -> int | None:
        """Read one message; the process id of one that began."""
        fd = self._server.stdout.fileno()
        while b"\n" not in self._buffer:
            assert self._readable(timeout), "tests/warm.py is silent"
            data = os.read(fd, 4096)
            assert data, "tests/warm.py has ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        if "ended" in message:
            self._codes[message["ended"]] = message["code"]
        return message.get("started")


_warm = WarmStart()


class Run:
    """A run of ``run.py`` in a session of its own, with what `subprocess.Popen` offers to look at it and to end it.

    Args:
        arguments: Of the command line.
        cwd: Where the user is.
        stdout: File for the standard output.
        stderr: File for the standard error; may be the same.
        cold: Start Python anew instead of forking a process that has torch and Lightning already.
        env: Further variables.
    """

    def __init__(self, *arguments: str, cwd: Path, stdout: Path, stderr: Path, cold: bool, env: dict[str, str]) -> None:
        self.arguments = (str(ROOT / "run.py"), *arguments)
        self.returncode: int | None = None
        self._cold: subprocess.Popen[bytes] | None = None
        if cold:
            with stdout.open("ab") as out, stderr.open("ab") as err:
                command = [sys.executable, *self.arguments]
                more = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "start_new_session": True}
                self._cold = subprocess.Popen(command, cwd=cwd, env=environment(**env), **more)
            self.pid = self._cold.pid
        else:
            more = {"cwd": cwd, "env": environment(**env), "stdout": stdout, "stderr": stderr}
            self.pid = _warm.start(*self.arguments, **more)

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._cold.poll() if self._cold else _warm.code(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Exit code; `subprocess.TimeoutExpired` if it still runs after ``timeout`` seconds."""
        if self.returncode is None:
            self.returncode = self._cold.wait(timeout) if self._cold else _warm.code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(list(self.arguments), timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and to all that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def run(
    *arguments: str, cwd: Path, timeout: float = 110, cold: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """``python run.py ARGUMENTS`` to its end."""
    with tempfile.TemporaryDirectory(prefix="run-output-") as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        process = Run(*arguments, cwd=cwd, stdout=out, stderr=err, cold=cold, env=env)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(process.arguments), code, out.read_text(), err.read_text())


def ok(*arguments: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """The same, for a run that must succeed."""
    done = run(*arguments, cwd=cwd, **more)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class Started:
    """A run in the background, in a session of its own: a signal to its group is a Ctrl-C in its terminal."""

    def __init__(self, *arguments: str, cwd: Path, cold: bool = False, **env: str) -> None:
        self.output = cwd / f"output-{time.monotonic_ns()}"
        self.process = Run(*arguments, cwd=cwd, stdout=self.output, stderr=self.output, cold=cold, env=env)
        self.family: list[psutil.Process] = []

    def wait_for(self, *files: Path, timeout: float = 90) -> None:
        """Until the run has written the files."""
        deadline = time.monotonic() + timeout
        while not all(file.exists() for file in files):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: int, group: bool = False) -> None:
        """To the supervisor, or to all its processes."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def end(self, timeout: float = 60) -> tuple[int, str]:
        """(exit code, output); no process of the run is left."""
        try:
            code = self.process.wait(timeout)
            _, alive = psutil.wait_procs(self.family, timeout=10)
            assert not alive, f"orphans: {alive}\n{self.output.read_text()}"
            return code, self.output.read_text()
        finally:
            self.kill()

    def kill(self) -> None:
        """End whatever is left, all of it at once: ranks must not train on while their supervisor's end is awaited."""
        left = [p for p in (*self.family, self.process) if not isinstance(p, psutil.Process) or p.is_running()]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in left:
            with contextlib.suppress(psutil.Error, subprocess.TimeoutExpired):
                process.wait(5)


def results(run_dir: Path) -> dict[str, Any]:
    """``results.json`` of a run."""
    return json.loads((run_dir / "results.json").read_text())


def differences(one: Path, other: Path, checkpoint: str = "last") -> list[str]:
    """Where two runs differ, to the last bit: weights, optimizer state, random states, position, metrics."""
    a, b = (torch.load(d / f"checkpoints/{checkpoint}.ckpt", weights_only=True) for d in (one, other))
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "rng_states", "epoch", "global_step")
    found = [line for part in parts for line in _differ(a[part], b[part], part)]
    left, right = results(one), results(other)
    found += [line for part in ("metrics", "status") for line in _differ(left[part], right[part], part)]
    return found


def _differ(a: Any, b: Any, key: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{key}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for k in a for line in _differ(a[k], b[k], f"{key}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i in range(len(a)) for line in _differ(a[i], b[i], f"{key}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)
    return [] if same else [f"{key}: {a!s:.60} != {b!s:.60}"]
