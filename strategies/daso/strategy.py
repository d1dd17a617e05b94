"""The Lightning strategy: local steps, exchanges that overlap with them, and the state that a resumed run needs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from parallel.flat import FlatTensors
from strategies.cluster import loss_of
from strategies.daso.merging import MergeRule, merge
from strategies.daso.schedule import Plateau, Rule, Schedule, check
from strategies.exchange import WIRE_TYPES, Exchange, Mean, Variant
from strategies.replicas import ReplicaStrategy, SyncBuffers

log = logging.getLogger(__name__)


@dataclass
class Flight:
    """An exchange between its send step and its merge.

    Attributes:
        step: t of the send.
        wait: W.
        turn: k, which says who sends.
        mean: On its way; None on ranks that do not send, and when it was restored from a checkpoint.
        sent: What this rank has sent, its part.
        received: The mean, once it is there.
    """

    step: int
    wait: int
    turn: int
    mean: Mean | None = None
    sent: Tensor | None = None
    received: Tensor | None = None

    def advance(self) -> None:
        """Begin the second half of the way."""
        if self.mean is not None:
            self.mean.advance()

    def land(self) -> None:
        """Wait for the mean."""
        if self.mean is not None:
            self.sent, self.received, self.mean = self.mean.sent, self.mean.result(), None


class DASO(ReplicaStrategy):
    """Gradients are averaged within a node in every step, parameters between nodes in some, without waiting for them.

    Source: Coquelin et al., "Accelerating neural network training with distributed asynchronous and selective
    optimization (DASO)", Journal of Big Data 9 (2022), 14. With B = ``skip``, W = ``wait``, P nodes and the step t:

    - every B-th step the parameters x_i(t) of node i begin to travel;
    - W steps later every node merges the mean of what was sent. ``paper``: a convex combination,
      x_i <- (2 W x_i + sum_j x_j(t)) / (2 W + P), which gives up part of the local progress, nearly all of it for many
      nodes. ``delta``: the stale disagreement is added, x_i <- x_i + mean_j x_j(t) - x_i(t), which keeps it all;
    - warm-up and cool-down epochs exchange after every step and wait, as does the last step of every epoch.

    Logged metrics are those of all ranks together, whose networks differ while exchanges are under way.

    Args:
        warmup_epochs: Epochs that exchange after every step, or a fraction of all.
        cooldown_epochs: The same at the end.
        warmup_steps: Steps that do, for training that is counted in steps.
        skip: B in the first cycling epoch.
        wait: W in it; 0: every exchange is waited for (post-local SGD over nodes).
        max_skip: B after a plateau at B = 1.
        reduction: Divisor of B (and W) at a plateau of the training loss.
        plateau_patience: Epochs without improvement before that.
        plateau_threshold: Relative improvement of the loss that counts.
        schedule: ``paper``, ``code`` (its published program) or ``fixed``, see `Schedule`.
        merge_rule: ``delta`` or ``paper``.
        wire_dtype: Of exchanges that are waited for: ``fp32``, ``bf16``, ``fp16``.
        cycling_wire_dtype: Of the others.
        wire_encoding: What a 16-bit wire carries: ``delta`` the change since the nodes were last equal, which rounding
            hardly hurts; ``param`` the parameters themselves, as the published program does.
        exchange: ``rotate`` or ``sharded``, see `strategies.exchange.Exchange`.
        sync_optimizer: Whether momenta are averaged over nodes: ``never``, ``warm_end`` (once, after the warm-up) or
            ``every_blocking``.
        sync_buffers: See `ReplicaStrategy`.
        **cluster: Nodes, emulated network and DDP, see `ClusterStrategy`.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    def __init__(
        self,
        warmup_epochs: float = 4,
        cooldown_epochs: float = 4,
        warmup_steps: int = 0,
        skip: int = 4,
        wait: int = 1,
        max_skip: int = 8,
        reduction: int = 2,
        plateau_patience: int = 2,
        plateau_threshold: float = 0.05,
        schedule: Rule = "paper",
        merge_rule: MergeRule = "delta",
        wire_dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
        cycling_wire_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        wire_encoding: Literal["delta", "param"] = "delta",
        exchange: Variant = "rotate",
        sync_optimizer: Literal["never", "warm_end", "every_blocking"] = "never",
        sync_buffers: SyncBuffers = "mean",
        **cluster: Any,
    ) -> None:
        choices = {
            "merge_rule": (merge_rule, ("delta", "paper")), "wire_dtype": (wire_dtype, WIRE_TYPES),
            "cycling_wire_dtype": (cycling_wire_dtype, WIRE_TYPES),
            "wire_encoding": (wire_encoding, ("delta", "param")),
            "exchange": (exchange, ("rotate", "sharded")),
            "sync_optimizer": (sync_optimizer, ("never", "warm_end", "every_blocking")),
        }  # fmt: skip
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"strategy.{name}={value!r}: choose {', '.join(known)}")
        if warmup_steps < 0:
            raise ValueError(f"strategy.warmup_steps={warmup_steps}: it counts steps, 0 or more")
        check(warmup_epochs, cooldown_epochs, skip, wait, max_skip, reduction, schedule)
        Plateau(plateau_patience, plateau_threshold)
        super().__init__(sync_buffers, **cluster)
        self.warmup_epochs, self.cooldown_epochs, self.warmup_steps = warmup_epochs, cooldown_epochs, warmup_steps
        self.skip, self.wait, self.max_skip, self.reduction = skip, wait, max_skip, reduction
        self.plateau_patience, self.plateau_threshold = plateau_patience, plateau_threshold
        self.schedule_rule, self.merge_rule = schedule, merge_rule
        self.wire_dtype, self.cycling_wire_dtype = wire_dtype, cycling_wire_dtype
        self.wire_encoding, self.exchange_variant, self.sync_optimizer = wire_encoding, exchange, sync_optimizer
        self.drift: Tensor | float = 0.0  # of this node at the last exchange: ||x_i - mean|| / ||mean||
        self._flight: Flight | None = None
        self._anchor: Tensor | None = None  # what all nodes had when they were last equal
        self._exchange: Exchange | None = None
        self._cautious = False  # wait for every exchange until the epoch ends: the checkpoint was of another cluster
        self._losses = [0.0, 0.0]  # sum and number in this epoch

    # -------------------------------------------------------------------------------------------------- preparation

    @override
    def check_module(self) -> None:
        super().check_module()
        module, trainer = self.lightning_module, self.lightning_module.trainer
        for name, part in module.named_modules():
            if getattr(part, "sparse", False):
                raise ValueError(f"model: {name} has sparse gradients, which DASO does not exchange: set sparse=False")
        for optimizer in self.optimizers:
            if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
                raise ValueError("model.optimizer: DASO keeps an optimizer per node, it cannot be sharded over ranks")
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        self.schedule = Schedule(
            epochs, self.warmup_epochs, self.cooldown_epochs, self.skip, self.wait, self.max_skip, self.reduction,
            self.schedule_rule, Plateau(self.plateau_patience, self.plateau_threshold), self.cut_short,
        )  # fmt: skip
        self._flight, self._losses, self.equal, self._cautious = None, [0.0, 0.0], True, False
        _ = self.flat

    @override
    def parameters_changed(self) -> None:
        flat = self._flat
        assert flat is not None
        if self._flight is not None:
            raise RuntimeError(
                "parameters were exchanged while DASO had some of them under way: call synchronize before"
            )
        self._exchange = Exchange(self.groups, self.interconnect, flat.numel, self.exchange_variant)
        narrow = {self.wire_dtype, self.cycling_wire_dtype} - {"fp32"}
        self._anchor = self.packed_alike() if narrow and self.wire_encoding == "delta" else None

    # ----------------------------------------------------------------------------------------------------- training

    @override
    def on_train_start(self) -> None:
        known = self.steps
        super().on_train_start()
        trainer = self.lightning_module.trainer
        if trainer.max_steps > 0:  # the length of an epoch is known only now
            epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            epochs = math.ceil(trainer.max_steps / epoch)
            if self.schedule.epochs is None or epochs < self.schedule.epochs:
                self.schedule.set_length(epochs)
        if self.steps != known:  # the checkpoint of another strategy
            self.schedule.epoch = trainer.current_epoch
        if self.groups.num_nodes > 1 and self.global_rank == 0 and not self.schedule.cycles:
            log.info(
                "a training of %d epochs is all warm-up (%d) and cool-down (%d): nodes exchange parameters after every "
                "step and wait; only longer ones cycle, or with strategy.warmup_epochs=0 strategy.cooldown_epochs=0",
                self.schedule.epochs,
                self.schedule.warmup,
                self.schedule.cooldown,
            )

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        # Not what the schedule has counted: another strategy may have trained the first epochs.
        self.schedule.epoch = self.lightning_module.trainer.current_epoch

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        if (loss := loss_of(output)) is not None:
            self._losses[0] = self._losses[0] + loss.double()
            self._losses[1] += 1
        return output

    @override
    def after_step(self, last: bool) -> None:
        t = self.steps - 1
        if self.groups.num_nodes > 1:
            self.equal = False
            values = self.schedule.values
            flight = self._flight
            if flight is not None and (last or t - flight.step >= flight.wait):
                self._merge(t)
            blocking = values.skip == 0 or t < self.warmup_steps or self._cautious
            # What is waited for comes at the end of B steps, what travels at their begin.
            if blocking or last or (values.wait == 0 and (t + 1) % values.skip == 0):
                self._average()
            elif values.wait and t % values.skip == 0:
                if self._flight is not None:  # one at most is under way: receive first, then send
                    self._merge(t)
                self._send(t, values.wait)
            elif self._flight is not None and t - self._flight.step == (self._flight.wait + 1) // 2:
                self._flight.advance()  # half of the way
        if last and self.lightning_module.trainer.is_last_batch:
            self._end_epoch()

    def _send(self, t: int, wait: int) -> None:
        """Begin to exchange x(t)."""
        flight = Flight(t, wait, self.turn)
        flat = self.flat  # all ranks ask for it: where parameters were exchanged they build it anew together
        if self._exchange.mine(self.turn) is not None:
            part = self._exchange.part(self._encode(flat.pack(), self.cycling_wire_dtype), self.turn)
            flight.mean = self._exchange.start(part, WIRE_TYPES[self.cycling_wire_dtype])
        self._flight = flight
        self.turn += 1

    def _merge(self, t: int) -> None:
        """Merge what was sent W steps ago, and give all ranks of the node the result."""
        flight, self._flight = self._flight, None
        assert flight is not None
        flight.land()
        vector, part = self.flat.empty(), None
        if flight.received is not None:
            received, sent = flight.received, flight.sent
            if self._encodes(self.cycling_wire_dtype):
                anchor = self._exchange.part(self._anchor, flight.turn)
                received, sent = received + anchor, sent + anchor
            self.drift = (sent - received).norm() / received.norm().clamp_min(1e-30)
            part = self._exchange.part(self.flat.pack(vector), flight.turn)
            part = merge(self.merge_rule, part, sent, received, t - flight.step, self.groups.num_nodes)
        self.flat.unpack(self._exchange.distribute(part, flight.turn, vector))

    def _average(self) -> None:
        """Make all nodes equal, and wait for it."""
        vector = self.flat.pack()
        part = self._exchange.part(self._encode(vector, self.wire_dtype), self.turn)
        if part is not None:
            part = self._exchange.start(part, WIRE_TYPES[self.wire_dtype]).result()
            if self._encodes(self.wire_dtype):
                part = part + self._exchange.part(self._anchor, self.turn)
        mean = self._exchange.distribute(part, self.turn, vector)
        self.drift = (vector - mean).norm() / mean.norm().clamp_min(1e-30)
        self.flat.unpack(mean)
        if self._anchor is not None:
            self._anchor = self.flat.pack()  # parameters of 16 bits have rounded it
        self.average_buffers()
        if self.sync_optimizer == "every_blocking":
            self.average_optimizers()
        self.turn += 1
        self.equal = True

    def _encodes(self, wire_dtype: str) -> bool:
        return wire_dtype != "fp32" and self.wire_encoding == "delta"

    def _encode(self, vector: Tensor, wire_dtype: str) -> Tensor:
        return vector - self._anchor if self._encodes(wire_dtype) else vector

    def average_optimizers(self) -> None:
        """Average the floating-point state of the optimizers (momenta) over the nodes."""
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            averages = [
                [v for key, v in sorted(optimizer.state.get(p, {}).items())
                 if isinstance(v, Tensor) and v.is_floating_point() and key != "step"]
                for p in parameters
            ]  # fmt: skip
            tensors = [v for of_one in self._kept_everywhere(averages) for v in of_one]
            if tensors:
                flat = FlatTensors(tensors)
                flat.unpack(self.mean_over_nodes(flat.pack()))

    def _kept_everywhere(self, averages: list[list[Tensor]]) -> list[list[Tensor]]:
        """Those of the parameters of which every node keeps the same numbers.

        A node may have left out all steps of a parameter so far: its part of the network was not used there, or its
        scaled gradients have overflown.
        """
        if not averages:
            return []
        sizes = torch.tensor([sum(v.numel() for v in of_one) for of_one in averages], device=self.root_device)
        largest = torch.stack([sizes, -sizes])
        self.interconnect.all_reduce(largest, self.groups.across, self.local_size, dist.ReduceOp.MAX).wait()
        alike = (largest[0] == -largest[1]).tolist()
        return [of_one for of_one, same in zip(averages, alike, strict=True) if same]

    def _end_epoch(self) -> None:
        total = self._loss_sums()
        self._losses = [0.0, 0.0]
        warm = self.schedule.phase == "warmup"
        self.schedule.end_epoch(total[0] / total[1] if total[1] else math.inf)
        self._cautious = False
        if warm and self.schedule.phase != "warmup" and self.sync_optimizer == "warm_end":
            self.average_optimizers()

    def _loss_sums(self) -> list[float]:
        """Sum and number of the losses of all ranks in this epoch."""
        sums = torch.tensor([float(x) for x in self._losses], dtype=torch.float64, device=self.root_device)
        dist.all_reduce(sums)
        return sums.tolist()

    @override
    def synchronize(self) -> None:
        if self._flight is not None:
            self._merge(self.steps - 1)
        super().synchronize()
        if self._anchor is not None:
            self._anchor = self.flat.pack()

    @property
    def phase(self) -> str:
        """``warmup``, ``cycling`` or ``cooldown``; callbacks look for this."""
        return "warmup" if self.steps < self.warmup_steps else self.schedule.phase

    @override
    def report(self) -> dict[str, float]:
        values = self.schedule.values
        return {
            "daso/skip": values.skip,
            "daso/wait": values.wait,
            "daso/exchanges": self.turn,
            "daso/drift": float(self.drift),
        }

    @override
    def teardown(self) -> None:
        super().teardown()
        self._flight = None

    # -------------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"turn": self.turn, "schedule": self.schedule.state_dict(), "losses": self._loss_sums()}
        return super().state_dict() | own

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.turn = state["turn"]
        self.schedule.load_state_dict(state["schedule"])
        self._losses = list(state["losses"]) if self.global_rank == 0 else [0.0, 0.0]
        if (state["world_size"], state["local_size"]) != (self.groups.world.size, self.local_size):
            rank_zero_warn(
                f"the checkpoint was written by {state['world_size']} processes, {state['local_size']} a node, and "
                f"goes on with {self.groups.world.size}, {self.local_size} a node: "
                "exchanges are waited for in this epoch"
            )
            self._flight, self._cautious = None, True
        if self._anchor is not None and self.equal:
            self._anchor = self.flat.pack()

    @override
    def replica_state(self) -> dict[str, Any]:
        state = super().replica_state()
        if self._anchor is not None and not self.equal:
            state["anchor"] = self._anchor.cpu()
        flight = self._flight
        if flight is not None:
            flight.land()
            with self.ledger.paused():
                whole = [self._exchange.distribute(part, flight.turn, self.flat.empty()).cpu()
                         for part in (flight.sent, flight.received)]  # fmt: skip
            state["flight"] = {
                "step": flight.step, "wait": flight.wait, "turn": flight.turn, "sent": whole[0], "received": whole[1],
            }  # fmt: skip
        return state

    @override
    def load_replica_state(self, state: Mapping[str, Any]) -> None:
        super().load_replica_state(state)
        if "anchor" in state and self._anchor is not None:
            self._anchor = state["anchor"].to(self.root_device)
        if (saved := state.get("flight")) is not None:
            flight = Flight(saved["step"], saved["wait"], saved["turn"])
            flight.sent, flight.received = (
                self._exchange.part(saved[name].to(self.root_device), flight.turn) for name in ("sent", "received")
            )
            self._flight = flight
