"""ReCycle: a forecaster over recent historic profiles that falls back on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import SumMetric
from typing_extensions import override

from lightning_modules.forecasting import Batch, Calibration, Forecaster
from lightning_modules.metrics.calibration import QuantileSet
from lightning_modules.metrics.forecast import SumRatio


class ReCycle(Forecaster):
    """Residual forecasts X = g + P of a network g over the recent historic profile P (ReCycle, section III).

    A zero output of the network is the profile, a forecast that an operator can check by hand. So it is the answer of
    last resort: a series for which the network returns NaN or infinity gets its profile, the number of such windows is
    logged (``val/fallback_windows``, ``test/fallback_windows``) and a warning says so once per evaluation. Training is
    not shielded, there a non-finite output must be seen.

    ``test/residual_ratio`` = mean |forecast - profile| / mean |profile| in the data's units, averaged over the
    channels, tells how far the network departs from the profile: near zero, it may be left out.

    Args:
        net: Network that adds its residual to ``batch["forecast_profile"]``.
        optimizer: See `Forecaster`.
        scheduler: See `Forecaster`.
        loss: See `Forecaster`.
        quantiles: See `Forecaster`.
        quantile_set: See `Forecaster`.
        sort_quantiles: See `Forecaster`.
        calibrate: See `Forecaster`.
        calibration_windows: See `Forecaster`.
        scheduler_monitor: See `Forecaster`.
        scheduler_interval: See `Forecaster`.
        log_steps: See `Forecaster`.
        log_channels: See `Forecaster`.
        fallback_on_nan: Whether non-finite outputs are replaced.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        loss: str = "l1",
        quantiles: int | Sequence[float] | None = None,
        quantile_set: QuantileSet = "equidistant",
        sort_quantiles: bool = True,
        calibrate: Calibration = "none",
        calibration_windows: int = 56,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        log_steps: bool = False,
        log_channels: bool = False,
        fallback_on_nan: bool = True,
    ) -> None:
        super().__init__(
            net,
            optimizer,
            scheduler,
            loss,
            quantiles,
            quantile_set,
            sort_quantiles,
            calibrate,
            calibration_windows,
            scheduler_monitor,
            scheduler_interval,
            log_steps,
            log_channels,
        )
        self.fallback_on_nan = fallback_on_nan

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.residual_ratio = SumRatio(self.units.scale.shape)
        self.fallbacks = SumMetric()

    @override
    def forward(self, batch: Batch) -> Tensor:
        prediction = super().forward(batch)
        if self.training or not self.fallback_on_nan:
            return prediction
        finite = prediction.isfinite()
        finite = (finite.all(-1) if prediction.ndim == 4 else finite).all(1)  # (batch, channel)
        if hasattr(self, "fallbacks"):
            self.fallbacks.update((~finite).sum())
        profile = batch["forecast_profile"].to(prediction.dtype)
        if prediction.ndim == 4:
            finite, profile = finite.unsqueeze(-1), profile.unsqueeze(-1)
        return torch.where(finite.unsqueeze(1), prediction, profile)

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.fallbacks.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.fallback_on_nan:
            self._log_exact({"val/fallback_windows": self._count_fallbacks("validation")})

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.residual_ratio.reset()
        self.fallbacks.reset()

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        out = super().test_step(batch, batch_idx)
        valid, profile = out["valid"].unsqueeze(1), out["profile"].double()
        residual = torch.where(valid, self.point(out["prediction"]) - profile, 0.0)
        self.residual_ratio.update(residual.abs().sum((0, 1)), torch.where(valid, profile, 0.0).abs().sum((0, 1)))
        return out

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._log_exact({"test/residual_ratio": self.residual_ratio.compute()})
        if self.fallback_on_nan:
            self._log_exact({"test/fallback_windows": self._count_fallbacks("test")})

    @override
    def on_predict_epoch_start(self) -> None:
        super().on_predict_epoch_start()
        self.fallbacks.reset()

    def on_predict_epoch_end(self) -> None:
        """Say how many forecasts of this rank are profiles (a rank without a window is not here to add its own)."""
        if count := int(self.fallbacks.sum_value):
            warnings.warn(_fallback_message("predict", count), stacklevel=2)

    def _count_fallbacks(self, stage: str) -> Tensor:
        count = self.fallbacks.compute()
        if count > 0:
            rank_zero_warn(_fallback_message(stage, int(count)))
        return count


def _fallback_message(stage: str, count: int) -> str:
    return (
        f"{stage}: the network was not finite for {count} windows (origins x series); their forecast is the recent "
        "historic profile (model.fallback_on_nan=true)."
    )
