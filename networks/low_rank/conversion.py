"""Networks between their dense and their factored form: conversion, update of bases, checkpoints, export."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from networks.low_rank.layers import (
    LowRankAttentionOutput,
    LowRankEmbedding,
    LowRankWeight,
    _ConvForward,
    _LinearForward,
    factored_weights,
    weight_of,
)
from networks.low_rank.optimizer_state import StateMode, exchange
from networks.tall_view import from_tall

Form = Literal["dense", "folded", "factored"]


# ------------------------------------------------------------------------------------------------- one weight at a time


def convert(
    weight: LowRankWeight,
    decomposition: tuple[Tensor, Tensor, Tensor],
    optimizers: Iterable[Optimizer] = (),
    opt_state: StateMode = "rotate",
    rank: int | None = None,
    train_bases: bool = False,
) -> None:
    """Make a dense weight ``U diag(s) V^T``, cut to a rank if one is given.

    Args:
        weight: A dense weight.
        decomposition: Its reduced SVD ``(U, s, V)`` (`networks.low_rank.basis.decompose`).
        optimizers: That may hold it.
        opt_state: What happens to their state.
        rank: Rank to keep; None: all, which leaves the function as it is.
        train_bases: Train U and V as well; they join the group of the weight.
    """
    u, s, v = (t[..., :rank] for t in decomposition)
    old = weight.trained
    weight.assign(u, torch.diag(s), v, train_bases)
    more = (weight.u, weight.v) if train_bases else ()
    exchange(optimizers, old, weight.sigma, opt_state, u, v, converting=True, more=more)


def update_basis(
    weight: LowRankWeight,
    decomposition: tuple[Tensor, Tensor, Tensor],
    rank: int,
    optimizers: Iterable[Optimizer] = (),
    opt_state: StateMode = "rotate",
) -> None:
    """Turn the bases by an SVD of Sigma and keep the first ``rank`` directions: ``U U'``, ``diag(s')``, ``V V'``.

    Without a cut this leaves the function as it is.

    Args:
        weight: A factored weight.
        decomposition: SVD ``(U', s', V')`` of its Sigma.
        rank: How many directions to keep.
        optimizers: That may hold Sigma.
        opt_state: What happens to their state.
    """
    left, s, right = (t[..., :rank] for t in decomposition)
    old = weight.trained
    u = weight.u.detach().to(left.dtype) @ left
    v = weight.v.detach().to(right.dtype) @ right
    weight.assign(u, torch.diag(s), v, weight.trains_bases)
    exchange(optimizers, old, weight.sigma, opt_state, left, right, converting=False)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def structure(network: nn.Module) -> list[dict[str, Any]]:
    """Which weights are factored, as plain data for a checkpoint."""
    return [
        {
            "name": w.name,
            "shape": list(w.shape),
            "transposed": w.transposed,
            "rank": w.rank,
            "bases": w.trains_bases,  # whether U and V are trained
            "pair": _pair_kind(w),
        }
        for w in factored_weights(network)
    ]


def _pair_kind(weight: LowRankWeight) -> str | None:
    """What kind of pair of plain layers can stand for a factored layer with fewer numbers; None: no pair."""
    layer = weight.module
    if not weight.path or weight.rank * (weight.m + weight.n) >= weight.m * weight.n:
        return None
    if isinstance(layer, LowRankAttentionOutput):  # attention reads its weight
        return None
    if isinstance(layer, _ConvForward):
        return "conv" if layer.groups == 1 else None
    kinds = {_LinearForward: "linear", LowRankEmbedding: "embedding"}
    return next((kind for cls, kind in kinds.items() if isinstance(layer, cls)), None)


def rebuild(network: nn.Module, layers: Sequence[Mapping[str, Any]]) -> None:
    """Give a network the structure of a checkpoint, so that its ``state_dict`` fits; values are to be loaded.

    Weights that the checkpoint has dense become dense.

    Raises:
        ValueError: The network has no such weight, or one of another shape.
    """
    wanted = {layer["name"]: layer for layer in layers}
    for weight in list(factored_weights(network)):
        if weight.name not in wanted:
            weight.restore()
    for name, layer in wanted.items():
        try:
            weight = weight_of(network, name)
        except AttributeError as error:
            raise ValueError(f"the checkpoint has the low-rank weight {name}, which this network lacks.") from error
        if list(weight.shape) != list(layer["shape"]):
            raise ValueError(
                f"the checkpoint has {name} with shape {list(layer['shape'])}, this network with {list(weight.shape)}."
            )
        rank, like = layer["rank"], weight.trained.detach()
        if weight.rank != rank or not weight.converted or weight.trains_bases != layer["bases"]:
            sizes = (weight.m, rank), (rank, rank), (weight.n, rank)
            weight.assign(*(like.new_zeros(size) for size in sizes), train_bases=layer["bases"])


# --------------------------------------------------------------------------------------------------------------- export


def _keys(name: str, state: Mapping[str, Tensor]) -> tuple[str, str, str]:
    """Names of U, Sigma and V of a weight in a ``state_dict``."""
    path, _, tensor = name.rpartition(".")
    prefix = f"{path}." if path else ""
    if f"{prefix}sigma" in state and tensor == "weight":
        return f"{prefix}u", f"{prefix}sigma", f"{prefix}v"
    held = f"{prefix}parametrizations.{tensor}"
    return f"{held}.0.u", f"{held}.original", f"{held}.0.v"


def dense_state(state: Mapping[str, Tensor], layers: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The ``state_dict`` of the untouched network, from that of a factored one and its `structure`."""
    state = dict(state)
    for layer in layers:
        keys = _keys(layer["name"], state)
        u, sigma, v = (state.pop(key) for key in keys)
        state[layer["name"]] = from_tall(u @ sigma @ v.mT, layer["shape"], layer["transposed"]).contiguous()
    return state


def folded_state(state: Mapping[str, Tensor], layers: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The ``state_dict`` of `fold` of a network, from that of the factored one and its `structure`."""
    state = dict(state)
    for layer in layers:
        name, rank = layer["name"], layer["rank"]
        if layer["pair"] is None:
            state = dense_state(state, [layer])
            continue
        u, sigma, v = (state.pop(key) for key in _keys(name, state))
        path = name.rpartition(".")[0]
        # W = up (out, r) @ down (r, rest)
        up, down = (v @ sigma.mT, u.mT) if layer["transposed"] else (u, sigma @ v.mT)
        if layer["pair"] == "embedding":
            up, down = down.mT, up
        elif layer["pair"] == "conv":
            ones = [1] * (len(layer["shape"]) - 2)
            up, down = up.reshape(*up.shape, *ones), down.reshape(rank, *layer["shape"][1:])
        state[f"{path}.down.weight"], state[f"{path}.up.weight"] = down.contiguous(), up.contiguous()
        if f"{path}.bias" in state:
            state[f"{path}.up.bias"] = state.pop(f"{path}.bias")
    return state


def fold(network: nn.Module) -> nn.Module:
    """A copy with every factored layer as two plain layers, ``down`` and ``up``: ``r (m + n)`` numbers, no Sigma.

    Weights that no pair of layers can stand for (projections of attention, grouped convolutions, somebody's own
    tensors) and those whose pair would be larger become dense.
    """
    network = copy.deepcopy(network)
    layers, state = structure(network), network.state_dict()
    for layer in layers:
        weight = weight_of(network, layer["name"])
        if layer["pair"] is None:
            weight.restore()
            continue
        parent, _, name = weight.path.rpartition(".")
        setattr(network.get_submodule(parent), name, _pair(weight.module, layer["pair"]))
    network.load_state_dict(folded_state(state, layers))
    return network


class Pair(nn.Sequential):
    """Two plain layers ``down`` and ``up`` in the place of one; those who read its weight get the product."""

    @property
    def weight(self) -> Tensor:
        """Weight of the one layer that the pair stands for."""
        down = self.down.weight
        if isinstance(self.down, nn.Embedding):
            return down @ self.up.weight.mT
        return (self.up.weight.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """Bias of the second layer."""
        return self.up.bias


def _pair(layer: Any, kind: str) -> Pair:
    """Two plain layers of the right sizes and options."""
    bias = getattr(layer, "bias", None) is not None
    if kind == "embedding":
        down: nn.Module = nn.Embedding(layer.num_embeddings, layer.rank, layer.padding_idx)
        up: nn.Module = nn.Linear(layer.rank, layer.embedding_dim, bias=False)
    elif kind == "linear":
        down = nn.Linear(layer.in_features, layer.rank, bias=False)
        up = nn.Linear(layer.rank, layer.out_features, bias=bias)
    else:
        options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        down = layer.dense_class(layer.in_channels, layer.rank, layer.kernel_size, bias=False, **options)
        up = layer.dense_class(layer.rank, layer.out_channels, 1, bias=bias)
    pair = Pair()
    pair.add_module("down", down)
    pair.add_module("up", up)
    return pair.to(device=layer.sigma.device, dtype=layer.sigma.dtype).train(layer.training)


def exported(checkpoint: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """A checkpoint for use after training: weights in one of three forms, no state of optimizers, loops or callbacks.

    ``dense`` loads into the untouched network with ``strict=True``. ``factored`` loads after `rebuild`, ``folded``
    into `fold` of a network that was rebuilt.

    Args:
        checkpoint: With ``state_dict`` and, where weights are factored, ``low_rank``.
        form: The form.
    """
    layers = checkpoint.get("low_rank", {}).get("layers", [])
    dropped = {"optimizer_states", "lr_schedulers", "loops", "callbacks", "rng_states", "plateau_metrics", "low_rank"}
    result = {key: value for key, value in checkpoint.items() if key not in dropped}
    if form == "dense":
        return result | {"state_dict": dense_state(checkpoint["state_dict"], layers)}
    if form == "folded":
        result["state_dict"] = folded_state(checkpoint["state_dict"], layers)
    return result | {"low_rank": {"layers": layers, "form": form}}
