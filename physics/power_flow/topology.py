"""Which buses hang together, and which branches hold them together. Integers in, integers out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components

Ints = np.ndarray


def components(num_buses: int, from_bus: Ints, to_bus: Ints) -> Ints:
    """Number of the connected part of every bus, ``[n]``.

    Args:
        num_buses: ``n``.
        from_bus: Ends of the branches in service.
        to_bus: Their other ends.
    """
    return connected_components(_graph(num_buses, from_bus, to_bus), directed=False)[1]


def _graph(num_buses: int, from_bus: Ints, to_bus: Ints) -> coo_matrix:
    return coo_matrix((np.ones(len(from_bus)), (from_bus, to_bus)), shape=(num_buses, num_buses))


class Cuts(NamedTuple):
    """How branches hold the grid together, seen from its sources.

    A spanning tree grows from the sources. Every branch outside the tree gets a random label of 64 bits, every branch
    of the tree the exclusive or of those that span it: branches of label 0 are bridges, two branches of one label cut
    the grid together. Chance collisions have a probability below ``L^2 / 2^64``.

    Args:
        label: ``[L]`` uint64.
        size: Buses below a branch of the tree, 0 for other branches, ``[L]``.
        first: Place in depth-first order of the first bus below a branch of the tree, ``[L]``.
    """

    label: Ints
    size: Ints
    first: Ints

    @property
    def bridge(self) -> Ints:
        """Whether a branch alone cuts buses off, ``[L]`` bool."""
        return (self.label == 0) & (self.size > 0)

    def cut_off(self, one: Ints, two: Ints) -> Ints:
        """How many buses the outage of two branches cuts off, for pairs of different branches, ``[C]``."""
        size, bridge = self.size, self.bridge
        small, large = np.minimum(size[one], size[two]), np.maximum(size[one], size[two])
        outer, inner = np.where(size[one] >= size[two], (one, two), (two, one))
        start = self.first[outer]
        nested = (self.first[inner] >= start) & (self.first[inner] < start + size[outer])
        both = np.where(nested, large, small + large)
        alone = np.where(bridge[one], size[one], size[two])
        together = (self.label[one] == self.label[two]) & ~bridge[one]
        found = np.where(together, np.where(nested, large - small, small + large), 0)
        found = np.where(bridge[one] ^ bridge[two], alone, found)
        return np.where(bridge[one] & bridge[two], both, found)


def cuts(num_buses: int, from_bus: Ints, to_bus: Ints, sources: Ints, on: Ints | None = None, seed: int = 0) -> Cuts:
    """Which branches, and pairs of branches, hold buses to the sources. Parallel branches and loops are understood.

    Args:
        num_buses: ``n``.
        from_bus: Ends of all branches, ``[L]``.
        to_bus: Their other ends.
        sources: Buses that count as one, usually the slack buses; every bus in service is connected to them.
        on: Whether a branch is in service, ``[L]`` bool; None: all are. Others cut nothing: a label that no other has.
        seed: Of the labels.
    """
    count = len(from_bus)
    on = np.ones(count, dtype=bool) if on is None else on.astype(bool)
    root = int(sources[0])
    merged = np.arange(num_buses)
    merged[sources] = root
    f, t = merged[from_bus], merged[to_bus]
    used = on & (f != t)
    order, parent = breadth_first_order(_graph(num_buses, f[used], t[used]).tocsr(), root, directed=False)
    # The first branch between a bus and its parent is the branch of the tree.
    tree = np.full(num_buses, -1)
    for end, other in ((f, t), (t, f)):
        hits = np.flatnonzero(used & (parent[end] == other))
        tree[end[hits[::-1]]] = hits[::-1]
    of_tree = np.zeros(count, dtype=bool)
    of_tree[tree[tree >= 0]] = True

    label = np.random.default_rng(seed).integers(1, 2**64, size=count, dtype=np.uint64)
    outside = used & ~of_tree
    at_bus = np.zeros(num_buses, dtype=np.uint64)
    for end in (f, t):
        np.bitwise_xor.at(at_bus, end[outside], label[outside])
    size, below = np.ones(num_buses, dtype=np.int64), at_bus
    leaves_first = [(int(bus), int(parent[bus])) for bus in order[:0:-1]]
    for bus, above in leaves_first:
        below[above] ^= below[bus]
        size[above] += size[bus]
    first, following = np.zeros(num_buses, dtype=np.int64), np.zeros(num_buses, dtype=np.int64)
    following[root] = 1
    for bus, above in reversed(leaves_first):
        first[bus] = following[above]
        following[above] += size[bus]
        following[bus] = first[bus] + 1
    held = np.flatnonzero(tree >= 0)
    out_size, out_first = np.zeros(count, dtype=np.int64), np.full(count, -1)
    label[tree[held]], out_size[tree[held]], out_first[tree[held]] = below[held], size[held], first[held]
    return Cuts(label, out_size, out_first)
