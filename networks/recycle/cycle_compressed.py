"""Primary cycle compression and residual learning around any forecasting backbone (ReCycle, section V)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from networks.recycle.residual import CycleTokens, QuantileHead, ResidualCycles


class CycleCompressed(ResidualCycles):
    """Run a backbone on day tokens of the residual instead of on steps of the series.

    The backbone sees H tokens of D channels, the calendar vectors as marks, and the day number as origin; it is built
    for ``history_length = H, horizon = F, channels = D, marks = 9``.

    A backbone may end in anything (RevIN, a decomposition, a softmax over experts), so its last layer cannot be set to
    zero from outside. ``zero_init`` therefore appends the counterpart of ReCycle's W_o: one linear map R^D -> R^{D Q},
    zero at the start. Then the untrained forecast is exactly the profile, the map's first gradient is that of an
    ordinary output layer, and the backbone trains from the second step on.

    Args:
        backbone: Called as ``backbone(history, history_marks, forecast_marks, origin)``, (b, H, D) -> (b, F, D).
        history_length: L, steps before the origin; a multiple of ``cycle_length``.
        horizon: T, steps to forecast.
        cycle_length: D, steps per day.
        residual_input: Whether the history is given as deviation from its profile.
        residual_forecast: Whether the profile is added to the output.
        zero_init: Whether a zero-initialised map follows the backbone.
        window_scale: Whether residuals are measured in standard deviations of their own window.
        quantiles: Q, number of quantiles, ascending in the output; 1 is a point forecast.
    """

    def __init__(
        self,
        backbone: nn.Module,
        history_length: int,
        horizon: int,
        cycle_length: int,
        residual_input: bool = True,
        residual_forecast: bool = True,
        zero_init: bool = True,
        window_scale: bool = False,
        quantiles: int = 1,
    ) -> None:
        super().__init__(
            history_length,
            horizon,
            cycle_length,
            residual_input=residual_input,
            residual_forecast=residual_forecast,
            window_scale=window_scale,
            quantiles=quantiles,
        )
        self.backbone = backbone
        self.head = QuantileHead(cycle_length, cycle_length, quantiles, dropout=0.0, zero_init=zero_init)

    def residual_forecast_of(self, tokens: CycleTokens, batch: Mapping[str, Tensor]) -> Tensor:
        """Residual forecast g of every day, (b, F, D, Q)."""
        channels = batch["history"].shape[2]
        origin = (batch["origin"] // self.cycle_length).repeat_interleave(channels)
        output = self.backbone(tokens.history, tokens.history_calendar, tokens.forecast_calendar, origin)
        expected = (tokens.history.shape[0], self.forecast_cycles, self.cycle_length)
        if output.shape != expected:
            raise ValueError(
                f"net.backbone gives {tuple(output.shape)} instead of {expected}; on day tokens it needs "
                f"history_length={self.history_cycles}, horizon={self.forecast_cycles}, "
                f"channels={self.cycle_length}, marks=9."
            )
        return self.head(output)
