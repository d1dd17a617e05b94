"""Sources that take too long to be read at every boundary: a thread polls them, `read` returns the latest value."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import subprocess
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

from typing_extensions import override

from callbacks.energy.meters.base import Channel, Meter, MeterError

log = logging.getLogger(__name__)

STALE_AFTER = 3
"""A value that is older than this many polls is none."""


PATIENCE_S = 5.0
"""For a poll that hangs although it was interrupted."""


class Polled(Meter):
    """A meter whose `poll` may take seconds.

    What happened between two stages is attributed to them only as finely as the source is polled.

    Args:
        poll_s: Time between two polls, s.
        clock: Monotonic seconds.
    """

    def __init__(self, poll_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if not poll_s > 0:
            raise ValueError(f"{type(self).__name__}: poll_s={poll_s} is no time between polls; use e.g. 1.0.")
        self.poll_s, self.clock = poll_s, clock
        self._channels: list[Channel] = []
        self._latest: tuple[float, float, list[float]] | None = None  # (when, how long a poll takes, values)
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self._failing = False

    @abstractmethod
    def describe(self) -> list[Channel]:
        """Channels; called once, before the first poll."""

    @abstractmethod
    def poll(self) -> list[float]:
        """Values at this moment; may take long, and may raise: the latest values stay until they are too old."""

    def interrupt(self) -> None:
        """End a running `poll` soon; called in another thread, by `close`."""

    @property
    def stopping(self) -> bool:
        """Whether `close` was called."""
        return self._stop is not None and self._stop.is_set()

    @override
    def open(self) -> list[Channel]:
        self._stop = threading.Event()
        self._latest = None
        self._channels = [replace(channel, update_s=self.poll_s) for channel in self.describe()]
        try:
            self._poll()
        except Exception as error:
            raise error if isinstance(error, MeterError) else MeterError(f"{type(self).__name__}: {error}") from error
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"energy-{type(self).__name__}", daemon=True)
        self._thread.start()
        return self._channels

    @override
    def read(self) -> list[float]:
        latest = self._latest
        if latest is None:
            return [math.nan] * len(self._channels)
        when, duration, values = latest
        if self.clock() - when > STALE_AFTER * max(self.poll_s, duration):
            return [math.nan] * len(values)
        return list(values)

    @override
    def refresh(self) -> None:
        with contextlib.suppress(Exception):
            self._poll()

    @override
    def close(self) -> None:
        if self._stop is None:
            return
        self._stop.set()
        self.interrupt()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)
        self._thread = self._latest = self._stop = None

    def _run(self) -> None:
        stop, following = self._stop, time.monotonic() + self.poll_s
        while not stop.wait(max(following - time.monotonic(), 0.0)):
            try:
                self._poll()
                self._failing = False
            except Exception as error:
                if not self._failing and not self.stopping:
                    log.warning("energy: %s was not read: %s", type(self).__name__, error)
                self._failing = True
            following = max(following + self.poll_s, time.monotonic())

    def _poll(self) -> None:
        begin = self.clock()
        values = self.poll()
        end = self.clock()
        self._latest = (end, end - begin, list(values))


class PolledCommand(Polled):
    """A meter that reads the output of a program.

    Args:
        command: Program and arguments.
        poll_s: Time between two calls, s.
        timeout_s: A call that takes longer is ended and has failed, s.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        command: Sequence[str],
        poll_s: float,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(poll_s, clock)
        if isinstance(command, str) or not command:
            raise ValueError(
                f"{type(self).__name__}: command={command!r} must be a list of a program and its arguments, like "
                "[ipmitool, dcmi, power, reading]."
            )
        self.command, self.timeout_s = tuple(map(str, command)), timeout_s
        self._child: subprocess.Popen[str] | None = None

    @property
    def installed(self) -> bool:
        """Whether the program is there."""
        return shutil.which(self.command[0]) is not None

    def output(self) -> str:
        """What the program prints.

        Raises:
            MeterError: If it fails, with what it has to say.
        """
        line = " ".join(self.command)
        try:
            # A session of its own: Ctrl-C is for the run, not for its meters.
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            raise MeterError(f"{line}: {error.strerror or error}") from error
        if self.stopping:
            self.interrupt()
        try:
            out, err = self._child.communicate(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            raise MeterError(f"{line}: no answer within {self.timeout_s:g} s") from None
        code, self._child = self._child.returncode, None
        if code:
            said = (err or out).strip().splitlines()
            raise MeterError(f"{line}: exit status {code}: {said[-1] if said else 'no message'}")
        return out

    @override
    def interrupt(self) -> None:
        if (child := self._child) is not None:
            with contextlib.suppress(OSError):
                child.kill()
