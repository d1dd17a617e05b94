"""Counts what crosses from group to group, where groups are not nodes."""

from __future__ import annotations

from typing_extensions import override

from parallel.collectives import Interconnect
from parallel.groups import Group
from parallel.ledger import Ledger


class GroupedInterconnect(Interconnect):
    """An interconnect with a second ledger, `between`, in which the groups of AB-training take the place of nodes."""

    between: Ledger

    @override
    def book(self, operation: str, group: Group, payload: int, sharing: int = 1) -> float:
        self.between.record(operation, group.ranks, payload)
        return super().book(operation, group, payload, sharing)
