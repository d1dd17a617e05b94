"""Figures of classifiers that say how sure they are: pure functions ``(outputs, datamodule) -> Figure``.

For `FiguresCallback`. ``outputs`` are the joined step outputs of a classifier: ``probability`` (item, class) and
``target`` (item,), and of images that it cannot know (``data.ood``) ``unknown_probability``. A role has the same colour
in every figure, and pyplot is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from callbacks.figures.axes import make_figure, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Outputs = dict[str, Tensor]

KNOWN, UNKNOWN, WRONG, MUTED = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"


def reliability_diagram(outputs: Outputs, datamodule: Any, *, num_bins: int = 15) -> Figure:
    """Accuracy over confidence in bins of equal width, and below how many images there are in each.

    Whiskers are 68 % intervals of the accuracy. The title has the expected calibration error over these bins, weighted
    by images, and the mean over the bins that hold an image.

    Args:
        outputs: Joined step outputs.
        datamodule: Not used.
        num_bins: Bins of the confidence, the largest probability.
    """
    probability = outputs["probability"].double().numpy()
    confidence = probability.max(1)
    right = probability.argmax(1) == outputs["target"].numpy()
    place = np.clip((confidence * num_bins).astype(int), 0, num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    seen = count > 0
    accuracy, mean = (
        np.bincount(place, weights=x, minlength=num_bins)[seen] / count[seen] for x in (right.astype(float), confidence)
    )
    gap = np.abs(accuracy - mean)
    figure, (above, below) = make_figure(4.8, 5.6, rows=2, heights=(3.4, 1))
    edges = np.arange(num_bins + 1) / num_bins
    width = 1 / num_bins
    left = edges[:-1][seen]
    above.bar(left, accuracy, width, align="edge", color=KNOWN, alpha=0.75, linewidth=0, label="accuracy")
    above.bar(
        left, mean - accuracy, width, bottom=accuracy, align="edge", facecolor="none", edgecolor=UNKNOWN, hatch="////",
        linewidth=0.8, label="gap to the mean confidence",
    )  # fmt: skip
    # Wilson's interval, which of one image does not say that all are right.
    middle = (accuracy + 0.5 / count[seen]) / (1 + 1 / count[seen])
    half = np.sqrt(accuracy * (1 - accuracy) / count[seen] + 0.25 / count[seen] ** 2) / (1 + 1 / count[seen])
    above.errorbar(left + width / 2, middle, yerr=half, fmt="none", color="black", linewidth=1.0, capsize=2)
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)), label="calibrated")
    above.set_ylim(0, 1)
    above.set_ylabel("accuracy")
    above.set_title(
        f"accuracy {right.mean():.3f}, mean confidence {confidence.mean():.3f}\n"
        f"ECE {(gap * count[seen]).sum() / count.sum():.3f}, mean over bins {gap.mean():.3f}",
        fontsize="medium",
    )
    below.bar(edges[:-1], count, width, align="edge", color=MUTED, edgecolor="white", linewidth=0.8)
    below.set_yscale("log")
    below.set_ylim(0.7, 2 * count.max())
    below.set_ylabel("images")
    below.set_xlabel("confidence")
    for axes in (above, below):
        axes.set_xlim(0, 1)
    figure.legend(
        *above.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    return figure


def entropy_histograms(outputs: Outputs, datamodule: Any, *, num_bins: int = 40) -> Figure:
    """Entropy of the predictions of known and unknown images, and the part of it that is due to the weights.

    The second panel, the mutual information of class and weights, is there where the outputs have it. The area under
    the ROC curve is the chance that an unknown image has the larger value.

    Args:
        outputs: Joined step outputs.
        datamodule: Not used.
        num_bins: Bins of each histogram.
    """
    measures = {"entropy of the prediction": [_entropy(outputs, ""), _entropy(outputs, "unknown_")]}
    if "mutual_information" in outputs:
        pair = [outputs.get(f"{prefix}mutual_information") for prefix in ("", "unknown_")]
        measures["mutual information of class and weights"] = [x if x is None else x.numpy() for x in pair]
    figure, panels = make_figure(4.4 * len(measures), 3.5, columns=len(measures))
    for axes, (name, (known, unknown)) in zip(panels, measures.items(), strict=True):
        found = [x for x in (known, unknown) if x is not None]
        # A handful of images with a large value must not squeeze all others into one bin.
        limit = max(np.quantile(np.concatenate(found), 0.995), 1e-12)
        power = 0 if limit > 0.05 else int(np.floor(np.log10(limit)))
        known, unknown = (x if x is None else x / 10.0**power for x in (known, unknown))
        limit /= 10.0**power
        edges = np.linspace(0, limit, num_bins + 1)
        groups = {"known": (known, KNOWN), "unknown": (unknown, UNKNOWN)}
        if unknown is None:
            wrong = outputs["probability"].argmax(1).numpy() != outputs["target"].numpy()
            groups = {"right": (known[~wrong], KNOWN), "wrong": (known[wrong], WRONG)}
        for label, (values, color) in groups.items():
            if not len(values):
                continue
            share = np.full(len(values), 100 / len(values))
            axes.hist(
                values.clip(max=limit), edges, weights=share, color=color, alpha=0.45, label=f"{label} ({len(values)})"
            )
            axes.hist(values.clip(max=limit), edges, weights=share, color=color, histtype="step", linewidth=1.2)
        first, second = (values for values, _ in groups.values())
        if len(first) and len(second):
            axes.set_title(f"area under ROC curve {_larger(first, second):.3f}", fontsize="medium")
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
        axes.set_xlim(0, limit)
        axes.set_xlabel(f"{name} [{'' if not power else f'$10^{{{power}}}$ '}nat]")
    panels[0].set_ylabel("images of the group [%]")
    panels[-1].legend(frameon=False, fontsize="small", loc="upper right")
    return figure


def _entropy(outputs: Outputs, prefix: str) -> np.ndarray | None:
    if f"{prefix}probability" not in outputs:
        return None
    p = outputs[f"{prefix}probability"].double().numpy()
    return -(p * np.log(p.clip(min=np.finfo(p.dtype).tiny))).sum(1)


def _larger(first: np.ndarray, second: np.ndarray) -> float:
    """Chance that a value of the second group is larger than one of the first; equal ones count a half."""
    first = np.sort(first)
    below = np.searchsorted(first, second, "left") + np.searchsorted(first, second, "right")
    return float(below.mean() / 2 / len(first))
