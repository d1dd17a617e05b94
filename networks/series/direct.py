"""Adapter that runs a backbone on the steps of a window as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Direct(nn.Module):
    """Forecast a window with one token per step: no cycle compression, no profile.

    The counterpart of `networks.recycle.CycleCompressed`. Only the series, the marks of the steps and the origin are
    handed to the backbone; profiles, calendar tokens and covariates of the batch are not read.

    Args:
        backbone: network `(history, history_marks, forecast_marks, origin) -> (batch, horizon, channel)`.
        channel_independent: fold the channels into the batch, so that one backbone with a single channel serves all
            of them and none sees another.
    """

    def __init__(self, backbone: nn.Module, channel_independent: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.channel_independent = channel_independent

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forecast `(batch, horizon, channel)` on the scaled axis.

        Args:
            batch: `history` (batch, time, channel); where present `history_marks` (batch, time, mark),
                `forecast_marks` (batch, horizon, mark) and `origin` (batch,).
        """
        history = batch["history"]
        context = [batch.get(key) for key in ("history_marks", "forecast_marks", "origin")]
        if not self.channel_independent:
            return self.backbone(history, *context)
        size, length, channels = history.shape
        folded = history.mT.reshape(size * channels, length, 1)
        context = [entry if entry is None else entry.repeat_interleave(channels, dim=0) for entry in context]
        return self.backbone(folded, *context).reshape(size, channels, -1).mT
