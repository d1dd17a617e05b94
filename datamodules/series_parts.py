"""Where training, validation and test of a series begin and end (ReCycle, section 6.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class SeriesParts:
    """Cuts a series in the order of time.

    Attributes:
        splits: Fractions of the whole days, or numbers of steps, of training, validation, test.
        cycle_length: Steps of a day.
        history_length: Steps before the origin of a window; they may lie in the part before.
        horizon: Steps from the origin on; they lie in the part.
    """

    splits: Sequence[float]
    cycle_length: int
    history_length: int
    horizon: int

    @property
    def fractional(self) -> bool:
        """Whether the splits are fractions."""
        return max(self.splits) <= 1

    def check(self, whole_days: bool) -> None:
        """Refuse splits that cannot be meant.

        Args:
            whole_days: Whether every part must begin with a day.

        Raises:
            ValueError: Names the splits and the remedy.
        """
        if len(self.splits) != 3 or min(self.splits) < 0 or self.splits[0] <= 0:
            raise ValueError(f"data.splits={self.splits} must be three numbers: training, validation, test")
        if self.fractional:
            if sum(self.splits) > 1 + 1e-9:
                raise ValueError(
                    f"data.splits={self.splits} add up to more than 1: use fractions such as 0.6, 0.2, 0.2"
                )
        elif any(part != int(part) for part in self.splits):
            raise ValueError(f"data.splits={self.splits} must be fractions up to 1 or whole numbers of steps")
        elif whole_days and any(part % self.cycle_length for part in self.splits):
            raise ValueError(
                f"data.splits={self.splits} are not multiples of data.cycle_length={self.cycle_length}: use whole "
                "days, or set data.any_origin=true"
            )

    def bounds(self, num_steps: int, name: str) -> dict[Part, tuple[int, int]]:
        """The steps [start, stop) of each part; its targets lie inside.

        Args:
            num_steps: Of the series.
            name: What an error message calls it.

        Raises:
            ValueError: If a part that is wanted holds no window; says how many days it takes.
        """
        cycle, needed = self.cycle_length, self._needed
        if not self._fits(num_steps):
            days = num_steps // cycle
            if self.fractional:
                while not self._fits(days * cycle):
                    days += 1
            else:
                parts = [max(int(part), size if part else 0) for part, size in zip(self.splits, needed, strict=True)]
                days = -(-sum(parts) // cycle)
            raise ValueError(
                f"{name}: {num_steps / cycle:g} days are too short: windows of {self.history_length / cycle:g} + "
                f"{self.horizon / cycle:g} days with data.splits={self.splits} need {days} days "
                f"(at least {needed[0] / cycle:g} in training, {needed[1] / cycle:g} in validation and in test); "
                "give a longer file, change data.splits, or shorten data.history_length and data.horizon"
            )
        return dict(zip(get_args(Part), pairwise(self._cuts(num_steps)), strict=True))

    @property
    def _needed(self) -> tuple[int, int, int]:
        """Steps that one window needs in each part."""
        return self.history_length + self.horizon, self.horizon, self.horizon

    def _fits(self, num_steps: int) -> bool:
        """Tell whether every part that is wanted (its split is not 0) holds a window."""
        cuts = self._cuts(num_steps)
        sizes = zip(self.splits, self._needed, cuts[:-1], cuts[1:], strict=True)
        return cuts[-1] <= num_steps and all(split == 0 or stop - start >= size for split, size, start, stop in sizes)

    def _cuts(self, num_steps: int) -> list[int]:
        """Return the steps at which training, validation and test begin and end: floor(f N) days, or the counts."""
        sums = [0, self.splits[0], sum(self.splits[:2]), sum(self.splits)]
        if not self.fractional:
            return [int(part) for part in sums]
        days = num_steps // self.cycle_length
        return [int(part * days + 1e-9) * self.cycle_length for part in sums]
