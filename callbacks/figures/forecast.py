"""Figures of forecasts: pure functions ``(outputs, datamodule) -> Figure`` for `FiguresCallback`, and of result tables.

``outputs`` are the joined step outputs of a `Forecaster` in the data's units. All figures are made of
`matplotlib.figure.Figure` objects: no pyplot, no global state, any thread. Colours are those of Okabe and Ito, which
readers with any colour vision can tell apart; a role has the same colour in every figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Outputs = dict[str, Tensor]

TRUTH, FORECAST, PROFILE, HIGHLIGHT, MUTED = "#000000", "#0072B2", "#E69F00", "#D55E00", "#8C8C8C"
_PALETTE = (FORECAST, HIGHLIGHT, "#009E73", PROFILE, "#CC79A7", "#56B4E9", TRUTH)
_MARKERS = "osD^vP*Xp"  # nine and seven have no common divisor: 63 models look different
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


# ------------------------------------------------------------------------------------------------------ time courses


def forecast_week(outputs: Outputs, datamodule: Any, *, channel: int = 0, window: int | None = None) -> Figure:
    """Truth, forecast and profile of one window.

    Args:
        outputs: Joined step outputs.
        datamodule: Gives time axis, names and unit.
        channel: Series to draw.
        window: Position of the window; None takes the one with the median error: neither luck nor mishap.
    """
    window = _typical_window(outputs, channel) if window is None else window
    times = _times(outputs, datamodule, window)
    truth, point, profile = _course(outputs, window, channel)
    figure, axes = _figure(7.5, 3.2)
    axes.plot(times, profile, color=PROFILE, linestyle=(0, (4, 2)), linewidth=1.4, label="profile (RHP)")
    axes.plot(times, truth, color=TRUTH, linewidth=1.4, label="truth")
    axes.plot(times, point, color=FORECAST, linewidth=1.6, label="forecast")
    mae, mae_profile = np.abs(truth - point).mean(), np.abs(truth - profile).mean()
    axes.set_title(
        f"{_series(datamodule, channel)}, from {times[0]:%d %B %Y}:  MAE {_number(mae)}, profile {_number(mae_profile)}"
        f"{_unit_suffix(datamodule)}"
    )
    axes.set_ylabel(_quantity(datamodule, channel))
    _date_axis(axes, times, datamodule)
    _shade_holidays(axes, outputs, times, window, channel)
    _legend_below(figure, axes)
    return figure


def quantile_fan(outputs: Outputs, datamodule: Any, *, channel: int = 0, window: int | None = None) -> Figure:
    """Central intervals of a quantile forecast around its median, and the truth."""
    levels = _levels(outputs)
    window = _typical_window(outputs, channel) if window is None else window
    times = _times(outputs, datamodule, window)
    truth, point, _ = _course(outputs, window, channel)
    quantiles = outputs["prediction"][window, :, channel].double().numpy()
    figure, axes = _figure(7.5, 3.2)
    pairs = _pairs(levels)
    for depth, (lower, upper) in enumerate(pairs):
        shade = 0.18 + 0.42 * depth / max(len(pairs) - 1, 1)
        axes.fill_between(
            times,
            quantiles[:, lower],
            quantiles[:, upper],
            color=FORECAST,
            alpha=shade,
            linewidth=0,
            label=f"{100 * (levels[upper] - levels[lower]):.3g} % interval",
        )
    axes.plot(times, point, color="white", linewidth=2.6)
    axes.plot(times, point, color=FORECAST, linewidth=1.4, label="median" if 0.5 in levels.round(6) else "forecast")
    axes.plot(times, truth, color=TRUTH, linewidth=1.2, label="truth")
    axes.set_title(f"{_series(datamodule, channel)}, from {times[0]:%d %B %Y}")
    axes.set_ylabel(_quantity(datamodule, channel))
    _date_axis(axes, times, datamodule)
    _legend_below(figure, axes)
    return figure


def interval_fan(outputs: Outputs, datamodule: Any, *, channel: int = 0, window: int | None = None) -> Figure:
    """Central intervals of a forecast by samples (``lower_<percent>``, ``upper_<percent>``) around its mean.

    The title has the coverage of each interval over all windows.
    """
    percents = sorted((int(key.removeprefix("lower_")) for key in outputs if key.startswith("lower_")), reverse=True)
    if not percents:
        raise ValueError("the outputs have no lower_<percent>: a module of lightning_modules.bayes gives them.")
    window = _typical_window(outputs, channel) if window is None else window
    times = _times(outputs, datamodule, window)
    truth, point, _ = _course(outputs, window, channel)
    figure, axes = _figure(7.5, 3.2)
    covered = []
    for depth, percent in enumerate(percents):
        lower, upper = (outputs[f"{side}_{percent}"] for side in ("lower", "upper"))
        inside = ((outputs["target"] >= lower) & (outputs["target"] <= upper)).double().numpy()
        missing = np.broadcast_to(~outputs["valid"].numpy()[:, None], inside.shape)
        covered.append(f"{percent} %: {100 * np.ma.masked_array(inside, missing)[..., channel].mean():.0f} %")
        axes.fill_between(
            times,
            lower[window, :, channel].double().numpy(),
            upper[window, :, channel].double().numpy(),
            color=FORECAST,
            alpha=0.2 + 0.3 * depth / max(len(percents) - 1, 1),
            linewidth=0,
            label=f"{percent} % interval",
        )
    axes.plot(times, point, color="white", linewidth=2.6)
    axes.plot(times, point, color=FORECAST, linewidth=1.4, label="mean")
    axes.plot(times, truth, color=TRUTH, linewidth=1.2, label="truth")
    axes.set_title(
        f"{_series(datamodule, channel)}, from {times[0]:%d %B %Y}; inside, all windows: {', '.join(covered)}",
        fontsize="medium",
    )
    axes.set_ylabel(_quantity(datamodule, channel))
    _date_axis(axes, times, datamodule)
    _legend_below(figure, axes)
    return figure


def holiday_residual(outputs: Outputs, datamodule: Any, *, channel: int = 0) -> Figure:
    """What the network adds to the profile, and what it should add, in the window with the clearest public holiday.

    Raises:
        ValueError: If no window of the outputs has a holiday.
    """
    holiday = outputs["target_holiday"][..., channel] & outputs["valid"][:, None, channel]
    # The holiday in the middle of the window shows the return to normal as well as the day itself.
    position = np.arange(holiday.shape[1]) - (holiday.shape[1] - 1) / 2
    score = holiday.double().numpy() @ np.exp(-((position / (0.25 * holiday.shape[1])) ** 2))
    if not score.any():
        raise ValueError("there is no public holiday in the windows at hand (max_batches: null takes all of them).")
    window = int(score.argmax())
    times = _times(outputs, datamodule, window)
    truth, point, profile = _course(outputs, window, channel)
    figure, (upper, lower) = _figure(7.5, 4.6, rows=2, sharex=True)
    upper.plot(times, profile, color=PROFILE, linestyle=(0, (4, 2)), linewidth=1.4, label="profile (RHP)")
    upper.plot(times, truth, color=TRUTH, linewidth=1.4, label="truth")
    upper.plot(times, point, color=FORECAST, linewidth=1.6, label="forecast")
    upper.set_ylabel(_quantity(datamodule, channel))
    upper.set_title(f"{_series(datamodule, channel)}, from {times[0]:%d %B %Y}")
    lower.axhline(0, color=MUTED, linewidth=0.8)
    lower.plot(times, truth - profile, color=TRUTH, linewidth=1.4, label="_truth")
    lower.plot(times, point - profile, color=FORECAST, linewidth=1.6, label="_forecast")
    lower.set_ylabel(f"deviation from\nprofile{_bracketed(datamodule)}")
    for axes in (upper, lower):
        _shade_holidays(axes, outputs, times, window, channel)
    _date_axis(lower, times, datamodule)
    _legend_below(figure, upper)
    return figure


# ------------------------------------------------------------------------------------------------------ mean errors


def error_by_lead(outputs: Outputs, datamodule: Any, *, channel: int | None = None) -> Figure:
    """Mean absolute error against the lead time, of the forecast and of the profile.

    Args:
        outputs: Joined step outputs.
        datamodule: Gives cycle length, step and unit.
        channel: Series to draw; None averages over all of them.
    """
    days = (np.arange(outputs["target"].shape[1]) + 0.5) / datamodule.cycle_length
    figure, axes = _figure(6.0, 3.4)
    for key, name, color in (("profile", "profile (RHP)", PROFILE), ("prediction", "forecast", FORECAST)):
        error = _masked_error(outputs, key, channel).mean((0, 2))
        axes.plot(days, error, color=color, alpha=0.35, linewidth=0.9)
        # The daily means carry the message; single steps mostly show the hour of the day.
        edges = np.arange(0, len(error), datamodule.cycle_length)
        ends = np.append(edges[1:], len(error))
        means = [error[a:b].mean() for a, b in zip(edges, ends, strict=True)]
        label = f"{name}, mean {_number(error.mean())}"
        axes.hlines(means, edges / datamodule.cycle_length, ends / datamodule.cycle_length, color=color, linewidth=2.2)
        axes.plot([], [], color=color, linewidth=2.2, label=label)
    axes.set_xlim(0, len(error) / datamodule.cycle_length)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("lead time [days]; thick: mean of the lead day")
    axes.set_ylabel(f"mean absolute error{_bracketed(datamodule)}")
    axes.set_title(_scope(outputs, datamodule, channel))
    _legend_below(figure, axes)
    return figure


def error_by_hour_of_week(
    outputs: Outputs, datamodule: Any, *, channel: int | None = None, relative: bool = False
) -> Figure:
    """Heat map of the mean absolute error, days of the week x steps of the day.

    Args:
        outputs: Joined step outputs.
        datamodule: Gives time axis and unit.
        channel: Series to draw; None averages over all of them.
        relative: Draw the difference to the profile's error instead, on a diverging scale: blue where the forecast is
            better.
    """
    error = _masked_error(outputs, "prediction", channel)
    if relative:
        error = error - _masked_error(outputs, "profile", channel)
    error = error.mean(2).filled(np.nan)
    per_day = datamodule.cycle_length
    total, count = np.zeros((7, per_day)), np.zeros((7, per_day))
    for window in range(len(error)):
        times = _times(outputs, datamodule, window)
        seconds = times.hour * 3600 + times.minute * 60 + times.second
        column = (seconds * per_day // 86400).to_numpy()
        seen = ~np.isnan(error[window])
        np.add.at(total, (times.day_of_week.to_numpy()[seen], column[seen]), error[window][seen])
        np.add.at(count, (times.day_of_week.to_numpy()[seen], column[seen]), 1)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    figure, axes = _figure(7.5, 3.0, grid=False)
    limit = np.nanmax(np.abs(mean)) or 1.0
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if relative else {"cmap": "cividis", "vmin": 0}
    image = axes.imshow(mean, aspect="auto", extent=(0, 24, 7, 0), interpolation="nearest", **scale)
    axes.set_yticks(np.arange(7) + 0.5, _DAYS)
    axes.set_xticks(range(0, 25, 3))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("hour of the day")
    axes.set_title(_scope(outputs, datamodule, channel))
    name = "MAE minus\nthat of the profile" if relative else "mean absolute error"
    figure.colorbar(image, ax=axes, label=f"{name}{_bracketed(datamodule)}", pad=0.02)
    return figure


def reliability_diagram(outputs: Outputs, datamodule: Any, *, channel: int | None = None) -> Figure:
    """Observed against nominal frequency of values below each quantile; on the diagonal the forecast is calibrated.

    The band holds the middle 90 % of what resampled windows give: values within a window depend on each other, so
    that windows, not values, are drawn.
    """
    levels = _levels(outputs)
    below = (outputs["target"].unsqueeze(-1) <= outputs["prediction"]).double().numpy()
    missing = np.broadcast_to(~outputs["valid"].numpy()[:, None, :, None], below.shape)
    below = np.ma.masked_array(below, missing)
    if channel is not None:
        below = below[:, :, channel : channel + 1]
    hits, number = below.sum((1, 2)).filled(0), below.count((1, 2))
    observed = hits.sum(0) / number.sum(0)
    draws = np.random.default_rng(0).integers(len(hits), size=(500, len(hits)))
    low, high = np.quantile(hits[draws].sum(1) / number[draws].sum(1).clip(min=1), [0.05, 0.95], axis=0)
    figure, axes = _figure(4.4, 4.3)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)), label="calibrated")
    axes.fill_between(levels, low, high, color=FORECAST, alpha=0.2, linewidth=0, label="90 % of resampled windows")
    axes.plot(levels, observed, color=FORECAST, marker="o", markersize=5, linewidth=1.6, label="forecast")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("nominal level q")
    axes.set_ylabel("fraction of values below the q-quantile")
    axes.set_title(_scope(outputs, datamodule, channel))
    axes.legend(frameon=False, loc="upper left")
    return figure


# ---------------------------------------------------------------------------------------------------- result tables


def profile_depth(
    table: pd.DataFrame, *, depth: str = "depth", error: str = "mae_scaled", by: str | None = None
) -> Figure:
    """Error of the recent historic profile against its depth k, the lowest marked.

    Args:
        table: One row per depth (and group).
        depth: Column of k.
        error: Column of the error; also labels the axis.
        by: Column that separates the curves, e.g. the data set; None draws one.
    """
    figure, axes = _figure(5.4, 3.6)
    groups = [(None, table)] if by is None else list(table.groupby(by, sort=False))
    for i, (name, rows) in enumerate(groups):
        rows = rows.sort_values(depth)
        color = _PALETTE[i % len(_PALETTE)]
        axes.plot(rows[depth], rows[error], color=color, marker=".", markersize=7, linewidth=1.4, label=name)
        best = rows.loc[rows[error].idxmin()]
        axes.plot(best[depth], best[error], "o", markersize=10, markerfacecolor="none", markeredgecolor=color)
    axes.plot([], [], "o", markersize=10, markerfacecolor="none", markeredgecolor=MUTED, label="lowest")
    axes.set_xlabel("profile depth k [days of the same type]")
    axes.set_ylabel(_readable(error))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.12)
    _legend_below(figure, axes)
    return figure


def pareto(
    table: pd.DataFrame,
    *,
    cost: str = "energy_j",
    error: str = "mae_scaled",
    name: str = "model",
    log_cost: bool = True,
) -> Figure:
    """Error against cost of several models; the line joins those that no other one beats in both.

    Args:
        table: One row per model (rows of one name, e.g. seeds, are averaged; whiskers span their range).
        cost: Column of the cost.
        error: Column of the error.
        name: Column of the model's name.
        log_cost: Whether the cost axis is logarithmic.
    """
    groups = table.groupby(name, sort=False)[[cost, error]]
    mean, low, high = groups.mean(), groups.min(), groups.max()
    if log_cost and (mean[cost] <= 0).any():
        raise ValueError(f"column {cost!r} has a cost of zero, which a logarithmic axis cannot show; log_cost=False.")
    figure, axes = _figure(6.4, 4.0)
    ordered = mean.sort_values([cost, error])
    best = ordered[error] <= ordered[error].cummin()
    best &= ~ordered[error].duplicated()
    front = ordered[best]
    axes.plot(front[cost], front[error], color=MUTED, linewidth=1.2, drawstyle="steps-post", zorder=1)
    for i, model in enumerate(mean.index):
        x, y = mean.loc[model, cost], mean.loc[model, error]
        spread = [[y - low.loc[model, error]], [high.loc[model, error] - y]]
        on_front = model in front.index
        axes.errorbar(
            x,
            y,
            yerr=spread,
            color=_PALETTE[i % len(_PALETTE)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=8,
            markerfacecolor=None if on_front else "white",
            linewidth=1.0,
            linestyle="none",
            label=str(model),
            zorder=2,
        )
    if log_cost:
        axes.set_xscale("log")
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(_readable(cost))
    axes.set_ylabel(_readable(error))
    axes.set_title("filled: not beaten in both; towards the lower left is better", fontsize="medium")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


# ------------------------------------------------------------------------------------------------------------ parts


def _figure(width: float, height: float, rows: int = 1, grid: bool = True, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure of inches with one axes, or an array of ``rows`` of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, **kwargs)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
        if grid:
            each.grid(color="#E5E5E5", linewidth=0.6)
            each.set_axisbelow(True)
    return figure, axes


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 6 else -(-len(labels) // 2)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small", columnspacing=1.4
    )


def _times(outputs: Outputs, datamodule: Any, window: int) -> pd.DatetimeIndex:
    """Local wall time of a window's forecast steps (matplotlib would convert aware times to UTC)."""
    times = datamodule.time_of(int(outputs["origin"][window]), outputs["profile"].shape[1])
    return times if times.tz is None else times.tz_localize(None)


def _date_axis(axes: Axes, times: pd.DatetimeIndex, datamodule: Any) -> None:
    from matplotlib.dates import AutoDateLocator, DateFormatter, DayLocator

    days = (times[-1] - times[0]).days + 1
    axes.xaxis.set_major_locator(DayLocator() if days <= 8 else AutoDateLocator(maxticks=8))
    axes.xaxis.set_major_formatter(DateFormatter("%a %d %b"))
    axes.tick_params(axis="x", labelsize="small")
    axes.set_xlim(times[0], times[-1] + datamodule.step)


def _shade_holidays(axes: Axes, outputs: Outputs, times: pd.DatetimeIndex, window: int, channel: int) -> None:
    holiday = outputs["target_holiday"][window, :, channel].numpy().astype(int)
    edges = np.flatnonzero(np.diff(holiday, prepend=0, append=0))
    step = times[1] - times[0]
    for i, (start, stop) in enumerate(edges.reshape(-1, 2)):
        label = "public holiday" if i == 0 else None
        axes.axvspan(times[start], times[stop - 1] + step, color=HIGHLIGHT, alpha=0.12, linewidth=0, label=label)


def _levels(outputs: Outputs) -> np.ndarray:
    if "quantiles" not in outputs:
        raise ValueError("this figure needs a quantile model (model.quantiles).")
    return outputs["quantiles"].double().numpy()


def _pairs(levels: np.ndarray) -> list[tuple[int, int]]:
    """Positions of q and 1 - q, widest interval first."""
    return [
        (i, j) for i, q in enumerate(levels) for j, p in enumerate(levels) if q < 0.5 - 1e-6 and abs(p + q - 1) < 1e-6
    ]


def _point(outputs: Outputs) -> Tensor:
    """Point forecast, (batch, time, channel)."""
    prediction = outputs["prediction"].double()
    if "quantiles" not in outputs:
        return prediction
    distance = np.abs(_levels(outputs) - 0.5).round(6)
    return prediction[..., len(distance) - 1 - int(distance[::-1].argmin())]  # the upper one of two


def _course(outputs: Outputs, window: int, channel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth (NaN where the series has a gap), forecast and profile of one window, each (time,)."""
    truth = outputs["target"][window, :, channel].double().numpy()
    if not outputs["valid"][window, channel]:
        truth = np.full_like(truth, np.nan)
    return truth, _point(outputs)[window, :, channel].numpy(), outputs["profile"][window, :, channel].double().numpy()


def _masked_error(outputs: Outputs, key: str, channel: int | None) -> np.ma.MaskedArray:
    """Absolute error of ``prediction`` or ``profile``, (batch, time, channel), invalid windows masked."""
    forecast = _point(outputs) if key == "prediction" else outputs[key].double()
    error = (forecast - outputs["target"].double()).abs().numpy()
    missing = np.broadcast_to(~outputs["valid"].numpy()[:, None, :], error.shape)
    error = np.ma.masked_array(error, missing)
    return error if channel is None else error[:, :, channel : channel + 1]


def _typical_window(outputs: Outputs, channel: int) -> int:
    """The window with the median error of those with a full horizon of truth."""
    error = _masked_error(outputs, "prediction", channel).mean((1, 2))
    candidates = np.flatnonzero(~np.ma.getmaskarray(error))
    if not len(candidates):
        raise ValueError(f"series {channel} has a gap in every window at hand.")
    order = candidates[np.argsort(error.data[candidates], kind="stable")]
    return int(order[len(order) // 2])


def _series(datamodule: Any, channel: int) -> str:
    return str(datamodule.channel_names[channel])


def _scope(outputs: Outputs, datamodule: Any, channel: int | None) -> str:
    names = datamodule.channel_names
    if channel is None and len(names) > 1:
        return f"{len(outputs['origin'])} windows, {len(names)} series"
    return f"{_series(datamodule, channel or 0)}, {len(outputs['origin'])} windows"


def _bracketed(datamodule: Any) -> str:
    return f" [{datamodule.unit}]" if datamodule.unit else ""


def _unit_suffix(datamodule: Any) -> str:
    return f" {datamodule.unit}" if datamodule.unit else ""


def _quantity(datamodule: Any, channel: int) -> str:
    return f"{_series(datamodule, channel)}{_bracketed(datamodule)}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _readable(column: str) -> str:
    """Axis label of a metric's name: ``energy_j`` -> ``energy [J]``."""
    units = {"j": "J", "wh": "Wh", "s": "s", "ms": "ms", "w": "W", "percent": "%", "bytes": "bytes", "flops": "FLOP"}
    stem, _, last = column.split("/")[-1].rpartition("_")
    if stem and last in units:
        return f"{stem.replace('_', ' ')} [{units[last]}]"
    known: Sequence[tuple[str, str]] = (
        ("mae", "MAE"),
        ("mse", "MSE"),
        ("rmse", "RMSE"),
        ("mase", "MASE"),
        ("rhp", "RHP"),
    )
    words = [dict(known).get(word, word) for word in column.split("/")[-1].split("_")]
    if words[-1] == "scaled":
        return f"{' '.join(words[:-1])} (scaled axis)"
    return " ".join(words)
