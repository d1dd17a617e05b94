"""TiDE: a dense encoder and decoder of one channel and the marks around it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from networks.series.normalization import InstanceNormalization, NoNormalization


class ResidualBlock(nn.Module):
    """One hidden layer with ReLU beside a linear skip, then layer normalisation.

    Args:
        width_in: features in.
        hidden: features of the hidden layer.
        width_out: features out.
        dropout: on the output of the hidden branch.
        layer_norm: normalise the sum.
    """

    def __init__(self, width_in: int, hidden: int, width_out: int, dropout: float, layer_norm: bool) -> None:
        super().__init__()
        self.dense = nn.Sequential(
            nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, width_out), nn.Dropout(dropout)
        )
        self.skip = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out) if layer_norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Map `(..., width_in)` to `(..., width_out)`."""
        return self.norm(self.dense(features) + self.skip(features))


class TiDE(nn.Module):
    """Time-series dense encoder.

    Das et al., "Long-term Forecasting with TiDE: Time-series Dense Encoder", TMLR 2023, section 4: the marks of every
    step are projected to a few features; window and projected marks of past and future are encoded together; the
    decoder gives a vector for every forecast step, which the temporal decoder turns into a value with the marks of
    that step at hand; a linear map of the window is added. All channels share the network and do not see each other.
    The last block has no layer normalisation, because that of a single number is a constant.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        marks: known features per step; 0 leaves them out.
        d_model: hidden width of encoder and decoder.
        encoder_layers: residual blocks of the encoder.
        decoder_layers: residual blocks of the decoder.
        step_width: features per forecast step that the decoder gives.
        mark_width: features to which the marks of a step are projected.
        temporal_hidden: hidden width of the temporal decoder.
        dropout: in every block.
        layer_norm: in every block but the last.
        instance_norm: standardise every window by its own mean and variance.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        marks: int,
        d_model: int = 256,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        step_width: int = 8,
        mark_width: int = 4,
        temporal_hidden: int = 128,
        dropout: float = 0.3,
        layer_norm: bool = True,
        instance_norm: bool = True,
    ) -> None:
        super().__init__()
        for key, value in (("encoder_layers", encoder_layers), ("decoder_layers", decoder_layers)):
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        self.history_length = history_length
        self.horizon = horizon
        self.normalization = InstanceNormalization() if instance_norm else NoNormalization()
        self.mark_projection = ResidualBlock(marks, d_model, mark_width, dropout, layer_norm) if marks else None
        mark_width = mark_width if marks else 0
        widths = [history_length + (history_length + horizon) * mark_width]
        widths += [d_model] * (encoder_layers + decoder_layers - 1) + [horizon * step_width]
        self.coder = nn.Sequential(
            *(
                ResidualBlock(width_in, d_model, width_out, dropout, layer_norm)
                for width_in, width_out in itertools.pairwise(widths)
            )
        )
        self.temporal_decoder = ResidualBlock(step_width + mark_width, temporal_hidden, 1, dropout, layer_norm=False)
        self.skip = nn.Linear(history_length, horizon)

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`.

        Args:
            history: the window.
            history_marks: `(batch, time, mark)`, needed unless `marks` is 0.
            forecast_marks: `(batch, horizon, mark)`, needed unless `marks` is 0.
            origin: ignored.
        """
        normalized, statistics = self.normalization.normalize(history)
        windows = normalized.mT  # (batch, channel, time)
        features = windows
        future = None
        if self.mark_projection is not None:
            if history_marks is None or forecast_marks is None:
                raise ValueError("marks > 0, but the batch has no history_marks or forecast_marks: set marks=0")
            # Projected once per window, not once per channel.
            projected = self.mark_projection(torch.cat([history_marks, forecast_marks], dim=1))
            channels = history.shape[2]
            context = projected.flatten(1)[:, None].expand(-1, channels, -1)
            features = torch.cat([windows, context], dim=2)
            future = projected[:, None, self.history_length :].expand(-1, channels, -1, -1)
        steps = self.coder(features).unflatten(-1, (self.horizon, -1))  # (batch, channel, horizon, step_width)
        if future is not None:
            steps = torch.cat([steps, future], dim=3)
        forecast = self.temporal_decoder(steps).squeeze(-1) + self.skip(windows)
        return self.normalization.denormalize(forecast.mT, statistics)
