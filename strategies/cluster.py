"""What all strategies of this program share: nodes, groups, counted and delayed communication, the count of steps."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from parallel import gradient_hooks
from parallel.collectives import Interconnect
from parallel.flat import FlatTensors
from parallel.groups import ClusterGroups, Group, destroy, make_cluster_groups
from parallel.layout import check_local_size
from parallel.ledger import Ledger
from parallel.network_model import Delay, NetworkModel
from parallel.sample_layout import SampleShare
from strategies.shared_statistics import SharedStatistics

# DDP shall not send buffers around in every forward pass, see `ClusterStrategy.share_buffers`. torch 2.13 has named
# that argument anew, and with the new one DDP makes them equal where it is built.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_FORWARD_SYNC = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class ClusterStrategy(DDPStrategy):
    """Data parallelism over a cluster of nodes, real or simulated on one machine.

    Subclasses override `after_step`, which is called on every rank after each optimizer step, `state_dict` and
    `load_state`. Gradients are averaged over `gradient_group`.

    Args:
        local_size: Processes of a node; None: the devices of a machine. Smaller values make simulated nodes: 2 with
            ``trainer.devices=4`` makes two nodes with two processes each.
        rate_mbit: Bandwidth of the emulated network between nodes, Mbit/s; None: the real one.
        latency_ms: Latency of the emulated network between nodes.
        compute_ms: Sleep before every training step, which stands for an accelerator that computes.
        bucket_cap_mb: Size of DDP's gradient buckets, MiB.
        find_unused_parameters: See torch's DistributedDataParallel.
        process_group_backend: ``gloo``, ``nccl``; None: what suits the device.
        timeout_s: After this time a collective that hangs ends the run.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    # Whether ranks share the samples of a step (read by runner/check.py without importing this).
    data_parallel: ClassVar[bool] = True

    def __init__(
        self,
        local_size: int | None = None,
        rate_mbit: float | None = None,
        latency_ms: float = 0.0,
        compute_ms: float = 0.0,
        bucket_cap_mb: int = 25,
        find_unused_parameters: bool = False,
        process_group_backend: str | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
            bucket_cap_mb=bucket_cap_mb,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,  # no second copy of all gradients
            **_NO_FORWARD_SYNC,
        )
        if local_size is not None and local_size < 1:
            raise ValueError(f"cluster.local_size={local_size}: it counts the processes of a node, 1 or more")
        if compute_ms < 0:
            raise ValueError(f"cluster.compute_ms={compute_ms}: a time is 0 or more")
        self.network = NetworkModel(rate_mbit, latency_ms)
        self.compute_ms = compute_ms
        self.steps = 0  # optimizer steps of the whole training, resumed parts included
        self._local_size = local_size
        self._groups: ClusterGroups | None = None
        self._delay = Delay()
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------ environment

    @property
    def local_size(self) -> int:
        """Processes of a node."""
        return self._local_size or self.num_processes

    @property
    def groups(self) -> ClusterGroups:
        """Process groups; after `setup_environment`."""
        assert self._groups is not None, "process groups exist after setup_environment"
        return self._groups

    @property
    def gradient_group(self) -> Group:
        """Ranks whose gradients are averaged in every step."""
        return self.groups.world

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss under ``trainer.precision=16-mixed``: it leaves out steps whose gradients overflow.

        Such a step counts: when ranks communicate must not depend on a decision that only some of them have taken.
        """
        scaler = getattr(self.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def check_sizes(self, world_size: int) -> None:
        """Raise ValueError for sizes that do not fit; called on every rank before any process group exists."""
        check_local_size(self.local_size, world_size)

    @override
    def setup_environment(self) -> None:
        self.check_sizes(self.num_nodes * self.num_processes)
        super().setup_environment()
        self.interconnect = Interconnect(self.local_size, self.network, Ledger(self.global_rank, self.local_size))
        self._groups = make_cluster_groups(self.local_size, self._timeout)
        if isinstance(self._layer_sync, TorchSyncBatchNorm) and self.root_device.type != "cuda":
            self._layer_sync = SharedStatistics(self._statistics_share)  # torch's refuses every other device

    def _statistics_share(self) -> SampleShare:
        """Whom ``trainer.sync_batchnorm`` takes statistics over: the ranks whose gradients are averaged."""
        group = self.gradient_group
        return SampleShare(group.size, group.ranks.index(self.global_rank), group, interconnect=self.interconnect)

    @property
    def ledger(self) -> Ledger:
        """What this strategy has communicated; callbacks read it."""
        return self.interconnect.ledger

    # ----------------------------------------------------------------------------------------------------- training

    @override
    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        # DDP makes ranks equal within its own group only.
        if self.gradient_group.size < self.groups.world.size:
            self.equalize(model)
        group = self.gradient_group
        device_ids = self.determine_ddp_device_ids()
        handle = group.handle if group.handle is not None else self._group_of_one()
        for part in model.modules():
            if isinstance(part, torch.nn.SyncBatchNorm):  # or it would speak to all ranks in every step
                part.process_group = handle
        return DistributedDataParallel(model, device_ids=device_ids, process_group=handle, **self._ddp_kwargs)

    def _group_of_one(self) -> Any:
        """DDP asks for a group even where there is nobody to talk to."""
        if not hasattr(self, "_alone"):
            for rank in range(dist.get_world_size()):
                handle = dist.new_group([rank], timeout=self._timeout)
                if rank == dist.get_rank():
                    self._alone = Group((rank,), handle)
        return self._alone.handle

    def equalize(self, model: torch.nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0."""
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only; here a hook counts what is sent on any device.
        if self.gradient_group.size > 1:
            self._hook = self.gradient_hook()
            self.model.register_comm_hook(self._hook, gradient_hooks.call)

    def gradient_hook(self) -> gradient_hooks.GradientHook:
        """How a bucket of gradients is averaged."""
        return gradient_hooks.GradientHook(self.interconnect, self.gradient_group, self._delay)

    @override
    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.check_module()

    def check_module(self) -> None:
        """Raise for modules that the strategy cannot train; called when they are set up to be trained."""

    @property
    def cut_short(self) -> bool:
        """Whether the training was cut short on purpose (a debug run): then it may be too short for some phases."""
        trainer = self.lightning_module.trainer
        limit = trainer.limit_train_batches  # 1 is one batch, 1.0 are all
        return bool(trainer.fast_dev_run) or isinstance(limit, int) or (limit is not None and limit < 1)

    def refuse_manual_optimization(self) -> None:
        """For strategies that act after each step of the Trainer's own optimisation."""
        if not self.lightning_module.automatic_optimization:
            raise ValueError(
                f"strategy={type(self).__name__} acts after the optimizer steps of the Trainer, and "
                f"{type(self.lightning_module).__name__} steps by itself (automatic_optimization=False): "
                "use strategy=ddp"
            )

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        counts = [self.lightning_module.trainer.num_training_batches] * self.groups.world.size
        if len(counts) > 1:
            dist.all_gather_object(counts, counts[0])
        if len(set(counts)) > 1:
            raise ValueError(
                f"the ranks have {counts} training batches per epoch and must all take the same steps: build the "
                "loader with datamodules.loading.make_loader"
            )
        if self.steps == 0:  # unlike the Trainer's, where the checkpoint of another strategy was loaded
            self.steps = self.lightning_module.trainer.global_step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.compute_ms:
            time.sleep(1e-3 * self.compute_ms)
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        # Past the DDP wrapper: it would send buffers around in every evaluation step, and ranks may have fewer of them.
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.steps += 1
        self.share_buffers()
        self.after_step(self.ends_epoch())
        return output

    def share_buffers(self) -> None:
        """Give the ranks of the gradient group the running statistics of their first one.

        DDP does so before every forward pass, which leaves them different after the last step, when a validation or a
        checkpoint looks at them.
        """
        group = self.gradient_group
        if group.size < 2:
            return
        buffers = FlatTensors([b for b in self.lightning_module.buffers() if b.is_floating_point()])
        if len(buffers):
            vector = buffers.pack()
            self.interconnect.broadcast(vector, group.ranks[0], group).wait()
            buffers.unpack(vector)

    def ends_epoch(self) -> bool:
        """Whether the running optimizer step is the last one of its epoch, or of the training."""
        trainer = self.lightning_module.trainer
        return trainer.is_last_batch or (trainer.max_steps > 0 and trainer.global_step + 1 >= trainer.max_steps)

    def after_step(self, last: bool) -> None:
        """Called on every rank after each optimizer step; ``last``: of its epoch."""

    def report(self) -> dict[str, float]:
        """Numbers of the moment for loggers, by name; callbacks ask for them."""
        return {}

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """State beside the weights, safe for ``torch.load(weights_only=True)``; called on all ranks together."""
        return {"strategy": type(self).__name__, "steps": self.steps, "world_size": self.groups.world.size,
                "local_size": self.local_size, "ledger": self._gathered_ledgers()}  # fmt: skip

    def _gathered_ledgers(self) -> list[dict[str, Any]]:
        ledgers = [self.ledger.state_dict()] * self.groups.world.size
        if len(ledgers) > 1:
            dist.all_gather_object(ledgers, ledgers[0])
        return ledgers

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of this strategy; weights and optimizers are loaded by then."""
        self.steps = state["steps"]
        if (state["world_size"], state["local_size"]) == (self.groups.world.size, self.local_size):
            self.ledger.load_state_dict(state["ledger"][self.global_rank])

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if "optimizer_states" in checkpoint:  # otherwise weights alone are wanted
            checkpoint["strategy"] = self.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.get("strategy")
        return checkpoint

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        restored, self._restored = self._restored, None
        if restored is not None and restored["strategy"] == type(self).__name__:
            self.load_state(restored)

    # -------------------------------------------------------------------------------------------------------- end

    @override
    def teardown(self) -> None:
        self._delay.close()
        super().teardown()
        if self._groups is not None and dist.is_initialized():
            destroy(self._groups.node, self._groups.across, *([self._alone] if hasattr(self, "_alone") else []))
        self._groups = None
        self.__dict__.pop("_alone", None)


def running_state(module: torch.nn.Module) -> list[Tensor]:
    """Floating-point tensors that follow a training without being trained, of which replicas need their mean.

    Buffers (running statistics), and what a module names in ``weight_averages()`` (a moving average of its weights: the
    mean over replicas is that of their mean).
    """
    averages = getattr(module, "weight_averages", list)()
    return [t for t in [*module.buffers(), *averages] if t.is_floating_point()]


def loss_of(output: Any) -> Tensor | None:
    """The loss that a training step returned."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss.detach() if isinstance(loss, Tensor) else None
