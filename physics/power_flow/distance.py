"""How far buses are from each other along branches."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra


def distances(
    num_buses: int, from_bus: np.ndarray, to_bus: np.ndarray, length: np.ndarray, sources: np.ndarray
) -> np.ndarray:
    """Length of the shortest path to the nearest source, ``[n]``; infinite where there is none.

    Args:
        num_buses: ``n``.
        from_bus: One end of the branches in service.
        to_bus: The other end.
        length: Of the branches, above 0; of parallel ones the shortest counts.
        sources: Buses of distance 0.
    """
    order = np.lexsort((length, to_bus, from_bus))
    f, t, z = from_bus[order], to_bus[order], length[order]
    first = np.ones(len(f), dtype=bool)
    first[1:] = (f[1:] != f[:-1]) | (t[1:] != t[:-1])
    graph = coo_matrix((z[first], (f[first], t[first])), shape=(num_buses, num_buses)).tocsr()
    return dijkstra(graph, directed=False, indices=sources, min_only=True)
