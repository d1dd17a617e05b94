"""What steps of a phase take."""

from __future__ import annotations

import time

from strategies.ab_training.phases import Phase


class StepTimes:
    """Seconds from step to step by phase, with whatever callbacks and evaluations do in between, without switches."""

    def __init__(self) -> None:
        self._taken: dict[Phase, list[float]] = {"warmup": [0.0, 0], "ab": [0.0, 0], "full": [0.0, 0]}
        self._begin = 0.0

    def begin(self) -> None:
        """The next step begins."""
        self._begin = time.perf_counter()

    def end(self, phase: Phase) -> None:
        """A step of a phase has ended."""
        taken = self._taken[phase]
        taken[0], taken[1] = taken[0] + time.perf_counter() - self._begin, taken[1] + 1

    def means(self) -> dict[Phase, float]:
        """Of the phases that had a step."""
        return {phase: taken / steps for phase, (taken, steps) in self._taken.items() if steps}
