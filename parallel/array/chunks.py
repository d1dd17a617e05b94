"""Which rows of a split axis lie on which rank: pure functions of sizes, testable without a single process.

A *map* is a tuple with the number of rows of every rank, in the order of the ranks; ranks may have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

Map = tuple[int, ...]


class Piece(NamedTuple):
    """Rows ``begin:end`` of a rank's own part that are meant for, or come from, one other rank."""

    begin: int
    end: int


def balanced(length: int, size: int) -> Map:
    """The canonical map: ``floor(length / size)`` rows each, and one more on the first ``length mod size`` ranks.

    Source: HeAT (Götz et al., 2020), the chunk rule of its arrays. `torch.chunk` leaves the last ranks empty instead.
    """
    rows, more = divmod(length, size)
    return tuple(rows + (rank < more) for rank in range(size))


def offsets(map_: Sequence[int]) -> Map:
    """Global number of the first row of every rank."""
    return tuple(accumulate(map_, initial=0))[:-1]


def owner_bounds(map_: Sequence[int]) -> Map:
    """Global number behind the last row of every rank: ``bisect_right`` in it finds the owner of a row."""
    return tuple(accumulate(map_))


def sends(source: Sequence[int], target: Sequence[int], rank: int) -> list[Piece]:
    """What ``rank`` sends to every rank when rows move from one map to another.

    Args:
        source: Map before.
        target: Map after; of as many rows.
        rank: The sender.

    Raises:
        ValueError: If the maps do not have the same number of ranks and rows.
    """
    check_maps(source, target)
    first = offsets(source)[rank]
    last = first + source[rank]
    found = []
    for begin, count in zip(offsets(target), target, strict=True):
        low, high = max(first, begin), min(last, begin + count)
        found.append(Piece(low - first, high - first) if high > low else Piece(0, 0))
    return found


def receives(source: Sequence[int], target: Sequence[int], rank: int) -> list[int]:
    """How many rows ``rank`` receives from every rank."""
    check_maps(source, target)
    return [
        sends(source, target, sender)[rank].end - sends(source, target, sender)[rank].begin
        for sender in range(len(source))
    ]


def check_maps(source: Sequence[int], target: Sequence[int]) -> None:
    """Raise ValueError unless rows can move from one map to the other."""
    if len(source) != len(target) or sum(source) != sum(target) or min(target, default=0) < 0:
        raise ValueError(
            f"map={tuple(target)}: {sum(target)} rows on {len(target)} ranks cannot hold the {sum(source)} rows "
            f"of {tuple(source)}; give a number of rows, 0 or more, for each of the {len(source)} ranks"
        )
