"""Loaders whose order of samples depends on (seed, epoch) alone, not on the number of processes or on restarts.

Guarantees (docs/architecture.md, section 7):

- the global batch ``k`` of an epoch holds the same samples on one process and on any number of processes;
- evaluation visits every sample exactly once, also when the processes get unequal shares;
- a run that resumes, at the end of an epoch or in the middle of it, sees the samples it would have seen;
- no loader draws from the global random state, so it can be restored exactly (`callbacks.rng_state`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class WholeBatches(Dataset[dict[str, Tensor]], ABC):
    """A data set that gathers a whole batch at once; its loaders take `whole_batch` as ``collate_fn``."""

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one item, the batch of one without its batch dimension."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}


def whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pass on a batch that a data set has put together already (``collate_fn``)."""
    return batch


def _mixed(*parts: int) -> int:
    """One 32-bit seed from several numbers; torch's CPU generator ignores the bits of a seed above the lowest 32."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class RankSampler(Sampler[int]):
    """The share of one process of a permutation that all processes agree on.

    Process ``r`` of ``R`` takes the positions ``r, r + R, r + 2 R, ...``. In training the permutation wraps around to
    a multiple of ``R`` (every process must take the same number of steps); in evaluation shares may differ by one.

    Args:
        data: Anything with a length.
        shuffle: Training order (permuted anew every epoch) if true, else evaluation order.
        seed: Seed of the permutation.
        num_replicas: Number of processes that share the data.
        rank: Index of this process among them.
        multiple_of: In training, keep only a multiple of this many samples of the epoch (drop the last batch).
    """

    def __init__(
        self,
        data: Sized,
        *,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        multiple_of: int | None = None,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank} is not in 0..{num_replicas - 1} (num_replicas={num_replicas})")
        self.data, self.shuffle, self.seed = data, shuffle, seed
        self.num_replicas, self.rank, self.multiple_of = num_replicas, rank, multiple_of
        self.skip = (-1, 0)  # (epoch, samples of this process's share to leave out): a restart in mid-epoch
        self.workers = torch.Generator()  # handed to the DataLoader: seeds its worker processes
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Select the permutation of ``epoch``; Lightning calls it before every epoch."""
        self.epoch = epoch
        self.workers.manual_seed(_mixed(self.seed, epoch, self.rank))

    def __iter__(self) -> Iterator[int]:
        n = len(self.data)
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
            order = torch.randperm(n, generator=generator).tolist()
            if self.multiple_of:
                del order[n - n % self.multiple_of :]
            else:
                wrap = math.ceil(n / self.num_replicas) * self.num_replicas - n
                order += (order * math.ceil(wrap / max(n, 1)))[:wrap]
        else:
            order = range(n)
        yield from order[self.rank :: self.num_replicas][self.pop_skip() :]

    def pending_skip(self) -> int:
        """Samples that the next pass leaves out: those that the interrupted pass over this epoch already gave."""
        epoch, samples = self.skip
        return samples if epoch == self.epoch else 0

    def pop_skip(self) -> int:
        """Return `pending_skip` and forget it: it holds for one pass."""
        samples, self.skip = self.pending_skip(), (-1, 0)
        return samples

    def __len__(self) -> int:
        n = len(self.data)
        if not self.shuffle:
            return len(range(self.rank, n, self.num_replicas))
        if self.multiple_of:
            return (n - n % self.multiple_of) // self.num_replicas
        return math.ceil(n / self.num_replicas)


class ResumableLoader(DataLoader):
    """A DataLoader that Lightning can stop and resume in the middle of an epoch (it has a ``state_dict``)."""

    _yielded = 0

    def __iter__(self) -> Iterator[Any]:
        self._yielded = self.sampler.pending_skip() // self.batch_size  # before the sampler consumes it
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The running epoch and how many of its batches were handed out (0 when all were)."""
        return {"epoch": self.sampler.epoch, "batches": self._yielded % max(len(self), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the batches of the interrupted epoch that were already used."""
        self.sampler.skip = (state["epoch"], state["batches"] * self.batch_size)


def make_loader(
    data: Sized,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    layout: dict[str, int] | None = None,
    drop_last: bool = False,
    **kwargs: Any,
) -> DataLoader:
    """Build the loader of this process.

    Args:
        data: A map-style data set, with ``__getitems__`` (a batch at a time) where speed matters.
        batch_size: Samples of one optimiser step over **all** processes that share the data, so that a run on more
            devices computes the same thing.
        shuffle: Training order if true, evaluation order else.
        seed: Seed of the order.
        layout: ``trainer.distributed_sampler_kwargs``: who shares the data (None: one process).
        drop_last: In training, drop the incomplete last batch of an epoch.
        **kwargs: Further arguments of ``DataLoader`` (``num_workers``, ``collate_fn``, ``pin_memory``, ...).

    Raises:
        ValueError: If ``batch_size`` does not divide by the number of processes, if ``drop_last`` leaves nothing, or if
            there are fewer samples to evaluate than processes.
    """
    layout = {key: layout[key] for key in ("num_replicas", "rank")} if layout else {"num_replicas": 1, "rank": 0}
    replicas = layout["num_replicas"]
    if batch_size < 1 or batch_size % replicas:
        raise ValueError(
            f"data.batch_size={batch_size} cannot be split over {replicas} data-parallel processes; "
            f"it counts the samples of one step over all of them: use a multiple of {replicas}"
        )
    if shuffle and drop_last and len(data) < batch_size:
        raise ValueError(
            f"data.batch_size={batch_size} is larger than the training part ({len(data)} samples) and "
            f"data.drop_last=true drops incomplete batches: use at most {len(data)}, or data.drop_last=false"
        )
    if not shuffle and 0 < len(data) < replicas:  # said by all: some of them would have none, and the others wait
        raise ValueError(
            f"{len(data)} samples to evaluate cannot be shared by {replicas} data-parallel processes: lower "
            "trainer.devices, or give the validation, test or prediction part more data"
        )
    sampler = RankSampler(
        data, shuffle=shuffle, seed=seed, multiple_of=batch_size if shuffle and drop_last else None, **layout
    )
    if kwargs.get("num_workers"):
        kwargs.setdefault("persistent_workers", True)
    # Only training is resumed in mid-pass; Lightning rebuilds prediction loaders, which must be plain ones for that.
    kind = ResumableLoader if shuffle else DataLoader
    return kind(data, batch_size=batch_size // replicas, sampler=sampler, generator=sampler.workers, **kwargs)
