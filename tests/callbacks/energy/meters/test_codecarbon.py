from __future__ import annotations

import logging
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from callbacks.energy.meters import codecarbon
from callbacks.energy.meters.codecarbon import CodecarbonTotals, countries, intensity, processor_power

HOSTILE = """[codecarbon]
pue = 3.0
force_cpu_power = 100000
force_ram_power = 100000
output_methods = csv,logger
output_dir = {folder}
save_to_file = true
emissions_endpoint = http://127.0.0.1:9/
co2_signal_api_token = token
electricitymaps_api_token = token
force_carbon_intensity_g_co2e_kwh = 99999
allow_multiple_runs = false
tracking_mode = process
country_iso_code = FRA
cloud_provider = gcp
cloud_region = us-central1
log_level = debug
measure_power_secs = 0.001
"""


# ------------------------------------------------------------------------------------------------------------ tables


def test_electricity_of_countries():
    grams, source, year = intensity("DEU")
    assert grams == pytest.approx(381, abs=1) and "Germany" in source and "codecarbon" in source and year == 2023
    assert intensity("deu") == (grams, source, year)
    grams, source, year = intensity(None)
    assert grams == 475 and "world" in source and year == 2018
    names = countries()
    assert names["FRA"] == "France" and len(names) > 200
    assert all(intensity(code)[0] >= 0 for code in names)


@pytest.mark.parametrize(
    ("country", "meant"), [("DE", r"DEU \(Germany\)"), ("Germany", r"DEU \(Germany\)"), ("Frnace", r"FRA \(France\)")]
)
def test_unknown_countries(country, meant):
    with pytest.raises(ValueError, match=rf"country='{country}' is unknown \(did you mean .*{meant}.*three letters"):
        intensity(country)
    with pytest.raises(ValueError, match="did you mean"):
        CodecarbonTotals(country)
    with pytest.raises(ValueError, match="'QQQQQQ' is unknown; use"):
        intensity("QQQQQQ")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Intel(R) Xeon(R) Platinum 8368 CPU @ 2.40GHz", ("Intel Xeon Platinum 8368", 270)),
        ("Intel(R) Xeon(R) Platinum 8480+", ("Intel Xeon Platinum 8480+", 350)),
        ("Intel(R) Xeon(R) CPU E5-2670 v3 @ 2.30GHz", ("Intel Xeon E5-2670 v3", 120)),
        ("AMD EPYC 7232P 8-Core Processor", ("AMD EPYC 7232P", 120)),
        ("AMD Ryzen Threadripper 3990X 64-Core Processor", ("AMD Ryzen Threadripper 3990X", 280)),
        # Names that hypervisors invent say nothing.
        ("AMD EPYC", None),
        ("Intel(R) Xeon(R) Processor @ 2.90GHz", None),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", None),
        ("", None),
    ],
)
def test_power_of_processors(model, expected):
    assert processor_power(model) == expected


def test_tables_without_codecarbon(monkeypatch):
    monkeypatch.setattr(codecarbon.importlib.util, "find_spec", lambda name: None)
    codecarbon._processors.cache_clear()
    codecarbon._mix.cache_clear()
    try:
        assert processor_power("Intel(R) Xeon(R) Platinum 8368") is None
        with pytest.raises(ImportError, match="pip install"):
            intensity("DEU")
    finally:
        codecarbon._processors.cache_clear()
        codecarbon._mix.cache_clear()


# ----------------------------------------------------------------------------------------------------------- tracker


def wait(totals, seconds=20):
    deadline = time.monotonic() + seconds
    while totals.totals()["status"] == "starting":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_real_tracker_under_a_hostile_configuration(tmp_path, monkeypatch, capfd):
    """No network, files, lock, handlers or outer settings; totals that are those of its models."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
        (folder / ".codecarbon.config").write_text(HOSTILE.format(folder=folder))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for name, value in {"PUE": "5", "LOG_LEVEL": "shout", "SAVE_TO_API": "true", "FORCE_RAM_POWER": "5000"}.items():
        monkeypatch.setenv(f"CODECARBON_{name}", value)
    connections = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connections.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **keywords: connections.append(arguments))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    level = logging.getLogger("codecarbon").level
    lock = Path(tempfile.gettempdir()) / ".codecarbon.lock"
    locked = lock.exists()
    threads = set(threading.enumerate())

    totals = CodecarbonTotals("DEU", period_s=0.05, ram_w=10.0, cpu_w=40.0)
    assert totals.totals() == {"status": "not started"}
    begin = time.monotonic()
    totals.start()
    totals.start()
    assert time.monotonic() - begin < 1.5, "looking for hardware is not waited for"
    wait(totals)
    first = totals.totals()
    assert first["status"] == "ok", first
    at = time.perf_counter()
    time.sleep(0.3)
    second = totals.totals()
    seconds = time.perf_counter() - at
    totals.stop()
    totals.stop()
    last = totals.totals()

    assert last["status"] == "ok" and last["cpu_mode"] == "cpu_load"
    # 10 W and not 10 W times a PUE; both timers and we measure, and no interval counts twice.
    assert second["ram_j"] - first["ram_j"] == pytest.approx(10 * seconds, rel=0.1)
    assert 0 < last["cpu_j"] - first["cpu_j"] <= 40 * (seconds + 0.5)
    assert last["total_j"] == pytest.approx(last["cpu_j"] + last["ram_j"] + last["gpu_j"])
    assert last["co2_kg"] == pytest.approx(last["total_j"] / 3.6e6 * intensity("DEU")[0] / 1000)
    assert not connections
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert sorted(p.name for p in [*home.iterdir(), *here.iterdir()]) == [".codecarbon.config"] * 2
    assert lock.exists() == locked
    assert not logging.getLogger("codecarbon").filters and logging.getLogger("codecarbon").level in (level, 20)
    assert set(threading.enumerate()) <= threads
    out, err = capfd.readouterr()
    assert not out and not err

    # A damaged file makes codecarbon's own constructor fail; and a second tracker in the process is quick.
    (home / ".codecarbon.config").write_text("no section\n")
    (here / ".codecarbon.config").write_text("[codecarbon\n")
    again = CodecarbonTotals(None, period_s=0.05)
    again.start()
    again.stop()
    assert again.totals()["status"] == "ok" and again.totals()["ram_j"] >= 0


class Fake:
    """A tracker of some other version: only what is called public, and flush and the record of totals."""

    failing = None

    def __init__(self, **settings):
        type(self).settings = settings
        if self.failing != "constructor":
            self.run_id = 1
        self._start_time = None

    def start(self):
        if self.failing == "start":
            logging.getLogger("codecarbon").warning("graceful shutdown", exc_info=OSError("no hardware here"))
            return
        self._start_time = 1.0

    def flush(self):
        if self.failing == "flush":
            raise RuntimeError("no totals")
        return 0.25

    def _prepare_emissions_data(self):
        return SimpleNamespace(cpu_energy=1.0, gpu_energy=2.0, ram_energy=0.5)

    def stop(self):
        self.final_emissions_data = None if self.failing == "stop" else object()


@pytest.fixture
def fake(monkeypatch):
    module = SimpleNamespace(OfflineEmissionsTracker=type("Tracker", (Fake,), {}))
    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(emissions_tracker=module))
    monkeypatch.setitem(sys.modules, "codecarbon.emissions_tracker", module)
    return module.OfflineEmissionsTracker


def test_private_names_that_vanished(fake):
    totals = CodecarbonTotals("DEU")
    totals.start()
    totals.stop()
    assert totals.totals() == {
        "cpu_j": 3.6e6,
        "gpu_j": 7.2e6,
        "ram_j": 1.8e6,
        "total_j": 12.6e6,
        "co2_kg": 0.25,
        "cpu_mode": "unknown",
        "status": "ok",
    }
    assert totals._tracker.settings["output_methods"] == [] and totals._tracker.settings["pue"] == 1.0
    assert totals._tracker.settings["allow_multiple_runs"] is True


@pytest.mark.parametrize(
    ("failing", "status"),
    [
        ("constructor", "RuntimeError: its tracker was not made"),
        ("start", "OSError: no hardware here"),
        ("flush", "RuntimeError: no totals"),
        ("stop", "its tracker did not stop in order"),
    ],
)
def test_what_codecarbon_swallows_is_told(fake, failing, status):
    fake.failing = failing
    totals = CodecarbonTotals("DEU")
    totals.start()
    wait(totals)
    totals.stop()
    assert status in totals.totals()["status"]
    assert not logging.getLogger("codecarbon").filters


def test_one_measurement_at_a_time_and_nothing_from_outside():
    """Its timer and we, at once; an error in its timer's thread is noted and not printed."""

    class Base:
        inside = most = 0

        def __init__(self):
            self._external_conf = {"co2_signal_api_token": "token"}

        def _measure_power_and_energy(self):
            Base.inside += 1
            Base.most = max(Base.most, Base.inside)
            time.sleep(0.02)
            Base.inside -= 1
            raise OSError("unplugged")

    notes = codecarbon._Notes()
    tracker = codecarbon._tracker_class(SimpleNamespace(OfflineEmissionsTracker=Base), threading.RLock(), notes.add)()
    assert tracker._external_conf == {}
    threads = [threading.Thread(target=tracker._measure_power_and_energy) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Base.most == 1 and str(notes) == "OSError: unplugged"


def test_a_timer_that_fires_while_it_is_stopped_ends_as_well():
    from codecarbon.external.scheduler import PeriodicScheduler

    before = set(threading.enumerate())
    scheduler = PeriodicScheduler(function=lambda: None, interval=0.01)
    scheduler.start()
    scheduler.stop()
    scheduler.start(from_run=True)  # what a timer that has just fired does
    codecarbon._end(scheduler)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # a timer that was told to end does so as soon as the machine gets round to it
    assert set(threading.enumerate()) <= before
    codecarbon._end(None)


def test_an_old_version_is_not_started(fake, monkeypatch):
    totals = CodecarbonTotals("DEU")
    monkeypatch.setattr(codecarbon.metadata, "version", lambda name: "3.3.0")
    totals.start()
    totals.stop()
    assert "3.3.0 is too old, 3.3.2 is needed" in totals.totals()["status"]


def test_every_setting_is_given():
    """An argument that a later version adds, and a configuration could set, is noticed here."""
    import inspect

    from codecarbon import OfflineEmissionsTracker
    from codecarbon.emissions_tracker import BaseEmissionsTracker

    known = {
        name
        for owner in (BaseEmissionsTracker, OfflineEmissionsTracker)
        for name, parameter in inspect.signature(inspect.unwrap(owner.__init__)).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        and name != "self"
        and not name.startswith("save_to_")
    }
    assert known - {"co2_signal_api_token"} == set(CodecarbonTotals("DEU")._settings())
