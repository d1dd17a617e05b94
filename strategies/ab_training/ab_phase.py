"""What a rank holds between the split of the weights and the synchronisation that ends an AB phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.ab_factors import ABFactor, Factors, Side, Sync, combine, divergence, scale_to
from strategies.ab_training.exchange import FactoredLayer, mean_factors
from strategies.ab_training.optimizer_slots import OptimizerSlots
from strategies.cluster import running_state

AllReduce = Callable[[Tensor], None]
Start = tuple[ABFactor, Factors, Tensor | None]  # a layer, its factors at the split, roots of its singular values


@dataclass(frozen=True)
class Groups:
    """What a rank must know of the others.

    Attributes:
        side: Factor that this rank trains.
        num_ranks: Ranks that train each factor.
        sync: Rule of combination.
        wire_dtype: Type on the wire of what is exchanged at the end; None: full precision.
    """

    side: Side
    num_ranks: Mapping[Side, int]
    sync: Sync
    wire_dtype: torch.dtype | None = None

    @property
    def alone(self) -> bool:
        """Whether there is one group of all ranks, which are equal then."""
        return self.num_ranks["a"] == 0


class ABPhase:
    """Factors in the place of weights, and the way back.

    Making one splits nothing: it puts given factors into the module and the optimizers. `end` or `abandon` puts the
    weights back.

    Args:
        module: What is trained.
        slots: Its places in optimizers.
        groups: Of ranks.
        starts: Layers to factorise. Roots only where the trained factor takes all of the singular values.
    """

    def __init__(self, module: nn.Module, slots: OptimizerSlots, groups: Groups, starts: Sequence[Start]) -> None:
        self.module, self.slots, self.groups = module, slots, groups
        self.entries: list[FactoredLayer] = []
        for layer, start, root in starts:
            scaled = start if root is None else scale_to(start, root, groups.side)
            layer.factorize(scaled, groups.side)
            slots.to_factor(layer, scaled)
            self.entries.append(FactoredLayer(layer, start, root))
        factors = {id(f) for entry in self.entries for f in entry.layer.factors}
        # What every group trains, and what batch norms count and a module averages.
        self.common = [p for p in module.parameters() if p.requires_grad and id(p) not in factors]
        self.buffers = running_state(module)
        self.anchors = [p.detach().clone() for p in self.common] if groups.wire_dtype is not None else []
        self._evaluation: _Evaluation | None = None

    @property
    def layers(self) -> list[ABFactor]:
        """Factored ones."""
        return [entry.layer for entry in self.entries]

    # ------------------------------------------------------------------------------------------------------- the end

    @torch.no_grad()
    def end(self, all_reduce: AllReduce) -> tuple[float, float] | None:
        """Combine what all groups have learned to whole weights. Called on all ranks together.

        Returns:
            Cosine of the angle between what the two halves have learned, ``dA B0`` and ``A0 dB``, and the length of
            their sum relative to the weights; None where there are no halves.
        """
        moments = self.slots.moments(self.common)
        means, averages = self._means(all_reduce, moments, self.groups.wire_dtype)
        for tensor, mean in zip([*self.common, *self.buffers, *moments], averages, strict=True):
            tensor.copy_(mean)
        self._put_back([combine(self.groups.sync, e.start, *m) for e, m in zip(self.entries, means, strict=True)])
        return None if self.groups.alone or not means else self._angle(means)

    @torch.no_grad()
    def abandon(self) -> None:
        """Put the weights back without the other ranks, which may be gone."""
        if self._evaluation is not None:
            self.resume_training()
        self._put_back([entry.layer.a @ entry.layer.b for entry in self.entries])

    def _put_back(self, matrices: Sequence[Tensor]) -> None:
        for entry, matrix in zip(self.entries, matrices, strict=True):
            trained = entry.layer.trained
            entry.layer.detach(matrix)
            self.slots.to_weight(entry.layer, trained)

    def _means(
        self, all_reduce: AllReduce, moments: Sequence[Tensor] = (), wire_dtype: torch.dtype | None = None
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Means (A, B) of every layer; of the common parameters, of buffers, of moments."""
        if self.groups.alone:
            means = [(entry.start.a, entry.start.b + entry.change()) for entry in self.entries]
            return means, [t.detach().clone() for t in (*self.common, *self.buffers, *moments)]
        exact = [*self.buffers, *moments]
        return mean_factors(
            self.entries, self.groups.side, self.groups.num_ranks, self.common, all_reduce, wire_dtype, self.anchors,
            exact,
        )  # fmt: skip

    def _angle(self, means: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        parts = [divergence(e.start, a, b) for e, (a, b) in zip(self.entries, means, strict=True)]
        inner, of_a, of_b, start = (sum(values) for values in zip(*parts, strict=True))
        lengths = math.sqrt(of_a * of_b)
        together = math.sqrt(max(of_a + of_b + 2 * inner, 0.0) / start) if start else 0.0
        return (inner / lengths if lengths else 0.0), together

    # ----------------------------------------------------------------------------------------------------- consensus

    @torch.no_grad()
    def consensus(self, all_reduce: AllReduce) -> tuple[list[Tensor], list[Tensor]]:
        """What `end` would give now, without any change. Called on all ranks together.

        Returns:
            Tall views of the factored weights; the common parameters and the buffers.
        """
        means, averages = self._means(all_reduce)
        return [combine(self.groups.sync, e.start, *m) for e, m in zip(self.entries, means, strict=True)], averages

    def plain_state_dict(self, state: Mapping[str, Any], all_reduce: AllReduce) -> dict[str, Any]:
        """The module's ``state_dict`` with the consensus under plain names. Called on all ranks together."""
        if self._evaluation is not None:  # the module is the consensus
            return dict(state)
        matrices, averages = self.consensus(all_reduce)
        means = {id(t): mean for t, mean in zip([*self.common, *self.buffers], averages, strict=True)}
        named = [*self.module.named_parameters(remove_duplicate=False)]
        named += self.module.named_buffers(remove_duplicate=False)
        replaced = {name: {name: means[id(t)].to(t.dtype)} for name, t in named if id(t) in means}
        for layer, matrix in zip(self.layers, matrices, strict=True):
            whole = (matrix.T if layer.transposed else matrix).reshape(layer.shape).to(layer.weight.dtype)
            replaced |= {f"{layer.path}_a": {layer.path: whole}, f"{layer.path}_b": {}}
        return {k: v for name, value in state.items() for k, v in replaced.get(name, {name: value}).items()}

    # ---------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def show_consensus(self, all_reduce: AllReduce) -> None:
        """Put the consensus into the module until `resume_training`. Called on all ranks together."""
        matrices, averages = self.consensus(all_reduce)
        self._show(matrices, averages)

    def _show(self, matrices: Sequence[Tensor], averages: Sequence[Tensor]) -> None:
        own = [t.detach().clone() for t in (*self.common, *self.buffers)]
        factors = [entry.layer.detach(m) for entry, m in zip(self.entries, matrices, strict=True)]
        for tensor, mean in zip([*self.common, *self.buffers], averages, strict=True):
            tensor.detach().copy_(mean)
        self._evaluation = _Evaluation(factors, own, list(matrices), list(averages))

    @torch.no_grad()
    def resume_training(self) -> None:
        """Put back what `show_consensus` replaced; without effect otherwise."""
        if self._evaluation is None:
            return
        evaluation, self._evaluation = self._evaluation, None
        for entry, factors in zip(self.entries, evaluation.factors, strict=True):
            entry.layer.attach(*factors)
        for tensor, value in zip([*self.common, *self.buffers], evaluation.own, strict=True):
            tensor.detach().copy_(value)

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """The training state within the block: callbacks save checkpoints before an evaluation is over."""
        evaluation = self._evaluation
        self.resume_training()
        try:
            yield
        finally:
            if evaluation is not None:
                with torch.no_grad():
                    self._show(evaluation.matrices, evaluation.averages)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def starts(self) -> dict[str, list[Tensor]]:
        """Factors at the split and, where they are used, roots of the singular values; the same on all ranks."""
        return {e.layer.path: to_host([*e.start, *([] if e.root is None else [e.root])]) for e in self.entries}

    def group_state(self) -> dict[str, Any]:
        """What the ranks of one group share and others have not, on the CPU."""
        with self.as_in_training():
            return {
                "factors": {layer.path: to_host(layer.trained) for layer in self.layers},
                "common": to_host(self.common),
                "buffers": to_host(self.buffers),
                "anchors": to_host(self.anchors),
                "optimizers": [to_host(optimizer.state_dict()) for optimizer in self.slots.optimizers],
            }

    @torch.no_grad()
    def load_group_state(self, state: Mapping[str, Any]) -> None:
        """Continue as this group."""
        for layer in self.layers:
            layer.trained.copy_(state["factors"][layer.path])
        for tensors, saved in (
            (self.common, state["common"]),
            (self.buffers, state["buffers"]),
            (self.anchors, state["anchors"]),
        ):
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        for optimizer, saved in zip(self.slots.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@dataclass
class _Evaluation:
    """What an evaluation of the consensus must give back, and what it shows.

    Attributes:
        factors: Of every factored layer.
        own: Common parameters and buffers of this rank.
        matrices: Tall views of the consensus.
        averages: Common parameters and buffers of the consensus.
    """

    factors: list[tuple[nn.Parameter, nn.Parameter]]
    own: list[Tensor]
    matrices: list[Tensor]
    averages: list[Tensor]


def to_host(state: Any) -> Any:
    """A copy on the CPU that later steps do not change."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return (tuple if isinstance(state, tuple) else list)(to_host(value) for value in state)
    return state
