from __future__ import annotations

import logging

import pytest

from callbacks.energy.meters import registry
from callbacks.energy.meters.base import Availability, MeterError
from callbacks.energy.selection import describe, select
from tests.callbacks.energy.sources import Source


class Several(Source):
    """A meter with a channel for each component."""

    def __init__(self, *components: str, found: Availability | None = None) -> None:
        super().__init__()
        self.found = found or Availability(True)
        self.channels = [Source(name=f"{c}0", component=c).channel for c in components]

    def probe(self) -> Availability:
        return self.found

    def open(self):
        return self.channels

    def read(self):
        return [float(i) for i in range(len(self.channels))]


@pytest.fixture
def machine(monkeypatch):
    """Which instruments are there; the others are not, models always are."""
    there: dict[str, Several] = {"cpu_model": Several("cpu"), "dram_model": Several("dram")}
    absent = Availability(False, "no such hardware")
    monkeypatch.setattr(registry, "make", lambda name, **options: there.get(name) or Several("cpu", found=absent))
    return there


def components(selection) -> list[str]:
    return [channel.component for meter in selection.meters for channel in meter.open()]


def test_models_stand_in_where_there_is_no_instrument(machine):
    assert components(select("auto", {}, {})) == ["cpu", "dram"]
    machine["rapl"] = Several("cpu")
    chosen = select("auto", {}, {})
    assert components(chosen) == ["cpu", "dram"]
    assert chosen.meters[0].meter is machine["rapl"]


def test_what_one_instrument_measures_is_not_read_from_another(machine):
    machine |= {"nvml": Several("gpu"), "rapl": Several("cpu", "dram"), "cray_pm": Several("node", "cpu", "gpu")}
    chosen = select("auto", {}, {})
    assert components(chosen) == ["gpu", "cpu", "dram", "node"]
    assert chosen.meters[-1].read() == [0.0]  # the node's value, not the processor's
    assert machine["cpu_model"].closed == 1


def test_estimates_ignore_instruments(machine):
    machine["rapl"] = Several("cpu")
    assert [meter.meter for meter in select("estimates", {}, {}).meters] == [
        machine["cpu_model"], machine["dram_model"],
    ]  # fmt: skip


def test_hardware_that_may_not_be_read_is_a_warning_and_never_a_silent_guess(machine, caplog):
    reason = "/sys/class/powercap/intel-rapl:0/energy_uj: permission denied; sudo chmod a+r ..."
    machine["rapl"] = Several("cpu", found=Availability(False, reason, present=True))
    with caplog.at_level(logging.WARNING):
        chosen = select("auto", {}, {})
    assert any(reason in message for message in caplog.messages)
    estimated = [Source(measured=False).channel]
    assert describe(estimated, chosen.absent) == f"cpu estimated (test); rapl: {reason}"


def test_absent_hardware_is_no_warning(machine, caplog):
    with caplog.at_level(logging.WARNING):
        select("auto", {}, {})
    assert not caplog.messages


def test_names_are_exact(machine):
    machine |= {"rapl": Several("cpu"), "nvml": Several("gpu")}
    assert components(select(["nvml", "rapl"], {}, {})) == ["gpu", "cpu"]
    with pytest.raises(MeterError, match="'slurm' cannot be read here: no such hardware"):
        select(["rapl", "slurm"], {}, {})
    assert machine["rapl"].closed >= 1


def test_two_meters_of_one_thing_are_refused(machine):
    machine |= {"slurm": Several("node"), "ipmi": Several("node", "cpu")}
    with pytest.raises(MeterError, match="both read 'node'"):
        select(["slurm", "ipmi"], {}, {})


def test_own_meters_come_first(machine):
    own = Several("cpu")
    machine["rapl"] = Several("cpu", "dram")
    chosen = select("auto", {"mine": own}, {})
    assert chosen.meters[0].meter is own
    assert components(chosen) == ["cpu", "dram"]


def test_one_line_says_what_is_measured():
    channels = [
        Source(name="gpu0", component="gpu").channel, Source(name="gpu1", component="gpu").channel,
        Source(measured=False).channel,
    ]  # fmt: skip
    assert describe(channels, {}) == "gpu measured (2 x test), cpu estimated (test)"
    assert describe([], {}) == "nothing is read"
