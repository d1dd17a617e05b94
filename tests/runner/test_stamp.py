"""The name of a run's folder is the same on every rank, and again when a job is requeued."""

from __future__ import annotations

import re

import pytest

from runner.stamp import run_stamp

CLOCK = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{3}"


@pytest.fixture
def stamp(monkeypatch):
    def with_variables(**variables: str) -> str:
        for name in ("RUN_STAMP", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "STEP_ID"):
            monkeypatch.delenv(f"SLURM_{name}", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        run_stamp.cache_clear()
        return run_stamp()

    yield with_variables
    run_stamp.cache_clear()


def test_clock(stamp):
    assert re.fullmatch(CLOCK, stamp())


def test_read_once(stamp, monkeypatch):
    first = stamp()
    monkeypatch.setenv("RUN_STAMP", "later")
    assert run_stamp() == first


def test_torchrun_without_an_id_is_its_start_time(stamp):
    """All ranks have the same parent; the clock would differ between them."""
    assert re.fullmatch(CLOCK, first := stamp(TORCHELASTIC_RUN_ID="none"))
    assert stamp(TORCHELASTIC_RUN_ID="none") == first


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "abc"}, "abc"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "abc"}, "7"),
        ({"RUN_STAMP": "mine", "SLURM_JOB_ID": "7"}, "mine"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, "7"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}, "7_step1"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(2**32 - 5)}, "7"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "batch"}, "7"),
    ],
)
def test_rules(stamp, variables, expected):
    assert stamp(**variables) == expected
