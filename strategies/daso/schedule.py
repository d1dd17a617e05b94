"""When DASO exchanges parameters: a function of epochs and of the training loss, equal on all ranks.

Source: Coquelin et al. (2022), section on the phases; the values of a phase and their decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Rule = Literal["paper", "code", "fixed"]


class Plateau:
    """Detects that a loss stopped to fall.

    An epoch improves if its loss is below ``best - threshold * |best|``. More than ``patience`` epochs in a row that do
    not improve are a plateau; the count then starts anew, the best loss stays.

    Args:
        patience: Epochs without improvement that are tolerated.
        threshold: Relative improvement that counts.
    """

    def __init__(self, patience: int = 2, threshold: float = 0.05) -> None:
        if patience < 0:
            raise ValueError(f"strategy.plateau_patience={patience}: it counts epochs, 0 or more")
        if threshold < 0:
            raise ValueError(f"strategy.plateau_threshold={threshold}: a relative improvement is 0 or more")
        self.patience, self.threshold = patience, threshold
        self.best, self.bad = math.inf, 0

    def update(self, loss: float) -> bool:
        """Count an epoch; whether this one completes a plateau."""
        if self.best == math.inf or loss < self.best - self.threshold * abs(self.best):
            self.best, self.bad = loss, 0
            return False
        self.bad += 1
        if self.bad <= self.patience:
            return False
        self.bad = 0
        return True


@dataclass(frozen=True)
class Values:
    """What holds during an epoch.

    Attributes:
        skip: B: parameters are exchanged in every B-th step; 0: after every step, and waited for.
        wait: W: steps until what was sent is merged.
        local_skip: L of the published schedule. The strategy averages gradients within the node in every step,
            whatever L is: the broadcast that ends an exchange would throw away what the other processes had learned.
    """

    skip: int = 0
    wait: int = 0
    local_skip: int = 1


BLOCKING = Values(0, 0, 0)


class Schedule:
    """B, W and L epoch by epoch.

    Warm-up and cool-down exchange after every step and wait (`BLOCKING`). In between the run cycles: it begins with
    ``skip`` and ``wait``; a plateau of the training loss halves B and L and reduces W, and at B = 1 sets
    B = ``max_skip`` and W = L = ``max_skip // 4``.

    Args:
        epochs: Epochs of the training, E; None: unknown (there is no cool-down).
        warmup_epochs: Epochs, or a fraction of all.
        cooldown_epochs: The same at the end.
        skip: B of the first cycling epoch.
        wait: W of it.
        max_skip: B after the reset.
        reduction: Divisor at a plateau.
        short: Whether the training was cut short on purpose (a debug run): then its phases are too, where they do not
            fit.
        rule: ``paper`` divides W by ``reduction`` at a plateau, ``code`` (the published one) subtracts 1, ``fixed``
            keeps B and W.
        plateau: Detector.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    def __init__(
        self,
        epochs: int | None,
        warmup_epochs: float = 4,
        cooldown_epochs: float = 4,
        skip: int = 4,
        wait: int = 1,
        max_skip: int = 8,
        reduction: int = 2,
        rule: Rule = "paper",
        plateau: Plateau | None = None,
        short: bool = False,
    ) -> None:
        check(warmup_epochs, cooldown_epochs, skip, wait, max_skip, reduction, rule)
        self.warmup_epochs, self.cooldown_epochs, self.short = warmup_epochs, cooldown_epochs, short
        self.set_length(epochs)
        self.first, self.max_skip, self.reduction, self.rule = Values(skip, wait), max_skip, reduction, rule
        self.plateau = plateau or Plateau()
        self.epoch = 0
        self._cycling: Values | None = None

    def set_length(self, epochs: int | None) -> None:
        """Spread the phases over this many epochs; None: nobody knows.

        Shares of all epochs, which count at least one each, give way where there are too few epochs.

        Raises:
            ValueError: If numbers of epochs were given that do not fit.
        """
        self.epochs = epochs
        self.warmup, self.cooldown = _count(self.warmup_epochs, epochs), _count(self.cooldown_epochs, epochs)
        if epochs is None or self.warmup + self.cooldown <= epochs:
            return
        given = [count for count in (self.warmup_epochs, self.cooldown_epochs) if count >= 1]
        if sum(given) > epochs and not self.short:
            raise ValueError(
                f"strategy.warmup_epochs={self.warmup_epochs} and strategy.cooldown_epochs={self.cooldown_epochs} are "
                f"{self.warmup} + {self.cooldown} epochs, trainer.max_epochs={epochs}: lower them (shares such as 0.1 "
                "fit any length), or train longer"
            )
        if self.cooldown_epochs >= 1 > self.warmup_epochs:
            self.cooldown = min(self.cooldown, epochs)
            self.warmup = epochs - self.cooldown
        else:
            self.warmup = min(self.warmup, epochs)
            self.cooldown = epochs - self.warmup

    @property
    def cycles(self) -> bool:
        """Whether any epoch is left between warm-up and cool-down."""
        return self.epochs is None or self.warmup + self.cooldown < self.epochs

    @property
    def phase(self) -> Literal["warmup", "cycling", "cooldown"]:
        """Of the running epoch."""
        if self.epoch < self.warmup:
            return "warmup"
        if self.epochs is not None and self.epoch >= self.epochs - self.cooldown:
            return "cooldown"
        return "cycling"

    @property
    def values(self) -> Values:
        """Of the running epoch."""
        return (self._cycling or self.first) if self.phase == "cycling" else BLOCKING

    def end_epoch(self, loss: float) -> None:
        """Go on to the next epoch, given the mean training loss of all ranks in this one.

        A loss that is not finite counts as no improvement.
        """
        fired = self.plateau.update(loss if math.isfinite(loss) else math.inf)
        was_cycling = self.phase == "cycling"
        self.epoch += 1
        if self.phase != "cycling":
            return
        if not was_cycling:
            self._cycling = self.first
        elif fired and self.rule != "fixed":
            self._cycling = self._next(self._cycling or self.first)

    def _next(self, values: Values) -> Values:
        if values.skip <= 1:
            quarter = max(1, self.max_skip // 4)
            return Values(self.max_skip, quarter, quarter)
        wait = values.wait - 1 if self.rule == "code" else values.wait // self.reduction
        return Values(max(1, values.skip // self.reduction), max(1, wait), max(1, values.local_skip // self.reduction))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        cycling = self._cycling
        return {
            "epoch": self.epoch,
            "cycling": None if cycling is None else [cycling.skip, cycling.wait, cycling.local_skip],
            "best": self.plateau.best,
            "bad": self.plateau.bad,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.epoch = state["epoch"]
        self._cycling = None if state["cycling"] is None else Values(*state["cycling"])
        self.plateau.best, self.plateau.bad = state["best"], state["bad"]


def check(
    warmup_epochs: float, cooldown_epochs: float, skip: int, wait: int, max_skip: int, reduction: int, rule: str
) -> None:
    """Raise ValueError for values that can never work, whatever the training."""
    for name, value in (("warmup_epochs", warmup_epochs), ("cooldown_epochs", cooldown_epochs)):
        if value < 0 or (value > 1 and value != int(value)):
            raise ValueError(f"strategy.{name}={value}: give a number of epochs, or a fraction of all between 0 and 1")
    if warmup_epochs < 1 and cooldown_epochs < 1 and warmup_epochs + cooldown_epochs > 1:
        raise ValueError(
            f"strategy.warmup_epochs={warmup_epochs} and strategy.cooldown_epochs={cooldown_epochs} are more than all "
            "epochs together: lower them"
        )
    if skip < 1:
        raise ValueError(f"strategy.skip={skip}: it counts steps between two exchanges, 1 or more")
    if not 0 <= wait <= skip:
        raise ValueError(
            f"strategy.wait={wait} is not between 0 and strategy.skip={skip}: "
            "an exchange must end before the next begins"
        )
    if max_skip < 1:
        raise ValueError(f"strategy.max_skip={max_skip}: it counts steps between two exchanges, 1 or more")
    if reduction < 2:
        raise ValueError(f"strategy.reduction={reduction}: a divisor is 2 or more")
    if rule not in ("paper", "code", "fixed"):
        raise ValueError(f"strategy.schedule={rule!r}: choose paper, code or fixed")


def _count(epochs: float, of: int | None) -> int:
    """A number of epochs, or that share of all where it is below 1 (1 is one epoch)."""
    if epochs >= 1 or epochs == 0:
        return int(epochs)
    if of is None:
        raise ValueError(
            f"strategy.warmup_epochs or cooldown_epochs={epochs} is a share of trainer.max_epochs, which is not set"
        )
    return max(1, round(epochs * of))
