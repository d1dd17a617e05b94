"""Figures of weather forecasts: pure functions ``(outputs, datamodule) -> Figure`` for `FiguresCallback`.

``outputs`` are the joined step outputs of `lightning_modules.weather.WeatherMixerModule` in the test, ``datamodule``
one of `datamodules.weather`. Pyplot is not used, and a forecast has the same colour in every figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from callbacks.figures.axes import make_figure, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Outputs = dict[str, Tensor]

FORECASTS = ("model", "persistence", "climatology", "damped_persistence", "linear")
"""In the order of the second dimension of ``mse`` and ``acc``."""
COLORS = {
    "model": "#0072B2", "persistence": "#D55E00", "climatology": "#8C8C8C", "damped_persistence": "#CC79A7",
    "linear": "#009E73",
}  # fmt: skip
LABELS = {
    "model": "network", "persistence": "persistence", "climatology": "climatology",
    "damped_persistence": "damped persistence", "linear": "linear (EOFs)",
}  # fmt: skip
# What is drawn of many channels, in this order, where the data have them.
HEADLINE = ("z500", "t850", "msl", "t2m", "u10", "q850", "h", "u", "v", "zeta")
# Shown units: q in g/kg.
UNITS = {
    "z": "m²/s²", "t": "K", "msl": "Pa", "t2m": "K", "u10": "m/s", "v10": "m/s", "q": "g/kg", "h": "m", "u": "m/s",
    "v": "m/s", "zeta": "1e-5/s", "tp": "m",
}  # fmt: skip


def maps(outputs: Outputs, datamodule: Any, channel: str | None = None, leads: Sequence[int] = (0, 1, -1)) -> Figure:
    """The first forecast of the test: truth, forecast, and their difference, at three leads.

    Args:
        outputs: With ``map_truth`` and ``map_forecast``, (1, L, H, W, V).
        datamodule: Names channels, leads and places.
        channel: Which; None: a headline one.
        leads: Numbers of the leads.
    """
    name = channel or shown_channels(datamodule, 1)[0]
    at = datamodule.names.index(name)
    count = len(datamodule.leads_h)
    chosen = sorted({lead % count for lead in leads if -count <= lead < count})
    truth, forecast = (outputs[f"map_{kind}"][0, ..., at].numpy() for kind in ("truth", "forecast"))
    figure, panels = make_figure(10.0, 0.4 + 2.0 * len(chosen), rows=len(chosen), columns=3)
    low, high = np.percentile(truth[chosen], [0.5, 99.5])
    spread = float(np.percentile(np.abs(forecast - truth)[chosen], 99.5)) or 1.0
    factor = 1000.0 if datamodule.channels[at].variable == "q" else 1.0
    images = []
    for row, lead in enumerate(chosen):
        for column, (title, field) in enumerate(
            (("truth", truth[lead]), ("forecast", forecast[lead]), ("forecast - truth", (forecast - truth)[lead]))
        ):
            axes = panels[3 * row + column]
            axes.grid(visible=False)
            limits = {"cmap": "viridis", "vmin": factor * low, "vmax": factor * high}
            if column == 2:
                limits = {"cmap": "RdBu_r", "vmin": -factor * spread, "vmax": factor * spread}
            places = datamodule.longitudes, datamodule.latitudes
            images.append(axes.pcolormesh(*places, factor * field, shading="nearest", rasterized=True, **limits))
            axes.set_xticks([0, 90, 180, 270], ["0°", "90°E", "180°", "90°W"] if row == len(chosen) - 1 else [""] * 4)
            axes.set_yticks([-60, 0, 60], ["60°S", "0°", "60°N"] if column == 0 else [""] * 3)
            if row == 0:
                axes.set_title(title, fontsize="medium")
            if column == 0:
                axes.set_ylabel(_after(datamodule, lead))
    unit = _unit(datamodule, at)
    figure.colorbar(images[0], ax=[p for i, p in enumerate(panels) if i % 3 < 2], label=f"{name} [{unit}]", aspect=40)
    figure.colorbar(images[2], ax=[p for i, p in enumerate(panels) if i % 3 == 2], label=f"[{unit}]", aspect=40)
    return figure


def error_against_lead(outputs: Outputs, datamodule: Any, channels: Sequence[str] | None = None) -> Figure:
    """RMSE over lead of the network and of the baselines, a panel per channel.

    Args:
        outputs: With ``mse``, (B, F, L, V).
        datamodule: Names channels and leads.
        channels: Which; None: headline ones.
    """
    error = np.sqrt(outputs["mse"].numpy().mean(0))
    return _against_lead(error, datamodule, channels, lambda at: f"RMSE [{_unit(datamodule, at)}]", floor=True)


def correlation_against_lead(outputs: Outputs, datamodule: Any, channels: Sequence[str] | None = None) -> Figure:
    """Anomaly correlation over lead; a forecast is called useful above 0.6.

    Args:
        outputs: With ``acc``, (B, F, L, V).
        datamodule: Names channels and leads.
        channels: Which; None: headline ones.
    """
    correlation = outputs["acc"].numpy().mean(0)
    figure = _against_lead(correlation, datamodule, channels, lambda _: "anomaly correlation", floor=False)
    for axes in figure.axes:
        if axes.lines:
            axes.axhline(0.6, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
    return figure


def _against_lead(values: np.ndarray, datamodule: Any, channels: Any, label: Any, floor: bool) -> Figure:
    """Panels of (F, L, V) over lead."""
    names = list(channels) if channels else shown_channels(datamodule, 4)
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, panels = make_figure(4.2 * columns + 0.4, 2.9 * rows + 0.6, rows=rows, columns=columns)
    leads = np.array(datamodule.leads_h, dtype=float)
    for axes, name in zip(panels, names, strict=False):
        at = datamodule.names.index(name)
        for number, forecast in enumerate(FORECASTS[: len(values)]):
            if not floor and forecast == "climatology":  # it has no anomaly
                continue
            wide = {"linewidth": 2.2, "zorder": 3} if forecast == "model" else {"linewidth": 1.3}
            axes.plot(
                leads, values[number, :, at], color=COLORS[forecast], marker="o", markersize=3.5, **wide,
                label=LABELS[forecast],
            )  # fmt: skip
        axes.set_xticks(leads, [f"{lead:g}" for lead in leads])
        axes.set_xlim(left=0)
        if floor:
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylim(top=1.02)
        axes.set_title(name, fontsize="medium")
        axes.set_ylabel(label(at))
        axes.set_xlabel("lead [h]" if datamodule.step_h is not None else "lead [records]")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def spectra(outputs: Outputs, datamodule: Any, channels: Sequence[str] | None = None) -> Figure:
    """Zonal power spectra of forecasts at every lead, and of the truth: below it a forecast is too smooth.

    Args:
        outputs: With ``power``, (B, 2, L, V, M).
        datamodule: Names channels and leads.
        channels: Which; None: headline ones.
    """
    from matplotlib import colormaps

    power = outputs["power"].numpy().mean(0)
    names = list(channels) if channels else shown_channels(datamodule, 4)
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, panels = make_figure(4.2 * columns + 0.4, 2.9 * rows + 0.6, rows=rows, columns=columns)
    orders = np.arange(1, power.shape[-1])
    colors = colormaps["viridis"](np.linspace(0.85, 0.15, len(datamodule.leads_h)))
    for axes, name in zip(panels, names, strict=False):
        at = datamodule.names.index(name)
        truth = power[1, :, at, 1:].mean(0)
        for lead, color in enumerate(colors):
            label = f"forecast, {_after(datamodule, lead)}"
            axes.plot(orders, power[0, lead, at, 1:], color=color, linewidth=1.3, label=label)
        axes.plot(orders, truth, color="black", linewidth=1.6, linestyle=(0, (4, 2)), label="truth")
        axes.set_xscale("log")
        axes.set_yscale("log")
        visible = truth[truth > 1e-12 * truth.max()]
        axes.set_ylim(bottom=0.05 * visible.min(), top=3 * truth.max())
        plain_log_ticks(axes.xaxis)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("zonal wavenumber")
        axes.set_ylabel(f"power [({_unit(datamodule, at)})²]")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def shown_channels(datamodule: Any, most: int) -> list[str]:
    """Channels that figures show: headline ones first."""
    names = datamodule.names
    headline = [name for name in HEADLINE if name in names]
    return (headline + [name for name in names if name not in headline])[:most]


def _unit(datamodule: Any, at: int) -> str:
    return UNITS.get(datamodule.channels[at].variable, "?")


def _after(datamodule: Any, lead: int) -> str:
    """For instance ``24 h``."""
    value = datamodule.leads_h[lead]
    if datamodule.step_h is not None:
        return f"{value:g} h"
    return f"{value:g} record" + ("" if value == 1 else "s")
