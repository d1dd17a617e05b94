"""Encoder-decoder Transformer that forecasts all steps in one pass (Vaswani et al. 2017; pruning study, 2.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from networks.pruning.groups import DimGroup, Slice, columns, norm
from networks.series.attention import AttentionLayer, FeedForward, FullAttention, head_width
from networks.series.embedding import TokenEmbedding, decoder_marks, last_steps, resolve_label_length


class EncoderLayer(nn.Module):
    """Post-norm self-attention and feed-forward.

    Args:
        attention: self-attention layer.
        d_model: width of the residual stream.
        feed_forward: hidden width f.
        dropout: dropout of both residual branches.
    """

    def __init__(self, attention: nn.Module, d_model: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = FeedForward(d_model, feed_forward, dropout)
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform (batch, time, d_model)."""
        tokens = self.attention_norm(tokens + self.dropout(self.attention(tokens)))
        return self.feed_forward_norm(tokens + self.feed_forward(tokens))

    def dim_groups(self, name: str) -> list[DimGroup]:
        """Groups that end within the layer."""
        return self.attention.dim_groups(f"{name}.attention") + self.feed_forward.dim_groups(name)

    def reads(self) -> list[Slice]:
        """Channels of the encoder's stream."""
        attention = self.attention.reads() + self.attention.remembers() + norm(self.attention_norm)
        return attention + self.feed_forward.reads() + norm(self.feed_forward_norm)


class Encoder(nn.Module):
    """Encoder layers, an optional reduction of the time axis between them, and a final LayerNorm.

    Args:
        layers: the encoder layers.
        reductions: modules between consecutive layers (one fewer than the layers), e.g. Informer's distillation.
        norm: final norm.
    """

    def __init__(self, layers: list[nn.Module], norm: nn.Module, reductions: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reductions = nn.ModuleList(reductions or [])
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        """Memory (batch, reduced time, d_model) of tokens (batch, time, d_model)."""
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens)
            if index < len(self.reductions):
                tokens = self.reductions[index](tokens)
        return self.norm(tokens)


class DecoderLayer(nn.Module):
    """Post-norm self-attention, cross-attention and feed-forward.

    Args:
        self_attention: (masked) self-attention layer.
        cross_attention: attention layer from decoder tokens to the encoder's memory.
        d_model: width of the residual stream.
        feed_forward: hidden width f.
        dropout: dropout of the residual branches.
    """

    def __init__(
        self, self_attention: nn.Module, cross_attention: nn.Module, d_model: int, feed_forward: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.feed_forward = FeedForward(d_model, feed_forward, dropout)
        self.self_attention_norm = nn.LayerNorm(d_model)
        self.cross_attention_norm = nn.LayerNorm(d_model)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Transform (batch, time, d_model) given memory (batch, encoder time, d_model)."""
        tokens = self.self_attention_norm(tokens + self.dropout(self.self_attention(tokens)))
        tokens = self.cross_attention_norm(tokens + self.dropout(self.cross_attention(tokens, memory)))
        return self.feed_forward_norm(tokens + self.feed_forward(tokens))

    def dim_groups(self, name: str) -> list[DimGroup]:
        """Groups that end within the layer."""
        attention = self.self_attention.dim_groups(f"{name}.self_attention")
        cross = self.cross_attention.dim_groups(f"{name}.cross_attention")
        return attention + cross + self.feed_forward.dim_groups(name)

    def reads(self) -> list[Slice]:
        """Channels of the decoder's stream."""
        attention = self.self_attention.reads() + self.self_attention.remembers() + norm(self.self_attention_norm)
        cross = self.cross_attention.reads() + norm(self.cross_attention_norm)
        return attention + cross + self.feed_forward.reads() + norm(self.feed_forward_norm)


class Decoder(nn.Module):
    """Decoder layers and a final LayerNorm.

    Args:
        layers: the decoder layers.
        norm: final norm.
    """

    def __init__(self, layers: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Transform (batch, time, d_model) given memory (batch, encoder time, d_model)."""
        for layer in self.layers:
            tokens = layer(tokens, memory)
        return self.norm(tokens)


class EncoderDecoder(nn.Module):
    """Embeds history and decoder input, runs encoder and decoder, projects to the channels.

    The decoder input is the last ``label_length`` values followed by zeros for the horizon, whose marks are known; the
    forecast is the part of the output that belongs to the horizon. One pass, no autoregression.

    Args:
        encoder: maps tokens (batch, history_length, d_model) to the memory.
        decoder: maps tokens (batch, label_length + horizon, d_model) and memory to tokens.
        history_length: steps of the input n_in.
        horizon: steps of the forecast n_out.
        channels: series c.
        marks: calendar features per step m, 0 for none.
        label_length: steps of the history repeated in the decoder input, None for half of the history.
        d_model: width of the residual stream.
        dropout: dropout of the embeddings.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        history_length: int,
        horizon: int,
        channels: int,
        marks: int,
        label_length: int | None,
        d_model: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.horizon = horizon
        self.label_length = resolve_label_length(label_length, history_length)
        decoder_length = self.label_length + horizon
        self.encoder_embedding = TokenEmbedding(history_length, channels, d_model, marks, dropout)
        self.decoder_embedding = TokenEmbedding(decoder_length, channels, d_model, marks, dropout)
        self.encoder = encoder
        self.decoder = decoder
        self.projection = nn.Linear(d_model, channels)

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
            history_marks: (batch, history_length, mark), needed unless ``marks=0``.
            forecast_marks: (batch, horizon, mark), needed unless ``marks=0``.
            origin: ignored.

        Returns:
            (batch, horizon, channel).
        """
        memory = self.encoder(self.encoder_embedding(history, history_marks))
        start = F.pad(last_steps(history, self.label_length), (0, 0, 0, self.horizon))
        marks = decoder_marks(history_marks, forecast_marks, self.label_length)
        tokens = self.decoder(self.decoder_embedding(start, marks), memory)
        return self.projection(last_steps(tokens, self.horizon))

    def dim_groups(self) -> list[DimGroup]:
        """Groups of channels that go together; encoder and decoder meet in the cross-attention only."""
        encoder, decoder = self.encoder, self.decoder
        memory = self.encoder_embedding.writes() + norm(encoder.norm)
        tokens = self.decoder_embedding.writes() + norm(decoder.norm) + columns(self.projection)
        groups = []
        for i, layer in enumerate(encoder.layers):
            groups += layer.dim_groups(f"encoder.{i}")
            memory += layer.reads()
        for reduction in encoder.reductions:
            memory += reduction.reads()
        for i, layer in enumerate(decoder.layers):
            groups += layer.dim_groups(f"decoder.{i}")
            tokens += layer.reads()
            memory += layer.cross_attention.remembers()
        width = self.projection.in_features
        encoder_width = self.encoder_embedding.value.out_channels
        streams = [DimGroup("encoder.stream", "stream", encoder_width, memory)]
        return groups + streams + [DimGroup("decoder.stream", "stream", width, tokens)]


class Transformer(EncoderDecoder):
    """Full attention, post-norm, causal mask in the decoder's self-attention.

    The defaults are the pruning study's (10,540,039 parameters with 7 channels, 96 -> 96).

    Args:
        history_length: steps of the input n_in.
        horizon: steps of the forecast n_out.
        channels: series c.
        marks: calendar features per step m, 0 for none.
        label_length: steps of the history repeated in the decoder input, None for half of the history.
        d_model: width of the residual stream.
        heads: attention heads.
        feed_forward: hidden width f.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        dropout: dropout of embeddings, attention weights and residual branches.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        channels: int,
        marks: int = 4,
        label_length: int | None = None,
        d_model: int = 512,
        heads: int = 8,
        feed_forward: int = 2048,
        encoder_layers: int = 2,
        decoder_layers: int = 1,
        dropout: float = 0.05,
    ) -> None:
        width = head_width(d_model, heads)

        def attention(*, causal: bool = False) -> AttentionLayer:
            return AttentionLayer(FullAttention(width, dropout, causal=causal), d_model, heads)

        super().__init__(
            Encoder(
                [EncoderLayer(attention(), d_model, feed_forward, dropout) for _ in range(encoder_layers)],
                norm=nn.LayerNorm(d_model),
            ),
            Decoder(
                [
                    DecoderLayer(attention(causal=True), attention(), d_model, feed_forward, dropout)
                    for _ in range(decoder_layers)
                ],
                norm=nn.LayerNorm(d_model),
            ),
            history_length=history_length,
            horizon=horizon,
            channels=channels,
            marks=marks,
            label_length=label_length,
            d_model=d_model,
            dropout=dropout,
        )
