from __future__ import annotations

from importlib import metadata

import pytest

from callbacks.energy.meters import registry
from callbacks.energy.meters.base import Meter
from callbacks.energy.meters.constant import ConstantMeter


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_name_makes_a_meter_that_says_whether_it_can_be_read(name):
    meter = registry.make(name)
    assert isinstance(meter, Meter)
    found = meter.probe()
    assert found.ok or found.reason


def test_options():
    assert registry.make("cpu_model", tdp_w=270).tdp_w == 270
    with pytest.raises(ValueError, match=r"options\.cpu_model\.tpd_w is unknown \(did you mean 'tdp_w'\?\).*threads"):
        registry.make("cpu_model", tpd_w=270)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'nvlm' is unknown \(did you mean 'nvml'\?\); there are nvml, rapl"):
        registry.make("nvlm")
    with pytest.raises(ValueError, match="dram_model"):
        registry.make("zzz")


@pytest.fixture
def package(monkeypatch):
    """An installed package that adds meters."""
    place = "tests.callbacks.energy.meters.test_registry"
    points = [
        metadata.EntryPoint("theirs", f"{place}:Theirs", registry.GROUP),
        metadata.EntryPoint("broken", f"{place}:Missing", registry.GROUP),
        metadata.EntryPoint("nvml", f"{place}:Theirs", registry.GROUP),
    ]

    def entry_points(group, name=None):
        assert group == registry.GROUP
        return [point for point in points if name in (None, point.name)]

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)


class Theirs(ConstantMeter):
    pass


def test_meters_of_other_packages(package):
    meter = registry.make("theirs", watts=5)
    assert type(meter) is Theirs and meter.watts == 5
    assert type(registry.make("nvml")).__name__ == "NvmlMeter", "ours cannot be replaced"
    with pytest.raises(ValueError, match=r"'broken'.*cannot be imported"):
        registry.make("broken")
    with pytest.raises(ValueError, match=r"'their' is unknown.*'theirs'"):
        registry.make("their")
