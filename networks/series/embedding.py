"""Token embeddings and decoder inputs shared by the encoder-decoder forecasters.

A token is one time step. Its embedding is the sum of a convolution over the values, a linear map of the calendar
marks and, for attention that is blind to order, a sinusoidal position (pruning study, section 2.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from networks.pruning.groups import Slice, rows


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Sine (even columns) and cosine (odd columns) of the step index at geometric frequencies, (length, d_model)."""
    position = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10_000.0) / d_model))
    table = torch.zeros(length, d_model)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: d_model // 2])
    return table


class TokenEmbedding(nn.Module):
    """Embeds a series step by step: circular convolution + calendar marks (+ position), then dropout.

    Args:
        length: number of tokens.
        channels: values per token.
        d_model: width of the residual stream.
        marks: calendar features per token; 0 leaves the calendar out and ignores marks that are given.
        dropout: dropout of the sum.
        position: add the sinusoidal position. Auto-correlation and Fourier blocks see the order themselves.
    """

    position: Tensor | None

    def __init__(
        self, length: int, channels: int, d_model: int, marks: int = 4, dropout: float = 0.05, *, position: bool = True
    ) -> None:
        super().__init__()
        self.length = length
        self.value = nn.Conv1d(channels, d_model, kernel_size=3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.value.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.calendar = nn.Linear(marks, d_model, bias=False) if marks else None
        # Persistent, although it has a formula: once channels of the stream are pruned its columns are a selection.
        self.register_buffer("position", sinusoidal_positions(length, d_model) if position else None)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor, marks: Tensor | None = None) -> Tensor:
        """Tokens (batch, time, d_model) of values (batch, time, channel) and marks (batch, time, mark)."""
        expected = (self.length, self.value.in_channels)
        if tuple(values.shape[1:]) != expected:
            raise ValueError(
                f"the network was built for {expected[0]} steps of {expected[1]} channels but got "
                f"{tuple(values.shape[1:])}: set history_length, label_length, horizon and channels to the data's sizes"
            )
        tokens = self.value(values.transpose(1, 2)).transpose(1, 2)
        if self.calendar is not None:
            if marks is None or marks.shape[-1] != self.calendar.in_features:
                found = "none" if marks is None else str(marks.shape[-1])
                raise ValueError(
                    f"marks={self.calendar.in_features} calendar features are expected per step, the input has "
                    f"{found}: set marks to what the data gives, or to 0"
                )
            tokens = tokens + self.calendar(marks)
        if self.position is not None:
            tokens = tokens + self.position
        return self.dropout(tokens)

    def writes(self) -> list[Slice]:
        """Channels of the stream that it begins."""
        slices = rows(self.value)
        if self.calendar is not None:
            slices += rows(self.calendar)
        if self.position is not None:
            slices.append(Slice(self, "position", 1))
        return slices


def resolve_label_length(label_length: int | None, history_length: int) -> int:
    """Steps of the history that the decoder sees again; half of the history (the study's 48 of 96) by default."""
    if label_length is None:
        return history_length // 2
    if not 0 <= label_length <= history_length:
        raise ValueError(
            f"label_length={label_length} must lie in 0..history_length={history_length}; null takes half the history"
        )
    return label_length


def decoder_marks(history_marks: Tensor | None, forecast_marks: Tensor | None, label_length: int) -> Tensor | None:
    """Marks (batch, label_length + horizon, mark) of the decoder tokens, None when either part is missing."""
    if history_marks is None or forecast_marks is None:
        return None
    return torch.cat([last_steps(history_marks, label_length), forecast_marks], dim=1)


def last_steps(series: Tensor, steps: int) -> Tensor:
    """The last ``steps`` steps of (batch, time, channel); unlike ``[:, -steps:]`` also right for 0."""
    return series[:, series.shape[1] - steps :]
