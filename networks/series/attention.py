"""Multi-head attention in two parts: projections (`AttentionLayer`) around an exchangeable mechanism.

A mechanism maps queries (..., L_Q, heads, E), keys (..., L_K, heads, E), values (..., L_K, heads, V) to
(..., L_Q, heads, V). Widths are read from the projections at run time, so a network whose heads were made narrower by
structured pruning needs no other code; what was trained at the full width (the softmax scale) is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.pruning.groups import DimGroup, Slice, columns, rows


def head_width(d_model: int, heads: int) -> int:
    """Width E of one head, d_model / heads."""
    if heads < 1 or d_model % heads:
        raise ValueError(f"heads={heads} does not divide d_model={d_model}: choose a divisor of d_model")
    return d_model // heads


class FullAttention(nn.Module):
    """Scaled dot-product attention over all keys.

    Args:
        width: head width E the network is trained with; fixes the softmax scale 1/sqrt(E), also after pruning.
        dropout: dropout of the attention weights.
        causal: a query attends to its own and earlier steps only.
    """

    def __init__(self, width: int, dropout: float = 0.0, *, causal: bool = False) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.dropout = dropout
        self.causal = causal

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend; leading dimensions broadcast, e.g. routers shared by the batch."""
        leading = torch.broadcast_shapes(queries.shape[:-3], keys.shape[:-3])
        # One batch dimension: the fused kernels take (N, heads, time, width) only.
        queries, keys, values = (
            x.expand(*leading, *x.shape[-3:]).flatten(0, -4).transpose(1, 2) for x in (queries, keys, values)
        )
        dropout = self.dropout if self.training else 0.0
        if dropout and queries.device.type == "cpu":
            attended = attend_with_dropout(queries, keys, values, dropout, causal=self.causal, scale=self.scale)
        else:
            attended = F.scaled_dot_product_attention(
                queries, keys, values, dropout_p=dropout, is_causal=self.causal, scale=self.scale
            )
        return attended.transpose(1, 2).unflatten(0, leading)


def attend_with_dropout(
    queries: Tensor, keys: Tensor, values: Tensor, dropout: float, *, causal: bool, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` with dropout of the attention weights, for CPUs.

    Torch's fused CPU kernel has no dropout, and its other one draws a floating-point number per attention weight. Here
    a 64-bit random number decides about four weights, so that the probability is a multiple of 2^-16; a training step
    of the pruning study's small Transformer is a fifth faster.

    Args:
        queries: (..., L_Q, width).
        keys: (..., L_K, width).
        values: (..., L_K, width of values).
        dropout: probability that an attention weight is dropped, below 1.
        causal: a query attends to its own and earlier steps only.
        scale: of the scores.

    Returns:
        (..., L_Q, width of values).
    """
    scores = (queries * scale) @ keys.transpose(-2, -1)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    weights = scores.softmax(-1)
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    bits = torch.empty(-(-weights.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    gone = bits[: weights.numel()].view(weights.shape) < dropped - 2**15
    return weights.masked_fill(gone, 0) @ values / (1 - dropped / 2**16)


class AttentionLayer(nn.Module):
    """Query, key, value and output projections around an attention mechanism.

    Args:
        mechanism: maps projected queries, keys, values to attended values (module docstring).
        d_model: width of the residual stream.
        heads: number of heads.
        width: head width, d_model / heads by default.
    """

    def __init__(self, mechanism: nn.Module, d_model: int, heads: int, width: int | None = None) -> None:
        super().__init__()
        inner = heads * (head_width(d_model, heads) if width is None else width)
        self.heads = heads
        self.mechanism = mechanism
        self.query_projection = nn.Linear(d_model, inner)
        self.key_projection = nn.Linear(d_model, inner)
        self.value_projection = nn.Linear(d_model, inner)
        self.out_projection = nn.Linear(inner, d_model)

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from ``tokens`` (..., L_Q, d_model) to ``memory`` (..., L_K, d_model); to themselves without one."""
        memory = tokens if memory is None else memory
        queries = self.query_projection(tokens).unflatten(-1, (self.heads, -1))
        keys = self.key_projection(memory).unflatten(-1, (self.heads, -1))
        values = self.value_projection(memory).unflatten(-1, (self.heads, -1))
        return self.out_projection(self.mechanism(queries, keys, values).flatten(-2))

    def dim_groups(self, name: str) -> list[DimGroup]:
        """Channels of queries and keys, and channels of the values.

        Raises:
            ValueError: The mechanism mixes steps and heads, so that no channel can be removed.
        """
        refuse_reference_layout(self.mechanism)
        q, k, v, out = self.query_projection, self.key_projection, self.value_projection, self.out_projection
        width = q.out_features // self.heads
        return [
            DimGroup(f"{name}.qk", "qk", width, rows(q) + rows(k), self.heads, [self]),
            DimGroup(f"{name}.v", "v", v.out_features // self.heads, rows(v) + columns(out), self.heads, [self]),
        ]

    def reads(self) -> list[Slice]:
        """Channels of the stream that the queries come from and the output goes to."""
        return columns(self.query_projection) + rows(self.out_projection)

    def remembers(self) -> list[Slice]:
        """Channels of the stream that is attended to."""
        return columns(self.key_projection) + columns(self.value_projection)


def refuse_reference_layout(module: nn.Module) -> None:
    """Raise ValueError where a mechanism mixes steps and heads, as some reference implementations do."""
    if getattr(module, "reference_layout", False):
        raise ValueError(
            f"reference_layout=true: {type(module).__name__} mixes time steps and heads, so none of its channels can "
            "be removed; set reference_layout=false, or prune single weights (callbacks.pruning.method=l1)"
        )


class FeedForward(nn.Module):
    """Two-layer perceptron with GELU, the same at every time step.

    Args:
        d_model: width of the residual stream.
        hidden: hidden width f.
        dropout: dropout after the activation and after the second map.
        bias: False in the decomposition networks, whose blocks have no offsets.
    """

    def __init__(self, d_model: int, hidden: int, dropout: float = 0.05, *, bias: bool = True) -> None:
        super().__init__()
        self.expand = nn.Linear(d_model, hidden, bias=bias)
        self.contract = nn.Linear(hidden, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform (..., d_model)."""
        return self.dropout(self.contract(self.dropout(F.gelu(self.expand(tokens)))))

    def dim_groups(self, name: str) -> list[DimGroup]:
        """The hidden channels."""
        return [DimGroup(f"{name}.ff", "ff", self.expand.out_features, rows(self.expand) + columns(self.contract))]

    def reads(self) -> list[Slice]:
        """Channels of the stream that it reads and writes."""
        return columns(self.expand) + rows(self.contract)
