"""TSMixer: multilayer perceptrons along time and along channels in turn."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from networks.series.dlinear import TimeLinear
from networks.series.normalization import InstanceNormalization, NoNormalization


class WindowBatchNorm(nn.BatchNorm1d):
    """Batch normalisation with statistics for every step and channel, taken over the batch alone."""

    def forward(self, window: Tensor) -> Tensor:
        """Normalise `(batch, time, channel)`."""
        # One window has no spread over the batch: the last, short batch of an epoch uses the running statistics.
        if self.training and window.shape[0] == 1:
            flat = functional.batch_norm(
                window.flatten(1), self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        else:
            flat = super().forward(window.flatten(1))
        return flat.view_as(window)


class MixerLayer(nn.Module):
    """Time mixing, then channel mixing, each normalised before and with a residual sum.

    Args:
        history_length: steps of the window.
        channels: number of channels.
        feed_forward: hidden width of the channel mixing.
        dropout: after every linear map.
        norm: "batch" or "layer", over time and channels together.
    """

    def __init__(self, history_length: int, channels: int, feed_forward: int, dropout: float, norm: str) -> None:
        super().__init__()

        def make_norm() -> nn.Module:
            if norm == "batch":
                return WindowBatchNorm(history_length * channels)
            return nn.LayerNorm((history_length, channels))

        self.time_mixing = nn.Sequential(
            make_norm(), TimeLinear(history_length, history_length, channels), nn.ReLU(), nn.Dropout(dropout)
        )
        self.channel_mixing = nn.Sequential(
            make_norm(),
            nn.Linear(channels, feed_forward),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(feed_forward, channels),
            nn.Dropout(dropout),
        )

    def forward(self, window: Tensor) -> Tensor:
        """Map `(batch, time, channel)` to the same shape."""
        window = window + self.time_mixing(window)
        return window + self.channel_mixing(window)


class TSMixer(nn.Module):
    """Time-series mixer.

    Chen et al., "TSMixer: An All-MLP Architecture for Time Series Forecasting", TMLR 2023, section 4.1: mixer layers
    on the normalised window and one linear map along time at the end.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        channels: number of channels.
        encoder_layers: number of mixer layers.
        feed_forward: hidden width of the channel mixing.
        dropout: after every linear map of a mixer layer.
        norm: "batch" or "layer", over time and channels together.
        instance_norm: RevIN with learnable scale and shift around the network.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        encoder_layers: int = 2,
        feed_forward: int = 64,
        dropout: float = 0.3,
        norm: str = "batch",
        instance_norm: bool = True,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm={norm!r} is unknown: choose 'batch' or 'layer'")
        self.normalization = InstanceNormalization(channels) if instance_norm else NoNormalization()
        self.mixers = nn.Sequential(
            *(MixerLayer(history_length, channels, feed_forward, dropout, norm) for _ in range(encoder_layers))
        )
        self.head = TimeLinear(history_length, horizon, channels)

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`; marks and origin are not used."""
        normalized, statistics = self.normalization.normalize(history)
        return self.normalization.denormalize(self.head(self.mixers(normalized)), statistics)
