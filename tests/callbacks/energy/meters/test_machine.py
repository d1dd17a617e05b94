from __future__ import annotations

import pytest

from callbacks.energy.meters import machine

CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8368 CPU @ 2.40GHz
physical id\t: 0
flags\t\t: fpu vme {flag}

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8368 CPU @ 2.40GHz
physical id\t: 1
flags\t\t: fpu vme {flag}
"""


def write(root, path, value):
    full = root / path
    full.parent.mkdir(parents=True, exist_ok=True)
    full.write_text(value)


@pytest.fixture(autouse=True)
def sixteen(monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 16)


def test_processor(tmp_path):
    write(tmp_path, "proc/cpuinfo", CPUINFO.format(flag="sse"))
    found = machine.processor(tmp_path)
    assert found == machine.Processor("Intel(R) Xeon(R) Platinum 8368 CPU @ 2.40GHz", 2, False)
    write(tmp_path, "proc/cpuinfo", CPUINFO.format(flag="hypervisor"))
    assert machine.processor(tmp_path).virtual
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 2000.00\n")
    assert machine.processor(tmp_path) == machine.Processor("", 1, False)


def test_threads_without_limits(tmp_path):
    assert machine.threads(tmp_path, {}) == (16, 16)
    assert machine.threads(tmp_path, {"SLURM_CPUS_ON_NODE": "6"}) == (6, 16)


def test_limits_of_control_groups_version_2(tmp_path):
    """The tightest on the way up holds."""
    write(tmp_path, "proc/self/cgroup", "0::/pods/mine\n")
    write(tmp_path, "sys/fs/cgroup/pods/cpu.max", "400000 100000\n")
    write(tmp_path, "sys/fs/cgroup/pods/mine/cpu.max", "max 100000\n")
    write(tmp_path, "sys/fs/cgroup/pods/mine/memory.max", f"{8 * 2**30}\n")
    write(tmp_path, "sys/fs/cgroup/pods/memory.max", "max\n")
    write(tmp_path, "proc/meminfo", f"MemTotal:       {64 * 2**20} kB\n")
    assert machine.threads(tmp_path, {}) == (4, 16)
    assert machine.memory_bytes(tmp_path) == (8 * 2**30, 64 * 2**30)
    write(tmp_path, "sys/fs/cgroup/pods/mine/cpuset.cpus.effective", "0-1,8\n")
    assert machine.threads(tmp_path, {}) == (3, 16)
    assert machine.threads(tmp_path, {"SLURM_CPUS_ON_NODE": "8"}) == (4, 16), "a rank's own cores are not the job's"


def test_limits_of_control_groups_version_1(tmp_path):
    """A path of the host that does not exist in the container: the limit is at the top."""
    write(tmp_path, "proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * 2**30}\n")
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "250000\n")
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "proc/meminfo", f"MemTotal: {4 * 2**20} kB\n")
    assert machine.threads(tmp_path, {})[0] == 2
    assert machine.memory_bytes(tmp_path)[0] == 2 * 2**30
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert machine.threads(tmp_path, {})[0] == 16
    assert machine.memory_bytes(tmp_path)[0] == 4 * 2**30
