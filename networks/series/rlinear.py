"""RLinear: a linear map between reversible instance normalisation and its inverse."""

from __future__ import annotations

from torch import Tensor, nn

from networks.series.dlinear import TimeLinear
from networks.series.normalization import InstanceNormalization


class RLinear(nn.Module):
    """RevIN and one linear map along time.

    Li et al., "Revisiting Long-term Time Series Forecasting: An Investigation on Linear Mapping", 2023
    (arXiv 2305.10721), section 4.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        channels: number of channels.
        individual: a separate map for every channel.
        affine: learnable scale and shift in the normalisation.
        dropout: on the normalised window.
        eps: added to the variance of the window.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        individual: bool = False,
        affine: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.normalization = InstanceNormalization(channels if affine else None, eps)
        self.dropout = nn.Dropout(dropout)
        self.map = TimeLinear(history_length, horizon, channels, individual)

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`; marks and origin are not used."""
        normalized, statistics = self.normalization.normalize(history)
        return self.normalization.denormalize(self.map(self.dropout(normalized)), statistics)
