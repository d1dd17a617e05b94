"""The learning rate after a switch between phases: it restarts low and rises until it meets the scheduled one."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Rebound:
    """Limits the learning rates of optimizers for some steps after a switch.

    Step ``k = 0, 1, ...`` after it takes ``min(scheduled, start + k (rate at the switch - start) / steps)``. Schedulers
    see nothing of this: the limit holds during the step only.

    Source: Coquelin et al. (arXiv 2405.01067); the published program leaves out the start value in
    the sum, and adds the rates of all parameter groups.

    Args:
        steps: Length of the rise; 0: no limit.
        start: Rate of the first step.

    Attributes:
        used: Rates of the last step, by optimizer and parameter group.
    """

    def __init__(self, steps: int, start: float) -> None:
        if steps < 0:
            raise ValueError(f"strategy.rebound_steps={steps}: it counts optimizer steps, 0 or more")
        if start < 0:
            raise ValueError(f"strategy.rebound_lr={start}: a learning rate is 0 or more")
        self.steps, self.start = steps, start
        self.used: list[list[float]] = []
        self._switched_at: int | None = None
        self._rates: list[list[float]] = []
        self._scheduled: list[tuple[dict[str, Any], Any]] = []

    def switch(self, step: int, optimizers: list[Optimizer]) -> None:
        """Begin after the optimizer step ``step``, from the rates that are scheduled now."""
        self._switched_at = step
        self._rates = [[float(group["lr"]) for group in o.param_groups] for o in optimizers]

    def limit(self, step: int, optimizer: int, group: int) -> float:
        """Largest rate of the optimizer step that follows ``step`` earlier ones."""
        if self._switched_at is None or not 0 <= step - self._switched_at < self.steps:
            return float("inf")
        at_switch = self._rates[optimizer][group]
        return self.start + (step - self._switched_at) * (at_switch - self.start) / self.steps

    def apply(self, step: int, optimizers: list[Optimizer]) -> None:
        """Limit the rates until `restore`."""
        self._scheduled = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
        self.used = []
        for i, optimizer in enumerate(optimizers):
            self.used.append([])
            for j, group in enumerate(optimizer.param_groups):
                rate, limit = group["lr"], self.limit(step, i, j)
                if limit < float(rate):
                    group["lr"] = torch.full_like(rate, limit) if isinstance(rate, torch.Tensor) else limit
                self.used[-1].append(float(group["lr"]))

    def restore(self) -> None:
        """Put the scheduled rates back; again: without effect."""
        for group, rate in self._scheduled:
            group["lr"] = rate
        self._scheduled = []

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"switched_at": self._switched_at, "rates": self._rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self._switched_at, self._rates = state["switched_at"], state["rates"]
