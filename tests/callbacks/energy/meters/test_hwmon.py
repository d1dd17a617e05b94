from __future__ import annotations

import math

import pytest

from callbacks.energy.meters.base import MeterError
from callbacks.energy.meters.hwmon import HwmonMeter


def device(root, index, driver, below=False, **files):
    folder = root / f"hwmon{index}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{driver}\n")
    if below:
        folder = folder / "device"
        folder.mkdir()
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def grace(root, index, label, microwatts):
    return device(root, index, "power_meter", True, power1_average=microwatts, power1_oem_info=label)


def test_grace_counts_nothing_twice(tmp_path):
    grace(tmp_path, 1, "Module Power Socket 0", 500_000_000)
    grace(tmp_path, 2, "Grace Power Socket 0", 120_000_000)
    grace(tmp_path, 3, "CPU Power Socket 0", 80_000_000)
    grace(tmp_path, 10, "SysIO Power Socket 0", 20_000_000)
    meter = HwmonMeter(str(tmp_path))
    assert meter.probe().ok
    channels = meter.open()
    assert [(c.name, c.component, c.kind) for c in channels] == [
        ("cpu0", "cpu", "gauge"),
        ("sysio0", "other", "gauge"),
    ]
    assert meter.read() == pytest.approx([80, 20])
    meter.close()


def test_counters_before_averages_before_instants(tmp_path):
    device(
        tmp_path,
        0,
        "ibmpowernv",
        power1_input=400_000_000,
        power1_label="System",
        power2_input=90_000_000,
        power2_average=91_000_000,
        power2_label="Chip 0",
        energy1_input=5_000_000_000,
        energy1_label="System",
        power3_input=1,
        power3_label="Chip 0 Vdd",
    )
    device(tmp_path, 1, "amd_energy", energy1_input=3_000_000, energy1_label="Esocket0")
    (tmp_path / "hwmon1" / "energy2_input").write_text("9")
    (tmp_path / "hwmon1" / "energy2_label").write_text("Ecore000")
    meter = HwmonMeter(str(tmp_path))
    channels = meter.open()
    read = dict(zip([c.name for c in channels], meter.read(), strict=True))
    meter.close()
    kinds = {c.name: c.kind for c in channels}
    # Both call a socket cpu0: one thing, and the counter is the better source.
    assert kinds == {"node": "counter", "cpu0": "counter"}
    assert read == pytest.approx({"node": 5000, "cpu0": 3})


def test_what_is_unclear_is_listed_and_not_counted(tmp_path):
    device(tmp_path, 0, "power_meter", True, power1_average=250_000_000)
    device(tmp_path, 1, "amdgpu", power1_average=40_000_000, power1_label="PPT")
    found = HwmonMeter(str(tmp_path)).probe()
    assert not found.ok
    assert "power_meter/power1" in found.reason and "amdgpu/PPT" in found.reason
    with pytest.raises(MeterError, match=r"hwmon\.channels"):
        HwmonMeter(str(tmp_path)).open()


def test_channels_are_chosen_by_name(tmp_path):
    device(tmp_path, 0, "power_meter", True, power1_average=250_000_000)
    for index in (1, 2):
        device(tmp_path, index, "amdgpu", power1_average=40_000_000 * index, power1_label="PPT")
    meter = HwmonMeter(str(tmp_path), {"power_meter/*": "node", "amdgpu/PPT": "gpu"})
    channels = meter.open()
    assert [(c.name, c.component) for c in channels] == [("node", "node"), ("gpu0", "gpu"), ("gpu1", "gpu")]
    assert meter.read() == pytest.approx([250, 40, 80])
    (tmp_path / "hwmon1" / "power1_average").write_text("")
    assert math.isnan(meter.read()[1])
    meter.close()
    assert not HwmonMeter(str(tmp_path), {"nothing/*": "node"}).probe().ok


def test_bad_options_and_no_sensors(tmp_path):
    with pytest.raises(ValueError, match=r"'a/b'\]='disk'.*cpu, gpu"):
        HwmonMeter(channels={"a/b": "disk"})
    assert "no sensor" in HwmonMeter(str(tmp_path)).probe().reason
