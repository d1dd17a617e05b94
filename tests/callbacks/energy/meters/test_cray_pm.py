from __future__ import annotations

import math

import pytest

from callbacks.energy.meters.base import MeterError
from callbacks.energy.meters.cray_pm import CrayPmMeter


def test_node_and_parts(tmp_path):
    for name, joules in {
        "energy": 123456,
        "cpu_energy": 40000,
        "cpu0_energy": 20000,
        "memory_energy": 5000,
        "accel0_energy": 30000,
        "accel1_energy": 31000,
        "accel_energy": 61000,
    }.items():
        (tmp_path / name).write_text(f"{joules} J 1620000000123456 us\n")
    (tmp_path / "power").write_text("500 W 1620000000123456 us\n")
    meter = CrayPmMeter(str(tmp_path))
    assert meter.probe().ok
    channels = meter.open()
    assert [(c.name, c.component) for c in channels] == [
        ("node", "node"),
        ("cpu", "cpu"),
        ("dram", "dram"),
        ("gpu0", "gpu"),
        ("gpu1", "gpu"),
    ]
    assert all(c.kind == "counter" and c.measured and c.modulus_j is None for c in channels)
    assert meter.read() == [123456, 40000, 5000, 30000, 31000]
    (tmp_path / "energy").write_text("123999 J 1620000001123456 us\n")
    (tmp_path / "accel1_energy").write_text("")
    values = meter.read()
    assert values[0] == 123999 and math.isnan(values[4])
    meter.close()


def test_only_the_sum_of_the_accelerators(tmp_path):
    for name in ("energy", "accel_energy"):
        (tmp_path / name).write_text("7 J 1 us")
    meter = CrayPmMeter(str(tmp_path))
    assert [c.name for c in meter.open()] == ["node", "gpu"]
    meter.close()


def test_absent(tmp_path):
    found = CrayPmMeter(str(tmp_path / "missing")).probe()
    assert not found.ok and not found.present
    assert "energy" in CrayPmMeter(str(tmp_path)).probe().reason
    with pytest.raises(MeterError, match="missing"):
        CrayPmMeter(str(tmp_path / "missing")).open()
