"""A batch of scenarios in the order of the equations: voltages, scheduled powers, changes of branches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """Voltages of a batch in the order of an `Equations`: magnitude and angle ``[n, B]``, shared imbalance ``[1, B]``.

    ``share`` has no rows (``[0, B]``) if the slack is not distributed.
    """

    vm: Tensor
    va: Tensor
    share: Tensor

    def select(self, columns: Tensor) -> State:
        """Some scenarios, as a copy."""
        return State(*(value[:, columns] for value in self))

    def clone(self) -> State:
        """A copy."""
        return State(*(value.clone() for value in self))


class Changes(NamedTuple):
    """How branches of a scenario differ from those of the grid: ``K`` changes, ends and admittances ``[K, B]``."""

    branch: Tensor
    f: Tensor
    t: Tensor
    ff: Tensor
    ft: Tensor
    tf: Tensor
    tt: Tensor

    def select(self, columns: Tensor) -> Changes:
        """Some scenarios."""
        return Changes(*(value[:, columns] for value in self))


class Batch(NamedTuple):
    """What is given for a batch in the order of an `Equations`: scheduled powers ``[n, B]``, changes of branches."""

    p: Tensor
    q: Tensor
    changes: Changes | None = None

    def narrow(self, columns: slice) -> Batch:
        """Scenarios that follow each other, not copied."""
        changes = None if self.changes is None else Changes(*(value[:, columns] for value in self.changes))
        return Batch(self.p[:, columns], self.q[:, columns], changes)

    def select(self, columns: Tensor) -> Batch:
        """Some scenarios."""
        changes = None if self.changes is None else self.changes.select(columns)
        return Batch(self.p[:, columns], self.q[:, columns], changes)
