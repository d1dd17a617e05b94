from __future__ import annotations

import os

import pytest

from callbacks.energy.meters import slurm
from callbacks.energy.meters.base import MeterError
from callbacks.energy.meters.slurm import SlurmMeter, exclusive_allocation

JOB = {"SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_JOB_EXCLUSIVE": "NODE"}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program with a given text on the path."""

    def put(name: str, text: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return put


def test_energy_of_the_own_step(program, tmp_path):
    program("sstat", f'echo "$@" > {tmp_path}/arguments; echo 98765')
    meter = SlurmMeter(environ=JOB)
    assert meter.probe().ok
    [channel] = meter.open()
    assert (channel.name, channel.component, channel.kind) == ("node", "node", "counter")
    assert "step 123.0" in channel.source
    assert meter.read() == [98765.0]
    meter.close()
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == ["--noheader", "--parsable2", "--format", "ConsumedEnergyRaw", "-j", "123.0"]


def test_the_batch_script_has_a_step_of_its_own():
    assert SlurmMeter(environ={"SLURM_JOB_ID": "7"}).command[-1] == "7.batch"
    assert SlurmMeter(environ={"SLURM_JOB_ID": "7"}, job="8", step="2").command[-1] == "8.2"


def test_only_where_the_job_is_alone(program):
    program("sstat", "echo 98765")
    shared = {"SLURM_JOB_ID": "123", "SLURM_JOB_EXCLUSIVE": "NO"}
    found = SlurmMeter(environ=shared).probe()
    assert not found.ok and "neighbours" in found.reason and "SLURM_JOB_EXCLUSIVE=NO" in found.reason
    assert "--exclusive" in found.reason
    assert SlurmMeter(exclusive=True, environ=shared).probe().ok
    assert not SlurmMeter(exclusive=False, environ=JOB).probe().ok


def test_a_step_of_several_nodes_has_no_figure_for_one(program):
    program("sstat", "echo 98765")
    found = SlurmMeter(environ={**JOB, "SLURM_STEP_NUM_NODES": "4"}).probe()
    assert not found.ok and "4 nodes" in found.reason


@pytest.mark.parametrize("answer", ["echo 0", "echo 18446744073709551614", "echo ''", "echo error >&2; exit 1"])
def test_sites_that_do_not_account_energy(program, answer):
    program("sstat", answer)
    found = SlurmMeter(environ=JOB).probe()
    assert not found.ok and found.reason
    if answer != "echo 0":
        with pytest.raises(MeterError):
            SlurmMeter(environ=JOB).open()


def test_no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "no SLURM job" in SlurmMeter(environ={}).probe().reason
    assert "sstat" in SlurmMeter(environ=JOB).probe().reason


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({}, False),
        ({"SLURM_JOB_EXCLUSIVE": "NODE"}, True),
        ({"SLURM_JOB_EXCLUSIVE": "USER"}, False),
        ({"SLURM_JOB_EXCLUSIVE": "NO", "SLURM_JOB_OVERSUBSCRIBE": "NO"}, False),
        ({"SLURM_JOB_OVERSUBSCRIBE": "NO"}, True),
        ({"SLURM_JOB_OVERSUBSCRIBE": "YES"}, False),
        ({"SLURM_JOB_OVERSUBSCRIBE": "OK"}, False),
        ({"SLURM_CPUS_ON_NODE": str(os.cpu_count())}, True),
        ({"SLURM_CPUS_ON_NODE": "1000000"}, False),
    ],
)
def test_exclusive_by_the_environment(monkeypatch, variables, alone):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert exclusive_allocation({"SLURM_JOB_ID": "1", **variables})[0] is alone


@pytest.mark.parametrize(
    ("answer", "alone"),
    [
        ("JobId=1 OverSubscribe=NO Contiguous=0", True),
        ("JobId=1 OverSubscribe=OK Contiguous=0", False),
        ("JobId=1 OverSubscribe=NO Exclusive=NO", False),
        ("JobId=1 OverSubscribe=NO Exclusive=NODE", True),
        ("JobId=1", False),
    ],
)
def test_exclusive_by_scontrol(program, answer, alone):
    program("scontrol", f"echo '{answer}'")
    assert exclusive_allocation({"SLURM_JOB_ID": "1"})[0] is alone


def test_without_a_job_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(slurm.subprocess, "run", lambda *a, **k: pytest.fail("asked"))
    assert not exclusive_allocation({"SLURM_JOB_EXCLUSIVE": "NODE"})[0]
