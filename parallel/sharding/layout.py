"""Which block of a whole tensor a rank of a Jigsaw grid holds: pure functions of sizes.

Ranks of a model instance form a grid of T parts of the token axis (longitude bands) and C parts of the channel axis.
A tensor dimension that is split over an axis is cut into chunks of equal length, so that the ``i``-th chunk begins at
``i * chunk``; the last ones may reach beyond the logical size, and what they hold there is zero padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Axis = Literal["token", "channel"]


def ceil_div(number: int, parts: int) -> int:
    """Length of the chunks when ``number`` is cut into ``parts``."""
    return -(-number // parts)


def clip(start: int, length: int, size: int) -> slice:
    """What of ``start : start + length`` lies below ``size``; empty slices begin at ``size``."""
    return slice(min(start, size), min(start + length, size))


@dataclass(frozen=True)
class Layout:
    """Blocks of one tensor.

    Attributes:
        sizes: Logical size of every dimension, without padding.
        axes: Axis of the grid over which a dimension is cut; None: every rank has all of it.
        local: Size of the local block, padding included.
    """

    sizes: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    local: tuple[int, ...]

    def offsets(self, place: Mapping[str, int]) -> tuple[int, ...]:
        """Where the block of the rank at ``place`` (axis to index) begins in the whole tensor."""
        return tuple(
            0 if axis is None else min(place[axis] * length, size)
            for axis, length, size in zip(self.axes, self.local, self.sizes, strict=True)
        )

    def valid(self, place: Mapping[str, int]) -> tuple[int, ...]:
        """How much of the block is not padding, by dimension."""
        starts = self.offsets(place)
        return tuple(
            min(length, size - start) for length, size, start in zip(self.local, self.sizes, starts, strict=True)
        )

    def padded(self, parts: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the whole tensor with its padding, on a grid with so many ``parts`` of each axis."""
        return tuple(
            length if axis is None else length * parts[axis] for axis, length in zip(self.axes, self.local, strict=True)
        )

    @property
    def numel(self) -> int:
        """Logical elements."""
        count = 1
        for size in self.sizes:
            count *= size
        return count


@dataclass(frozen=True)
class Piece:
    """Output features that one rank of the gather group stores and one rank of the reduce group owns.

    Attributes:
        block: Index in the gather group of the rank that stores these rows of the weight.
        owner: Index in the reduce group of the rank that holds these features of the result.
        rows: Rows within the stored block.
        features: Features within the block of the result.
    """

    block: int
    owner: int
    rows: slice
    features: slice

    @property
    def length(self) -> int:
        """Number of features."""
        return self.rows.stop - self.rows.start


def pieces(gather: int, rows: int, reduce: int, features: int) -> list[list[Piece]]:
    """Cut ``reduce * features`` output features where the stored blocks end and where the owners change.

    Args:
        gather: Ranks over which the rows of the weight are stored.
        rows: Stored on each of them; the last ones may be padding.
        reduce: Ranks over which the features of the result are spread.
        features: On each of them.

    Returns:
        The pieces of every stored block, in ascending order.
    """
    found: list[list[Piece]] = []
    for block in range(gather):
        begin, end = block * rows, min((block + 1) * rows, reduce * features)
        mine = []
        while begin < end:
            owner = begin // features
            stop = min(end, (owner + 1) * features)
            mine.append(
                Piece(
                    block,
                    owner,
                    slice(begin - block * rows, stop - block * rows),
                    slice(begin - owner * features, stop - owner * features),
                )
            )
            begin = stop
        found.append(mine)
    return found
