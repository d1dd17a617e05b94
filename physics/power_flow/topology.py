"""Which buses hang together: connected parts, and branches without which they would not. Integers in, integers out."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def components(num_buses: int, from_bus: np.ndarray, to_bus: np.ndarray) -> np.ndarray:
    """Number of the connected part of every bus, ``[n]``.

    Args:
        num_buses: ``n``.
        from_bus, to_bus: Ends of the branches in service.
    """
    graph = coo_matrix((np.ones(len(from_bus)), (from_bus, to_bus)), shape=(num_buses, num_buses))
    return connected_components(graph, directed=False)[1]


def bridges(num_buses: int, from_bus: np.ndarray, to_bus: np.ndarray) -> np.ndarray:
    """Which branches are bridges, without which their part falls in two, ``[L]`` bool.

    Parallel branches are no bridges, loops neither. Depth-first search without recursion (Tarjan, 1974): a branch of
    the tree is a bridge if nothing below it reaches above it otherwise.

    Args:
        num_buses: ``n``.
        from_bus, to_bus: Ends of the branches in service.
    """
    num_branches = len(from_bus)
    ends = np.concatenate([from_bus, to_bus])
    order = np.argsort(ends, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(ends, minlength=num_buses))]).tolist()
    other = np.concatenate([to_bus, from_bus])[order].tolist()
    branch = (order % max(num_branches, 1)).tolist()
    reached, lowest = [-1] * num_buses, [0] * num_buses
    following = start[:-1].copy()
    found = np.zeros(num_branches, dtype=bool)
    count = 0
    for root in range(num_buses):
        if reached[root] >= 0:
            continue
        reached[root] = lowest[root] = count
        count += 1
        path = [(root, -1)]
        while path:
            bus, entered = path[-1]
            if following[bus] < start[bus + 1]:
                edge = following[bus]
                following[bus] += 1
                to, number = other[edge], branch[edge]
                if number == entered or to == bus:
                    continue
                if reached[to] >= 0:
                    lowest[bus] = min(lowest[bus], reached[to])
                else:
                    reached[to] = lowest[to] = count
                    count += 1
                    path.append((to, number))
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[bus])
                    if lowest[bus] > reached[above]:
                        found[entered] = True
    return found
