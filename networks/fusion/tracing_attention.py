"""Attention, which is followed as a module: its channels are heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from networks.fusion.tracer import Along, Tracer, Value, register_module
from networks.vit import Attention


@register_module(Attention)
def _attention(tracer: Tracer, path: str, module: Attention, result: Tensor, x: Tensor) -> Value | None:
    """Heads are the channels between queries, keys, values and the output: each has rows in all three of them."""
    prefix = f"{path}." if path else ""
    size = module.proj.in_features // module.heads
    node = tracer.new(module.heads, path)
    along = Along(((node, size),), outer=3)
    tracer.bind(f"{prefix}qkv.weight", 0, along, "maker")
    bias = None if module.qkv.bias is None else f"{prefix}qkv.bias"
    if bias:
        tracer.bind(bias, 0, along, "bias")
    return _heads(tracer, path, node, size, x, f"{prefix}qkv.weight", bias, module.proj, f"{prefix}proj")


@register_module(nn.MultiheadAttention)
def _multihead_attention(
    tracer: Tracer,
    path: str,
    module: nn.MultiheadAttention,
    result: tuple[Tensor, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    **__: Any,
) -> Value | None:
    if module.in_proj_weight is None or module.bias_k is not None:
        tracer.refuse("has keys or values of another width, or a bias of its own")
    if key is not query or value is not query:
        tracer.refuse("attends to something else than its queries")
    prefix = f"{path}." if path else ""
    node = tracer.new(module.num_heads, path)
    along = Along(((node, module.head_dim),), outer=3)
    tracer.bind(f"{prefix}in_proj_weight", 0, along, "maker")
    if module.in_proj_bias is not None:
        tracer.bind(f"{prefix}in_proj_bias", 0, along, "bias")
    made = _heads(
        *(tracer, path, node, module.head_dim, query, f"{prefix}in_proj_weight", None),
        *(module.out_proj, f"{prefix}out_proj"),
        fitted=False,
    )
    tracer._note(result[0], made)
    return None


def _heads(
    tracer: Tracer,
    path: str,
    node: int,
    size: int,
    x: Tensor,
    weight: str,
    bias: str | None,
    out: nn.Linear,
    out_path: str,
    fitted: bool = True,
) -> Value:
    value = tracer.value(x)
    if value is not None:
        if value.dim != x.ndim - 1:
            tracer.refuse("attends along the dimension of the channels")
        tracer.bind(weight, 1, value.along, "reader")
    tracer.heads[path] = node
    tracer.bind(f"{out_path}.weight", 1, Along(((node, size),)), "reader")
    made = tracer.made(f"{out_path}.weight", 0, out.out_features)
    out_bias = None if out.bias is None else f"{out_path}.bias"
    if out_bias:
        tracer.bind(out_bias, 0, made, "bias")
    if fitted:
        tracer.layer("linear", weight, bias)
        tracer.layer("linear", f"{out_path}.weight", out_bias)
    return Value(x.ndim - 1, made)
