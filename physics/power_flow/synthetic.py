"""Grids of any size from small ones: copies with ties, feeders attached to a transmission grid."""

from __future__ import annotations

from typing import Literal

from physics.power_flow.grid import Grid

Ties = Literal["no_connections", "total_random", "linear_random", "pairwise_random"]


def copies(
    grid: Grid, count: int, ties: Ties = "linear_random", y_tie: tuple[float, float] = (1.0, 10.0), seed: int = 0
) -> Grid:
    """``count`` copies of a grid in one, joined by random ties.

    Args:
        grid: What to copy.
        count: How often.
        ties: ``no_connections``; ``total_random``: 20 ``count`` ties between any two buses; ``linear_random``: 3
            between copies that follow each other; ``pairwise_random``: 3 between every two copies.
        y_tie: Range of the ties' admittance, per unit; the paper has real ones of 1.515e-5.
        seed: Of the choice of buses.
    """
    raise NotImplementedError


def attach(grid: Grid, feeders: list[tuple[Grid, str]], share: float = 1.0) -> Grid:
    """Attach feeders at PQ buses: a joint grid of transmission and distribution.

    Args:
        grid: Transmission.
        feeders: Distribution grids, each with the name of the bus that becomes its source.
        share: What loads and generation of the feeders are multiplied by.
    """
    raise NotImplementedError
