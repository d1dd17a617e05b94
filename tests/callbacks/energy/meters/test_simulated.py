from __future__ import annotations

import itertools
import os
import statistics

import pytest

from callbacks.energy.meters.base import Progress
from callbacks.energy.meters.simulated import SimulatedDevices


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_energy_is_that_of_the_model(monkeypatch):
    clock, done = Clock(), [Progress(5, 3)]
    meter = SimulatedDevices(200.0, 50.0, 0.5, 2.0)
    meter.clock = clock
    meter.follow(lambda: done[0])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    (channel,) = meter.open()
    assert (channel.component, channel.kind, channel.measured) == ("node", "counter", False)
    assert "3 x 50 W" in channel.source
    assert meter.read() == [0.0]
    clock.now += 4.0
    assert meter.read() == pytest.approx([4 * 350])
    done[0] = Progress(25, 13)
    assert meter.read() == pytest.approx([4 * 350 + 20 * 0.5 + 10 * 2])


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, 3),  # run.py in a step
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 1),  # a batch script that starts one process
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, 1),
    ],
)
def test_processes_of_a_machine_however_they_were_started(monkeypatch, environ, expected):
    for key in [key for key in os.environ if key.startswith(("SLURM_", "OMPI_")) or key == "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(key)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    (channel,) = SimulatedDevices(200.0, 50.0).open()
    assert f"{expected} x 50 W" in channel.source


def test_nobody_need_tell_the_progress():
    clock = Clock()
    meter = SimulatedDevices(devices=4)
    meter.clock = clock
    meter.open()
    clock.now += 1.0
    assert meter.read() == pytest.approx([215.3 + 4 * 69.0])


def test_noise_has_its_size_and_its_seed():
    def readings(seed: int) -> list[float]:
        clock = Clock()
        meter = SimulatedDevices(100.0, 0.0, devices=1, noise=0.05, seed=seed)
        meter.clock = clock
        meter.open()
        values = [0.0]
        for _ in range(2000):
            clock.now += 1.0
            values += meter.read()
        return [b - a for a, b in itertools.pairwise(values)]

    first = readings(0)
    assert first == readings(0) != readings(1)
    assert statistics.fmean(first) == pytest.approx(100.0, rel=0.01)
    assert statistics.stdev(first) == pytest.approx(5.0, rel=0.1)
    assert min(first) >= 0


@pytest.mark.parametrize("wrong", [{"node_w": -1.0}, {"noise": float("inf")}, {"devices": 0}, {"j_per_sample": -0.1}])
def test_wrong_numbers(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"SimulatedDevices: {name}="):
        SimulatedDevices(**wrong)
