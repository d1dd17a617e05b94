"""Which phase a training is in: a pure function of the count of optimizer steps, equal on all ranks.

Source: Coquelin et al. (arXiv 2405.01067); ``reference`` is the rule of the published program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Phase = Literal["warmup", "ab", "full"]
Rule = Literal["relative", "reference"]


class Segment(NamedTuple):
    """A phase and the optimizer steps ``begin`` to ``end`` (not included) that it takes."""

    phase: Phase
    begin: int
    end: int


@dataclass(frozen=True)
class PhaseSchedule:
    """Warm-up, then AB phases and full-rank phases in turns; the last one is full-rank.

    With ``relative`` every phase has its length. An AB phase must leave ``final`` steps for the last full-rank phase:
    one that does not fit is shortened, and one after which no other would fit is stretched instead. ``final = 0`` does
    without, and the schedule no longer depends on the length of the training.

    With ``reference`` the lengths are those of the clock: with the period ``T = ab + full``, an AB phase ends at the
    next multiple of ``T``, and a full-rank phase ``full`` steps after it. The training may end in an AB phase.

    Attributes:
        warmup: Steps before the first AB phase.
        ab: Steps of an AB phase.
        full: Steps of the full-rank phase after it.
        final: Steps of the last full-rank phase.
        total: Steps of the training; None: unknown.
        rule: ``relative`` or ``reference``.
    """

    warmup: int
    ab: int
    full: int
    final: int = 0
    total: int | None = None
    rule: Rule = "relative"

    def end(self, phase: Phase, begin: int) -> int | None:
        """The step count at which the phase that began at ``begin`` ends; None: with the training."""
        if self.rule == "reference":
            period = self.ab + self.full
            if phase == "ab":
                return (begin // period + 1) * period
            return self._if_room(begin + (self.warmup if phase == "warmup" else self.full))
        if phase == "warmup":
            return self._if_room(begin + self.warmup)
        if phase == "full":
            return self._if_room(begin + self.full)
        end = begin + self.ab
        stays = self.total is None or self.final == 0 or self._has_room(end + self.full)
        return end if stays else self.total - self.final

    def following(self, phase: Phase) -> Phase:
        """The phase after this one."""
        return "full" if phase == "ab" else "ab"

    def segments(self) -> Iterator[Segment]:
        """All phases of a training of known length."""
        assert self.total is not None, "a training without end has no last phase"
        phase, begin = "warmup", 0
        while begin < self.total:
            end = self.end(phase, begin)
            end = self.total if end is None else min(end, self.total)
            if end > begin:
                yield Segment(phase, begin, end)
            phase, begin = self.following(phase), end

    def steps_in(self, phase: Phase) -> int:
        """Steps of all phases of this kind, of a training of known length."""
        return sum(s.end - s.begin for s in self.segments() if s.phase == phase)

    def has_no_ab_phase(self) -> bool:
        """Whether a training of known length is over before its first AB phase."""
        return self.total is not None and all(segment.phase != "ab" for segment in self.segments())

    def _has_room(self, begin: int) -> bool:
        """Whether an AB phase may begin there: one shorter than a full-rank phase is not worth two switches."""
        if self.total is None:
            return True
        if self.rule == "reference" or self.final == 0:
            return begin < self.total
        return self.total - self.final - begin >= max(1, min(self.ab, self.full))

    def _if_room(self, begin: int) -> int | None:
        return begin if self._has_room(begin) else None


def make_schedule(
    warmup_steps: float,
    ab_steps: int,
    full_steps: int,
    final_full_steps: int | None,
    total: int | None,
    rule: Rule,
    short: bool = False,
) -> PhaseSchedule:
    """The schedule of a training.

    Args:
        warmup_steps: Steps, or a fraction of all where it is below 1.
        ab_steps: Steps of an AB phase.
        full_steps: Steps of a full-rank phase.
        final_full_steps: Steps of the last full-rank phase; None: ``full_steps``.
        total: Steps of the training; None: unknown.
        rule: ``relative`` or ``reference``.
        short: Whether the training was cut short on purpose (a debug run): then it may be too short for an AB phase.

    Raises:
        ValueError: If no AB phase fits into the training, or a fraction is asked for of an unknown number of steps.
    """
    final = full_steps if final_full_steps is None else final_full_steps
    if rule == "reference":
        final = 0
    if 0 < warmup_steps < 1:
        if total is None:
            raise ValueError(
                f"strategy.warmup_steps={warmup_steps} is a fraction of all steps, whose number is unknown: set "
                "trainer.max_steps or trainer.max_epochs, or give a number of steps"
            )
        warmup_steps = max(1, round(warmup_steps * total))
    schedule = PhaseSchedule(int(warmup_steps), ab_steps, full_steps, final, total, rule)
    if total is not None and not short:
        if ab_steps >= total:
            raise ValueError(
                f"strategy.ab_steps={ab_steps} leaves no step to the other phases of a training of {total} optimizer "
                "steps: lower it, or raise trainer.max_epochs"
            )
        if schedule.has_no_ab_phase():
            raise ValueError(
                f"strategy.warmup_steps={int(warmup_steps)} and strategy.final_full_steps={final} leave no room for an "
                f"AB phase in a training of {total} optimizer steps: lower them, or raise trainer.max_epochs"
            )
    return schedule


def check_lengths(warmup_steps: float, ab_steps: int, full_steps: int, final_full_steps: int | None, rule: str) -> None:
    """Raise ValueError for lengths that can never work, whatever the training."""
    if warmup_steps < 0 or (warmup_steps > 1 and warmup_steps != int(warmup_steps)):
        raise ValueError(
            f"strategy.warmup_steps={warmup_steps}: give a number of optimizer steps, or a fraction of all below 1"
        )
    if ab_steps < 1:
        raise ValueError(f"strategy.ab_steps={ab_steps}: it counts optimizer steps, 1 or more")
    for name, value in (("full_steps", full_steps), ("final_full_steps", final_full_steps)):
        if value is not None and value < 0:
            raise ValueError(f"strategy.{name}={value}: it counts optimizer steps, 0 or more")
    if rule not in ("relative", "reference"):
        raise ValueError(f"strategy.schedule={rule!r}: choose relative or reference")
    if rule == "reference" and full_steps < 1:
        raise ValueError("strategy.full_steps=0 with strategy.schedule=reference: the clock needs 1 step or more")
