"""Jigsaw: one model over several processes, by longitude and by channel, and instances of it beside each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from parallel.collectives import Interconnect
from parallel.layout import check_local_size
from parallel.ledger import Ledger
from parallel.network_model import NetworkModel
from parallel.sharding import JigsawGrid, make_grid
from parallel.sharding.grid import check_sizes
from parallel.sharding.layout import Layout
from strategies.jigsaw import checkpoint as parts_of
from strategies.jigsaw.checkpoint import SHARDS, States
from strategies.jigsaw.gradients import BucketedMean

log = logging.getLogger(__name__)


class JigsawStrategy(ModelParallelStrategy):
    """A mesh of D instances of the model, each over T longitude bands times C groups of channels.

    Source: Kieckhefen et al. (SC25, arXiv 2507.05753). Rank = (d T + t) C + c. Modules and data modules read ``grid``
    (a `parallel.sharding.JigsawGrid`): which block of a field is theirs, and sums over the others. The module builds
    its network in ``configure_model``, as ``net``, for that grid. Ranks of an instance see the same samples; the
    gradients of equal blocks are averaged over the instances while the backward pass goes on.

    Args:
        token: T, longitude bands.
        channel: C, groups of channels.
        data: D, instances of the model; ``auto``: as many as there are processes for.
        save_distributed_checkpoint: Every rank writes its blocks beside the checkpoint (any grid reads them); otherwise
            rank 0 collects the model and writes one file.
        bucket_cap_mb: Gradients that travel together between instances, MiB.
        local_size: Processes of a node; None: the devices of a machine. Smaller values make simulated nodes.
        rate_mbit: Bandwidth of the emulated network between nodes, Mbit/s; None: the real one.
        latency_ms: Latency of the emulated network between nodes.
        compute_ms: Sleep before every training step, which stands for an accelerator that computes.
        process_group_backend: ``gloo``, ``nccl``; None: what suits the device.
        timeout_s: After this time a collective that hangs ends the run.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    # Ranks of an instance share the samples of a step (read by runner/check.py without importing this); that the batch
    # can be split over the instances is checked where the loaders are made.
    data_parallel: ClassVar[bool] = False

    def __init__(
        self,
        token: int = 1,
        channel: int = 1,
        data: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = True,
        bucket_cap_mb: int = 25,
        local_size: int | None = None,
        rate_mbit: float | None = None,
        latency_ms: float = 0.0,
        compute_ms: float = 0.0,
        process_group_backend: str | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        check_sizes(token, channel, data, token * channel * (1 if data == "auto" else data))
        if bucket_cap_mb < 1:
            raise ValueError(f"strategy.bucket_cap_mb={bucket_cap_mb}: MiB of gradients, 1 or more")
        if timeout_s <= 0:
            raise ValueError(f"strategy.timeout_s={timeout_s}: seconds above 0")
        if compute_ms < 0:
            raise ValueError(f"cluster.compute_ms={compute_ms}: a time is 0 or more")
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.token, self.channel, self.data = token, channel, data
        self.bucket_bytes, self.compute_ms = bucket_cap_mb << 20, compute_ms
        self.network = NetworkModel(rate_mbit, latency_ms)
        self._local_size = local_size
        self._grid: JigsawGrid | None = None
        self._mean: BucketedMean | None = None
        self._read_from: Path | None = None  # checkpoint that is being restored

    # ------------------------------------------------------------------------------------------------ environment

    @property
    def grid(self) -> JigsawGrid | None:
        """Where this rank stands; None before `setup_environment`."""
        return self._grid

    @property
    def local_size(self) -> int:
        """Processes of a node."""
        return self._local_size or self.num_processes

    @property
    def ledger(self) -> Ledger:
        """What this strategy and the layers of the model have communicated; callbacks read it."""
        return self._interconnect.ledger

    @override
    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        instances = check_sizes(self.token, self.channel, self.data, world)
        check_local_size(self.local_size, world)
        self._check_batch(instances)
        self._setup_distributed()
        if self._grid is None:
            self._interconnect = Interconnect(self.local_size, self.network, Ledger(self.global_rank, self.local_size))
            self._grid = make_grid(
                self.token, self.channel, instances, self._interconnect, self.root_device.type, self._timeout
            )
        self._device_mesh = self._grid.world_mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh
        if self.global_rank == 0:
            log.info(
                "%d instance(s) of the model, each over %d longitude band(s) x %d group(s) of channels",
                instances, self.token, self.channel,
            )  # fmt: skip

    def _check_batch(self, instances: int) -> None:
        datamodule = getattr(self.lightning_module.trainer, "datamodule", None) if self.lightning_module else None
        batch = getattr(datamodule, "batch_size", None)
        if isinstance(batch, int) and batch % instances:
            raise ValueError(
                f"data.batch_size={batch}: cannot be split over {instances} instances of the model (it counts the "
                f"samples of one step over all of them): use a multiple of {instances}"
            )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        assert self._grid is not None, "the grid exists after setup_environment"
        return {"num_replicas": self._grid.data_size, "rank": self._grid.data}

    @override
    def setup(self, trainer: Any) -> None:
        module = self.lightning_module
        net = getattr(module, "net", None)
        if getattr(net, "grid", None) is not self._grid:
            raise ValueError(
                f"strategy=jigsaw cuts networks of Jigsaw layers into blocks, and {type(module).__name__} has "
                f"{type(net).__name__ if net is not None else 'no net'}, which knows of no grid: choose an experiment "
                "with networks.weather_mixer.WeatherMixer (experiment=weather), or strategy=ddp"
            )
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            raise ValueError(
                "trainer.precision=16-mixed scales the loss, and ranks with parts of a model would disagree on which "
                "steps to leave out; use bf16-mixed"
            )
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            if self._grid.data_size > 1:
                parameters = [p for p in module.parameters() if p.requires_grad]
                self._mean = BucketedMean(parameters, self._grid.data_group, self._interconnect, self.bucket_bytes)
            if self.global_rank == 0 and self._grid.size > 1:
                travelling = [name for name, variant in net.variants.items() if variant == "activations"]
                log.info("activations travel in %s, weights in all other layers", ", ".join(travelling) or "no layer")

    @override
    def model_to_device(self) -> None:
        super().model_to_device()
        self._equalize_buffers()

    def _equalize_buffers(self) -> None:
        """Give all ranks the buffers of rank 0."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for buffer in self.lightning_module.buffers():
                dist.broadcast(buffer, 0)

    # ----------------------------------------------------------------------------------------------------- training

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.compute_ms:
            time.sleep(1e-3 * self.compute_ms)
        return super().training_step(*args, **kwargs)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._mean is not None:
            self._mean.finish()

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients that are accumulated over several batches are averaged after the last of them."""
        if self._mean is None:
            yield
            return
        self._mean.enabled = False
        try:
            yield
        finally:
            self._mean.enabled = True

    def report(self) -> dict[str, float]:
        """Numbers of the moment for loggers: bytes that this rank has received inside the model so far."""
        return {"comm/model_received_bytes": self._grid.traffic.total()} if self._grid.communicates else {}

    # -------------------------------------------------------------------------------------------------- checkpoints

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    def _layouts(self) -> dict[str, Layout]:
        return parts_of.module_layouts(self.lightning_module, self.lightning_module.net)

    def _states(self) -> States:
        return States(self.lightning_module, self.optimizers, self._layouts(), self._grid)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Tensors without cuts if they go to one file; otherwise nothing, since `save_checkpoint` writes the parts."""
        return {} if self._save_distributed_checkpoint else self._states().whole_model()

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
        return {} if self._save_distributed_checkpoint else self._states().whole_optimizer(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("JigsawStrategy.save_checkpoint takes no storage_options")
        file = Path(self.broadcast(str(filepath)))
        if self.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.barrier()
        folder = None
        if self._save_distributed_checkpoint:
            states = self._states()
            if "optimizer_states" in checkpoint:  # otherwise weights alone are wanted
                checkpoint["optimizer_states"] = states.plain()
            else:
                states.optimizers = []
            stamp = self.broadcast(f"{self.lightning_module.trainer.global_step}-{time.time_ns():x}")
            folder = file.with_name(f"{file.name}.{SHARDS}-{stamp}")
            parts_of.write_parts(states.tensors(), folder)
            checkpoint[SHARDS] = folder.name
        if self.is_global_zero:
            parts_of.write_file(checkpoint, file)
            parts_of.remove(file, but=folder)
        self.barrier()

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            Path(filepath).unlink(missing_ok=True)
            parts_of.remove(Path(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        file = Path(self.broadcast(str(checkpoint_path)))
        content = torch.load(file, map_location="cpu", weights_only=True if weights_only is None else weights_only)
        self._read_from = parts_of.folder_of(file, content) if SHARDS in content else None
        return content

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._read_from is not None:
            self._states().load_parts(self._read_from, with_model=True)
        else:
            self._states().load_whole_model(checkpoint["state_dict"])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = self._states()
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            if self._read_from is not None:
                states.load_optimizer_parts(number, optimizer, saved, self._read_from)
            else:
                states.load_whole_optimizer(optimizer, saved)

    # -------------------------------------------------------------------------------------------------------- end

    @override
    def teardown(self) -> None:
        if self._mean is not None:
            self._mean.close()
            self._mean = None
        super().teardown()  # the grid stays: the network belongs to it, and a test may follow a training
