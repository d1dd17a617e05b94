"""Crossformer: segments, two-stage attention, merging of scales (Zhang & Yan, ICLR 2023; pruning study, 2.4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.pruning.groups import DimGroup, Slice, columns, norm, rows
from networks.series.attention import AttentionLayer, FullAttention, head_width


class GeluMLP(nn.Module):
    """Linear, GELU, Linear; no dropout inside.

    Args:
        d_model: width of input and output.
        hidden: hidden width.
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(d_model, hidden)
        self.contract = nn.Linear(hidden, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform (..., d_model)."""
        return self.contract(F.gelu(self.expand(tokens)))

    def dim_groups(self, name: str) -> list[DimGroup]:
        """The hidden channels."""
        return [DimGroup(f"{name}.ff", "ff", self.expand.out_features, rows(self.expand) + columns(self.contract))]

    def reads(self) -> list[Slice]:
        """Channels of the stream that it reads and writes."""
        return columns(self.expand) + rows(self.contract)


def _attention(d_model: int, heads: int, dropout: float) -> AttentionLayer:
    return AttentionLayer(FullAttention(head_width(d_model, heads), dropout), d_model, heads)


class TwoStageAttention(nn.Module):
    """Attention over the segments of each channel, then over the channels of each segment.

    The second stage goes through a few learned routers per segment: they attend to all channels, then all channels
    attend to them, so its cost is linear in the number of channels.

    Args:
        segments: number of segments.
        routers: routers per segment (the paper's factor c).
        d_model: width.
        heads: attention heads.
        feed_forward: hidden width f.
        dropout: dropout of attention weights and residual branches.
    """

    def __init__(
        self, segments: int, routers: int, d_model: int, heads: int, feed_forward: int, dropout: float
    ) -> None:
        super().__init__()
        self.time_attention = _attention(d_model, heads, dropout)
        self.sender = _attention(d_model, heads, dropout)
        self.receiver = _attention(d_model, heads, dropout)
        self.routers = nn.Parameter(torch.randn(segments, routers, d_model))
        self.time_norm = nn.LayerNorm(d_model)
        self.time_mlp = GeluMLP(d_model, feed_forward)
        self.time_mlp_norm = nn.LayerNorm(d_model)
        self.channel_norm = nn.LayerNorm(d_model)
        self.channel_mlp = GeluMLP(d_model, feed_forward)
        self.channel_mlp_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform (batch, channel, segment, d_model)."""
        tokens = self.time_norm(tokens + self.dropout(self.time_attention(tokens)))
        tokens = self.time_mlp_norm(tokens + self.dropout(self.time_mlp(tokens)))
        tokens = tokens.transpose(1, 2)  # (batch, segment, channel, d_model)
        messages = self.sender(self.routers.unsqueeze(0), tokens)  # (batch, segment, router, d_model)
        tokens = self.channel_norm(tokens + self.dropout(self.receiver(tokens, messages)))
        tokens = self.channel_mlp_norm(tokens + self.dropout(self.channel_mlp(tokens)))
        return tokens.transpose(1, 2)

    def dim_groups(self, name: str) -> list[DimGroup]:
        """Groups that end within the layer; messages of the routers are a stream of their own."""
        messages = rows(self.sender.out_projection) + self.receiver.remembers()
        return [
            *self.time_attention.dim_groups(f"{name}.time_attention"),
            *self.sender.dim_groups(f"{name}.sender"),
            *self.receiver.dim_groups(f"{name}.receiver"),
            *self.time_mlp.dim_groups(f"{name}.time"),
            *self.channel_mlp.dim_groups(f"{name}.channel"),
            DimGroup(f"{name}.messages", "stream", self.sender.out_projection.out_features, messages),
        ]

    def reads(self) -> list[Slice]:
        """Channels of the stream; routers are tokens of it."""
        attention = self.time_attention.reads() + self.time_attention.remembers() + self.receiver.reads()
        routers = [Slice(self, "routers", 2), *columns(self.sender.query_projection), *self.sender.remembers()]
        norms = [self.time_norm, self.time_mlp_norm, self.channel_norm, self.channel_mlp_norm]
        mlps = self.time_mlp.reads() + self.channel_mlp.reads()
        return attention + routers + mlps + [part for layer in norms for part in norm(layer)]


class SegmentMerging(nn.Module):
    """Merges neighbouring segments into one of the next coarser scale.

    Args:
        d_model: width.
        window: segments that become one.
    """

    def __init__(self, d_model: int, window: int = 2) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(window * d_model)
        self.merge = nn.Linear(window * d_model, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, channel, segment, d_model) -> (batch, channel, ceil(segment / window), d_model)."""
        segments = tokens.shape[2]
        missing = -segments % self.window
        if missing:  # the last segments once more
            again = torch.arange(segments - missing, segments, device=tokens.device).clamp(min=0)
            tokens = torch.cat([tokens, tokens[:, :, again]], dim=2)
        return self.merge(self.norm(tokens.unflatten(2, (-1, self.window)).flatten(3)))

    def reads(self) -> list[Slice]:
        """Channels of the finer scale, once for every segment that is merged."""
        width = self.merge.in_features // self.window
        starts = [i * width for i in range(self.window)]
        return [part for start in starts for part in norm(self.norm, start) + columns(self.merge, start)]


class CrossformerDecoderLayer(nn.Module):
    """Two-stage attention, cross-attention to the encoder output of the same level, and this level's forecast.

    Args:
        segments: number of segments of the forecast.
        segment_length: steps of a segment.
        routers: routers per segment.
        d_model: width.
        heads: attention heads.
        feed_forward: hidden width f of the two-stage attention.
        dropout: dropout of attention weights and residual branches.
    """

    def __init__(
        self,
        segments: int,
        segment_length: int,
        routers: int,
        d_model: int,
        heads: int,
        feed_forward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = TwoStageAttention(segments, routers, d_model, heads, feed_forward, dropout)
        self.cross_attention = _attention(d_model, heads, dropout)
        self.cross_attention_norm = nn.LayerNorm(d_model)
        self.mlp = GeluMLP(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.prediction = nn.Linear(d_model, segment_length)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (batch, channel, segment, d_model) and forecast (batch, channel, segment, segment_length)."""
        tokens = self.self_attention(tokens)
        tokens = self.cross_attention_norm(tokens + self.dropout(self.cross_attention(tokens, memory)))
        tokens = self.mlp_norm(tokens + self.mlp(tokens))
        return tokens, self.prediction(tokens)

    def dim_groups(self, name: str) -> list[DimGroup]:
        """Groups that end within the layer."""
        return [
            *self.self_attention.dim_groups(f"{name}.self"),
            *self.cross_attention.dim_groups(f"{name}.cross_attention"),
            *self.mlp.dim_groups(name),
        ]

    def reads(self) -> list[Slice]:
        """Channels of the decoder's stream."""
        cross = self.cross_attention.reads() + norm(self.cross_attention_norm)
        mlp = self.mlp.reads() + norm(self.mlp_norm)
        return self.self_attention.reads() + cross + mlp + columns(self.prediction)


class Crossformer(nn.Module):
    """Attention over segments and over channels at several time scales; the forecasts of all scales are summed.

    The calendar is not used. The defaults are the pruning study's for ETTh1, 168 -> 96.

    Args:
        history_length: steps of the input n_in; filled up in front with its first value to whole segments.
        horizon: steps of the forecast n_out.
        channels: series c.
        segment_length: steps of a segment.
        d_model: width.
        heads: attention heads.
        feed_forward: hidden width f.
        encoder_layers: number of scales; the decoder has one layer more.
        dropout: dropout of attention weights and residual branches.
        routers: routers per segment (the paper's factor c).
        window: segments merged from one scale to the next.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        segment_length: int = 6,
        d_model: int = 256,
        heads: int = 4,
        feed_forward: int = 512,
        encoder_layers: int = 3,
        dropout: float = 0.2,
        routers: int = 10,
        window: int = 2,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("segment_length", segment_length, 1),
            ("routers", routers, 1),
            ("window", window, 2),
            ("encoder_layers", encoder_layers, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.history_length = history_length
        self.horizon = horizon
        self.segment_length = segment_length
        segments = math.ceil(history_length / segment_length)
        forecast_segments = math.ceil(horizon / segment_length)

        self.embedding = nn.Linear(segment_length, d_model)
        self.encoder_position = nn.Parameter(torch.randn(1, channels, segments, d_model))
        self.embedding_norm = nn.LayerNorm(d_model)
        self.merging = nn.ModuleList([SegmentMerging(d_model, window) for _ in range(encoder_layers - 1)])
        self.encoder = nn.ModuleList()
        for _ in range(encoder_layers):
            self.encoder.append(TwoStageAttention(segments, routers, d_model, heads, feed_forward, dropout))
            segments = math.ceil(segments / window)
        self.decoder_position = nn.Parameter(torch.randn(1, channels, forecast_segments, d_model))
        self.decoder = nn.ModuleList(
            [
                CrossformerDecoderLayer(
                    forecast_segments, segment_length, routers, d_model, heads, feed_forward, dropout
                )
                for _ in range(encoder_layers + 1)
            ]
        )

    def encode(self, history: Tensor) -> list[Tensor]:
        """Tokens (batch, channel, segment, d_model) of the embedding and of every scale, finest first."""
        filler = history[:, :1].expand(-1, -self.history_length % self.segment_length, -1)
        series = torch.cat([filler, history], dim=1).transpose(1, 2)
        tokens = self.embedding(series.unflatten(2, (-1, self.segment_length)))
        scales = [self.embedding_norm(tokens + self.encoder_position)]
        for level, layer in enumerate(self.encoder):
            tokens = scales[-1] if level == 0 else self.merging[level - 1](scales[-1])
            scales.append(layer(tokens))
        return scales

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Forecast.

        Args:
            history: (batch, history_length, channel).
            history_marks: ignored.
            forecast_marks: ignored.
            origin: ignored.

        Returns:
            (batch, horizon, channel).
        """
        expected = (self.history_length, self.encoder_position.shape[1])
        if tuple(history.shape[1:]) != expected:
            raise ValueError(
                f"the network was built for {expected[0]} steps of {expected[1]} channels but got "
                f"{tuple(history.shape[1:])}: set history_length and channels to the data's sizes"
            )
        scales = self.encode(history)
        tokens = self.decoder_position.expand(len(history), -1, -1, -1)
        forecast = None
        for layer, memory in zip(self.decoder, scales, strict=True):
            tokens, prediction = layer(tokens, memory)
            forecast = prediction if forecast is None else forecast + prediction
        return forecast.flatten(2).transpose(1, 2)[:, : self.horizon]

    def dim_groups(self) -> list[DimGroup]:
        """Groups of channels that go together: every scale has a stream of its own, and so has the decoder.

        The embedding and the finest scale share theirs; the decoder's layers attend to both.
        """
        scales = [[] for _ in self.encoder]
        scales[0] += [*rows(self.embedding), Slice(self, "encoder_position", 3), *norm(self.embedding_norm)]
        tokens = [Slice(self, "decoder_position", 3)]
        groups = []
        for level, layer in enumerate(self.encoder):
            groups += layer.dim_groups(f"encoder.{level}")
            scales[level] += layer.reads()
            if level < len(self.merging):
                scales[level] += self.merging[level].reads()
                scales[level + 1] += rows(self.merging[level].merge)
        for number, layer in enumerate(self.decoder):
            groups += layer.dim_groups(f"decoder.{number}")
            scales[max(number - 1, 0)] += layer.cross_attention.remembers()
            tokens += layer.reads()
        for level, (layer, stream) in enumerate(zip(self.encoder, scales, strict=True)):
            width = len(layer.time_norm.weight)
            groups.append(DimGroup(f"encoder.{level}.stream", "stream", width, stream))
        return [*groups, DimGroup("decoder.stream", "stream", self.decoder_position.shape[3], tokens)]
