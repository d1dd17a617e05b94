"""The groups of AB-training: which ranks train together, and which factor; pure functions of sizes."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Member(NamedTuple):
    """Where a rank stands in the grid (factor, replica, member).

    Attributes:
        factor: 0: its group trains A, 1: it trains B.
        replica: Number of the group among those that train the same factor.
        member: Number of the rank within its group.
    """

    factor: int
    replica: int
    member: int

    @property
    def side(self) -> Literal["a", "b"]:
        """The factor that is trained."""
        return "ab"[self.factor]


class ABLayout(NamedTuple):
    """Independent groups of ranks: the first half trains A, the second half B.

    Attributes:
        num_groups: Even, or 1: then the one group trains B.
        group_size: Ranks of a group.
    """

    num_groups: int
    group_size: int

    def groups(self) -> list[list[int]]:
        """Ranks of every group."""
        return [list(range(q * self.group_size, (q + 1) * self.group_size)) for q in range(self.num_groups)]

    def member(self, rank: int) -> Member:
        """Place of a rank."""
        group, member = divmod(rank, self.group_size)
        if self.num_groups == 1:
            return Member(1, 0, member)
        return Member(*divmod(group, self.num_groups // 2), member)

    def num_ranks_on(self, side: Literal["a", "b"]) -> int:
        """Ranks that train this factor."""
        if self.num_groups == 1:
            return self.group_size if side == "b" else 0
        return self.num_groups // 2 * self.group_size


def ab_layout(world_size: int, local_size: int, group_size: int | None, grouped: bool = True) -> ABLayout:
    """Divide the ranks into groups.

    Args:
        world_size: Ranks.
        local_size: Ranks of a node.
        group_size: Ranks of a group; None: a node, or half of it where there is only one.
        grouped: Whether there are groups at all; else, and in a single process, all ranks train B together.

    Raises:
        ValueError: If the groups do not come out even; names the setting, its value and the remedy.
    """
    if not grouped or world_size == 1:
        return ABLayout(1, world_size)
    fitting = [size for size in range(1, world_size // 2 + 1) if world_size % (2 * size) == 0]
    remedy = (
        f"use one of {', '.join(map(str, fitting))}, or strategy.sync=only-b, which has no groups"
        if fitting
        else f"{world_size} processes make no even number of equal groups: change trainer.devices, or set "
        "strategy.sync=only-b, which has no groups"
    )
    if group_size is None:
        # A single node is divided, so that the strategy also works where nobody said what a node is.
        name, size = "cluster.local_size", local_size if local_size < world_size else max(1, world_size // 2)
    else:
        name, size = "strategy.group_size", group_size
    if size < 1:
        raise ValueError(f"{name}={size}: it counts the processes of a group, 1 or more")
    if world_size % size:
        raise ValueError(f"{name}={size} does not divide {world_size} processes into groups: {remedy}")
    if world_size // size == 1:
        raise ValueError(
            f"{name}={size} makes one group of all {world_size} processes; one must train A, another one B: {remedy}"
        )
    if world_size // size % 2:
        raise ValueError(
            f"{name}={size} makes {world_size // size} groups, an odd number; half of them train A: {remedy}"
        )
    return ABLayout(world_size // size, size)
