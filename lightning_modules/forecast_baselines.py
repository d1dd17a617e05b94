"""Forecasts without training, under the same evaluation as the trained ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.forecasting import Batch, Forecaster


class UntrainedForecaster(Forecaster):
    """Evaluates a network that has nothing to learn: repeating the last day or week, the profile itself.

    A ``fit`` is not needed; where one runs all the same it passes through the data and changes nothing, so that sweeps
    over models need no exception.

    Args:
        net: Network without trainable parameters.
        optimizer: Unused; accepted so that one optimizer group serves all models of a sweep.
        scheduler: Unused, like ``optimizer``.
        loss: ``l1``, ``mse`` or ``huber``, for the reported loss.
        log_channels: See `Forecaster`.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        loss: str = "l1",
        log_channels: bool = False,
    ) -> None:
        if trainable := [name for name, p in net.named_parameters() if p.requires_grad]:
            raise ValueError(
                f"model.net has trainable parameters ({trainable[0]}, ...), which {type(self).__name__} would leave "
                "as they are; use model._target_=lightning_modules.forecasting.Forecaster."
            )
        super().__init__(net, loss=loss, log_channels=log_channels)
        self.automatic_optimization = False  # a loss without a gradient cannot be stepped on

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return super().training_step(batch, batch_idx)

    @override
    def configure_optimizers(self) -> None:
        return None
