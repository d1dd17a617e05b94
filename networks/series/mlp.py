"""Multilayer perceptron on the embedded tokens of a window."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected network on all tokens at once.

    The second backbone of Weyrauch et al., "ReCycle: Fast and Efficient Long Time Series Forecasting with Residual
    Cyclic Transformers", IEEE CAI 2024: every token [x_j ; m_j] is embedded linearly, the embedded tokens are
    flattened, and hidden layers with tanh and one linear map give all forecast tokens. Without hidden layers the
    network is linear. The marks of the horizon are not seen.

    Args:
        history_length: tokens of the window.
        horizon: tokens to forecast.
        channels: width of a token without its marks.
        marks: features appended to every token of the history; 0 leaves them out.
        d_model: width of an embedded token and of the hidden layers; tokens that have this width already are not
            embedded.
        hidden_layers: number of hidden layers; 0 is linear.
        dropout: before the embedding and before the last map.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        marks: int,
        d_model: int = 32,
        hidden_layers: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden_layers < 0:
            raise ValueError(f"hidden_layers={hidden_layers} must not be negative: 0 is a linear network")
        self.marks = marks
        width = channels + marks
        self.embedding = (
            nn.Identity() if width == d_model else nn.Sequential(nn.Dropout(dropout), nn.Linear(width, d_model))
        )
        widths = [history_length * d_model] + [d_model] * hidden_layers
        self.hidden = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(width_in, width_out), nn.Tanh())
                for width_in, width_out in itertools.pairwise(widths)
            )
        )
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(widths[-1], horizon * channels), nn.Unflatten(1, (horizon, channels))
        )

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
            forecast_marks: ignored.
            origin: ignored.
        """
        tokens = history
        if self.marks:
            if history_marks is None:
                raise ValueError(f"marks={self.marks}, but the batch has no history_marks: set marks=0")
            tokens = torch.cat([history, history_marks], dim=2)
        return self.head(self.hidden(self.embedding(tokens).flatten(1)))
