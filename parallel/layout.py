"""Which ranks share a node, a link or a group: pure functions of sizes, testable without a single process.

Ranks are numbered node by node: rank ``r`` is process ``r % local_size`` of node ``r // local_size``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple


class Place(NamedTuple):
    """Where a rank lives."""

    node: int
    local: int


def place(rank: int, local_size: int) -> Place:
    """Node of a rank and its number within the node."""
    return Place(*divmod(rank, local_size))


def check_local_size(local_size: int, world_size: int, devices: str = "trainer.devices x trainer.num_nodes") -> None:
    """Raise ValueError unless the ranks fill whole nodes."""
    if local_size < 1:
        raise ValueError(f"cluster.local_size={local_size}: it counts the processes of a node, 1 or more")
    if world_size % local_size:
        fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"cluster.local_size={local_size} does not divide {devices} = {world_size}; "
            f"use one of {', '.join(map(str, fitting))}"
        )


def node_groups(world_size: int, local_size: int) -> list[list[int]]:
    """Ranks of every node: the groups with fast links."""
    return [list(range(first, first + local_size)) for first in range(0, world_size, local_size)]


def global_groups(world_size: int, local_size: int) -> list[list[int]]:
    """Ranks of equal number within their nodes, one of each node: ``local_size`` groups over the slow network.

    Source: DASO (Coquelin et al., 2022), section 2.
    """
    return [list(range(local, world_size, local_size)) for local in range(local_size)]


def crossings(ranks: Sequence[int], local_size: int) -> int:
    """Edges of the ring over ``ranks``, in their order, whose ends lie on different nodes; each way of a link is one.

    0: all links of the group are fast. A ring over whole nodes crosses once per node.
    """
    return _crossings(tuple(ranks), local_size)


@lru_cache(maxsize=4096)
def _crossings(ranks: tuple[int, ...], local_size: int) -> int:
    """Asked for every collective, with few answers."""
    if len(ranks) < 2:
        return 0
    nodes = [rank // local_size for rank in ranks]
    return sum(a != b for a, b in pairwise([*nodes, nodes[0]]))


def ring_bytes(operation: str, payload: int, size: int) -> float:
    """Bytes that each rank sends in a bandwidth-optimal algorithm, to its neighbour of the ring of ``size`` ranks.

    Args:
        operation: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast``, ``reduce``,
            ``gather``, ``scatter`` or ``send``.
        payload: Bytes of the whole vector: of the tensor for ``all_reduce``, ``broadcast`` and ``reduce``, of all
            gathered, scattered or exchanged parts together for the others.
        size: Ranks of the group.

    Returns:
        ``2 (p-1)/p`` of the payload for an all-reduce (Patarasuk and Yuan, 2009), ``(p-1)/p`` for the collectives that
        move every part once (an all-to-all sends its parts directly), the payload for a pipelined broadcast.

    Raises:
        ValueError: For an unknown operation.
    """
    if size < 2:
        return 0.0
    share = (size - 1) / size
    match operation:
        case "all_reduce":
            return 2 * share * payload
        case "all_gather" | "reduce_scatter" | "gather" | "scatter" | "all_to_all":
            return share * payload
        case "broadcast" | "reduce" | "send":
            return float(payload)
    raise ValueError(f"unknown collective {operation!r}")


def ring_steps(operation: str, size: int) -> int:
    """Rounds of messages of that algorithm, each of which waits for the latency of a link once."""
    if size < 2:
        return 0
    return 2 * (size - 1) if operation == "all_reduce" else size - 1
