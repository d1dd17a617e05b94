from __future__ import annotations

import errno
import math
import os

import numpy as np
import pytest

from callbacks.energy.accounting import Ledger
from callbacks.energy.meters.base import MeterError
from callbacks.energy.meters.rapl import RaplMeter

RANGE_UJ = 262143328850


def zone(folder, name, energy_uj, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    for key, value in files.items():
        (folder / key).write_text(f"{value}\n")
    return folder


@pytest.fixture
def tree(tmp_path):
    """Two sockets with memory, cores, a platform counter and the memory-mapped twin."""
    limits = {
        "constraint_0_name": "long_term",
        "constraint_0_max_power_uw": 270000000,
        "constraint_0_power_limit_uw": 270000000,
        "constraint_1_name": "short_term",
        "constraint_1_max_power_uw": 0,
        "constraint_1_power_limit_uw": 324000000,
    }
    (tmp_path / "intel-rapl").mkdir()
    for socket in (0, 1):
        package = zone(tmp_path / f"intel-rapl:{socket}", f"package-{socket}", 50_000_000_000 * (socket + 1), **limits)
        zone(tmp_path / f"intel-rapl:{socket}:0", "core", 9_000_000)
        zone(tmp_path / f"intel-rapl:{socket}:1", "dram", 7_000_000_000 * (socket + 1), constraint_0_max_power_uw=0)
        zone(package / f"intel-rapl:{socket}:1", "dram", 7_000_000_000 * (socket + 1))  # the same one, as in /sys
    zone(tmp_path / "intel-rapl:2", "psys", 900_000_000_000)
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", 50_000_000_000)
    zone(tmp_path / "intel-rapl-mmio:1", "package-7", 70_000_000_000)
    return tmp_path


def test_packages_and_memory_and_nothing_inside_or_twice(tree):
    meter = RaplMeter(str(tree))
    assert meter.probe().ok
    channels = meter.open()
    assert [(c.name, c.component, c.kind, c.measured) for c in channels] == [
        ("cpu0", "cpu", "counter", True),
        ("dram0", "dram", "counter", True),
        ("cpu1", "cpu", "counter", True),
        ("dram1", "dram", "counter", True),
    ]
    assert channels[0].modulus_j == pytest.approx(262143.32885, abs=1e-9)
    assert channels[0].max_power_w == 324 and channels[1].max_power_w is None
    assert meter.read() == pytest.approx([50_000, 7_000, 100_000, 14_000])
    meter.close()
    meter.close()
    assert all(math.isnan(value) for value in meter.read())


def test_the_platform_only_when_asked_for(tree):
    meter = RaplMeter(str(tree), psys=True)
    channels = {c.name: c for c in meter.open()}
    meter.close()
    assert channels["node"].component == "node" and len(channels) == 5


def test_wrap_of_a_262_kj_counter_is_exact(tree):
    """1 s samples across two wraps: the energy is what was put in."""
    meter = RaplMeter(str(tree))
    channels = meter.open()
    ledger = Ledger(channels)
    file = tree / "intel-rapl:0" / "energy_uj"
    watts, total = 311, 0
    value = RANGE_UJ - 2 * watts * 1_000_000 - 123_457
    file.write_text(str(value))
    ledger.add(0.0, meter.read(), "run")
    for second in range(1, 7):
        step = watts * 1_000_000 + second
        total += step
        value = (value + step) % RANGE_UJ
        file.write_text(str(value))
        ledger.add(float(second), meter.read(), "run")
    meter.close()
    assert value < RANGE_UJ / 2, "the counter did not wrap"
    assert ledger.tallies["run"].joules["cpu0"] == pytest.approx(total * 1e-6, abs=1e-6)
    assert ledger.invalid["cpu0"] == 0


def test_a_counter_that_wraps_eight_times_a_second(tmp_path):
    """40 W into a range of 5 J, read every 50 ms with jitter: each interval has one wrap at most, none is lost."""
    folder = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    (folder / "max_energy_range_uj").write_text("5000000\n")
    meter = RaplMeter(str(tmp_path))
    ledger = Ledger(meter.open())
    times = np.cumsum(np.random.default_rng(0).uniform(0.03, 0.07, 400))
    for time_s in times:
        (folder / "energy_uj").write_text(f"{round(40e6 * time_s) % 5_000_000}\n")
        ledger.add(time_s, meter.read(), "run")
    meter.close()
    assert ledger.tallies["run"].total_j == pytest.approx(40 * (times[-1] - times[0]), rel=1e-6)
    assert ledger.invalid["cpu0"] == 0


def test_mirrored_counters_of_one_package_count_once(tmp_path):
    """Dies that show the package's counter: by the same name, and by the same value under another name."""
    zone(tmp_path / "intel-rapl:0", "package-0-die-0", 5_000_000_000)
    zone(tmp_path / "intel-rapl:1", "package-0-die-0", 5_000_200_000)
    zone(tmp_path / "intel-rapl:2", "package-0-die-1", 5_000_400_000)
    zone(tmp_path / "intel-rapl:3", "package-1-die-0", 8_000_000_000)
    meter = RaplMeter(str(tmp_path))
    channels = meter.open()
    assert [c.name for c in channels] == ["cpu0_die0", "cpu1_die0"]
    assert meter.read() == pytest.approx([5000, 8000])
    meter.close()


def test_unreadable_names_the_file_and_the_remedy(tree, monkeypatch):
    secret = tree / "intel-rapl:1" / "energy_uj"
    original = os.open

    def guarded(path, *arguments, **keywords):
        if str(path) == str(secret):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", guarded)
    found = RaplMeter(str(tree)).probe()
    assert not found.ok and found.present
    assert str(secret) in found.reason
    assert "sudo chmod a+r" in found.reason and 'RUN+="/bin/chmod a+r /sys%p/energy_uj"' in found.reason
    assert "guessed" in found.reason
    with pytest.raises(MeterError, match="chmod"):
        RaplMeter(str(tree)).open()


def test_no_tree_and_a_hidden_one(tmp_path):
    assert not RaplMeter(str(tmp_path / "missing")).probe().present
    (tmp_path / "intel-rapl").mkdir()
    (tmp_path / "intel-rapl:0").symlink_to(tmp_path / "gone")
    found = RaplMeter(str(tmp_path)).probe()
    assert not found.ok and found.present and "container" in found.reason
    (empty := tmp_path / "empty").mkdir()
    assert not RaplMeter(str(empty)).probe().ok


def test_a_file_that_vanishes_has_no_value(tree):
    meter = RaplMeter(str(tree))
    meter.open()
    (tree / "intel-rapl:0" / "energy_uj").write_text("")
    values = meter.read()
    meter.close()
    assert math.isnan(values[0]) and values[2] == pytest.approx(100_000)
