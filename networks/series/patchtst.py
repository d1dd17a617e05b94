"""PatchTST: attention over patches of one channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks.pruning.groups import DimGroup, Slice, columns, norm, rows
from networks.series.normalization import InstanceNormalization, NoNormalization


class FeatureBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last dimension of `(batch, token, feature)`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise every feature over the batch and all tokens."""
        return super().forward(tokens.flatten(0, 1)).view_as(tokens)


class EncoderLayer(nn.Module):
    """Transformer encoder layer with GELU and the normalisation after each residual sum.

    Written out, because the fused inference path of `nn.TransformerEncoderLayer` skips its submodules: it allows no
    other norm, and hides the layer from FLOP counters and from pruning.

    Args:
        d_model: width of a token (of all heads together).
        heads: number of heads.
        feed_forward: width of the hidden layer of the feed-forward part.
        dropout: on both residual branches and on the hidden layer.
        norm: "layer" or "batch".
        attention_dropout: on the attention weights.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        feed_forward: int,
        dropout: float,
        norm: str = "layer",
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"heads={heads} does not divide d_model={d_model}: choose a divisor")
        make_norm = {"layer": nn.LayerNorm, "batch": FeatureBatchNorm}[norm]
        self.heads = heads
        self.scale = (d_model // heads) ** -0.5  # that of the training, also where heads were made narrower
        self.attention_dropout = attention_dropout
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, feed_forward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feed_forward, d_model)
        )
        self.attention_norm = make_norm(d_model)
        self.feed_forward_norm = make_norm(d_model)
        self.dropout = nn.Dropout(dropout)

    def attend(self, tokens: Tensor) -> Tensor:
        """Multi-head self-attention without a mask, `(batch, token, d_model)`."""
        # three times (batch, head, token, d_model / heads)
        joint = self.query_key_value(tokens)
        inner = self.output.in_features  # of the values; queries and keys may have been made narrower by pruning
        outer = (joint.shape[-1] - inner) // 2
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in joint.split((outer, outer, inner), dim=-1)
        )
        dropout = self.attention_dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.output(attended.transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(batch, token, d_model)` to the same shape."""
        tokens = self.attention_norm(tokens + self.dropout(self.attend(tokens)))
        return self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))

    def dim_groups(self, name: str) -> list[DimGroup]:
        """Groups that end within the layer."""
        joint, inner, heads = self.query_key_value, self.output.in_features, self.heads
        outer = (joint.out_features - inner) // 2
        queries_and_keys = rows(joint) + rows(joint, outer)
        values = rows(joint, 2 * outer) + columns(self.output)
        expand, contract = self.feed_forward[0], self.feed_forward[-1]
        return [
            DimGroup(f"{name}.attention.qk", "qk", outer // heads, queries_and_keys, heads, [self]),
            DimGroup(f"{name}.attention.v", "v", inner // heads, values, heads, [self]),
            DimGroup(f"{name}.ff", "ff", expand.out_features, rows(expand) + columns(contract)),
        ]

    def reads(self) -> list[Slice]:
        """Channels of the stream."""
        attention = columns(self.query_key_value) + rows(self.output) + norm(self.attention_norm)
        hidden = columns(self.feed_forward[0]) + rows(self.feed_forward[-1])
        return attention + hidden + norm(self.feed_forward_norm)


class PatchTST(nn.Module):
    """Channel-independent Transformer encoder over overlapping patches.

    Nie et al., "A Time Series is Worth 64 Words: Long-term Forecasting with Transformers", ICLR 2023, section 3.1:
    instance normalisation, the last value repeated `stride` times at the end, patches, linear embedding plus learned
    position, encoder with batch normalisation, and one linear map of the flattened tokens. The defaults are the
    paper's choice for small data (ETTh); for large data it takes d_model 128, heads 16, feed_forward 256, dropout 0.2.
    Attention is the plain one of the paper; the residual attention scores of the authors' program are not built.

    Args:
        history_length: steps of the window.
        horizon: steps to forecast.
        patch_length: steps of a patch.
        stride: steps between the starts of two patches.
        d_model: width of a token (of all heads together).
        heads: attention heads.
        feed_forward: hidden width of the feed-forward part.
        encoder_layers: number of encoder layers.
        dropout: in the encoder.
        head_dropout: before the final map.
        instance_norm: standardise every window by its own mean and variance.
    """

    def __init__(
        self,
        history_length: int,
        horizon: int,
        patch_length: int = 16,
        stride: int = 8,
        d_model: int = 16,
        heads: int = 4,
        feed_forward: int = 128,
        encoder_layers: int = 3,
        dropout: float = 0.3,
        head_dropout: float = 0.0,
        instance_norm: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= stride <= patch_length:
            raise ValueError(f"stride={stride} must lie in 1..patch_length={patch_length}: else steps are never seen")
        if patch_length > history_length:
            raise ValueError(
                f"patch_length={patch_length} exceeds history_length={history_length}: choose a shorter patch"
            )
        self.patch_length = patch_length
        self.stride = stride
        num_patches = (history_length - patch_length) // stride + 2  # one more than fit: the padded end
        self.normalization = InstanceNormalization() if instance_norm else NoNormalization()
        self.embedding = nn.Linear(patch_length, d_model)
        self.position = nn.Parameter(torch.empty(num_patches, d_model).uniform_(-0.02, 0.02))
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Sequential(
            *(EncoderLayer(d_model, heads, feed_forward, dropout, norm="batch") for _ in range(encoder_layers))
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(head_dropout), nn.Linear(num_patches * d_model, horizon))

    def forward(
        self,
        history: Tensor,
        history_marks: Tensor | None = None,
        forecast_marks: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Map `(batch, time, channel)` to `(batch, horizon, channel)`; marks and origin are not used."""
        normalized, statistics = self.normalization.normalize(history)
        padded = functional.pad(normalized.mT, (0, self.stride), mode="replicate")  # (batch, channel, time + stride)
        patches = padded.flatten(0, 1).unfold(-1, self.patch_length, self.stride)  # (batch * channel, patch, step)
        tokens = self.encoder(self.dropout(self.embedding(patches) + self.position))
        forecast = self.head(tokens).unflatten(0, (history.shape[0], history.shape[2])).mT
        return self.normalization.denormalize(forecast, statistics)

    def dim_groups(self) -> list[DimGroup]:
        """Groups of channels that go together; the head reads those of the stream once per patch."""
        width = self.embedding.out_features
        stream = [*rows(self.embedding), Slice(self, "position", 1)]
        groups = []
        for i, layer in enumerate(self.encoder):
            groups += layer.dim_groups(f"encoder.{i}")
            stream += layer.reads()
        stream += [part for i in range(len(self.position)) for part in columns(self.head[-1], i * width)]
        return [*groups, DimGroup("stream", "stream", width, stream)]
