"""A recorded trace played again: for tests, for other people's measurements, for the same report twice."""

from __future__ import annotations

import csv
import math
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from typing_extensions import override

from callbacks.energy.meters.base import Availability, Channel, Component, Meter, MeterError

REQUIRED = ("t_s", "channel", "value")
KINDS = ("gauge", "counter")
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass
class _Series:
    component: str
    kind: str
    measured: bool
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def settings(self) -> tuple[str, str, bool]:
        return self.component, self.kind, self.measured

    def at(self, time_s: float) -> float:
        """Value on the straight line between two rows; NaN outside of them."""
        i = bisect_right(self.times, time_s)
        if i == 0 or (i == len(self.times) and time_s > self.times[-1]):
            return math.nan
        if i == len(self.times):
            return self.values[-1]
        share = (time_s - self.times[i - 1]) / (self.times[i] - self.times[i - 1])
        before, after = self.values[i - 1], self.values[i]
        return before if share == 0 else before + share * (after - before)


class ReplayMeter(Meter):
    """Plays a CSV file with columns ``t_s,channel,value``, from its first row on, starting at `open`.

    Optional columns: ``component`` (default: from the channel's name, ``gpu0`` is a gpu), ``kind`` (``gauge``, the
    default, in W, or ``counter`` in J), ``measured`` (default true). Between two rows of a channel its value lies on a
    straight line; before the first and after the last one there is none, nor beside one that is ``nan``. Counters must
    not go down.

    Args:
        path: The file.
        speed: Seconds of the trace in one second. Powers stay what they are, so a trace played twice as fast has half
            the energy.
        loops: Whether the trace begins again at its end, counters going on from there.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        path: str,
        speed: float = 1.0,
        loops: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0 < speed < math.inf:
            raise ValueError(f"ReplayMeter: speed={speed} must be positive; 1 is as recorded.")
        self.path, self.speed, self.loops, self.clock = Path(path), speed, loops, clock
        self._series: dict[str, _Series] = {}

    @override
    def probe(self) -> Availability:
        try:
            _load(self.path)
        except MeterError as error:
            return Availability(False, str(error))
        return Availability(True)

    @override
    def open(self) -> list[Channel]:
        self._series = _load(self.path)
        self._first = min(series.times[0] for series in self._series.values())
        self._last = max(series.times[-1] for series in self._series.values())
        if self.loops and self._last == self._first:
            raise MeterError(f"{self.path}: loops=true needs rows at two times at least.")
        self._begin = self.clock()
        source = f"replay ({self.path.name})"
        return [Channel(name, s.component, s.kind, s.measured, source) for name, s in self._series.items()]

    @override
    def read(self) -> list[float]:
        passed, laps = (self.clock() - self._begin) * self.speed, 0
        if self.loops:
            laps, passed = divmod(passed, self._last - self._first)
        out = []
        for series in self._series.values():
            value = series.at(self._first + passed)
            if series.kind == "counter":
                begin, end = series.values[0], series.values[-1]
                value = begin + (value - begin + laps * (end - begin)) / self.speed
            out.append(value)
        return out


def _load(path: Path) -> dict[str, _Series]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            if missing := [name for name in REQUIRED if name not in header]:
                raise MeterError(
                    f"{path}, line 1: no column {', '.join(missing)}; the header must be t_s,channel,value and may add "
                    "component,kind,measured."
                )
            out: dict[str, _Series] = {}
            for row in reader:
                _add(out, row, f"{path}, line {reader.line_num}")
    except OSError as error:
        raise MeterError(f"{path} cannot be read: {error.strerror}.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise MeterError(f"{path} is no CSV file: {error}.") from error
    if not out:
        raise MeterError(f"{path} has no rows.")
    return out


def _add(out: dict[str, _Series], row: dict[str, Any], where: str) -> None:
    name = (row["channel"] or "").strip()
    if not name:
        raise MeterError(f"{where}, column channel: empty.")
    time_s, value = (_number(row[column], where, column) for column in ("t_s", "value"))
    if not math.isfinite(time_s):
        raise MeterError(f"{where}, column t_s: {row['t_s']!r} is no time.")
    given = {key: (row.get(key) or "").strip().lower() for key in ("component", "kind", "measured")}
    component = given["component"] or next((c for c in get_args(Component) if name.startswith(c)), "other")
    kind = given["kind"] or "gauge"
    measured = given["measured"] or "true"
    for column, text, choices in (
        ("component", component, get_args(Component)),
        ("kind", kind, KINDS),
        ("measured", measured, tuple(TRUTH)),
    ):
        if text not in choices:
            raise MeterError(f"{where}, column {column}: {text!r} is unknown; choose one of {', '.join(choices)}.")
    series = out.setdefault(name, _Series(component, kind, TRUTH[measured]))
    if series.settings != (component, kind, TRUTH[measured]):
        raise MeterError(f"{where}: channel {name!r} had another component, kind or measured before.")
    if series.times and time_s <= series.times[-1]:
        raise MeterError(f"{where}, column t_s: {time_s:g} does not come after {series.times[-1]:g} of {name!r}.")
    if kind == "counter" and series.values and value < series.values[-1]:
        raise MeterError(f"{where}, column value: the counter {name!r} goes down, from {series.values[-1]:g}.")
    series.times.append(time_s)
    series.values.append(value)


def _number(text: str | None, where: str, column: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise MeterError(f"{where}, column {column}: {text!r} is no number.") from None
