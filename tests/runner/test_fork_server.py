"""Processes from the fork server: imports done, the environment of the moment, signals as anywhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import psutil
import pytest

from runner import fork_server
from tests.ranks import POOL_NAME

pytestmark = pytest.mark.skipif(not fork_server.is_safe("cpu"), reason="forks on Linux only")


def look_around(answers: Any, environment: dict[str, str]) -> None:
    imported = {"torch", "lightning.pytorch"} <= sys.modules.keys()
    os.environ |= {"LOCAL_RANK": "3", "MASTER_PORT": "1234"}  # as the elastic launcher does before it calls a function
    fork_server.adopt(environment)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    answers.put((imported, dict(os.environ), blocked, signal.getsignal(signal.SIGINT), os.getppid()))
    time.sleep(60)


def test_a_process_has_the_imports_the_environment_and_the_signals(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    fork_server.start()
    monkeypatch.setenv("COLOUR", "blue")  # the server, which began earlier, does not know
    environment = dict(os.environ)
    assert "WATTLIGHT_FORK_SERVER" not in environment
    context = multiprocessing.get_context("forkserver")
    answers = context.SimpleQueue()
    process = context.Process(target=look_around, args=(answers, environment), daemon=True, name=f"{POOL_NAME}-look")
    process.start()
    try:
        imported, found, blocked, handler, server = answers.get()
        assert imported
        # torch and Lightning may set variables of their own when they are imported.
        expected = environment | {"LOCAL_RANK": "3", "MASTER_PORT": "1234"}
        assert {name: found[name] for name in expected} == expected
        assert not blocked and handler == signal.getsignal(signal.SIGINT)
        assert psutil.Process(server).num_threads() == 1, "what is forked lacks the other threads"
        os.kill(server, signal.SIGTERM)
        os.kill(server, signal.SIGINT)
        process.terminate()
        process.join(20)
        assert process.exitcode == -signal.SIGTERM
        assert psutil.pid_exists(server) and psutil.Process(server).status() != psutil.STATUS_ZOMBIE
    finally:
        process.kill()
        process.join(10)


@pytest.mark.parametrize("accelerator", ["gpu", "auto", "mps"])
def test_devices_ask_for_fresh_interpreters(accelerator):
    assert not fork_server.is_safe(accelerator)
