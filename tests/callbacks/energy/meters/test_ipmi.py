from __future__ import annotations

import sys
from pathlib import Path

import pytest

from callbacks.energy.meters import ipmi
from callbacks.energy.meters.base import MeterError
from callbacks.energy.meters.ipmi import IpmiMeter

DCMI_ANSWER = """
    Instantaneous power reading:                   412 Watts
    Minimum during sampling period:                  8 Watts
    Power reading state is:                   activated
"""


def prints(text: str) -> list[str]:
    return ["printf", "%s", text]


def test_dcmi():
    meter = IpmiMeter(prints(DCMI_ANSWER))
    assert meter.probe().ok
    [channel] = meter.open()
    assert (channel.name, channel.component, channel.kind, channel.measured) == ("node", "node", "gauge", True)
    assert meter.read() == [412.0]
    meter.close()


def test_the_raw_energy_record_of_lenovo():
    """0x00bc614e J = 12345678, the lowest byte first, after two bytes of an index."""
    answer = " 2a 00 4e 61 bc 00 f4 01 10 27\n 00 00 00 00\n"
    meter = IpmiMeter(
        prints(answer),
        pattern=r"^\s*(?:\w\w\s+){2}((?:\w\w\s+){3}\w\w)",
        encoding="hex",
        kind="counter",
        modulus_j=2**32,
        max_power_w=3000,
    )
    [channel] = meter.open()
    assert (channel.kind, channel.modulus_j, channel.max_power_w) == ("counter", 2**32, 3000)
    assert meter.read() == [12345678.0]
    meter.close()


def test_units():
    meter = IpmiMeter(prints("energy: 5000 mJ"), pattern=r"energy: (\d+)", kind="counter", unit=1e-3)
    meter.open()
    assert meter.read() == [5.0]
    meter.close()


def test_not_available(monkeypatch, tmp_path):
    monkeypatch.setattr(ipmi, "DEVICES", (tmp_path / "ipmi0",))
    found = IpmiMeter(["no-such-ipmitool"]).probe()
    assert not found.ok and not found.present and "not installed" in found.reason
    found = IpmiMeter(["sh", "-c", "echo Could not open device >&2; exit 1"]).probe()
    assert not found.ok and not found.present and "Could not open device" in found.reason
    found = IpmiMeter(prints(DCMI_ANSWER.replace("412", "0"))).probe()
    assert not found.ok and "0 W" in found.reason
    with pytest.raises(MeterError, match=r"pattern=.*begins with 'hello'"):
        IpmiMeter(prints("hello")).open()


def test_a_device_for_root_only_has_a_remedy(monkeypatch, tmp_path):
    device = tmp_path / "ipmi0"
    device.touch()
    monkeypatch.setattr(ipmi, "DEVICES", (device,))
    monkeypatch.setattr(ipmi.os, "access", lambda path, mode: Path(path) != device)
    found = IpmiMeter([sys.executable, "-c", "raise SystemExit(1)"]).probe()
    assert not found.ok and found.present
    assert str(device) in found.reason and "udev" in found.reason and "sudo" in found.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "power"}, r"kind='power'.*gauge"),
        ({"encoding": "octal"}, r"encoding='octal'.*hex"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "Watts"}, "no group"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        IpmiMeter(**options)
