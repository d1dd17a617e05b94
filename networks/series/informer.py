"""Informer: ProbSparse attention and distillation (Zhou et al., AAAI 2021; pruning study, section 2.4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.pruning.groups import Slice, columns, norm, rows
from networks.series.attention import AttentionLayer, head_width
from networks.series.transformer import Decoder, DecoderLayer, Encoder, EncoderDecoder, EncoderLayer


class ProbSparseAttention(nn.Module):
    """Only the u queries that look least uniform attend; the others receive the mean of the values.

    The score of query i is M_i = max_j s_ij - (1 / L_K) sum_j s_ij over U = factor * ceil(ln L_K) sampled keys j with
    s_ij = q_i k_j; the u = factor * ceil(ln L_Q) largest attend to all keys (under the mask). Other queries receive
    mean(V), or cumsum(V) under the mask. As in the reference the sampled keys of M ignore the mask, so the *choice* of
    queries in a masked layer can depend on later steps.

    The keys are drawn anew at every training step (global generator), but are fixed in evaluation (own generator), so
    that a forecast depends neither on the random state nor on the batches before it.

    Args:
        width: head width E the network is trained with; fixes the softmax scale.
        factor: factor of u and U.
        causal: mask later steps.
        seed: seed of the keys sampled in evaluation.
        reference_layout: reproduce the reference, which reads its (batch, heads, time, width) result as
            (batch, time, heads * width) and so mixes steps and heads before the output projection.
    """

    def __init__(
        self, width: int, factor: int = 3, *, causal: bool = False, seed: int = 0, reference_layout: bool = False
    ) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor={factor} must be at least 1 (the study uses 3)")
        self.scale = width**-0.5
        self.factor = factor
        self.causal = causal
        self.seed = seed
        self.reference_layout = reference_layout
        self._evaluation_keys: dict[tuple[int, int, torch.device], Tensor] = {}

    def num_selected(self, length: int) -> int:
        """min(length, factor * ceil(ln length)), at least 1."""
        return max(1, min(length, self.factor * math.ceil(math.log(length))))

    def sample_keys(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Key indices (L_Q, U), drawn with replacement."""
        size = (num_queries, self.num_selected(num_keys))
        if self.training:
            return torch.randint(num_keys, size, device=device)
        cached = (num_queries, num_keys, device)
        if cached not in self._evaluation_keys:
            # Drawn on the CPU: every device evaluates the same network.
            generator = torch.Generator().manual_seed(self.seed)
            self._evaluation_keys[cached] = torch.randint(num_keys, size, generator=generator, device="cpu").to(device)
        return self._evaluation_keys[cached]

    @torch.no_grad()
    def select_queries(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Indices (batch, heads, u) of the queries with the largest M; queries and keys (batch, heads, time, E).

        The choice has no gradient. All dot products are computed and the sampled ones picked: gathering the sampled
        keys first moves U times as much memory and is 5 times slower at 96 to 504 steps.
        """
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        sample = self.sample_keys(num_queries, num_keys, queries.device)
        scores = queries @ keys.mT
        sampled = scores.gather(-1, sample.expand(*scores.shape[:2], -1, -1))
        sparsity = sampled.amax(-1) - sampled.sum(-1) / num_keys
        return sparsity.topk(self.num_selected(num_queries), sorted=False).indices

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend: (batch, L_Q, heads, E), (batch, L_K, heads, E), (batch, L_K, heads, V) -> (batch, L_Q, heads, V)."""
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        if self.num_selected(num_queries) == num_queries:
            context = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal, scale=self.scale)
        else:
            chosen = self.select_queries(queries, keys)
            mask = None
            if self.causal:
                mask = chosen.unsqueeze(-1) >= torch.arange(num_keys, device=chosen.device)
            attended = F.scaled_dot_product_attention(
                queries.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, queries.shape[-1])),
                keys,
                values,
                attn_mask=mask,
                scale=self.scale,
            )
            rest = values.cumsum(2) if self.causal else values.mean(2, keepdim=True).expand(-1, -1, num_queries, -1)
            context = rest.to(attended.dtype).scatter(
                2, chosen.unsqueeze(-1).expand(-1, -1, -1, attended.shape[-1]), attended
            )
        if self.reference_layout:
            batch, heads, _, width = context.shape
            return context.reshape(batch, num_queries, heads, width)
        return context.transpose(1, 2)


class Distillation(nn.Module):
    """Halves the time axis between encoder layers: convolution, BatchNorm, ELU, max pooling.

    Args:
        d_model: width of the residual stream.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        # Padding 2 (not 1) is the reference's: n steps become n + 2 before and (n + 1) // 2 + 1 after pooling.
        self.convolution = nn.Conv1d(d_model, d_model, kernel_size=3, padding=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(d_model)
        self.pool = nn.MaxPool1d(kernel_size=3, stride=2, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time, d_model) -> (batch, (time + 1) // 2 + 1, d_model)."""
        return self.pool(F.elu(self.norm(self.convolution(tokens.transpose(1, 2))))).transpose(1, 2)

    def reads(self) -> list[Slice]:
        """Channels of the stream that it reads and writes."""
        return columns(self.convolution) + rows(self.convolution) + norm(self.norm)


class Informer(EncoderDecoder):
    """The Transformer with ProbSparse attention everywhere and distillation between encoder layers.

    The defaults are the pruning study's (11,328,007 parameters with 7 channels, 96 -> 96).

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
        dropout: dropout of embeddings and residual branches (attention weights have none).
        factor: factor of the number of sampled keys and attending queries.
        distil: distillation between encoder layers.
        sampling_seed: seed of the keys sampled in evaluation; each attention has its own stream.
        reference_layout: reproduce the reference's mixing of steps and heads (see `ProbSparseAttention`).
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
        factor: int = 3,
        distil: bool = True,
        sampling_seed: int = 0,
        reference_layout: bool = False,
    ) -> None:
        width = head_width(d_model, heads)

        def attention(stream: int, *, causal: bool = False) -> AttentionLayer:
            mechanism = ProbSparseAttention(
                width, factor, causal=causal, seed=sampling_seed + stream, reference_layout=reference_layout
            )
            return AttentionLayer(mechanism, d_model, heads)

        super().__init__(
            Encoder(
                [EncoderLayer(attention(i), d_model, feed_forward, dropout) for i in range(encoder_layers)],
                norm=nn.LayerNorm(d_model),
                reductions=[Distillation(d_model) for _ in range(encoder_layers - 1)] if distil else None,
            ),
            Decoder(
                [
                    DecoderLayer(attention(i, causal=True), attention(i + 1), d_model, feed_forward, dropout)
                    for i in range(encoder_layers, encoder_layers + 2 * decoder_layers, 2)
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
