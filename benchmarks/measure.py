"""Timing variants against each other on a machine that is not quiet, and the memory that each of them needs.

What disturbs a machine (other processes, clock frequency, temperature) changes more slowly than a repeat lasts. So
variants take turns, ``A B A B ...``, statistics are medians, and intervals come from resampling whole rounds, which
keeps together what was measured under the same conditions. CPU seconds stand beside wall seconds: they do not count
the time that other processes took.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Row

REPEATS = 5  # fewer, and a median and its interval say little
RESAMPLES = 2000
CONFIDENCE = 0.95
UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


@dataclass(frozen=True)
class Lap:
    """Seconds that something took: by the clock on the wall, and of all threads of this process on the CPU."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Clock:
    """Two readings in seconds; tests inject their own."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time

    def now(self) -> Lap:
        """Both readings."""
        return Lap(self.wall(), self.cpu())


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant, an entry per repeat."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @classmethod
    def of(cls, laps: Sequence[Lap]) -> Timing:
        """The laps of all repeats."""
        return cls(tuple(lap.wall for lap in laps), tuple(lap.cpu for lap in laps))


@dataclass(frozen=True)
class Estimate:
    """A statistic with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Memory:
    """Peak memory of a fresh process in MiB.

    Attributes:
        peak_mib: Resident memory at its peak, the interpreter and imported libraries included.
        added_mib: The part of it that the function added to what importing its module had taken.
        cuda_mib: Peak of torch's allocator on the CUDA device, 0 without one.
    """

    peak_mib: float
    added_mib: float
    cuda_mib: float = 0.0


def interleave(
    variants: Mapping[str, Callable[[], Any]], repeats: int = REPEATS, warmup: int = 1
) -> dict[str, list[Any]]:
    """Call the variants in turn, ``repeats`` rounds after ``warmup`` unrecorded ones.

    Returns:
        What each variant returned, round by round. For variants that time themselves; `compare` times calls.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats}, warmup={warmup}: at least 1 repeat and 0 rounds of warm-up are needed")
    returned: dict[str, list[Any]] = {name: [] for name in variants}
    for round_ in range(-warmup, repeats):
        for name, variant in variants.items():
            gc.collect()  # nobody pays for the garbage of the variant before
            value = variant()
            if round_ >= 0:
                returned[name].append(value)
    return returned


def compare(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int = REPEATS,
    warmup: int = 1,
    calls: int | Mapping[str, int] = 1,
    device: str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time the variants in interleaved repeats.

    Args:
        variants: Name to a function without arguments.
        repeats: Recorded rounds.
        warmup: Rounds before them.
        calls: Calls of a variant per round, for each variant or for all: enough that a round lasts some milliseconds.
        device: ``cuda``: wait for the device before every reading of the clock.
        clock: Source of the times.
    """
    clock = clock or Clock()
    synchronize = _synchronizer(device)

    def timed(name: str, variant: Callable[[], Any]) -> Callable[[], Lap]:
        number = calls if isinstance(calls, int) else calls[name]

        def lap() -> Lap:
            synchronize()
            begin = clock.now()
            for _ in range(number):
                variant()
            synchronize()
            end = clock.now()
            return Lap((end.wall - begin.wall) / number, (end.cpu - begin.cpu) / number)

        return lap

    laps = interleave({name: timed(name, variant) for name, variant in variants.items()}, repeats, warmup)
    return {name: Timing.of(each) for name, each in laps.items()}


def _synchronizer(device: str) -> Callable[[], None]:
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------- statistics


def median(values: Sequence[float]) -> Estimate:
    """Median of repeats."""
    return _bootstrap(lambda a: np.median(a, axis=-1), values)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Ratio of the medians of two variants that were measured in the same rounds."""
    return _bootstrap(lambda a, b: np.median(a, axis=-1) / np.median(b, axis=-1), numerator, denominator)


def difference(minuend: Sequence[float], subtrahend: Sequence[float]) -> Estimate:
    """Difference of the medians of two variants that were measured in the same rounds."""
    return _bootstrap(lambda a, b: np.median(a, axis=-1) - np.median(b, axis=-1), minuend, subtrahend)


def _bootstrap(statistic: Callable[..., np.ndarray], *samples: Sequence[float]) -> Estimate:
    """Percentile interval of a statistic over resampled rounds; reproducible, the resampling is seeded."""
    values = np.asarray(samples, dtype=np.float64)  # (sample, round); raises where the numbers of rounds differ
    rounds = np.random.default_rng(0).integers(values.shape[1], size=(RESAMPLES, values.shape[1]))
    resampled = statistic(*(sample[rounds] for sample in values))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(statistic(*values)), float(low), float(high))


# ------------------------------------------------------------------------------------------------------------- rows


def time_rows(what: str, timings: Mapping[str, Timing], unit: str = "ms", **extra: Any) -> list[Row]:
    """A row per variant: median seconds in ``unit`` (``s``, ``ms`` or ``µs``), wall in ``value`` and CPU in ``cpu``."""
    return [
        _row(what, variant, unit, median(timing.wall), statistics.median(timing.cpu), UNITS[unit], extra)
        for variant, timing in timings.items()
    ]


def ratio_row(what: str, timings: Mapping[str, Timing], numerator: str, denominator: str, **extra: Any) -> Row:
    """How many times as long ``numerator`` takes; ``paper``, ``at_least``, ``at_most`` and ``note`` may be given."""
    above, below = timings[numerator], timings[denominator]
    cpu = ratio(above.cpu, below.cpu).value
    return _row(f"{what}, ratio", f"{numerator} / {denominator}", "", ratio(above.wall, below.wall), cpu, 1.0, extra)


def difference_row(
    what: str, timings: Mapping[str, Timing], minuend: str, subtrahend: str, unit: str = "ms", **extra: Any
) -> Row:
    """How much longer ``minuend`` takes, in ``unit``."""
    more, less = timings[minuend], timings[subtrahend]
    wall, cpu = difference(more.wall, less.wall), difference(more.cpu, less.cpu).value
    return _row(f"{what}, difference", f"{minuend} - {subtrahend}", unit, wall, cpu, UNITS[unit], extra)


def memory_rows(what: str, memories: Mapping[str, Memory], **extra: Any) -> list[Row]:
    """A row per variant: what it added to a fresh process, on the CUDA device where it used one."""
    return [
        {"what": what, "variant": variant, "value": memory.cuda_mib or memory.added_mib, "unit": "MiB", **extra}
        for variant, memory in memories.items()
    ]


def _row(what: str, variant: str, unit: str, wall: Estimate, cpu: float, factor: float, extra: Mapping) -> Row:
    scaled = {"value": wall.value, "low": wall.low, "high": wall.high, "cpu": cpu}
    return {"what": what, "variant": variant, "unit": unit, **{k: v * factor for k, v in scaled.items()}, **extra}


# ------------------------------------------------------------------------------------------------ threads and memory


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use ``number`` threads, and as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single_thread() -> AbstractContextManager[None]:
    """One thread: what small networks are fastest with, and what other processes disturb least."""
    return threads(1)


def peak_memory(function: Callable[..., Any], *args: Any) -> Memory:
    """Call ``function(*args)`` in a fresh process and return the memory that it needed at its peak.

    Args:
        function: Defined at the top level of a module (it is pickled by name).
        *args: Plain data.

    Raises:
        Exception: What the function raised.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, function, args).result()


def _measured(function: Callable[..., Any], args: tuple[Any, ...]) -> Memory:
    before = status_mib("VmRSS")
    function(*args)
    peak = status_mib("VmHWM")
    torch = sys.modules.get("torch")
    cuda = torch.cuda.max_memory_allocated() / 2**20 if torch and torch.cuda.is_initialized() else 0.0
    return Memory(peak, peak - before, cuda)


def status_mib(field: str) -> float:
    """A field of this process's status. Not ``ru_maxrss``: a child inherits that from a larger parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise NotImplementedError("peak memory is read from /proc/self/status, which this system lacks") from error
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
