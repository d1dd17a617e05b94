"""pandapower nets as grids."""

from __future__ import annotations

from typing import Any

from physics.power_flow.grid import Grid


def from_pandapower(net: Any) -> Grid:
    """See `Grid.from_pandapower`."""
    raise NotImplementedError
