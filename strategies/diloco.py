"""DiLoCo: nodes train alone, and an outer optimizer follows the mean of what they have learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from strategies.exchange import Exchange
from strategies.replicas import ReplicaStrategy, SyncBuffers


class DiLoCo(ReplicaStrategy):
    """Every H steps the mean change of the nodes' parameters is the gradient of one step of Nesterov's method.

    Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023, algorithm 1.
    With the common parameters a of the last exchange, the outer gradient is g = a - mean_i x_i; then
    v <- mu v + g, a <- a - lr (g + mu v), and every node goes on from a with the state of its own optimizer.
    The steps at the end of an epoch that do not fill H are exchanged then.

    Args:
        period: H, steps between two exchanges.
        outer_lr: lr of the outer step.
        outer_momentum: mu of the outer step.
        sync_buffers: See `ReplicaStrategy`.
        **cluster: Nodes, emulated network and DDP, see `ClusterStrategy`.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    def __init__(
        self,
        period: int = 16,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        sync_buffers: SyncBuffers = "mean",
        **cluster: Any,
    ) -> None:
        if period < 1:
            raise ValueError(f"strategy.period={period}: it counts steps between two exchanges, 1 or more")
        if not outer_lr > 0 or not 0 <= outer_momentum < 1:
            raise ValueError(
                f"strategy.outer_lr={outer_lr}, strategy.outer_momentum={outer_momentum}: a rate above 0 and a "
                "momentum from 0 to below 1 are needed (1 and 0: plain averaging)"
            )
        super().__init__(sync_buffers, **cluster)
        self.period, self.outer_lr, self.outer_momentum = period, outer_lr, outer_momentum
        self._since = 0  # steps since the last exchange
        self._anchor: Tensor | None = None
        self._velocity: Tensor | None = None

    @override
    def check_module(self) -> None:
        super().check_module()
        self.equal, self._since = True, 0
        _ = self.flat

    @override
    def parameters_changed(self) -> None:
        assert self._flat is not None
        self._exchange = Exchange(self.groups, self.interconnect, self._flat.numel, "rotate")
        self._anchor = self.packed_alike()
        self._velocity = torch.zeros_like(self._anchor)

    @override
    def after_step(self, last: bool) -> None:
        if self.groups.num_nodes == 1:
            return
        self.equal = False
        self._since += 1
        if last or self._since >= self.period:
            self.exchange()

    def exchange(self) -> None:
        """One outer step."""
        vector = self.flat.pack()
        anchor, velocity = self._anchor, self._velocity
        assert anchor is not None and velocity is not None
        part = self._exchange.part(vector, self.turn)
        if part is not None:
            part = self._exchange.start(part, None).result()
        gradient = anchor - self._exchange.distribute(part, self.turn, anchor)
        velocity.mul_(self.outer_momentum).add_(gradient)
        anchor.sub_(self.outer_lr * (gradient + self.outer_momentum * velocity))
        self.flat.unpack(anchor)
        self.average_buffers()
        self.turn, self._since, self.equal = self.turn + 1, 0, True

    @override
    def synchronize(self) -> None:
        if not self.equal and self.groups.num_nodes > 1:
            self.exchange()

    @override
    def report(self) -> dict[str, float]:
        return {"diloco/exchanges": self.turn, "diloco/outer_momentum_norm": float(self._velocity.norm())}

    # -------------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {"turn": self.turn, "since": self._since}
        if self.global_rank == 0:
            state |= {"anchor": self._anchor.cpu(), "velocity": self._velocity.cpu()}
        return super().state_dict() | state

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.turn = state["turn"]
        _ = self.flat
        self._velocity = state["velocity"].to(self.root_device)
        # Where the replicas could not be restored, training goes on from their mean.
        self._since = 0 if self.equal else state["since"]
        self._anchor = self.flat.pack() if self.equal else state["anchor"].to(self.root_device)
