"""NLinear: a linear map of the window relative to its last value."""

from __future__ import annotations

from torch import Tensor, nn

from networks.series.dlinear import TimeLinear


class NLinear(nn.Module):
    """Subtract the last value of the window, map linearly, add it again.

    Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023, section 4. The forecast moves
    with the level of the series, which answers a shift between training and test.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        channels: number of channels; read only when `individual`.
        individual: a separate map for every channel.
    """

    def __init__(self, history_length: int, horizon: int, channels: int, individual: bool = False) -> None:
        super().__init__()
        self.map = TimeLinear(history_length, horizon, channels, individual)

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`; marks and origin are not used."""
        last = history[:, -1:]
        return self.map(history - last) + last
