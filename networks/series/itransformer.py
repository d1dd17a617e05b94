"""iTransformer: attention over channels, each channel's window being one token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.pruning.groups import DimGroup, columns, norm, rows
from networks.series.normalization import InstanceNormalization, NoNormalization
from networks.series.patchtst import EncoderLayer


class ITransformer(nn.Module):
    """Inverted Transformer.

    Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting", ICLR 2024, section 3:
    one linear embedding of a whole window per channel, encoder layers without position, one linear map of each token
    to the horizon. The marks of the history are embedded like channels and may be attended to; their forecasts are
    dropped. The defaults are the authors' choice for ETTh.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        d_model: width of a token (of all heads together).
        heads: attention heads.
        feed_forward: hidden width of the feed-forward part.
        encoder_layers: number of encoder layers.
        dropout: in embedding, attention and feed-forward part.
        use_marks: let the channels attend to the marks of the history where the batch has them.
        instance_norm: standardise every window by its own mean and variance.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        d_model: int = 256,
        heads: int = 8,
        feed_forward: int = 256,
        encoder_layers: int = 2,
        dropout: float = 0.1,
        use_marks: bool = True,
        instance_norm: bool = True,
    ) -> None:
        super().__init__()
        self.use_marks = use_marks
        self.normalization = InstanceNormalization() if instance_norm else NoNormalization()
        self.embedding = nn.Sequential(nn.Linear(history_length, d_model), nn.Dropout(dropout))
        layers = (
            EncoderLayer(d_model, heads, feed_forward, dropout, attention_dropout=dropout)
            for _ in range(encoder_layers)
        )
        self.encoder = nn.Sequential(*layers, nn.LayerNorm(d_model))
        self.head = nn.Linear(d_model, horizon)

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
            history_marks: `(batch, time, mark)`, further tokens to attend to when `use_marks`.
            forecast_marks: ignored.
            origin: ignored.
        """
        channels = history.shape[2]
        variates, statistics = self.normalization.normalize(history)
        if self.use_marks and history_marks is not None:
            variates = torch.cat([variates, history_marks], dim=2)
        tokens = self.encoder(self.embedding(variates.mT))
        return self.normalization.denormalize(self.head(tokens[:, :channels]).mT, statistics)

    def dim_groups(self) -> list[DimGroup]:
        """Groups of channels that go together."""
        stream = rows(self.embedding[0]) + norm(self.encoder[-1]) + columns(self.head)
        groups = []
        for i, layer in enumerate(self.encoder[:-1]):
            groups += layer.dim_groups(f"encoder.{i}")
            stream += layer.reads()
        return [*groups, DimGroup("stream", "stream", self.head.in_features, stream)]
