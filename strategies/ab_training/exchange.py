"""What the groups tell each other at the end of an AB phase: one vector, one all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.ab_factors import ABFactor, Factors, Side
from parallel.flat import FlatTensors


@dataclass
class FactoredLayer:
    """A layer in an AB phase.

    Attributes:
        layer: With its factors as they are trained.
        start: Factors at the split, singular values shared between them.
        root: Square roots of the singular values where the trained factor has them all; else None.
    """

    layer: ABFactor
    start: Factors
    root: Tensor | None = None

    @torch.no_grad()
    def change(self) -> Tensor:
        """What training changed in the factor that is trained here, in the scale of ``start``."""
        if self.layer.mode == "a":
            trained = self.layer.a if self.root is None else self.layer.a / self.root
            return trained - self.start.a
        trained = self.layer.b if self.root is None else self.layer.b / self.root[:, None]
        return trained - self.start.b


@torch.no_grad()
def mean_factors(
    layers: Sequence[FactoredLayer],
    side: Side,
    num_ranks: Mapping[Side, int],
    common: Sequence[Tensor],
    all_reduce: Callable[[Tensor], None],
    wire_dtype: torch.dtype | None = None,
    anchors: Sequence[Tensor] | None = None,
    exact: Sequence[Tensor] = (),
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Average over the ranks what each of them has trained.

    Each rank contributes the change of its own factor and zeros for the other one, so P_A + P_B numbers serve every
    rule of combination: frozen copies are known to everybody.

    Args:
        layers: Factored layers, the same on all ranks.
        side: Factor that this rank trains.
        num_ranks: Ranks that train each factor.
        common: Tensors that every rank trains: their mean over all ranks is wanted.
        all_reduce: Sums a vector over all ranks in place.
        wire_dtype: Type on the wire of the factors and, as differences from ``anchors``, of the common tensors.
        anchors: Values of the common tensors that all ranks share; needed with ``wire_dtype``.
        exact: Further tensors to average that never cross the wire in fewer bits.

    Returns:
        Means (A, B) of every layer over the ranks that train them, and the means of ``common`` and ``exact``.
    """
    changes: list[Tensor] = []
    for entry in layers:
        own = entry.change()
        changes += [own, torch.zeros_like(entry.start.b)] if side == "a" else [torch.zeros_like(entry.start.a), own]
    common, exact = list(common), list(exact)
    if wire_dtype is None:
        sums = _summed([*changes, *common, *exact], all_reduce, None)
    else:
        differences = [c - a for c, a in zip(common, anchors, strict=True)]
        sums = _summed([*changes, *differences], all_reduce, wire_dtype) + _summed(exact, all_reduce, None)
    factors, rest = sums[: len(changes)], sums[len(changes) :]
    means = [
        (entry.start.a + a / num_ranks["a"], entry.start.b + b / num_ranks["b"])
        for entry, a, b in zip(layers, factors[::2], factors[1::2], strict=True)
    ]
    world = num_ranks["a"] + num_ranks["b"]
    averages = [value / world for value in rest]
    if wire_dtype is not None:
        averages[: len(common)] = [a + d for a, d in zip(anchors, averages[: len(common)], strict=True)]
    return means, averages


def _summed(
    tensors: Sequence[Tensor], all_reduce: Callable[[Tensor], None], wire_dtype: torch.dtype | None
) -> list[Tensor]:
    if not tensors:
        return []
    flat = FlatTensors(tensors)
    vector = flat.pack()
    sent = vector if wire_dtype is None else vector.to(wire_dtype)
    all_reduce(sent)
    return flat.split(sent.to(flat.dtype))
