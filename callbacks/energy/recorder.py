"""Reads meters in a thread and at every boundary, books the energy to the label in force, and writes each reading."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from callbacks.energy.accounting import Ledger, Tally
from callbacks.energy.meters.base import Channel, Meter
from callbacks.energy.trace import Trace

log = logging.getLogger(__name__)

SHORTEST_PERIOD_S, LONGEST_PERIOD_S = 0.05, 1e6
PATIENCE_S = 5.0
"""For a thread that hangs in a driver: the run must end all the same."""


class Recorder:
    """The energy of one machine, from `start` to `stop`, divided among labels without a remainder.

    A thread reads all meters every ``period_s``; `switch` reads them as well, in the calling thread, so that a
    boundary between two labels is where the caller says and not at the next tick. Whatever was used between two
    readings belongs to the label that was in force.

    Args:
        meters: What to read; `start` opens and `stop` closes them.
        period_s: Time between two readings of the thread, s; at least 0.05.
        write: Called with every record (a plain dictionary), under the recorder's lock. It must not raise.
        overhead_w: See `accounting.Ledger`.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        period_s: float = 1.0,
        write: Callable[[dict[str, Any]], None] | None = None,
        overhead_w: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not SHORTEST_PERIOD_S <= period_s <= LONGEST_PERIOD_S:
            raise ValueError(
                f"callbacks.energy.period_s={period_s}: use at least {SHORTEST_PERIOD_S} and at most "
                f"{LONGEST_PERIOD_S:g} seconds."
            )
        if not 0 <= overhead_w < math.inf:
            raise ValueError(f"callbacks.energy.overhead_w={overhead_w} is no power; use 0 or more.")
        self.meters, self.period_s, self.overhead_w, self.clock = list(meters), period_s, overhead_w, clock
        self.channels: list[Channel] = []
        self._sizes: list[int] = []
        self.label = ""
        self.step: Callable[[], int] = lambda: 0  # set by whoever counts optimiser steps; goes into the trace
        self.annotate: Callable[[], dict[str, Any]] = dict  # further fields of each reading's record
        self.trace = Trace()
        self.num_readings = 0
        self._write = write or (lambda record: None)
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._ledger = Ledger([])
        self._cumulative = Tally()
        self._failed: set[str] = set()
        self._warned_invalid: set[str] = set()
        self._pid = os.getpid()

    def start(self, label: str) -> None:
        """Open the meters and begin with ``label``."""
        opened: list[Meter] = []
        try:
            for meter in self.meters:
                channels = meter.open()
                opened.append(meter)
                self.channels += channels
                self._sizes.append(len(channels))
        except BaseException:
            for meter in opened:
                meter.close()
            raise
        self._ledger = Ledger(self.channels, self.overhead_w)
        self.label = label
        self._begin = self.clock()
        self.read()
        self._thread = threading.Thread(target=self._run, name="energy-recorder", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the recorder has started and not stopped, in the process that started it."""
        return self._thread is not None and os.getpid() == self._pid

    def _run(self) -> None:
        following = self.clock() + self.period_s
        while not self._stop.wait(max(following - self.clock(), 0.0)):
            try:
                self.read()
            except Exception as error:
                if "thread" not in self._failed:
                    self._failed.add("thread")
                    log.warning("energy: a reading failed: %s: %s", type(error).__name__, error)
            # After a pause (a suspended machine, a busy interpreter) readings are not made up for.
            following = max(following + self.period_s, self.clock())

    def read(self) -> None:
        """Take a reading now and book what was used since the last one."""
        with self._lock:
            values: list[float] = []
            for meter, size in zip(self.meters, self._sizes, strict=True):
                values += self._values_of(meter, size)
            now = self.clock() - self._begin
            self.num_readings += 1
            interval = self._ledger.add(now, values, self.label)
            if interval is not None:
                self._cumulative.add(interval)
                self.trace.add(now, interval, self.label, self.step())
                self._warn_of_invalid()
            self._write(self._record(now))

    def _values_of(self, meter: Meter, size: int) -> list[float]:
        try:
            values = [float(value) for value in meter.read()]
            if len(values) != size:
                raise ValueError(f"{len(values)} values for {size} channels")
            return [value if math.isfinite(value) else math.nan for value in values]
        except Exception as error:  # a meter that breaks (a lost GPU, a vanished file) must not cost the run
            name = type(getattr(meter, "meter", meter)).__name__
            if name not in self._failed:
                self._failed.add(name)
                log.warning("energy: %s cannot be read any more: %s: %s", name, type(error).__name__, error)
            return [math.nan] * size

    def _warn_of_invalid(self) -> None:
        for name, count in self._ledger.invalid.items():
            if count and name not in self._warned_invalid:
                self._warned_invalid.add(name)
                log.warning(
                    "energy: no valid reading of %s for a moment; such intervals are missing in energy/coverage",
                    name,
                )

    def _record(self, now: float) -> dict[str, Any]:
        total = self._cumulative
        return {
            "kind": "sample",
            "t": round(now, 6),
            "label": self.label,
            "j": [round(total.joules.get(channel.name, 0.0), 6) for channel in self.channels],
            "total_j": round(total.total_j, 6),
            "estimated_j": round(total.estimated_j, 6),
            "covered_s": round(total.covered_seconds, 6),
            "step": self.step(),
            **self.annotate(),
        }

    def switch(self, label: str) -> None:
        """End the present label at this moment and begin another one."""
        if not self.running or label == self.label:
            return
        with self._lock:
            self.read()
            self.label = label

    def tallies(self) -> dict[str, Tally]:
        """What every label has cost up to the last reading."""
        with self._lock:
            return {label: tally.copy() for label, tally in self._ledger.tallies.items()}

    def invalid_intervals(self) -> dict[str, int]:
        """Number of intervals without a valid reading, per channel."""
        return dict(self._ledger.invalid)

    def elapsed(self) -> float:
        """Seconds since `start`."""
        return self.clock() - self._begin

    def stop(self) -> None:
        """Take the last reading, end the thread and close the meters; twice without harm."""
        if not self.running:
            return
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            log.warning("energy: a meter hangs; the record ends with the last reading before")
            self._thread = None
            return
        for meter in self.meters:
            with contextlib.suppress(Exception):
                meter.refresh()
        self.read()
        self._thread = None
        for meter in self.meters:
            with contextlib.suppress(Exception):
                meter.close()
