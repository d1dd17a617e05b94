"""Figures of the posterior of Bayesian layers: functions of what `callbacks.posterior` reads from a network.

A layer is a row, from input to output. A function gives None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from callbacks.figures.axes import MAX_LABELS, make_figure, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("sigma_histograms", "signal_to_noise")
SIGMA, SIGNAL, MUTED = "#0072B2", "#009E73", "#8C8C8C"


class LayerWeights(NamedTuple):
    """The weights of a layer that are alive, flat, without the bias.

    Attributes:
        mu: Means.
        sigma: Deviations.
        initial_sigma: Median of the deviations when the training began; None: not known.
    """

    mu: np.ndarray
    sigma: np.ndarray
    initial_sigma: float | None


def sigma_histograms(layers: Mapping[str, LayerWeights]) -> Figure | None:
    """Deviations of the weights of every layer, logarithmic; the dashed line is where they began."""
    alive = {name: layer for name, layer in layers.items() if len(layer.sigma)}
    if not alive:
        return None
    began = [layer.initial_sigma for layer in alive.values() if layer.initial_sigma]
    figure, axes = _rows({name: layer.sigma for name, layer in alive.items()}, SIGMA, began)
    for row, layer in enumerate(alive.values()):
        if layer.initial_sigma:
            label = "when training began" if row == 0 else None
            axes.vlines(layer.initial_sigma, row, row - 0.9, color="black", linestyle=(0, (3, 2)), label=label)
    axes.set_xlabel("standard deviation of a weight")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def signal_to_noise(layers: Mapping[str, LayerWeights]) -> Figure | None:
    """abs(mu) / sigma of the weights of every layer; at the right how many have less than one."""
    alive = {name: layer for name, layer in layers.items() if len(layer.sigma)}
    if not alive:
        return None
    ratios = {name: np.abs(layer.mu) / layer.sigma for name, layer in alive.items()}
    figure, axes = _rows(ratios, SIGNAL)
    axes.axvline(1.0, color="black", linestyle=(0, (3, 2)), linewidth=1.0, label="mean as large as deviation")
    if len(ratios) <= MAX_LABELS:
        right = axes.secondary_yaxis("right")
        noisy = [f"{100 * (values < 1).mean():.3g} %" for values in ratios.values()]
        right.set_yticks(np.arange(len(noisy)) - 0.3, noisy, fontsize="small")
        right.tick_params(length=0)
        right.set_ylabel("below one")
    axes.set_xlabel("abs(mean) / standard deviation of a weight")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def _rows(values: Mapping[str, np.ndarray], color: str, more: Sequence[float] = ()) -> tuple[Figure, Any]:
    """Histograms over a common logarithmic axis, each in a row of its own and as high as it, medians marked.

    Args:
        values: Numbers of each row.
        color: Of all rows.
        more: Numbers that the axis holds as well.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = make_figure(7.0, 1.2 + min(max(0.5 * len(values), 1.2), 9.0))
    positive = {name: x[x > 0] for name, x in values.items()}
    # The smallest of many means lie decades below the others.
    low = min([*(np.quantile(x, 0.002) for x in positive.values() if len(x)), *more])
    high = max([*(x.max() for x in positive.values() if len(x)), *more])
    margin = max((high / low) ** 0.05, 1.02)
    low, high = low / margin, high * margin
    edges = np.geomspace(low, high, 121)
    for row, x in enumerate(positive.values()):
        count = np.histogram(x.clip(low, high), edges)[0].astype(float)
        height = 0.9 * count / max(count.max(), 1.0)
        axes.stairs(row - height, edges, baseline=row, fill=True, color=color, alpha=0.55, linewidth=0)
        axes.stairs(row - height, edges, baseline=row, color=color, linewidth=0.8)
        if len(x):
            middle = np.median(x)
            axes.plot(middle, row, "^", color=color, markersize=5, clip_on=False, label="median" if row == 0 else None)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    if high / low < 1e3:
        plain_log_ticks(axes.xaxis)
    if high / low < 8:  # the numbers of a logarithmic axis would be one or two
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylim(len(values) - 0.85, -1.0)
    axes.grid(axis="y", visible=False)
    if len(values) <= MAX_LABELS:
        axes.set_yticks(np.arange(len(values)) - 0.3, list(values), fontsize="small")
    else:
        axes.set_yticks([])
        axes.set_ylabel("layer, the first above")
    axes.tick_params(axis="y", length=0)
    return figure, axes
