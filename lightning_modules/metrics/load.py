"""Errors of load forecasts against naive ones, as sums: exact for any batch size and any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.sums import Sums

BASELINES = ("previous_week", "previous_day", "seasonal_mean")


class LoadErrors(Sums):
    """MAE, MAPE and MASE of forecasts of single series of different size.

    `compute` returns ``mae`` (the data's unit), ``mae_scaled`` (in parts of the series' range in training),
    ``mape_percent`` (absolute error over absolute value in the data's unit; values of zero, which have no percentage,
    are left out), ``mase`` = ``mae_scaled`` / ``previous_week_mae_scaled``, and for each naive forecast that was given
    ``<name>_mae`` and ``<name>_mae_scaled``. MASE compares on the scaled axis, where no large country drowns the
    others; for a single series that is the ratio of the MAEs.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    absolute: Tensor
    scaled: Tensor
    relative: Tensor
    count: Tensor
    relative_count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        kinds = 1 + len(BASELINES)
        for name, shape in (("absolute", kinds), ("scaled", kinds), ("count", kinds)):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("relative", "relative_count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(
        self,
        prediction: Tensor,
        target: Tensor,
        location: Tensor,
        scale: Tensor,
        baselines: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            prediction: Forecast, scaled, (batch, time, 1).
            target: Truth, scaled, (batch, time, 1).
            location: Of the scaling, (batch,): data's unit = scaled * scale + location.
            scale: Of the scaling, (batch,).
            baselines: Naive forecasts by name (`BASELINES`), each (batch, time, 1), scaled.
        """
        target = target.double()
        scale, location = scale.double().view(-1, 1, 1), location.double().view(-1, 1, 1)
        forecasts = [prediction, *((baselines or {}).get(name) for name in BASELINES)]
        for i, forecast in enumerate(forecasts):
            if forecast is not None:
                error = (forecast - target).abs()
                self.scaled[i] += error.sum()
                self.absolute[i] += (error * scale).sum()
                self.count[i] += error.numel()
                if i == 0:
                    actual = (target * scale + location).abs()
                    counted = actual > 1e-6 * scale  # float32 inputs leave a zero at about 1e-8 of the range
                    self.relative += torch.where(counted, error * scale / actual, 0.0).sum()
                    self.relative_count += counted.sum()

    @override
    def compute(self) -> dict[str, Tensor]:
        """All values by name, float64 scalars."""
        absolute, scaled = self.absolute / self.count, self.scaled / self.count
        out = {
            "mae": absolute[0],
            "mae_scaled": scaled[0],
            "mape_percent": 100 * self.relative / self.relative_count,
        }
        for i, name in enumerate(BASELINES, start=1):
            if self.count[i]:
                out |= {f"{name}_mae": absolute[i], f"{name}_mae_scaled": scaled[i]}
        if "previous_week_mae_scaled" in out:
            out["mase"] = out["mae_scaled"] / out["previous_week_mae_scaled"]
        return out
