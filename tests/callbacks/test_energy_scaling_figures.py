"""Figures of the scaling study: that curves are apart and texts can be read, for the published runs and for a sweep."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Annotation

from callbacks.figures import energy_scaling as plots
from datamodules.energy_records import PUBLISHED
from physics.energy_cost.analysis import analyse
from physics.energy_cost.records import read_runs, read_table
from tests.callbacks.test_energy_scaling import write_sweep

TEXTS = ("energy_and_hours", "energy_against_hours", "mean_power", "time_and_energy")


@pytest.fixture(scope="module", params=["published", "sweep", "seconds"])
def analysis(request, tmp_path_factory):
    """Of the published runs, of nine runs, and of four that took a second each: less than a decade, tiny numbers."""
    if request.param == "published":
        return analyse(read_table(PUBLISHED, repetitions=5), draws=0)
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(
        folder, "val/accuracy", **({} if request.param == "sweep" else {"counts": (1, 2), "batches": (64, 128)})
    )
    found = analyse(read_runs(folder)[0], draws=0)
    if request.param == "seconds":
        for row in found["rows"]:
            for key in ("energy_kwh", "device_hours", "hours"):
                row[key] /= 60
    return found


def shown(axis, low, high) -> list[float]:
    """Values of an axis that a number stands at."""
    labels = axis.get_majorticklabels()
    places = axis.get_majorticklocs()
    return [place for place, label in zip(places, labels, strict=True) if label.get_text() and low <= place <= high]


def boxes(figure) -> dict[str, object]:
    """Where the visible texts of a figure are, in pixels."""
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            if not axis.get_visible():  # a twin has that of the other
                continue
            in_view = shown(axis, low, high)
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            texts += [label for place, label in ticks if place in in_view]
            texts += [label for label in axis.get_minorticklabels() if label.get_text()]
    return {f"{i}: {t.get_text()}": t.get_window_extent() for i, t in enumerate(texts) if t.get_visible()}


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_lies_on_another(analysis, name):
    found = boxes(getattr(plots, name)(analysis))
    assert len(found) > 4
    assert [(a, b) for (a, one), (b, two) in combinations(found.items(), 2) if one.overlaps(two)] == []


def test_energy_and_hours_are_apart_on_axes_of_as_many_decades(analysis):
    figure = plots.energy_and_hours(analysis)
    figure.draw_without_rendering()
    panels = len(figure.axes) // 2
    assert panels == len({row["series"] for row in analysis["rows"]})
    for axes, twin in zip(figure.axes[:panels], figure.axes[panels:], strict=True):
        limits = [np.log10(a.get_ylim()) for a in (axes, twin)]
        assert np.ptp(limits[0]) == pytest.approx(np.ptp(limits[1]))
        energy, hours = (
            (np.log10(np.array(a.lines[0].get_ydata(), dtype=float)) - low) / (high - low)
            for a, (low, high) in zip((axes, twin), limits, strict=True)
        )
        assert (hours - energy).min() > 0.08
        assert min(energy.min(), hours.min()) > 0.02 and max(energy.max(), hours.max()) < 0.98
        for a in (axes, twin):
            numbers = shown(a.yaxis, *a.get_ylim())
            assert len(numbers) >= 2, a.get_ylim()
            assert {label.get_text() for label in a.yaxis.get_majorticklabels()} >= {f"{n:g}" for n in numbers}


def test_points_have_the_devices_of_their_run(analysis):
    """Whatever the order of the rows."""
    backwards = {**analysis, "rows": analysis["rows"][::-1]}
    rows = {}
    for row in analysis["rows"]:
        place = (3600e6 * row["hours"], 3.6e6 * row["energy_kwh"])
        rows.setdefault(str(row["devices"]), []).append([v / (row["num_samples"] * row["epochs"]) for v in place])
    figure = plots.time_and_energy(backwards)
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert len(labels) == len(analysis["rows"])
    for label in labels:
        assert any(label.xy == pytest.approx(place) for place in rows[label.get_text()]), label


def test_points_are_labelled_nearby(analysis):
    for name in ("mean_power", "time_and_energy"):
        figure = getattr(plots, name)(analysis)
        for axes in figure.axes:
            assert all(np.hypot(*label.get_position()) < 35 for label in axes.texts), name
