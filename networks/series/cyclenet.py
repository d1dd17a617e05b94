"""CycleNet: a learnable cycle per channel, and a small map of what it leaves over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks.series.dlinear import TimeLinear
from networks.series.normalization import InstanceNormalization, NoNormalization


class CycleNet(nn.Module):
    """Residual cycle forecasting.

    Lin et al., "CycleNet: Enhancing Time Series Forecasting through Modeling Periodic Patterns", NeurIPS 2024,
    section 3. A matrix Q in R^{W x C}, zero at first and learned with the rest, holds one cycle of every channel. The
    cycle in phase with the window is subtracted from the history, the residual is mapped to the horizon, and the
    cycle that follows is added; instance normalisation goes around all of it.

    The phase is `origin mod W`, both counted in tokens. In `networks.series.direct.Direct`, for which the network is
    meant, tokens are steps and W is a day or a week of steps. `CycleCompressed` counts the origin in days: there W = 7
    is a weekly cycle of day tokens, and W = 24 would mean nothing.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        channels: number of channels C.
        cycle_length: W, tokens of the learned cycle (24 for a day of hours, 168 for a week).
        map: "linear" (CycleNet/Linear) or "mlp" (CycleNet/MLP, one hidden layer with ReLU).
        d_model: width of the hidden layer of "mlp".
        instance_norm: standardise every window by its own mean and variance.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        cycle_length: int,
        map: str = "linear",
        d_model: int = 512,
        instance_norm: bool = True,
    ) -> None:
        super().__init__()
        if cycle_length < 1:
            raise ValueError(f"cycle_length={cycle_length} must be at least 1: the steps of one cycle (24 hours a day)")
        if map not in ("linear", "mlp"):
            raise ValueError(f"map={map!r} is unknown: choose 'linear' or 'mlp'")
        self.cycle_length = cycle_length
        self.history_length = history_length
        self.horizon = horizon
        self.cycle = nn.Parameter(torch.zeros(cycle_length, channels))
        self.normalization = InstanceNormalization() if instance_norm else NoNormalization()
        if map == "linear":
            self.map: nn.Module = TimeLinear(history_length, horizon, channels)
        else:
            self.map = nn.Sequential(
                TimeLinear(history_length, d_model, channels), nn.ReLU(), TimeLinear(d_model, horizon, channels)
            )

    def cycles(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        """The cycle along the history `(batch, time, channel)` and along the horizon `(batch, horizon, channel)`."""
        steps = torch.arange(-self.history_length, self.horizon, device=origin.device)
        # An embedding look-up and not an index: its backward pass adds up rows without sorting or atomics per element.
        cycle = functional.embedding((origin[:, None] + steps) % self.cycle_length, self.cycle)
        return cycle[:, : self.history_length], cycle[:, self.history_length :]

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`; marks are not used.

        Args:
            history: the window.
            history_marks: ignored.
            forecast_marks: ignored.
            origin: `(batch,)` index of the first forecast step on the time axis, gives the phase.
        """
        if origin is None:
            raise ValueError("origin=None: CycleNet needs the index of the first forecast step of every window")
        past, future = self.cycles(origin)
        normalized, statistics = self.normalization.normalize(history)
        return self.normalization.denormalize(self.map(normalized - past) + future, statistics)
