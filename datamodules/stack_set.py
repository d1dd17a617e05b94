"""Sets of thin-film stacks with their spectra, in memory or in mapped files, and how they are kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import WholeBatches
from physics.thin_film.layout import Shard
from physics.thin_film.targets import Target

Batch = dict[str, Tensor]


class StackSet(WholeBatches):
    """Stacks and their spectra, as a data set of whole batches.

    Args:
        shards: Spectra ``(N, 3, W)`` of any floating type and tokens ``(N, L)`` of any integer type.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.starts = torch.tensor([0, *(len(s.tokens) for s in self.shards)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Gather a whole batch."""
        index = torch.as_tensor(indices)
        spectrum, tokens = self.gather(index)
        spectrum = spectrum.float()
        return {
            "spectrum": spectrum,
            "tokens": tokens.long(),
            "weight": torch.ones(()).expand(spectrum.shape).clone(),
            "index": index,
        }

    def gather(self, index: Tensor) -> Shard:
        """Spectra and tokens with these numbers, as they are stored."""
        if len(self.shards) == 1:
            return Shard(self.shards[0].spectra[index], self.shards[0].tokens[index])
        which = torch.searchsorted(self.starts, index, right=True) - 1
        first = self.shards[0]
        spectra = first.spectra.new_empty(len(index), *first.spectra.shape[1:])
        tokens = first.tokens.new_empty(len(index), first.tokens.shape[1])
        for shard in which.unique().tolist():
            here = which == shard
            inside = index[here] - self.starts[shard]
            spectra[here], tokens[here] = self.shards[shard].spectra[inside], self.shards[shard].tokens[inside]
        return Shard(spectra, tokens)

    @property
    def tokens(self) -> Tensor:
        """All stacks, ``(N, L)`` int64."""
        return torch.cat([shard.tokens.long() for shard in self.shards])


class Numbers(Dataset[Batch]):
    """Numbers of stacks that are made later, on the device."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        """Return the number itself."""
        return {"index": torch.tensor(index)}

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch of numbers."""
        return {"index": torch.as_tensor(indices)}


class TargetSet(Dataset[Batch]):
    """Wanted spectra, each with the variants of it that a network is shown.

    Args:
        targets: What is wanted.
        variants: ``(K, 3, W)`` of each target, the target itself first.
    """

    def __init__(self, targets: Sequence[Target], variants: Sequence[Tensor]) -> None:
        self.targets, self.variants = list(targets), list(variants)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        """Return one target."""
        target = self.targets[index]
        return {
            "spectrum": target.spectrum.float(),
            "weight": target.weight.float(),
            "variants": self.variants[index].float(),
            "index": torch.tensor(index),
        }


def fingerprints(tokens: Tensor) -> Tensor:
    """A 64-bit hash of every stack, ``(N, L)`` to ``(N,)`` int64: the same stack, the same number, on any machine."""
    state = torch.zeros(len(tokens), dtype=torch.int64)
    for column in tokens.long().T:
        state = (state ^ (column + 0x9E3779B9)) * 0x5851F42D4C957F2D  # wraps around
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    return state


def take_unlike(make: Callable[[Tensor], Tensor], count: int, avoid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` stacks of a stream that are not among those to avoid.

    Args:
        make: Gives the stacks with certain numbers, ``(N,)`` to ``(N, L)``.
        count: How many.
        avoid: Fingerprints, or None.

    Returns:
        Stacks ``(count, L)`` and their numbers ``(count,)``.

    Raises:
        ValueError: If the stream hardly has others.
    """
    stacks, numbers, found, begin = [], [], 0, 0
    while found < count:
        index = torch.arange(begin, begin + max(count, 256))
        begin += len(index)
        tokens = make(index)
        if avoid is not None:
            unlike = ~torch.isin(fingerprints(tokens), avoid)
            index, tokens = index[unlike], tokens[unlike]
        stacks.append(tokens)
        numbers.append(index)
        found += len(tokens)
        if begin > 100 * max(count, 256):
            raise ValueError(
                f"of {begin} stacks only {found} are not in the other parts of the data; the space is too small for "
                "data.num_train, data.num_val and data.num_test: allow more layers or fewer stacks"
            )
    return torch.cat(stacks)[:count], torch.cat(numbers)[:count]
