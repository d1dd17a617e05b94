"""Which singular values are dropped at a split: a constant cutoff, or one that rises over the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cutoff:
    """Values below a fraction of the largest are dropped; a pure function of the count of optimizer steps.

    A network that has learned at high rank loses less by a late cut than by an early one.

    Args:
        first: Fraction until the rise.
        final: Fraction after it; None: ``first``, there is none.
        rise: Where the linear rise begins and ends, as fractions of the training.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    first: float
    final: float | None
    rise: Sequence[float]

    def __post_init__(self) -> None:
        for name, value in (("cutoff", self.first), ("final_cutoff", self.final)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(
                    f"strategy.{name}={value}: a fraction of the largest singular value, 0 or more and below 1"
                )
        if self.final is not None and self.final < self.first:
            raise ValueError(
                f"strategy.final_cutoff={self.final} is below strategy.cutoff={self.first}: a cutoff rises, since what "
                "was dropped does not come back; null: it stays"
            )
        if len(self.rise) != 2 or not 0 <= self.rise[0] <= self.rise[1] <= 1:
            raise ValueError(
                f"strategy.cutoff_rise={list(self.rise)}: give two fractions of the training, where the rise begins "
                "and where it ends: [0.5, 0.8]"
            )

    def at(self, step: int, total: int | None) -> float:
        """The fraction of a split after ``step`` of ``total`` optimizer steps.

        Raises:
            ValueError: If it rises over a training whose length is unknown.
        """
        if self.final is None:
            return self.first
        if total is None:
            raise ValueError(
                f"strategy.final_cutoff={self.final} is reached in the course of the training, whose number of steps "
                "is unknown: set trainer.max_steps or trainer.max_epochs, or strategy.final_cutoff=null"
            )
        begin, end = (fraction * total for fraction in self.rise)
        risen = min(1.0, max(0.0, (step - begin) / (end - begin))) if end > begin else float(step >= begin)
        return self.first + risen * (self.final - self.first)
