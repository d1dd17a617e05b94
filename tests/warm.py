"""A process that has imported what every run imports, and becomes a run each time it is told to, by forking.

Starting Python and importing torch and Lightning takes a run 5 s of CPU, most runs of the tests one second. What is
forked here is otherwise a user's process: its own environment, folder, session, standard streams, signal handlers and
module ``__main__``; nothing of the project is imported before. It ends as Python ends a script.

Requests are lines of JSON on the standard input (`tests.cli.WarmStart` sends them); process ids and exit statuses go
out on the standard output.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import selectors
import signal
import sys
from pathlib import Path
from typing import Any


def serve() -> list[str] | None:
    """Fork a process for every request. Returns in that process, with its arguments, or None at the end of input."""
    import hydra  # noqa: F401
    import lightning.pytorch  # noqa: F401

    gc.freeze()
    requests, (wakes, wake) = os.dup(0), os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(requests, False)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(wakes, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == wakes:
                    os.read(wakes, 4096)
                    _report_the_dead()
                    continue
                if not (data := os.read(requests, 1 << 20)):
                    return None
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    if pid := os.fork():
                        _say(started=pid)
                        continue
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, before)
                    selector.close()
                    for fd in (requests, wakes, wake):
                        os.close(fd)
                    return _become(**json.loads(line))


def _say(**what: int) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _report_the_dead() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say(ended=pid, code=os.waitstatus_to_exitcode(status))


def _become(arguments: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> list[str]:
    """Make this process the one that ``python ARGUMENTS`` in ``cwd`` would be."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        fd = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, number)
        os.close(fd)
    sys.argv = arguments
    sys.path[:1] = [str(Path(arguments[0]).parent), *env.get("PYTHONPATH", "").split(os.pathsep)]
    return arguments


def _main() -> Any:
    if arguments := serve():
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _main()
