"""Figures of algorithms on split arrays: pure functions ``(outputs, datamodule) -> Figure`` for `FiguresCallback`.

``outputs`` are the joined step outputs of the modules of `lightning_modules.arrays`: an entry per row of the test, and
``history`` and ``fitted_...`` of the result. Pyplot is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from callbacks.figures.axes import make_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Outputs = dict[str, Tensor]

BLUE, ORANGE, GREEN, MUTED = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
_MOST_POINTS = 5000
_COLUMNS = {"iteration": 0, "objective": 1, "change": 2, "compute_s": 3, "communication_s": 4}


def convergence(outputs: Outputs, datamodule: Any) -> Figure:
    """Objective over iterations (left), and what an iteration took: computing and waiting for others (right)."""
    history = outputs["history"].numpy()
    iteration, objective = history[:, 0], history[:, 1]
    figure, (left, right) = make_figure(9.0, 3.6, columns=2)
    least = objective.min()
    shown = objective - least
    positive = shown > 0
    if positive.sum() > 1:
        left.semilogy(iteration[positive], shown[positive], marker="o", markersize=3.5, color=BLUE)
        left.set_ylabel(f"objective above its least value, {least:.6g}")
    else:
        left.plot(iteration, objective, marker="o", markersize=3.5, color=BLUE)
        left.set_ylabel("objective")
    compute, wait = 1e3 * history[:, 3], 1e3 * history[:, 4]
    right.bar(iteration, compute, color=BLUE, label="computing", width=0.8)
    right.bar(iteration, wait, bottom=compute, color=ORANGE, label="communication", width=0.8)
    right.set_ylabel("milliseconds of an iteration, first process")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("iteration")
        whole_numbers(axes.xaxis)
    return figure


def clusters(outputs: Outputs, datamodule: Any) -> Figure:
    """Rows in the plane of their first two columns, by cluster; centres where there are some."""
    plane, labels = outputs["plane"].numpy(), outputs["prediction"].numpy()
    step = max(len(plane) // _MOST_POINTS, 1)
    plane, labels = plane[::step], labels[::step]
    figure, (axes,) = make_figure(5.5, 4.6)
    axes.scatter(plane[:, 0], plane[:, 1], c=labels % 10, cmap="tab10", vmin=0, vmax=9, s=5, alpha=0.5, linewidths=0)
    if "fitted_centres" in outputs:
        centres = outputs["fitted_centres"].numpy()
        axes.scatter(centres[:, 0], centres[:, 1], marker="X", s=70, color="black", edgecolors="white", label="centre")
        axes.legend(frameon=False)
    axes.set_xlabel("column 0")
    axes.set_ylabel("column 1")
    axes.set_title(f"{len(np.unique(labels))} clusters, {len(plane)} of the test rows", fontsize="medium")
    return figure


def coefficients(outputs: Outputs, datamodule: Any) -> Figure:
    """Coefficients that were found, and the true ones where they are known."""
    weights = outputs["fitted_weights"].numpy()
    truth = getattr(datamodule.generator, "weights", None)
    figure, (axes,) = make_figure(8.0, 3.4)
    number = np.arange(len(weights))
    if truth is not None:
        axes.vlines(number, 0, truth, color=MUTED, linewidth=4, alpha=0.5, label="true")
    axes.plot(number, weights, marker="o", markersize=4, linestyle="none", color=BLUE, label="found")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("column")
    axes.set_ylabel("coefficient")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize="small")  # bars are everywhere
    return figure


def scree(outputs: Outputs, datamodule: Any) -> Figure:
    """Part of the variance in each component, and of all up to it."""
    part = outputs["fitted_explained"].numpy()
    figure, (axes,) = make_figure(6.0, 3.6)
    number = np.arange(1, len(part) + 1)
    axes.bar(number, part, color=BLUE, label="component")
    axes.plot(number, part.cumsum(), marker="o", color=ORANGE, label="all up to it")
    axes.set_xlabel("component")
    axes.set_ylabel("part of the variance")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)
    whole_numbers(axes.xaxis)
    return figure


def confusion(outputs: Outputs, datamodule: Any) -> Figure:
    """How many test rows of each class are taken for each."""
    true, found = outputs["target"].numpy(), outputs["prediction"].numpy()
    classes = np.unique(np.concatenate([true, found]))
    table = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(table, (np.searchsorted(classes, true), np.searchsorted(classes, found)), 1)
    figure, (axes,) = make_figure(4.8, 4.4)
    axes.grid(visible=False)
    axes.imshow(table, cmap="Blues")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            if value:
                color = "white" if value > table.max() / 2 else "black"
                axes.text(j, i, str(value), ha="center", va="center", color=color, fontsize="small")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("found")
    axes.set_ylabel("true")
    axes.set_title(f"{(true == found).mean():.1%} of {len(true)} rows", fontsize="medium")
    return figure


def statistics(outputs: Outputs, datamodule: Any) -> Figure:
    """Mean with deviation, skewness, and kurtosis of every column of the training rows."""
    mean, std = outputs["fitted_mean"].numpy(), outputs["fitted_std"].numpy()
    column = np.arange(len(mean))
    figure, (top, middle, bottom) = make_figure(7.0, 5.6, rows=3)
    top.vlines(
        column, outputs["fitted_min"].numpy(), outputs["fitted_max"].numpy(), color=MUTED, linewidth=1, label="range"
    )
    top.errorbar(column, mean, std, fmt="o", markersize=4, color=BLUE, capsize=2, label="mean, deviation")
    top.set_ylabel("value")
    top.legend(frameon=False, fontsize="small")
    middle.bar(column, outputs["fitted_skewness"].numpy(), color=ORANGE)
    middle.set_ylabel("skewness")
    bottom.bar(column, outputs["fitted_kurtosis"].numpy(), color=GREEN)
    bottom.set_ylabel("excess kurtosis")
    bottom.set_xlabel("column")
    return figure


def nearest_distances(outputs: Outputs, datamodule: Any) -> Figure:
    """Distribution of the distance to the nearest row: training rows among each other, and test rows to them."""
    among = outputs["fitted_quantiles"].numpy()
    test = np.sort(outputs["prediction"].numpy()[:, 0])
    figure, (axes,) = make_figure(6.0, 3.8)
    axes.plot(among, np.linspace(0, 1, len(among)), color=BLUE, label="training rows to each other")
    axes.plot(test, (np.arange(len(test)) + 1) / len(test), color=ORANGE, linestyle=(0, (4, 2)),
              label="test rows to training rows")  # fmt: skip
    axes.set_xlim(left=0, right=np.quantile(test, 0.995) * 1.1)
    axes.set_xlabel("distance to the nearest row")
    axes.set_ylabel("part of the rows")
    axes.legend(frameon=False)
    return figure


def eigenvalues(outputs: Outputs, datamodule: Any) -> Figure:
    """Eigenvalues of the step in the complex plane, with those of the waves where they are known."""
    found = outputs["fitted_eigenvalues"].numpy()
    figure, (axes,) = make_figure(4.8, 4.6)
    angle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angle), np.sin(angle), color=MUTED, linewidth=0.8)
    truth = getattr(datamodule.generator, "eigenvalues", None)
    if truth is not None:
        known = np.array([*truth, *np.conj(truth)])
        axes.plot(
            known.real, known.imag, "o", markersize=10, markerfacecolor="none", color=ORANGE, label="of the waves"
        )
    axes.plot(found[:, 0], found[:, 1], "x", color=BLUE, label="found")
    axes.set_aspect("equal")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    axes.legend(frameon=False, loc="center")
    return figure
