"""What figures share: their look, and heat maps of layers over time. Pyplot is not used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LABELS = 30
"""Layers whose names stand beside a map; of more there is no room for them."""


def make_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Any]]:
    """A figure of a size in inches with its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def map_height(count: int) -> float:
    """Height in inches of a map with that many layers."""
    return min(max(0.3 * count, 0.9), 6.0)


def heat_map(axes: Any, values: np.ndarray, centres: Sequence[float], labels: Sequence[str], **limits: float) -> Any:
    """A heat map with layers downwards and times, which may be unevenly spaced, to the right."""
    axes.grid(visible=False)
    edges = np.arange(len(labels) + 1) - 0.5
    image = axes.pcolormesh(cell_edges(centres), edges, values, cmap="viridis", rasterized=True, **limits)
    axes.invert_yaxis()
    if len(labels) <= MAX_LABELS:
        axes.set_yticks(range(len(labels)), labels, fontsize="small")
    else:
        axes.set_ylabel("layer")
    return image


def cell_edges(centres: Sequence[float]) -> np.ndarray:
    """Borders of cells that lie around their centres."""
    centres = np.asarray(centres, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def plain_log_ticks(axis: Any) -> None:
    """Numbers a person reads on a logarithmic axis, also where its range is less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    class Plain(LogLocator):
        """1, 2 and 5 in every decade; where fewer than three of them are seen, round numbers as on a linear axis."""

        def tick_values(self, vmin: float, vmax: float) -> Any:
            found = super().tick_values(vmin, vmax)
            low, high = min(vmin, vmax), max(vmin, vmax)
            if ((found >= low) & (found <= high)).sum() >= 3:
                return found
            return [value for value in MaxNLocator(5).tick_values(low, high) if value > 0]

    axis.set_major_locator(Plain(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers alone, as for epochs."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # two would be fractions around a single number
