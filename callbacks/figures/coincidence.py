"""Figures of coincidences: pure functions ``(outputs, datamodule) -> Figure`` for `FiguresCallback`.

``outputs`` are the joined step outputs of the modules of `lightning_modules.coincidence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import make_figure, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

Outputs = Mapping[str, "Tensor"]

COLOURS = {
    "snn": "#D55E00", "lor_snn": "#E69F00", "pair_scorer": "#D55E00", "competing_lines": "#E69F00",
    "scw_paper": "#8C8C8C", "scw_raw": "#4D4D4D",
    "scw_raw_geometry": "#000000", "scw": "#56B4E9", "scw_geometry": "#0072B2", "take_winner_of_goods": "#009E73",
}  # fmt: skip
FURTHER = ("#CC79A7", "#7B4EA3", "#B8860B", "#35978F", "#A6D854")
INK, MUTED, FOUND, MISSED, TRUE = "#333333", "#B0B0B0", "#D55E00", "#CC79A7", "#0072B2"


def colour(method: str) -> str:
    """A colour that a method has in all figures."""
    return COLOURS.get(method) or FURTHER[sum(method.encode()) % len(FURTHER)]


def label(method: str) -> str:
    """Short names for legends."""
    known = {
        "snn": "spiking network", "lor_snn": "lines of response", "pair_scorer": "pair scorer",
        "competing_lines": "competing lines",
        "scw_paper": "single window (paper)", "scw_raw": "single window, best", "scw_raw_geometry": "+ angle",
        "scw": "calibrated window", "scw_geometry": "calibrated + angle",
    }  # fmt: skip
    return known.get(method, "GATE " + method.replace("_", " "))


def spike_raster(outputs: Outputs, datamodule: Any, *, sample: int | None = None) -> Figure:
    """Hits, true coincidences and output spikes of one sample, crystals over time.

    Args:
        outputs: With ``hits``, ``target``, ``spikes`` and ``prediction``.
        datamodule: Knows the scanner.
        sample: Its number; None: of those with most coincidences, the first.
    """
    hits, target, spikes = (outputs[name].numpy() for name in ("hits", "target", "spikes"))
    if sample is None:
        sample = int(np.bincount(target[:, 0].astype(int)).argmax()) if len(target) else 0
    hits, target, spikes = (values[values[:, 0] == sample] for values in (hits, target, spikes))
    figure, (axes,) = make_figure(8.0, 4.2)
    for k, (_, a, b, step) in enumerate(target):
        axes.plot(
            [step, step], [a, b], color=TRUE, linewidth=1.0, alpha=0.5, label="true coincidence" if not k else None
        )
    axes.plot(hits[:, 2], hits[:, 1], linestyle="none", marker="|", markersize=9, color=INK, label="hit (input)")
    axes.plot(
        spikes[:, 2], spikes[:, 1], linestyle="none", marker="o", markersize=8, markerfacecolor="none",
        markeredgecolor=FOUND, label="output spike",
    )  # fmt: skip
    ends = np.concatenate([target[:, [1, 3]], target[:, [2, 3]]])
    axes.plot(ends[:, 1], ends[:, 0], linestyle="none", marker=".", markersize=4, color=TRUE, label="label")
    axes.set_xlabel("step")
    axes.set_ylabel("crystal")
    axes.set_ylim(-0.03 * datamodule.num_crystals, 1.03 * datamodule.num_crystals)
    axes.set_title(f"sample {sample} of the test part", fontsize="medium", loc="left")
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize="small")
    return figure


def time_residuals(outputs: Outputs, datamodule: Any) -> Figure:
    """Difference of the times of both hits of listed coincidences, as recorded and without delays.

    Args:
        outputs: With ``prediction`` and ``hits``.
        datamodule: Its delays, and the module that has listed the coincidences.
    """
    pairs, hits = outputs["prediction"].numpy(), outputs["hits"].numpy()
    gaps = _gaps(pairs, hits, datamodule.num_steps)
    a, b = pairs[:, 1].astype(int), pairs[:, 2].astype(int)
    skew = datamodule.delays[b] - datamodule.delays[a]
    aligned = datamodule.trainer.lightning_module.aligned
    same = pairs[:, 5] > 0
    figure, panels = make_figure(8.4, 3.6, columns=2)
    titles = ("recorded", "without delays")
    for axes, values, title in zip(panels, (gaps - aligned * skew, gaps + (1 - aligned) * skew), titles, strict=True):
        reach = max(3, int(np.abs(values).max(initial=0)))
        edges, centres = np.arange(-reach - 0.5, reach + 1), np.arange(-reach, reach + 1)
        counts = [np.histogram(values[mask], edges)[0] for mask in (same, ~same)]
        axes.bar(centres, counts[0], width=0.85, color=TRUE, label="one decay")
        axes.bar(centres, counts[1], width=0.85, bottom=counts[0], color=MISSED, label="accidental")
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_xlabel("hit in b less hit in a [steps]")
    panels[0].set_ylabel("listed coincidences")
    panels[1].legend(frameon=False, fontsize="small")
    return figure


def _gaps(pairs: np.ndarray, hits: np.ndarray, num_steps: int) -> np.ndarray:
    """Steps from the hit in a to that in b that lies nearest to the coincidence."""
    span = 4 * num_steps

    def nearest(crystal: np.ndarray) -> np.ndarray:
        crystals = 1 + int(hits[:, 1].max(initial=0))
        key = (hits[:, 0] * crystals + hits[:, 1]) * span + hits[:, 2] + num_steps
        order = np.argsort(key)
        wanted = (pairs[:, 0] * crystals + crystal) * span + pairs[:, 3] + num_steps
        right = np.clip(np.searchsorted(key[order], wanted), 0, len(key) - 1)
        left = np.maximum(right - 1, 0)
        nearer = np.abs(key[order][left] - wanted) <= np.abs(key[order][right] - wanted)
        return hits[order[np.where(nearer, left, right)], 2]

    if not len(pairs):
        return np.empty(0)
    return nearest(pairs[:, 2]) - nearest(pairs[:, 1])


def calibration_residuals(outputs: Outputs, datamodule: Any) -> Figure:
    """Delays of crystals as estimated over the true ones, and how often they differ by how much."""
    errors = datamodule.calibration_errors()
    if errors is None:
        raise ValueError("the true delays are not known")
    figure, (left, right) = make_figure(8.0, 3.6, columns=2)
    true = datamodule.true_delays
    spread = np.random.default_rng(0).uniform(-0.25, 0.25, (2, len(true)))
    left.plot(true + spread[0], true + errors + spread[1], ".", color=TRUE, markersize=3, alpha=0.6)
    left.plot([true.min(), true.max()], [true.min(), true.max()], color=INK, linewidth=0.8)
    left.set_xlabel("true delay [steps]")
    left.set_ylabel("delay that is taken off [steps]")
    reach = max(2, int(np.abs(errors).max()))
    right.hist(errors, np.arange(-reach - 0.5, reach + 1), color=TRUE, rwidth=0.85)
    right.set_yscale("log")
    right.set_ylim(bottom=0.5)
    right.set_xlabel("taken off less true [steps]")
    right.set_ylabel("crystals")
    right.set_title(f"{100 * (errors == 0).mean():.1f} % exact", fontsize="medium", loc="left")
    return figure


def speed_against_hits(outputs: Outputs, datamodule: Any) -> Figure:
    """Hits per second of every method over the number of hits that it gets at once."""
    rows = outputs["methods"].numpy()
    names = list(datamodule.trainer.lightning_module.test_pairs)
    figure, (axes,) = make_figure(7.2, 3.8)
    for number, name in enumerate(names):
        mine = rows[rows[:, 0] == number]
        axes.plot(
            mine[:, 1], mine[:, 1] / np.maximum(mine[:, 2], 1e-6), marker="o", markersize=4, color=colour(name),
            label=label(name),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes.xaxis)
    axes.set_xlabel("hits at once")
    axes.set_ylabel("hits per second")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def back_projection(outputs: Outputs, datamodule: Any, *, pixels: int = 96, most: int = 20000) -> Figure:
    """Lines of response drawn over each other across the axis: of true coincidences, and of the listed ones."""
    figure, panels = make_figure(8.0, 3.9, columns=2)
    centres = datamodule.layout.centres_mm()
    listed = outputs["prediction"].numpy()[:most, 1:3].astype(int)
    true = outputs["target"].numpy()[:most, 1:3].astype(int)
    radius = datamodule.layout.radius_mm
    for axes, pairs, title in zip(panels, (true, listed), ("true coincidences", "listed coincidences"), strict=True):
        axes.grid(visible=False)
        along = np.linspace(0, 1, 2 * pixels)[:, None]
        a, b = centres[pairs[:, 0]], centres[pairs[:, 1]]
        x = (a[:, 0] + along * (b[:, 0] - a[:, 0])).ravel()
        y = (a[:, 1] + along * (b[:, 1] - a[:, 1])).ravel()
        # Near the crystals all lines are: they would outshine the object.
        image, *_ = np.histogram2d(x, y, pixels, [[-0.8 * radius, 0.8 * radius]] * 2)
        axes.imshow(
            image.T, origin="lower", extent=[-0.8 * radius, 0.8 * radius] * 2, cmap="magma", interpolation="nearest"
        )
        axes.set_title(f"{len(pairs)} {title}", fontsize="medium", loc="left")
        axes.set_xlabel("x [mm]")
    panels[0].set_ylabel("y [mm]")
    return figure


def learned_geometry(outputs: Outputs, datamodule: Any) -> Figure:
    """What a crystal's neuron has learned to hear: weights by the distance around the ring, and along the axis.

    Of a network with a kernel, the kernel. Of a fully connected one the product of its layers' weights, the whole
    matrix turned so that a crystal's own place is in the middle, and its mean over crystals.
    """
    net, layout = datamodule.trainer.lightning_module.net, datamodule.layout
    n, rings = layout.crystals_per_ring, layout.num_rings
    offsets = np.arange(n) - n // 2
    if hasattr(net, "kernel"):
        kernel = np.roll(net.kernel.detach().cpu().numpy(), n // 2, axis=1)
        rows, mean, name = kernel, kernel[rings - 1], "rings to the hit"
        extent = [offsets[0] - 0.5, offsets[-1] + 0.5, rings - 0.5, -rings + 0.5]
    elif hasattr(net, "spiking") or hasattr(net, "lines"):
        product = _crystal_to_crystal(net)
        number = np.arange(net.num_crystals)
        ring = layout.ring(number)[:, None]
        rows = product[number[:, None], layout.crystal(ring, layout.position(number)[:, None] + offsets)]
        mean, name = rows.mean(0), "crystal"
        extent = [offsets[0] - 0.5, offsets[-1] + 0.5, net.num_crystals - 0.5, -0.5]
    else:
        raise ValueError("this network has no weights from crystals to crystals")
    figure, (top, bottom) = make_figure(7.2, 4.6, rows=2, heights=[1, 1.4])
    top.plot(offsets, mean, color=TRUE, linewidth=1.2)
    top.set_xlim(offsets[0] - 0.5, offsets[-1] + 0.5)
    top.set_ylabel("weight, same ring" if rings > 1 else "weight, mean" if name == "crystal" else "weight")
    bottom.grid(visible=False)
    limit = float(np.abs(rows).max()) or 1.0
    image = bottom.imshow(
        rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", extent=extent, interpolation="nearest"
    )
    figure.colorbar(image, ax=bottom, label="weight")
    bottom.set_ylabel(name if rings > 1 or name == "crystal" else "")
    if rings == 1 and name != "crystal":
        bottom.set_yticks([])
    bottom.set_xlabel("crystals around the ring from the neuron's own to the hit")
    return figure


def _crystal_to_crystal(net: Any) -> np.ndarray:
    """Weights between crystals: product of the layers, or those of the lines between them, (crystal, crystal)."""
    if hasattr(net, "lines"):
        product = np.zeros((net.num_crystals, net.num_crystals))
        for side in (0, 1):
            own, other = net.lines[:, side].cpu().numpy(), net.lines[:, 1 - side].cpu().numpy()
            product[own, other] = net.weight.detach().cpu().numpy()[:, 1 - side]
            product[own, own] = net.weight.detach().cpu().numpy()[:, side]
        return product
    weights = [layer.weight.detach().cpu().numpy() for layer in net.spiking.linear]
    product = weights[0][:, : net.num_crystals]
    for weight in weights[1:]:
        product = weight @ product
    return product


def f1_against_setting(points: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]) -> Figure | None:
    """F1 of every method over the one numerical setting that a sweep has varied, for instance the activity.

    Args:
        points: What differs in a job, and a row of its table, for each method.
    """
    varied = sorted({name for differing, _ in points for name in differing})
    if len(varied) != 1 or not all(_is_number(d[varied[0]]) for d, _ in points):
        return None
    name = varied[0]
    figure, (axes,) = make_figure(7.2, 3.9)
    for method in dict.fromkeys(row["method"] for _, row in points):
        mine = sorted((float(d[name]), row["f1"], row["f1_low"], row["f1_high"]) for d, row in points
                      if row["method"] == method)  # fmt: skip
        x, f1, low, high = np.array(mine).T
        axes.plot(x, f1, marker="o", markersize=4, color=colour(method), label=label(method))
        axes.fill_between(x, low, high, color=colour(method), alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("activity [Bq]" if name.endswith("activity_bq") else name)
    axes.set_ylabel("F1 of pairs of one decay")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
