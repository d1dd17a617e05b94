"""Layouts turned into process groups. Every rank must call these functions in the same order with the same sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.layout import Place, global_groups, node_groups, place


@dataclass(frozen=True)
class Group:
    """A process group together with its ranks.

    Attributes:
        ranks: Global ranks in the order of the group.
        handle: What torch.distributed wants; None for a group of one rank that needs no communication.
    """

    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class ClusterGroups:
    """Nodes and what connects them.

    Attributes:
        world: All ranks.
        node: Ranks of this node.
        across: One rank of each node, those with this rank's number within the node.
        place: Of this rank.
    """

    world: Group
    node: Group
    across: Group
    place: Place

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return self.across.size


def make_group(families: Sequence[Sequence[int]], timeout: timedelta | None = None) -> Group:
    """Create one group per entry of ``families`` and return the one that holds this rank.

    Raises:
        ValueError: If this rank is in none of them.
    """
    rank, mine = dist.get_rank(), None
    for ranks in families:
        # All ranks take part in the creation of every group, also those outside of it.
        handle = None
        if len(ranks) == dist.get_world_size() and list(ranks) == list(range(len(ranks))):
            handle = dist.group.WORLD
        elif len(ranks) > 1:
            handle = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            mine = Group(tuple(ranks), handle)
    if mine is None:
        raise ValueError(f"rank {rank} is in none of the groups {list(map(list, families))}")
    return mine


def make_cluster_groups(local_size: int, timeout: timedelta | None = None) -> ClusterGroups:
    """The groups of a cluster of nodes with ``local_size`` ranks each."""
    world = dist.get_world_size()
    return ClusterGroups(
        world=make_group([range(world)], timeout),
        node=make_group(node_groups(world, local_size), timeout),
        across=make_group(global_groups(world, local_size), timeout),
        place=place(dist.get_rank(), local_size),
    )


def destroy(*groups: Group) -> None:
    """Destroy groups that `make_group` created; never the default one."""
    for group in groups:
        if group.handle is not None and group.handle is not dist.group.WORLD:
            dist.destroy_process_group(group.handle)
