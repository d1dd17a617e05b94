"""codecarbon: its tables (processors, electricity of countries), and its tracker beside our own meters.

The only file that touches codecarbon's private names; `CodecarbonTotals` says what it does about their absence. The
tables are read from the installed package's files without importing it.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import importlib.util
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import override

OLDEST = (3, 3, 2)
"""Before, ``output_methods=[]`` switched the power monitor off and the load of the processors was read as 0."""

J_PER_KWH = 3.6e6
log = logging.getLogger(__name__)
_constructing = threading.Lock()


def _data(name: str) -> Path:
    spec = importlib.util.find_spec("codecarbon")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package codecarbon is not installed: pip install -c constraints.txt codecarbon")
    return Path(spec.submodule_search_locations[0]) / "data" / name


# ------------------------------------------------------------------------------------------------------- electricity


@functools.cache
def _mix() -> dict[str, dict[str, Any]]:
    return json.loads(_data("private_infra/global_energy_mix.json").read_text())


def countries() -> dict[str, str]:
    """ISO 3166 codes of three letters and names of all countries whose electricity is known."""
    return {code: entry["country_name"] for code, entry in _mix().items()}


def intensity(country: str | None) -> tuple[float, str, int]:
    """CO2 equivalents of a country's electricity.

    Args:
        country: ISO 3166 code of three letters (DEU); None: the mean of the world.

    Returns:
        (g/kWh, source, year).

    Raises:
        ValueError: If the code is unknown; names the nearest.
    """
    version = metadata.version("codecarbon")
    if country is None:
        world = json.loads(_data("private_infra/carbon_intensity_per_source.json").read_text())["world_average"]
        # The report of 2019 gives the mean of 2018.
        return float(world), f"mean of the world, IEA, in codecarbon {version}", 2018
    entry = _mix().get(str(country).upper())
    if entry is None:
        raise ValueError(
            f"callbacks.energy.country={country!r} is unknown{_nearest(str(country))}; use the ISO 3166 code of three "
            "letters (DEU), null for the mean of the world, or give callbacks.energy.carbon_intensity in g/kWh."
        )
    source = f"{entry['country_name']}, Our World in Data, in codecarbon {version}"
    return float(entry["carbon_intensity"]), source, int(entry["year"])


def _nearest(word: str) -> str:
    known = countries()
    codes = difflib.get_close_matches(word.upper(), known, 2, 0.5)
    by_name = {name.lower(): code for code, name in known.items()}
    named = [by_name[name] for name in difflib.get_close_matches(word.lower(), by_name, 2, 0.7)]
    found = list(dict.fromkeys([*named, *codes] if len(word) > 3 else [*codes, *named]))[:3]
    return f" (did you mean {', '.join(f'{code} ({known[code]})' for code in found)}?)" if found else ""


# -------------------------------------------------------------------------------------------------------- processors


@functools.cache
def _processors() -> list[tuple[frozenset[str], str, float]]:
    out = []
    with _data("hardware/cpu_power.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError):  # one row says 27.29.5
                out.append((_words(row["Name"]), row["Name"], float(row["TDP"])))
    return out


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+(?:\.[a-z0-9]+)*\+?", text.lower()))


def processor_power(model: str) -> tuple[str, float] | None:
    """Name and thermal design power, W, of one processor in codecarbon's table; None if it is not there.

    The entry with the most words that are all in ``model`` (codecarbon's rule, which gives up where several fit);
    entries of one word (``3280``) fit too much. None also where the best entries disagree, or without codecarbon.

    Args:
        model: As in ``/proc/cpuinfo``: ``Intel(R) Xeon(R) Platinum 8368 CPU @ 2.40GHz``.
    """
    words = _words(model)
    try:
        fitting = [entry for entry in _processors() if len(entry[0]) > 1 and entry[0] <= words]
    except (ImportError, OSError):
        return None
    most = max((len(entry[0]) for entry in fitting), default=0)
    best = [(name, watts) for entry_words, name, watts in fitting if len(entry_words) == most]
    return best[0] if len({watts for _, watts in best}) == 1 else None


# ----------------------------------------------------------------------------------------------------------- tracker


class _Notes(logging.Filter):
    """Keeps what codecarbon logs off the terminal, and remembers the errors that it swallows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            self.add(record.exc_info[1])
        elif record.levelno >= logging.ERROR:
            self.add(record.getMessage())
        return False

    def add(self, what: BaseException | str) -> None:
        text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
        if text not in self.found:
            self.found.append(text)

    def __str__(self) -> str:
        return "; ".join(self.found[:3])


PATIENCE_S = 10.0
"""For a start that hangs: the run must end all the same."""


class CodecarbonTotals:
    """What codecarbon counts, on its own models, from `start` to `stop`: one tracker for one machine.

    It needs no network, writes no file and no lock, installs no signal handler, and reads neither configuration files
    nor ``CODECARBON_*`` variables: all its settings are given here. PUE is 1: facility figures are not its business.
    Nothing raises; what went wrong is in `totals` under ``status``.

    Args:
        country_iso_code: ISO 3166 code of three letters; None: the mean of the world.
        period_s: Time between two of its measurements, s.
        gpu_ids: GPUs that count, NVML indices or UUIDs; None: those of ``CUDA_VISIBLE_DEVICES``, or all.
        cpu_w: Thermal design power of the machine's processors, W; None: it finds it out.
        ram_w: Power of the memory, W; None: it estimates it.
        intensity_g_per_kwh: CO2 equivalents of the electricity, g/kWh, instead of the country's.
    """

    def __init__(
        self,
        country_iso_code: str | None = None,
        period_s: float = 1.0,
        gpu_ids: Sequence[int | str] | None = None,
        cpu_w: float | None = None,
        ram_w: float | None = None,
        intensity_g_per_kwh: float | None = None,
    ) -> None:
        if intensity_g_per_kwh is None:
            grams, _, _ = intensity(country_iso_code)  # an unknown country is an error here, not a line in a log
            intensity_g_per_kwh = grams if country_iso_code is None else None
        self.country = None if country_iso_code is None else str(country_iso_code).upper()
        self.period_s, self.cpu_w, self.ram_w = period_s, cpu_w, ram_w
        self.gpu_ids = None if gpu_ids is None else list(gpu_ids)
        self.intensity_g_per_kwh = intensity_g_per_kwh
        self.notes = _Notes()
        self._measuring = threading.RLock()
        self._tracker: Any = None
        self._thread: threading.Thread | None = None
        self._level: int | None = None
        self._state = "not started"
        self._totals: dict[str, Any] = {}

    def start(self) -> None:
        """Start in a thread: looking for hardware takes a second or two."""
        if self._thread is not None or self._state != "not started":
            return
        try:
            version = metadata.version("codecarbon")
            if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
                raise RuntimeError(
                    f"codecarbon {version} is too old, {'.'.join(map(str, OLDEST))} is needed: "
                    "pip install -c constraints.txt codecarbon"
                )
            logger = logging.getLogger("codecarbon")
            # Before the import: that prints already, at the level of a variable.
            logger.addFilter(self.notes)
            # Here and not in the thread: a process forked while a module is being imported could never import it.
            import codecarbon.emissions_tracker as library

            self._level = logger.level
            logger.setLevel(logging.WARNING)
            self.notes.found.clear()
        except Exception as error:
            self.notes.add(error)
            self._fail()
            return
        self._state = "starting"
        self._thread = threading.Thread(target=self._begin, args=(library,), name="energy-codecarbon", daemon=True)
        self._thread.start()

    def _begin(self, library: ModuleType) -> None:
        try:
            with _constructing, _without_configuration(library):
                tracker = _tracker_class(library, self._measuring, self.notes.add)(**self._settings())
            if not hasattr(tracker, "run_id"):  # the last thing that its constructor sets
                raise RuntimeError(f"its tracker was not made: {self.notes}")
            tracker.start()
            if getattr(tracker, "_start_time", 0.0) is None:
                raise RuntimeError(f"its tracker did not start: {self.notes}")
            if not getattr(tracker, "_hardware", True):
                self.notes.add("it found no hardware")
            self._tracker = tracker
            self._state = "running"
        except Exception as error:
            self.notes.add(error)
            self._fail()

    def _fail(self) -> None:
        self._state = "failed"
        self._restore_log()

    def _settings(self) -> dict[str, Any]:
        """Every argument that a configuration could set otherwise; those of ``save_to_...`` are deprecated."""
        return {
            "project_name": "wattlight",
            "measure_power_secs": self.period_s,
            "api_call_interval": -1,
            "api_endpoint": "",
            "api_key": "",
            "output_dir": ".",
            "output_file": "emissions.csv",
            "output_methods": [],
            "logging_logger": None,
            "prometheus_url": "",
            "output_handlers": [],
            "gpu_ids": self.gpu_ids,
            "emissions_endpoint": None,
            "experiment_id": "",
            "experiment_name": "",
            "electricitymaps_api_token": None,
            "tracking_mode": "machine",
            "log_level": "warning",
            "on_csv_write": "append",
            "logger_preamble": "",
            "force_cpu_power": self.cpu_w,
            "force_ram_power": self.ram_w,
            "pue": 1.0,
            "wue": 0.0,
            "force_carbon_intensity_g_co2e_kwh": self.intensity_g_per_kwh,
            "force_mode_cpu_load": False,
            "allow_multiple_runs": True,  # False writes a lock and replaces the handlers of SIGINT and SIGTERM
            "rapl_include_dram": False,
            "rapl_prefer_psys": False,
            "metadata": None,
            "country_iso_code": self.country,
            "region": None,
            "cloud_provider": None,
            "cloud_region": None,
            "country_2letter_iso_code": None,
        }

    def totals(self) -> dict[str, Any]:
        """What was counted until now, after a measurement at this moment; after `stop`, until then.

        Returns:
            ``cpu_j``, ``gpu_j``, ``ram_j``, ``total_j``, ``co2_kg`` and ``cpu_mode`` (how it takes the processors'
            energy: ``cpu_load`` is a model) once it has started; and always ``status``: ``ok``, ``starting``,
            ``not started``, or what went wrong.
        """
        if self._state == "running":
            self._measure()
        state = "ok" if self._state in ("running", "stopped") else self._state
        return {**self._totals, "status": str(self.notes) or state}

    def _measure(self) -> None:
        tracker = self._tracker
        with self._measuring:
            try:
                try:
                    tracker._measure_power_and_energy()
                    tracker._update_emissions()
                    cpu, gpu, ram = (getattr(tracker, f"_total_{part}_energy").kWh for part in ("cpu", "gpu", "ram"))
                    co2 = tracker._total_emissions
                except AttributeError:  # another version: the way that its own outputs take
                    co2 = tracker.flush()
                    data = tracker._prepare_emissions_data()
                    cpu, gpu, ram = data.cpu_energy, data.gpu_energy, data.ram_energy
                self._totals = {
                    "cpu_j": cpu * J_PER_KWH,
                    "gpu_j": gpu * J_PER_KWH,
                    "ram_j": ram * J_PER_KWH,
                    "total_j": (cpu + gpu + ram) * J_PER_KWH,
                    "co2_kg": float(co2),
                    "cpu_mode": _cpu_mode(tracker),
                }
            except Exception as error:
                self.notes.add(error)

    def stop(self) -> None:
        """Take the last measurement and end all its threads; twice without harm."""
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
            if self._thread.is_alive():
                self.notes.add("it did not start in time")
                return
            self._thread = None
        if self._state != "running":
            return
        self._measure()
        tracker = self._tracker
        timers = [getattr(tracker, name, None) for name in ("_scheduler", "_scheduler_monitor_power")]
        try:
            tracker.stop()
            if getattr(tracker, "final_emissions_data", None) is None:
                self.notes.add("its tracker did not stop in order")
        except Exception as error:
            self.notes.add(error)
        for timer in timers:
            _end(timer)
        self._state = "stopped"
        self._restore_log()

    def _restore_log(self) -> None:
        logger = logging.getLogger("codecarbon")
        logger.removeFilter(self.notes)
        if self._level is not None:
            logger.setLevel(self._level)
            self._level = None


def _tracker_class(library: ModuleType, lock: threading.RLock, note: Callable[[BaseException], None]) -> type:
    """The offline tracker: without outer settings, one measurement at a time, errors of its timers noted."""
    base = library.OfflineEmissionsTracker

    class Tracker(base):
        # Some settings are taken from here although an argument was given.
        _external_conf = property(lambda self: {}, lambda self, value: None)

    if hasattr(base, "_measure_power_and_energy"):
        # Its timer and we measure; both at once would count an interval twice.
        def measure(self: Any) -> None:
            with lock:
                try:
                    base._measure_power_and_energy(self)
                except Exception as error:
                    note(error)

        Tracker._measure_power_and_energy = measure
    return Tracker


@contextlib.contextmanager
def _without_configuration(library: ModuleType) -> Iterator[None]:
    """Keep the constructor from reading configuration: a damaged file alone would make it fail."""
    name = "get_hierarchical_config"
    original = getattr(library, name, None)
    if original is not None:
        setattr(library, name, dict)
    try:
        yield
    finally:
        if original is not None:
            setattr(library, name, original)


def _cpu_mode(tracker: Any) -> str:
    modes = [getattr(part, "_mode", None) for part in getattr(tracker, "_hardware", [])]
    return next((str(mode) for mode in modes if mode), "unknown")


def _end(scheduler: Any) -> None:
    """Stop one of its timers for good: one that has just fired starts the next after it was stopped."""
    for _ in range(5):
        timer = getattr(scheduler, "_timer", None)
        if timer is None:
            return
        with contextlib.suppress(Exception):
            scheduler.stop()
        if timer is not threading.current_thread():
            timer.join(2)
        if timer is getattr(scheduler, "_timer", None) and not timer.is_alive():
            return


def compare(theirs: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Warn if two readings of the same instrument differ: models may, measurements must not.

    Args:
        theirs: Of `CodecarbonTotals.totals`.
        summary: Of the run (`callbacks.energy.summary.summarize`).
    """
    measured = {c["component"] for c in summary["channels"].values() if c["measured"]}
    pairs = [("gpu", "gpu_j")] + ([("cpu", "cpu_j")] if "rapl" in str(theirs.get("cpu_mode", "")) else [])
    for component, key in pairs:
        ours = summary[f"{component}_kwh"] * J_PER_KWH
        long_enough = summary["duration_s"] > 300  # codecarbon starts two seconds later, which short runs notice
        if component in measured and long_enough and theirs.get(key) and abs(theirs[key] / ours - 1) > 0.05:
            log.warning(
                "energy: %s: %.5g J here, %.5g J by codecarbon; one of the two reads something else",
                component, ours, theirs[key],
            )  # fmt: skip
