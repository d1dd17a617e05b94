"""Splits weights into factors that are equal on all ranks; ranks share the decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.ab_factors import ABFactor, Decomposition, Factors, decompose, saves, split
from networks.tall_view import tall_shape
from parallel.collectives import Interconnect
from parallel.flat import FlatTensors
from parallel.groups import Group
from strategies.ab_training.ab_phase import Start
from strategies.ab_training.ranks import full_rank


@dataclass(frozen=True)
class Split:
    """The outcome for one weight.

    Attributes:
        layer: Its owner, still whole.
        rank: Singular values kept.
        start: Factors that share them; None: the weight stays whole, its factors would not be smaller.
        root: Square roots of the singular values, (rank,).
    """

    layer: ABFactor
    rank: int
    start: Factors | None = None
    root: Tensor | None = None


@torch.no_grad()
def split_weights(
    layers: Sequence[ABFactor],
    choose_rank: Callable[[ABFactor, Decomposition], int],
    always: bool,
    interconnect: Interconnect,
    world: Group,
    rank: int,
) -> list[Split]:
    """Split weights that are equal on all ranks. Called on all ranks together.

    Rank ``r`` decomposes the weights ``r, r + R, r + 2 R, ...`` of ``R`` ranks and broadcasts their factors, so that
    nobody depends on two machines rounding alike.

    Args:
        layers: Owners of the weights.
        choose_rank: Number of singular values to keep.
        always: Whether to split weights whose factors are not smaller, too.
        interconnect: Counts and delays.
        world: All ranks.
        rank: This one.

    Raises:
        ValueError: If a weight is not finite, on all ranks.
    """
    if not layers:
        return []
    for layer in layers:
        if not torch.isfinite(layer.weight).all():
            decompose(layer.weight, layer.path)  # raises
    device = layers[0].weight.device
    kept = torch.zeros(len(layers), dtype=torch.int64, device=device)
    own: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for i in range(rank, len(layers), world.size):
        parts = decompose(layers[i].weight, layers[i].path)
        kept[i] = choose_rank(layers[i], parts)
        own[i] = (*split(parts, int(kept[i])), parts.sigma[: int(kept[i])].sqrt())
    interconnect.all_reduce(kept, world).wait()
    ranks = kept.tolist()
    found = [Split(layer, r) for layer, r in zip(layers, ranks, strict=True)]
    under_way = []
    for source in range(world.size):
        chosen = [i for i in range(source, len(layers), world.size) if always or saves(layers[i].shape, ranks[i])]
        if not chosen:
            continue
        flat = FlatTensors([t for i in chosen for t in own.get(i) or _empty(layers[i], ranks[i])])
        vector = flat.pack()
        under_way.append((chosen, flat, vector, interconnect.broadcast(vector, world.ranks[source], world)))
    for chosen, flat, vector, transfer in under_way:
        transfer.wait()
        # Copies: views would keep the vector of all layers alive.
        parts = [part.clone() for part in flat.split(vector)]
        for i, a, b, root in zip(chosen, parts[::3], parts[1::3], parts[2::3], strict=True):
            found[i] = Split(layers[i], ranks[i], Factors(a, b), root)
    return found


def _empty(layer: ABFactor, rank: int) -> list[Tensor]:
    """Room for the factors and roots of another rank."""
    m, n = tall_shape(layer.shape)
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    return [torch.empty(shape, dtype=dtype, device=layer.weight.device) for shape in ((m, rank), (rank, n), (rank,))]


def starts_of(splits: Sequence[Split], with_roots: bool) -> list[Start]:
    """The layers that are trained in factors, with these.

    Args:
        splits: Of all weights.
        with_roots: Whether the trained factor takes all of the singular values.
    """
    return [(s.layer, s.start, s.root if with_roots else None) for s in splits if s.start is not None]


def ranks_of(splits: Sequence[Split]) -> dict[str, int]:
    """Rank of every weight by path, the full one where it stays whole."""
    return {s.layer.path: full_rank(s.layer) if s.start is None else s.rank for s in splits}
