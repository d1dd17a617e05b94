"""A small transformer over patches of all channels, built from PyTorch's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchTransformer(nn.Module):
    """Tokens of ``patch_length`` steps times channels in, tokens of the same size out, plus the last value.

    Two maps do the forecast: one over tokens, from those of the history to those of the horizon, one over the width,
    from a token to its steps and channels. With 96 and 192 steps, seven channels and the defaults it has 281,584
    parameters. Attention is `torch.nn.MultiheadAttention`, whose three input projections are one matrix.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        channels: number of series.
        patch_length: steps of a token; divides both lengths.
        d_model: width of a token (of all heads together).
        heads: attention heads.
        feed_forward: hidden width of the feed-forward part.
        encoder_layers: number of encoder layers.
        dropout: in the encoder.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        patch_length: int = 8,
        d_model: int = 128,
        heads: int = 4,
        feed_forward: int = 256,
        encoder_layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"heads={heads} does not divide d_model={d_model}: choose a divisor")
        for name, length in (("history_length", history_length), ("horizon", horizon)):
            if length % patch_length:
                raise ValueError(f"patch_length={patch_length} does not divide {name}={length}: choose a divisor")
        self.channels, self.patch_length = channels, patch_length
        tokens_in, tokens_out = history_length // patch_length, horizon // patch_length
        self.embedding = nn.Linear(patch_length * channels, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(tokens_in, d_model))
        layers = [
            nn.TransformerEncoderLayer(d_model, heads, feed_forward, dropout, batch_first=True)
            for _ in range(encoder_layers)
        ]
        self.encoder = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(d_model)
        self.ahead = nn.Linear(tokens_in, tokens_out)
        self.head = nn.Linear(d_model, patch_length * channels)

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`; marks and origin are not used."""
        if history.shape[2] != self.channels:
            raise ValueError(f"the history has {history.shape[2]} channels, the network was built for {self.channels}")
        last = history[:, -1:]
        patches = (history - last).unflatten(1, (-1, self.patch_length)).flatten(2)  # (batch, token, step * channel)
        tokens = self.norm(self.encoder(self.embedding(patches) + self.position))
        ahead = self.ahead(tokens.mT).mT  # (batch, token of the horizon, d_model)
        return self.head(ahead).unflatten(2, (self.patch_length, self.channels)).flatten(1, 2) + last
