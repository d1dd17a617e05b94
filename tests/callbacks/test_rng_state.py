"""Random states survive a checkpoint, on every rank."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks.rng_state import RngState, capture, restore


def draw() -> list[float]:
    return [torch.rand(()).item(), torch.randn(()).item(), np.random.rand(), np.random.randn(), random.gauss(0, 1)]


def test_restored_streams_continue(tmp_path):
    draw()  # an odd number of normal draws: generators hold half a pair
    torch.save(capture(), tmp_path / "state.pt")
    expected = draw()
    draw()
    restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def trainer(rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(world_size=world_size, global_rank=rank)


def saved(rank: int, world_size: int) -> tuple[dict, list[float]]:
    checkpoint: dict = {}
    RngState().on_save_checkpoint(trainer(rank, world_size), None, checkpoint)
    return checkpoint, draw()


def test_restoring_waits_for_the_training():
    """What happens between loading and training (a sanity check, a model summary) may draw."""
    checkpoint, expected = saved(0, 1)
    callback = RngState()
    callback.on_load_checkpoint(trainer(), None, checkpoint)
    draw()
    callback.on_train_start(trainer(), None)
    assert draw() == expected
    after = draw()
    callback.on_train_start(trainer(), None)  # a second fit goes on
    assert draw() != expected and after != expected


def _save_and_restore(_: None) -> tuple[bool, list[float], int]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank), np.random.seed(rank), random.seed(rank)
    checkpoint, expected = saved(rank, 2)
    torch.manual_seed(99)
    callback = RngState()
    callback.on_load_checkpoint(trainer(rank, 2), None, checkpoint)
    callback.on_train_start(trainer(rank, 2), None)
    return draw() == expected, expected, len(checkpoint["rng_states"])


def test_each_rank_gets_its_own(ranks2):
    (same0, first, n0), (same1, second, n1) = ranks2(_save_and_restore, None)
    assert same0 and same1 and n0 == n1 == 2
    assert not set(first) & set(second)


def test_another_number_of_ranks_says_so():
    checkpoint, _ = saved(0, 1)
    callback = RngState()
    with pytest.warns(UserWarning, match="random states of 1 ranks, this run has 2"):
        callback.on_load_checkpoint(trainer(0, 2), None, checkpoint)
    state = torch.get_rng_state()
    callback.on_train_start(trainer(0, 2), None)
    assert torch.equal(state, torch.get_rng_state())


def test_a_checkpoint_of_another_program():
    with pytest.warns(UserWarning, match="random states of 0 ranks"):
        RngState().on_load_checkpoint(trainer(), None, {})
