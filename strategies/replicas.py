"""Strategies whose nodes hold replicas of the network that differ between synchronisations.

Within a node this is ordinary data parallelism. A subclass decides when replicas meet. Everything outside of training
(checkpoints, validation, the end) sees their mean, and a checkpoint keeps every replica besides, so that a resumed run
goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from parallel.collectives import Interconnect, gather_objects
from parallel.flat import FlatTensors
from parallel.groups import Group
from parallel.ledger import Ledger
from parallel.network_model import NetworkModel
from strategies.cluster import ClusterStrategy, running_state
from strategies.exchange import Exchange, Variant

log = logging.getLogger(__name__)  # not Lightning's, whose notes the console leaves out

SyncBuffers = Literal["mean", "own"]


class ReplicaStrategy(ClusterStrategy):
    """One replica per node.

    Args:
        sync_buffers: ``mean``: floating-point buffers (running statistics), and the moving averages of weights that a
            module keeps, are averaged where replicas are made equal; ``own``: every node keeps its own.
        **cluster: See `ClusterStrategy`.
    """

    def __init__(self, sync_buffers: SyncBuffers, **cluster: Any) -> None:
        if sync_buffers not in ("mean", "own"):
            raise ValueError(f"strategy.sync_buffers={sync_buffers!r}: choose mean or own")
        super().__init__(**cluster)
        self.sync_buffers = sync_buffers
        self.exchange_variant: Variant = "rotate"
        self.turn = 0  # exchanges so far, which say who sends
        self.equal = True  # whether all replicas hold the same numbers
        self._flat: FlatTensors | None = None
        self._own: tuple[Tensor, Tensor] | None = None  # parameters and buffers, while a validation sees the mean

    @property
    @override
    def gradient_group(self) -> Group:
        return self.groups.node

    @property
    @override
    def local_size(self) -> int:
        """Processes of a node; a single machine is taken as two nodes unless ``cluster.local_size`` says otherwise."""
        if self._local_size is None and self.num_nodes == 1:
            return self.num_processes // 2 if self.num_processes % 2 == 0 else 1
        return super().local_size

    @override
    def check_module(self) -> None:
        self.refuse_manual_optimization()
        self._tell_nodes()

    def _tell_nodes(self) -> None:
        """Say what the nodes are, before a training: an evaluation does not depend on them."""
        name = type(self).__name__
        if self.groups.world.size == 1:
            rank_zero_warn(
                f"strategy={name} in one process is plain training, as by strategy=auto; trainer=cluster_2x2 makes two "
                "nodes of two processes on this machine"
            )
        elif self.groups.num_nodes == 1:
            rank_zero_warn(
                f"strategy={name} on one node of {self.local_size} processes is plain data parallelism; "
                "cluster.local_size makes smaller nodes"
            )
        elif self._local_size is None and self.num_nodes == 1 and self.global_rank == 0:
            log.info(
                "one machine, taken as %d nodes of %d; cluster.local_size sets it",
                self.groups.num_nodes,
                self.local_size,
            )

    # ---------------------------------------------------------------------------------------------------- replicas

    @property
    def flat(self) -> FlatTensors:
        """All trainable parameters as one vector; built anew when a callback has exchanged some of them."""
        parameters = [p for p in self.lightning_module.parameters() if p.requires_grad]
        if self._flat is None or not self._flat.holds(parameters):
            self._flat = FlatTensors(parameters)
            self.parameters_changed()
        return self._flat

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self._flat is not None:  # a callback exchanged parameters, after `synchronize`
            _ = self.flat

    def parameters_changed(self) -> None:
        """Forget what belonged to the parameters before."""

    def packed_alike(self) -> Tensor:
        """The parameters of rank 0 as one vector, on all ranks; they call this together.

        For what nodes must have in common when the vector is built anew, where they may have stepped since they were
        equal (a layer that stopped to learn).
        """
        vector = self._flat.pack()
        if self.groups.num_nodes > 1:
            dist.broadcast(vector, 0)
        return vector

    def _buffers(self) -> FlatTensors:
        return FlatTensors(running_state(self.lightning_module))

    def mean_over_nodes(self, vector: Tensor, interconnect: Interconnect | None = None) -> Tensor:
        """Average a vector that all ranks of a node hold alike over the nodes, in full precision, and wait for it.

        Like every exchange it crosses the slow network once per node, not once per rank.

        Args:
            vector: ``(n,)``; it may be overwritten.
            interconnect: None: the one that counts and delays training traffic.
        """
        if self.groups.num_nodes == 1:
            return vector
        exchange = Exchange(self.groups, interconnect or self.interconnect, vector.numel(), self.exchange_variant)
        part = exchange.part(vector, self.turn)
        if part is not None:
            part = exchange.start(part, None).result()
        return exchange.distribute(part, self.turn, vector)

    def synchronize(self) -> None:
        """Make all replicas equal to their mean; callbacks that change weights call this first."""
        if self.equal or self.groups.num_nodes == 1:
            return
        self.flat.unpack(self.mean_over_nodes(self.flat.pack()))
        self.average_buffers()
        self.equal = True

    def average_buffers(self) -> None:
        """Average the floating-point buffers over the nodes."""
        if self.sync_buffers == "mean" and len(buffers := self._buffers()):
            buffers.unpack(self.mean_over_nodes(buffers.pack()))

    @override
    def on_train_end(self) -> None:
        self.synchronize()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The mean of the replicas, under plain names; the replicas stay as they are. Called on all ranks together."""
        state = super().lightning_module_state_dict()
        if self.equal or self.groups.num_nodes == 1:
            return state
        named = dict(self.lightning_module.named_parameters(remove_duplicate=False))
        means = {id(p): v for p, v in zip(self.flat.tensors, self.flat.split(self._mean(self.flat)), strict=True)}
        if self.sync_buffers == "mean" and len(buffers := self._buffers()):
            named |= dict(self.lightning_module.named_buffers(remove_duplicate=False))  # averages are parameters
            means |= {id(b): v for b, v in zip(buffers.tensors, buffers.split(self._mean(buffers)), strict=True)}
        # In the types of the module: those that are loaded take over the type of some buffers.
        return {
            name: means[key].to(value.dtype, copy=True) if (key := id(named.get(name))) in means else value
            for name, value in state.items()
        }

    def _mean(self, flat: FlatTensors) -> Tensor:
        """Of a copy, neither counted nor delayed: a checkpoint is not training traffic."""
        aside = Interconnect(self.local_size, NetworkModel(), Ledger(self.global_rank, self.local_size))
        return self.mean_over_nodes(flat.pack(), aside)

    @override
    def teardown(self) -> None:
        super().teardown()
        self._flat = self._own = None

    # ------------------------------------------------------------------------------------------------- validation

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if not self.equal and self.groups.num_nodes > 1:
            self._own = self.flat.pack(), self._buffers().pack()
            self.flat.unpack(self._mean(self.flat))
            if self.sync_buffers == "mean" and len(buffers := self._buffers()):
                buffers.unpack(self._mean(buffers))

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        own, self._own = self._own, None
        if own is not None:
            self.flat.unpack(own[0])
            self._buffers().unpack(own[1])

    # ------------------------------------------------------------------------------------------------- checkpoints

    def replica_state(self) -> dict[str, Any]:
        """What differs between nodes: a dictionary of tensors and numbers, on the CPU."""
        state = {"optimizers": [_to_cpu(self.optimizer_state(optimizer)) for optimizer in self.optimizers]}
        # Checkpoints are written at the end of a validation too, while the module shows the mean.
        parameters, buffers = self._own or (self.flat.pack(), self._buffers().pack())
        if not self.equal:
            state["parameters"] = parameters.cpu()
        if self.sync_buffers == "own" or not self.equal:
            state["buffers"] = buffers.cpu()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_replica_state(self, state: Mapping[str, Any]) -> None:
        """Continue as this node."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if "parameters" in state:
            self.flat.unpack(state["parameters"])
        if "buffers" in state:
            self._buffers().unpack(state["buffers"])
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"equal": self.equal}
        mine = self.replica_state()  # all ranks of a node take part
        if self.groups.num_nodes > 1 and self.groups.place.local == 0:
            state["replicas"] = gather_objects(mine, self.groups.across, self.root_device)
        return state

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        replicas = state.get("replicas") or []
        if len(replicas) == self.groups.num_nodes and len(replicas) > 1:
            self.equal = state["equal"]
            self.load_replica_state(replicas[self.groups.place.node])
            return
        if len(replicas) != self.groups.num_nodes and len(replicas) > 1:
            rank_zero_warn(
                f"the checkpoint holds {len(replicas)} replicas and this run has {self.groups.num_nodes} nodes: "
                "it starts from their mean, with the optimizer state of the first"
            )
        self.equal = True


def _to_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_to_cpu(value) for value in state)
    return state
