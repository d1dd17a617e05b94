"""The guarantees of `datamodules.loading`, over many sizes, numbers of processes and seeds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.loading import RankSampler, ResumableLoader, make_loader

REPLICAS = (1, 2, 3)
SIZES = (1, 5, 12, 13, 31)


class Numbers(Dataset):
    """Sample i is the number i; ``noisy`` adds what a worker draws."""

    def __init__(self, size: int, noisy: bool = False) -> None:
        self.size, self.noisy = size, noisy

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        return (index, torch.rand(()).item(), random.random()) if self.noisy else index


def batches(size: int, batch_size: int, replicas: int, epoch: int = 0, **kwargs) -> list[list[list[int]]]:
    """Batches of every process."""
    everyone = []
    for rank in range(replicas):
        layout = {"num_replicas": replicas, "rank": rank}
        loader = make_loader(Numbers(size), batch_size, layout=layout, **kwargs)
        loader.sampler.set_epoch(epoch)
        everyone.append([batch.tolist() for batch in loader])
        assert len(everyone[-1]) == len(loader)
    return everyone


def global_batches(everyone: list[list[list[int]]]) -> list[set[int]]:
    assert len({len(mine) for mine in everyone}) == 1, "every process takes the same number of training steps"
    return [set().union(*parts) for parts in zip(*everyone, strict=True)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_global_batch_is_the_same_set_on_any_number_of_processes(size, epoch, drop_last):
    if drop_last and size < 6:
        return
    alone = global_batches(batches(size, 6, 1, epoch, shuffle=True, seed=4, drop_last=drop_last))
    for replicas in REPLICAS[1:]:
        shared = global_batches(batches(size, 6, replicas, epoch, shuffle=True, seed=4, drop_last=drop_last))
        if drop_last or size % replicas == 0:
            assert shared == alone
        else:  # the last one is filled up with the first samples of the epoch
            assert shared[: size // 6] == alone[: size // 6]
            assert set().union(*shared) == set(range(size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("replicas", REPLICAS)
def test_evaluation_visits_every_sample_once(size, replicas):
    if size < replicas:
        with pytest.raises(ValueError, match="lower trainer"):
            batches(size, 6, replicas)
        return
    everyone = batches(size, 6, replicas)
    seen = [i for mine in everyone for batch in mine for i in batch]
    assert sorted(seen) == list(range(size))
    shares = [sum(map(len, mine)) for mine in everyone]
    assert max(shares) - min(shares) <= 1
    assert batches(size, 6, replicas, epoch=5) == everyone


@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize("size", SIZES)
def test_training_visits_every_sample(size, replicas):
    everyone = batches(size, 6, replicas, shuffle=True)
    assert {i for mine in everyone for batch in mine for i in batch} == set(range(size))


@pytest.mark.parametrize("replicas", REPLICAS)
def test_drop_last_keeps_whole_global_batches(replicas):
    everyone = batches(31, 6, replicas, shuffle=True, drop_last=True)
    seen = [i for mine in everyone for batch in mine for i in batch]
    assert len(seen) == len(set(seen)) == 30
    assert all(len(batch) == 6 // replicas for mine in everyone for batch in mine)


def test_drop_last_does_not_touch_evaluation():
    assert sum(len(b) for b in batches(7, 6, 1, drop_last=True)[0]) == 7


def orders(seed: int, epochs: int = 4) -> list[tuple[int, ...]]:
    sampler = RankSampler(Numbers(40), shuffle=True, seed=seed)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(tuple(sampler))
    return found


def test_order_depends_on_seed_and_epoch():
    """Seeds that differ by a multiple of 256 or 2**32 too: torch's generator reads the lowest 32 bits only."""
    seeds = (0, 1, 2, 255, 256, 257, 2**24, 2**31, 2**32 - 1)
    every = [order for seed in seeds for order in orders(seed)]
    assert len(set(every)) == len(every)
    assert orders(257) == orders(257)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("used", [1, 3, 4])
def test_mid_epoch_skip(num_workers, replicas, used):
    """A restart gives the rest of the epoch; the next epoch is whole."""

    def loader() -> ResumableLoader:
        layout = {"num_replicas": replicas, "rank": replicas - 1}
        made = make_loader(Numbers(31), 6, shuffle=True, drop_last=True, layout=layout, num_workers=num_workers)
        made.sampler.set_epoch(2)
        return made

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    iterator = iter(first)
    begun = [next(iterator).tolist() for _ in range(used)]
    state = first.state_dict()
    assert state == {"epoch": 2, "batches": used}
    resumed = loader()
    resumed.load_state_dict(state)
    iterator_two = iter(resumed)
    rest = [next(iterator_two).tolist()]
    assert resumed.state_dict() == {"epoch": 2, "batches": (used + 1) % len(resumed)}, "a second stop"
    rest += [batch.tolist() for batch in iterator_two]
    assert begun + rest == whole
    resumed.sampler.set_epoch(3)
    other = loader()
    other.sampler.set_epoch(3)
    assert [batch.tolist() for batch in resumed] == [batch.tolist() for batch in other]


def test_a_skip_holds_for_its_epoch_only():
    loader = make_loader(Numbers(31), 6, shuffle=True, drop_last=True)
    loader.load_state_dict({"epoch": 2, "batches": 3})
    assert len(list(loader)) == 5  # epoch 0


def test_state_after_a_whole_epoch():
    loader = make_loader(Numbers(31), 6, shuffle=True)
    assert len(list(loader)) == 6
    assert loader.state_dict() == {"epoch": 0, "batches": 0}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("shuffle", [False, True])
def test_never_draws_from_the_global_random_state(num_workers, shuffle):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    loader = make_loader(Numbers(12), 6, shuffle=shuffle, num_workers=num_workers)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert len(list(loader)) == 2
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())


def drawn(seed: int, rank: int = 0, epoch: int = 0) -> list[float]:
    layout = {"num_replicas": 2, "rank": rank}
    loader = make_loader(Numbers(8, noisy=True), 4, shuffle=True, seed=seed, layout=layout, num_workers=2)
    loader.sampler.set_epoch(epoch)
    return [value for _, *values in loader for column in values for value in column.tolist()]


def test_workers_draw_the_same_again_and_differ_by_seed_rank_and_epoch():
    first = drawn(seed=1)
    assert first == drawn(seed=1)
    others = [drawn(seed=2), drawn(seed=257), drawn(seed=1, rank=1), drawn(seed=1, epoch=1)]
    assert len({round(v, 12) for values in (first, *others) for v in values}) == 5 * len(first)


def test_prediction_loaders_are_plain():
    """Lightning rebuilds them with arguments that it reads from the signature."""
    assert type(make_loader(Numbers(5), 2)) is DataLoader
    assert type(make_loader(Numbers(5), 2, shuffle=True)) is ResumableLoader


@pytest.mark.parametrize(
    ("size", "batch_size", "replicas", "drop_last", "message"),
    [
        (9, 4, 3, False, "data.batch_size=4 cannot be split over 3 .* multiple of 3"),
        (9, 0, 1, False, "data.batch_size=0"),
        (3, 4, 1, True, r"data.batch_size=4 is larger than the training part \(3 samples\)"),
    ],
)
def test_sizes_that_do_not_fit(size, batch_size, replicas, drop_last, message):
    layout = {"num_replicas": replicas, "rank": 0}
    with pytest.raises(ValueError, match=message):
        make_loader(Numbers(size), batch_size, shuffle=True, layout=layout, drop_last=drop_last)


@pytest.mark.parametrize("rank", [0, 1])
def test_fewer_samples_to_evaluate_than_processes_are_refused_by_all(rank):
    layout = {"num_replicas": 2, "rank": rank}
    with pytest.raises(ValueError, match=r"1 samples to evaluate cannot be shared by 2 .* lower trainer\.devices"):
        make_loader(Numbers(1), 2, layout=layout)
    assert len(make_loader(Numbers(0), 2, layout=layout)) == 0  # nothing to evaluate is no mistake


def test_rank_out_of_range():
    with pytest.raises(ValueError, match=r"rank=2 is not in 0\.\.1"):
        RankSampler(Numbers(3), shuffle=False, num_replicas=2, rank=2)


def test_lightnings_layout_with_more_keys_is_accepted():
    layout = {"num_replicas": 2, "rank": 1, "shuffle": True}
    assert [b.tolist() for b in make_loader(Numbers(4), 2, layout=layout)] == [[1], [3]]
