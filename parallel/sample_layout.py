"""Which rank evaluates which weight samples: pure functions of sizes, testable without a single process.

The world of R = D K ranks is a mesh: rank ``d K + j`` holds share d of the data and share j of the samples. The K ranks
of a sample group see the same items; D ranks of a data group evaluate the same samples on different items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # this module imports no torch: configurations are checked with it before torch is there
    from parallel.collectives import Interconnect
    from parallel.groups import Group


class MeshPlace(NamedTuple):
    """Where a rank stands in the mesh (data, sample)."""

    data: int
    sample: int


def check_sample_parallel_size(size: int, world_size: int) -> None:
    """Raise ValueError unless groups of ``size`` ranks fill the world."""
    if size < 1:
        raise ValueError(f"strategy.sample_parallel_size={size}: it counts the ranks that share samples, 1 or more")
    if world_size % size:
        fitting = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"strategy.sample_parallel_size={size} does not divide trainer.devices x trainer.num_nodes = {world_size} "
            f"processes; use one of {', '.join(fitting)}"
        )


def check_num_samples(num_samples: int, size: int, key: str = "model.num_samples", antithetic: bool = False) -> None:
    """Raise ValueError unless every one of ``size`` ranks gets samples, in whole pairs if they are antithetic.

    Args:
        num_samples: S, samples of the posterior over all ranks of a sample group.
        size: K, ranks that share them.
        key: Configuration key of S, for the message.
        antithetic: Whether samples 2i and 2i + 1 are a pair, which one rank must hold.
    """
    if num_samples < 1:
        raise ValueError(f"{key}={num_samples}: at least 1 sample is needed")
    if antithetic and num_samples % 2:
        raise ValueError(f"{key}={num_samples}: antithetic samples come in pairs; use an even number")
    if num_samples < size:
        raise ValueError(
            f"{key}={num_samples} leaves {size - num_samples} of strategy.sample_parallel_size={size} ranks without a "
            f"sample: use strategy.sample_parallel_size={_largest_fitting(num_samples, size)} and share the data over "
            f"the rest, or {key}={size} or more"
        )
    if antithetic and any(len(share_of(num_samples, size, j)) % 2 for j in range(size)):
        step = 2 * size
        raise ValueError(
            f"{key}={num_samples}: an antithetic pair would be split between two of "
            f"strategy.sample_parallel_size={size} ranks; use a multiple of {step}, for instance "
            f"{-(-num_samples // step) * step}"
        )


def _largest_fitting(num_samples: int, size: int) -> int:
    return max(n for n in range(1, num_samples + 1) if size % n == 0)


def mesh(rank: int, world_size: int, size: int) -> MeshPlace:
    """Place of a rank.

    Raises:
        ValueError: If groups of ``size`` ranks do not fill the world.
    """
    check_sample_parallel_size(size, world_size)
    return MeshPlace(*divmod(rank, size))


def share_of(num_samples: int, size: int, index: int) -> range:
    """Global numbers {s : floor(s K / S) = j} of the samples of one rank, K = ``size``, j = ``index``."""
    first, end = (-(-j * num_samples // size) for j in (index, index + 1))
    return range(first, end)


def view_streams(scope: Literal["shared", "rank", "sample"] | int, num_samples: int, share: SampleShare) -> list[int]:
    """Number of the random view of the data that each of this rank's samples sees.

    Args:
        scope: ``shared``: all samples see one view; ``rank``: every rank of the group has its own; ``sample``: every
            sample has its own; a number A: sample s of S sees view floor(s A / S), whatever the ranks are.
        num_samples: S, samples of all ranks.
        share: Which of them are this rank's.

    Raises:
        ValueError: For an unknown scope, or more views than samples.
    """
    ids = share.ids(num_samples)
    if scope == "shared":
        return [0] * len(ids)
    if scope == "rank":
        return [share.index] * len(ids)
    views = num_samples if scope == "sample" else scope
    if isinstance(views, bool) or not isinstance(views, int) or not 1 <= views <= num_samples:
        raise ValueError(
            f"model.augment_scope={scope!r}: choose shared, rank, sample, or a number of views from 1 to "
            f"model.num_samples={num_samples}"
        )
    return [s * views // num_samples for s in ids]


@dataclass(frozen=True)
class SampleShare:
    """How samples are shared between ranks; the default is a process that evaluates all of them.

    Attributes:
        size: K, ranks that share the samples.
        index: j, number of this rank among them.
        group: Those ranks; None: nobody else.
        data_group: Ranks that evaluate the same samples on other items; None: nobody else.
        interconnect: Counts and delays what the group communicates; None: not counted.
    """

    size: int = 1
    index: int = 0
    group: Group | None = None
    data_group: Group | None = None
    interconnect: Interconnect | None = None

    def ids(self, num_samples: int) -> range:
        """Global numbers of this rank's samples.

        Raises:
            ValueError: If there are fewer samples than ranks.
        """
        check_num_samples(num_samples, self.size)
        return share_of(num_samples, self.size, self.index)

    def weight(self, num_samples: int) -> float:
        """K S_j / S: by this factor a mean over this rank's samples counts in the mean over ranks."""
        return self.size * len(self.ids(num_samples)) / num_samples
