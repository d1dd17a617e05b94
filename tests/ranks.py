"""A pool of gloo processes that lives as long as the test run: functions are sent to ranks, results come back.

They are forked from a process that has imported torch and Lightning once for all pools of the test run.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner import fork_server

POOL_NAME = "rank-pool"  # how the names of its processes begin
_NO_GROUP = "Gloo connectFullMesh failed"
BEGIN_TIMEOUT = 110.0  # until all ranks run the function: a busy machine takes long to start them and to import


class RankError(AssertionError):
    """A rank raised, or was silent past the timeout; the message holds the traceback of that rank."""


def _end_with_parent() -> None:
    """A test run that is killed leaves no ranks behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _serve(rank: int, size: int, store: str, inbox: Any, outbox: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Lightning sees ranks that somebody else launched, and an initialised group: it starts no process of its own.
    env = {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    os.environ.update(env)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)  # no port, no race
    while (job := inbox.get()) is not None:
        os.environ.update(env)  # Lightning's teardown removes WORLD_SIZE
        try:
            fn, args = pickle.loads(job)
            outbox.put((rank, "begun", None))
            outbox.put((rank, "returned", pickle.dumps(fn(*args))))
        except BaseException:
            outbox.put((rank, "raised", traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``Ranks(2)(fn, *args)`` runs ``fn(*args)`` on two ranks and returns their results, rank 0 first.

    Starts on first use. A rank that raises, or that is silent past the timeout (seconds, from when all ranks run the
    function), fails the test with its own traceback and ends the pool (the other ranks may hang in a collective); the
    next call starts a fresh one. ``fn`` must be defined at the top level of a module, since it is pickled by name.

    On a busy machine gloo now and then loses a connection while a group is made, before anything of ours runs in it.
    Then, and only then, the function is run once more on fresh processes, with a warning.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._procs: list[Any] = []

    def _start(self) -> None:
        fork_server.start()
        context = multiprocessing.get_context("forkserver")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        store = str(Path(self._folder.name) / "store")
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(self.size)]
        self._procs = [
            context.Process(
                target=_serve,
                args=(r, self.size, store, self._inboxes[r], self._outbox),
                name=f"{POOL_NAME}-{r}",
                daemon=True,
            )
            for r in range(self.size)
        ]
        for process in self._procs:
            process.start()

    def __call__(self, fn: Callable[..., Any], *args: Any, timeout: float = 110.0) -> list[Any]:
        try:
            return self._run(fn, args, timeout)
        except RankError as error:
            if _NO_GROUP not in str(error):
                raise
            warnings.warn(f"{fn.__name__} runs once more: {str(error).splitlines()[-1]}", stacklevel=2)
            return self._run(fn, args, timeout)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        if not self._procs:
            self._start()
        for box in self._inboxes:
            box.put(pickle.dumps((fn, args)))
        begun, results = set(), {}
        while len(results) < self.size:
            limit = timeout if len(begun) == self.size else BEGIN_TIMEOUT
            try:
                rank, event, value = self._outbox.get(timeout=limit)
            except queue.Empty:
                silent = sorted(set(range(self.size)) - set(results))
                self.close(kill=True)
                raise RankError(f"ranks {silent} were silent for {limit} s") from None
            if event == "raised":
                self.close(kill=True)
                raise RankError(f"rank {rank}:\n{value}")
            if event == "begun":
                begun.add(rank)
            else:
                results[rank] = pickle.loads(value)
        return [results[rank] for rank in range(self.size)]

    def close(self, kill: bool = False) -> None:
        """End the processes, gently unless one of them may hang."""
        for box, process in zip(self._inboxes if self._procs else [], self._procs, strict=False):
            if kill:
                process.kill()
            else:
                box.put(None)
        for process in self._procs:
            process.join(10)
            if process.is_alive():
                process.kill()
        if self._procs:
            self._folder.cleanup()
        self._procs = []
