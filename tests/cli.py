"""The program as a user starts it: in a process of its own, from a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def run(*arguments: str, cwd: Path, timeout: float = 110, **env: str) -> subprocess.CompletedProcess[str]:
    """``python run.py ARGUMENTS`` to its end."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
    )


def ok(*arguments: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """The same, for a run that must succeed."""
    done = run(*arguments, cwd=cwd, **more)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class Started:
    """A run in the background, in a session of its own: a signal to its group is a Ctrl-C in its terminal."""

    def __init__(self, *arguments: str, cwd: Path, **env: str) -> None:
        self.output = cwd / f"output-{time.monotonic_ns()}"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *arguments],
                cwd=cwd,
                env=environment(**env),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
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
        """End whatever is left."""
        for process in [*self.family, self.process]:
            if isinstance(process, psutil.Process) and not process.is_running():
                continue
            try:
                process.kill()
                process.wait(5)
            except (psutil.Error, subprocess.TimeoutExpired):
                continue


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
