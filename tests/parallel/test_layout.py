"""Groups and costs as pure functions of sizes."""

import pytest

from parallel.layout import (
    check_local_size,
    crossings,
    global_groups,
    node_groups,
    place,
    ring_bytes,
    ring_steps,
)


@pytest.mark.parametrize(("world", "local"), [(1, 1), (4, 2), (6, 3), (8, 1), (12, 4)])
def test_groups_are_two_partitions_that_meet_in_one_rank(world, local):
    nodes, across = node_groups(world, local), global_groups(world, local)
    for family in (nodes, across):
        assert sorted(rank for group in family for rank in group) == list(range(world))
    assert len(nodes) == world // local and len(across) == local
    for n, node in enumerate(nodes):
        for i, group in enumerate(across):
            (meeting,) = set(node) & set(group)
            assert place(meeting, local) == (n, i)


def test_rings_cross_once_per_node():
    assert crossings(range(4), 4) == 0
    assert crossings(range(4), 2) == 2
    assert crossings(range(12), 4) == 3
    assert crossings([1, 5, 9], 4) == 3
    assert crossings([3], 2) == 0
    assert crossings([0, 2, 1, 3], 2) == 4  # an order that goes back and forth costs more


def test_bytes_of_a_ring():
    assert ring_bytes("all_reduce", 100, 4) == 150
    assert ring_bytes("all_gather", 100, 4) == ring_bytes("reduce_scatter", 100, 4) == 75
    assert ring_bytes("broadcast", 100, 4) == 100
    assert ring_bytes("all_reduce", 100, 1) == 0
    assert ring_steps("all_reduce", 4) == 6 and ring_steps("all_gather", 4) == 3 and ring_steps("all_reduce", 1) == 0
    with pytest.raises(ValueError, match="unknown collective 'barrier'"):
        ring_bytes("barrier", 1, 2)


def test_nodes_must_be_whole():
    check_local_size(2, 8)
    with pytest.raises(ValueError, match=r"cluster\.local_size=3 does not divide .* = 8; use one of 1, 2, 4, 8"):
        check_local_size(3, 8)
    with pytest.raises(ValueError, match=r"cluster\.local_size=0"):
        check_local_size(0, 8)
