"""Models of processors and memory, by hand calculation."""

from __future__ import annotations

import math

import pytest

from callbacks.energy.meters import cpu_model, dram_model, machine
from callbacks.energy.meters.cpu_model import CpuModelMeter, power_w
from callbacks.energy.meters.dram_model import DramModelMeter
from tests.callbacks.energy.meters.test_machine import CPUINFO, write
from tests.callbacks.energy.sources import Clock


@pytest.fixture
def clock():
    return Clock()


def stat(root, user=0, idle=0, steal=0, iowait=0, guest=0):
    write(root, "proc/stat", f"cpu  {user} 0 0 {idle} {iowait} 0 0 {steal} {guest} 0\ncpu0 1 2 3\nintr 1 2 3\n")


def opened(root, clock, **options):
    meter = CpuModelMeter(root=str(root), clock=clock, **options)
    assert meter.probe().ok
    return meter, meter.open()


def test_the_curve():
    assert power_w(100, 0) == 10 and power_w(100, 1) == 100
    assert power_w(270, 0.5) == pytest.approx(270 * (0.1 + 0.9 / 8))


def test_energy_by_hand(tmp_path, clock):
    """1 s at load 0, 2 s at load 1/2, 3 s at load 1, with 200 W: 20 + 2 * 42.5 + 600 J."""
    stat(tmp_path)
    meter, [channel] = opened(tmp_path, clock, tdp_w=200)
    assert (channel.name, channel.component, channel.kind, channel.measured) == ("cpu", "cpu", "counter", False)
    assert channel.source == "model (200 W, configured)"
    assert meter.read() == [0.0]
    steps = [(1.0, {"idle": 200}), (2.0, {"idle": 400, "user": 200}), (3.0, {"idle": 400, "user": 800})]
    expected = 0.0
    for (seconds, ticks), joules in zip(steps, (20.0, 85.0, 600.0), strict=True):
        clock.now += seconds
        stat(tmp_path, **ticks)
        expected += joules
        assert meter.read()[0] == pytest.approx(expected, rel=1e-12)
    meter.close()
    meter.close()


def test_waiting_and_stolen_time_is_no_work_and_guests_count_once(tmp_path, clock):
    stat(tmp_path)
    meter, _ = opened(tmp_path, clock, tdp_w=100)
    clock.now += 1
    stat(tmp_path, user=100, guest=60, steal=50, iowait=30, idle=20)
    assert meter.read()[0] == pytest.approx(power_w(100, 0.5))
    meter.close()


def test_boundaries_within_a_tick_keep_the_load_and_never_go_back(tmp_path, clock):
    stat(tmp_path)
    meter, _ = opened(tmp_path, clock, tdp_w=100)
    clock.now += 1
    stat(tmp_path, user=100, idle=0)
    first = meter.read()[0]
    assert first == pytest.approx(100)
    clock.now += 0.001
    assert meter.read()[0] == pytest.approx(100 + 0.1), "no new tick: the last load"
    clock.now += 0.02
    stat(tmp_path, user=100, idle=2)
    assert meter.read()[0] == pytest.approx(100 + 2.1), "two ticks say nothing about load"
    clock.now += 0.979
    stat(tmp_path, user=100, idle=100)
    assert meter.read()[0] == pytest.approx(100 + 2.1 + 0.979 * 10), "the window was idle"
    meter.close()


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A node with two processors of 270 W and 152 threads."""
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 152)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    stat(tmp_path)
    write(tmp_path, "proc/cpuinfo", CPUINFO.format(flag="sse"))
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    return tmp_path


def assumed(root, **options):
    meter = CpuModelMeter(root=str(root), **options)
    [channel] = meter.open()
    meter.close()
    return meter._watts, channel.source


def test_power_of_a_known_processor(bare):
    assert assumed(bare) == (540, "model (2 x 270 W, Intel Xeon Platinum 8368)")


def test_a_virtual_machine_has_4_w_per_thread(bare, monkeypatch):
    write(bare, "proc/cpuinfo", CPUINFO.format(flag="hypervisor"))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert assumed(bare) == (8, "model (4 W x 2 threads, virtual machine)")


def test_a_container_has_4_w_per_thread(bare):
    write(bare, "sys/fs/cgroup/cpu.max", "800000 100000\n")
    assert assumed(bare) == (32, "model (4 W x 8 threads, of 152 of the machine)")


def test_the_cap_is_no_floor(bare, monkeypatch):
    write(bare, "proc/cpuinfo", CPUINFO.format(flag="hypervisor"))
    assert assumed(bare) == (540, "model (2 x 270 W, Intel Xeon Platinum 8368)")


def test_an_unknown_processor(bare):
    write(bare, "proc/cpuinfo", CPUINFO.format(flag="sse").replace("Xeon(R) Platinum 8368", "Mystery"))
    watts, source = assumed(bare)
    assert watts == 608 and source.startswith("model (4 W x 152 threads, unknown processor Intel(R) Mystery")


def test_configured(bare):
    assert assumed(bare, tdp_w=350.5) == (350.5, "model (350.5 W, configured)")
    assert assumed(bare, threads=10) == (40, "model (4 W x 10 threads, configured)")
    for options in ({"tdp_w": 0}, {"tdp_w": math.nan}, {"threads": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*must be positive"):
            CpuModelMeter(**options)


def test_without_proc_the_times_of_psutil(tmp_path, clock, monkeypatch):
    from collections import namedtuple

    import psutil

    Times = namedtuple("Times", "user system idle")  # as on other systems
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(1.0, 1.0, 8.0))
    meter, _ = opened(tmp_path, clock, tdp_w=100)
    clock.now += 1
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(2.0, 1.0, 9.0))
    assert meter.read()[0] == pytest.approx(power_w(100, 0.5))
    meter.close()


def test_this_machine():
    meter = CpuModelMeter()
    [channel] = meter.open()
    assert meter.read()[0] >= 0 and channel.source.startswith("model (")
    meter.close()


def test_memory_by_hand(tmp_path):
    write(tmp_path, "proc/meminfo", f"MemTotal:       {512 * 2**20} kB\nMemFree: 1 kB\n")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    meter = DramModelMeter(root=str(tmp_path))
    assert meter.probe().ok
    [channel] = meter.open()
    assert (channel.name, channel.component, channel.kind, channel.measured) == ("dram", "dram", "gauge", False)
    assert channel.source == "model (0.3725 W/GiB x 512 GiB; Lannelongue et al. 2021)"
    assert meter.read() == [pytest.approx(190.72)]
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{24 * 2**30}")
    [channel] = meter.open()
    assert channel.source == "model (0.3725 W/GiB x 24 GiB of 512 GiB of the machine; Lannelongue et al. 2021)"
    assert meter.read() == [pytest.approx(8.94)]


def test_memory_configured(tmp_path):
    meter = DramModelMeter(watts_per_gib=0.5, memory_gib=64, root=str(tmp_path))
    [channel] = meter.open()
    assert meter.read() == [32.0] and "64 GiB, configured" in channel.source
    with pytest.raises(ValueError, match="memory_gib=-1"):
        DramModelMeter(memory_gib=-1)


def test_constants_are_those_of_the_sources():
    assert cpu_model.WATTS_PER_THREAD == 4 and cpu_model.IDLE_FRACTION == 0.1 and dram_model.GIB == 2**30
