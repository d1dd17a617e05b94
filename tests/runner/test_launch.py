"""How many processes a configuration asks for, and who starts them."""

from __future__ import annotations

import pytest
import torch

from runner.launch import num_processes, ranks_exist

VARIABLES = ("LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),  # a batch script without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "2"}, True),
    ],
)
def test_ranks_exist(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks_exist() == expected


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"accelerator": "cpu", "devices": 1}, 1),
        ({"accelerator": "cpu", "devices": 3}, 3),
        ({"accelerator": "cpu", "devices": "3"}, 3),
        ({"accelerator": "cpu", "devices": "auto"}, 1),
        ({"accelerator": "gpu", "devices": "auto"}, 4),
        ({"accelerator": "gpu", "devices": -1}, 4),
        ({"accelerator": "gpu", "devices": "-1"}, 4),
        ({"accelerator": "gpu", "devices": "0,2"}, 2),
        ({"accelerator": "gpu", "devices": [0, 1, 3]}, 3),
        ({"accelerator": "gpu", "devices": 2}, 2),
    ],
)
def test_num_processes(monkeypatch, trainer, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert num_processes({"trainer": trainer}) == expected


def test_nodes_need_a_launcher(monkeypatch):
    trainer = {"accelerator": "cpu", "devices": 2, "num_nodes": 3}
    with pytest.raises(ValueError, match=r"trainer.num_nodes=3: .*srun or torchrun"):
        num_processes({"trainer": trainer})
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert num_processes({"trainer": trainer}) == 6


@pytest.mark.parametrize("devices", [0, -1, "0", "two"])
def test_nonsense_on_cpu(devices):
    with pytest.raises(ValueError, match=f"trainer.devices={devices}"):
        num_processes({"trainer": {"accelerator": "cpu", "devices": devices}})
