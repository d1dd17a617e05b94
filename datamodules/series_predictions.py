"""The table of what a forecaster predicts of series."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

TimeOf = Callable[[int, int], pd.DatetimeIndex]


def prediction_table(
    outputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], names: Sequence[str], time_of: TimeOf
) -> pd.DataFrame:
    """Tabulate step outputs, one row per origin, step and series.

    Args:
        outputs: Outputs of a test or predict step in the data's units, or a list of them: ``prediction``
            (batch, time, channel[, quantile]), ``profile`` (batch, time, channel), ``origin`` (batch,), and where
            present ``target``, ``valid``, ``quantiles``, and ``std``, ``lower_<percent>`` and ``upper_<percent>``
            (batch, time, channel) of forecasts that are samples.
        names: Of the series.
        time_of: Times of a number of steps from an origin on.

    Returns:
        Columns series, origin, timestamp, forecast, rhp, one per quantile (q10, q50, ...), std, lower_50, upper_50,
        ... where the module delivers them, and actual when the target is known (NaN where the series has a gap in
        that window).
    """
    frames = [
        _table_of_batch(batch, names, time_of) for batch in ([outputs] if isinstance(outputs, Mapping) else outputs)
    ]
    return pd.concat(frames, ignore_index=True)


def _table_of_batch(outputs: Mapping[str, Any], names: Sequence[str], time_of: TimeOf) -> pd.DataFrame:
    prediction = outputs["prediction"].detach().cpu().double()
    batch, horizon, channels = prediction.shape[:3]
    times = [time_of(origin, horizon) for origin in outputs["origin"].tolist()]
    columns: dict[str, Any] = {
        "series": np.tile(np.array(names, dtype=object), batch * horizon),
        "origin": np.repeat(np.array([stamps[0] for stamps in times], dtype="datetime64[ns]"), horizon * channels),
        "timestamp": np.repeat(np.concatenate([stamps.as_unit("ns").to_numpy() for stamps in times]), channels),
        "forecast": prediction,
        "rhp": outputs["profile"].detach().cpu().double(),
    }
    if prediction.ndim == 4:
        levels = outputs["quantiles"].detach().cpu().double()
        # The level next to the median is the point forecast, the upper one of two; of one-sided sets as well.
        distance = (levels - 0.5).abs().round(decimals=6)  # levels arrive in float32
        columns["forecast"] = prediction[..., len(levels) - 1 - int(distance.flip(0).argmin())]
        for i, level in enumerate(levels.tolist()):
            columns[f"q{round(100 * level, 4):g}"] = prediction[..., i]
    for name in outputs:
        if name == "std" or name.startswith(("lower_", "upper_")):
            columns[name] = outputs[name].detach().cpu().double()
    if outputs.get("target") is not None:
        actual = outputs["target"].detach().cpu().double()
        valid = outputs.get("valid")
        columns["actual"] = actual if valid is None else actual.where(valid.cpu()[:, None, :], torch.nan)
    return pd.DataFrame({key: np.asarray(value).reshape(-1) for key, value in columns.items()})
