"""Sampling parallelism: ranks share the weight samples of a Bayesian network, not only the data."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from parallel.groups import Group, destroy, make_group
from parallel.layout import global_groups, node_groups
from parallel.phase_times import PhaseTimes
from parallel.sample_collectives import all_gather
from parallel.sample_layout import SampleShare, check_sample_parallel_size, mesh
from strategies.cluster import ClusterStrategy
from strategies.shared_statistics import SharedStatistics

log = logging.getLogger(__name__)  # not Lightning's, whose notes the console leaves out

# Forward and backward of a rank that take less than this do not get shorter with fewer samples. Measured on two CPU
# cores, two ranks: 64-128-128-10 with 16 samples, 12 ms, CPU time of a rank 0.96 of that of one process; 64-256-256-10
# with 32 samples, 36 ms, 0.60.
_SMALL_STEP_S = 0.02
_STEPS_OF_HINT = 10


class SamplingParallel(ClusterStrategy):
    """R = D K ranks: K of them, a sample group, evaluate different samples of the weights on the same items.

    Source: Özdemir et al., "Sampling Parallelism for Fast and Efficient Bayesian Learning" (2026, arXiv 2604.04736).
    D = 1 is sampling parallelism, K = 1 data parallelism, anything else the paper's hybrid. Rank d K + j has share d of
    the data and the samples {s : floor(s K / S) = j}. Gradients are averaged over all ranks.

    Modules ask for `sample_share` (a module that does not has every rank of a group evaluate the same). While a part of
    the data is evaluated, the metrics of the module (torchmetrics) are synchronised over ranks with different items
    alone, so that no item counts K times.

    Args:
        sample_parallel_size: K. ``auto``: the processes of a node, so that samples are shared over fast links and the
            data over the others; one machine shares samples alone.
        sync_bn: Statistics of batch normalisation while training: ``sample`` those of the whole sample group, None
            those of the rank's own samples and items.
        assert_replicas_equal_every_n_steps: Compare the parameters of all ranks bit for bit this often, to find
            modules that break replication; None: never.
        **cluster: Nodes, emulated network and DDP, see `ClusterStrategy`.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """

    # The argument that counts ranks which get the same items (read by runner/check.py without importing this).
    same_items_size: ClassVar[str] = "sample_parallel_size"

    def __init__(
        self,
        sample_parallel_size: int | Literal["auto"] = "auto",
        sync_bn: Literal["sample"] | None = None,
        assert_replicas_equal_every_n_steps: int | None = None,
        **cluster: Any,
    ) -> None:
        if sample_parallel_size != "auto" and (not isinstance(sample_parallel_size, int) or sample_parallel_size < 1):
            raise ValueError(
                f"strategy.sample_parallel_size={sample_parallel_size!r}: it counts the ranks that share samples, 1 or "
                "more, or auto"
            )
        if sync_bn not in (None, "sample"):
            raise ValueError(f"strategy.sync_bn={sync_bn!r}: choose sample or null")
        every = assert_replicas_equal_every_n_steps
        if every is not None and every < 1:
            raise ValueError(f"strategy.assert_replicas_equal_every_n_steps={every}: it counts steps, 1 or more")
        super().__init__(**cluster)
        self._wanted_size, self.sync_bn, self.assert_every = sample_parallel_size, sync_bn, every
        self._share: SampleShare | None = None
        self._asked = False  # whether anybody wanted to know the share
        self._sample_group: Group | None = None
        self._data_group: Group | None = None
        self._metric_group: Any = None  # for torchmetrics, to which None means all ranks
        self._metrics: list[Metric] = []  # those that are synchronised over the data group at the moment

    # ------------------------------------------------------------------------------------------------ environment

    @property
    def sample_parallel_size(self) -> int:
        """K, ranks that share samples."""
        return self.local_size if self._wanted_size == "auto" else self._wanted_size

    @property
    def sample_share(self) -> SampleShare:
        """Which samples are this rank's, and whom it shares them with; after `setup_environment`."""
        assert self._share is not None, "the share exists after setup_environment"
        self._asked = True
        return self._share

    @override
    def check_sizes(self, world_size: int) -> None:
        super().check_sizes(world_size)
        check_sample_parallel_size(self.sample_parallel_size, world_size)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        world, size = self.groups.world.size, self.sample_parallel_size
        self._sample_group = make_group(node_groups(world, size), self._timeout)
        self._data_group = make_group(global_groups(world, size), self._timeout)
        place = mesh(self.global_rank, world, size)
        self._share = SampleShare(size, place.sample, self._sample_group, self._data_group, self.interconnect)
        if size > 1:  # not later, where a rank without a batch to evaluate would miss it
            self._metric_group = self._data_group.handle or self._group_of_one()
        if self.sync_bn == "sample":
            self._layer_sync = SharedStatistics(lambda: self._share)
        if self.global_rank == 0:
            log.info("%d share(s) of the data, samples shared over %d process(es)", world // size, size)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        world = self.num_nodes * self.num_processes
        place = mesh(self.global_rank, world, self.sample_parallel_size)
        return {"num_replicas": world // self.sample_parallel_size, "rank": place.data}

    @override
    def teardown(self) -> None:
        groups = [group for group in (self._sample_group, self._data_group) if group is not None]
        super().teardown()
        if torch.distributed.is_initialized():
            destroy(*groups)
        self._sample_group = self._data_group = self._metric_group = None
        if self._share is not None:  # callbacks that end later still ask which rank this was
            self._share = SampleShare(self._share.size, self._share.index)

    # ----------------------------------------------------------------------------------------------------- training

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._times = PhaseTimes(self.root_device)
        self._first_steps = PhaseTimes(self.root_device, time.process_time)
        self._step_end, self._hinted = None, self._share.size == 1

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._step_end is not None and batch_idx > 0:
            self._times.add("between_steps_s", self._step_end)
        self._step_end = None

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._timed("forward_s"):
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._timed("backward_s"):
            return super().backward(closure_loss, *args, **kwargs)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        clocks = [self._times] if self._hinted else [self._times, self._first_steps]
        begins = [clock.now() for clock in clocks]
        yield
        for clock, begin in zip(clocks, begins, strict=True):
            clock.add(phase, begin)

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        computed: list[Any] = []

        def timed() -> Any:
            result = closure()
            computed.append(self._times.now())
            return result

        output = super().optimizer_step(optimizer, timed, model, **kwargs)
        if computed:
            self._times.add("optimizer_s", computed[-1])
        self._step_end = self._times.now()
        self._hint()
        return output

    def _hint(self) -> None:
        """Say it once where a rank's samples are so little work that sharing them saves nothing."""
        if self._hinted:
            return
        phases = [self._first_steps.seconds(name) for name in ("forward_s", "backward_s")]
        if len(phases[0]) < _STEPS_OF_HINT:
            return
        self._hinted = True
        work = statistics.median(map(sum, zip(*phases, strict=False)))
        if work < _SMALL_STEP_S and self.global_rank == 0:
            log.info(
                "the model is too small for sampling parallelism to save time: a process computes %.1f ms "
                "a step on its samples, most of which (launching, drawing weights, collectives) having fewer of them "
                "does not shrink; use fewer processes, or share the data by strategy.sample_parallel_size=1",
                1e3 * work,
            )

    @override
    def after_step(self, last: bool) -> None:
        if not self._asked and self._share.size > 1:
            self._asked = True
            rank_zero_warn(
                f"{type(self.lightning_module).__name__} has no samples to share (it never asked for sample_share): "
                f"{self._share.size} processes compute the same; use strategy=ddp, or a Bayesian module"
            )
        if self.assert_every is not None and self.steps % self.assert_every == 0:
            self.assert_replicas_equal()

    def assert_replicas_equal(self) -> None:
        """Raise RuntimeError on all ranks if their parameters are not the same, bit for bit."""
        world = SampleShare(self.groups.world.size, self.global_rank, self.groups.world)
        if world.size == 1:
            return
        named = list(self.lightning_module.named_parameters())
        sums = all_gather(torch.stack([checksum(p.detach()) for _, p in named]), world)
        wrong = (sums != sums[0]).any(0).nonzero().flatten().tolist()
        if wrong:
            first = wrong[0]
            ranks = (sums[:, first] != sums[0, first]).nonzero().flatten().tolist()
            raise RuntimeError(
                f"after step {self.steps} parameter {named[first][0]!r} differs between rank 0 and rank(s) "
                f"{', '.join(map(str, ranks))} ({len(wrong)} of {len(named)} parameters differ): something draws or "
                "updates differently on each rank"
            )

    @override
    def report(self) -> dict[str, float]:
        """Seconds of this rank since the last report, by phase; waits for collectives are part of their phase."""
        return super().report() | {f"time/{name}": seconds for name, seconds in self._times.take().items()}

    # --------------------------------------------------------------------------------------------------- evaluation

    def _metrics_over_data(self) -> None:
        """Synchronise the metrics of the module over ranks with different items: those of a group count the same."""
        if self._share.size == 1 or self._metrics:
            return
        for metric in self.lightning_module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                metric.process_group = self._metric_group
                self._metrics.append(metric)

    def _metrics_over_all(self) -> None:
        """In training ranks of a group see different samples, and means are over all of them."""
        for metric in self._metrics:
            metric.process_group = None
        self._metrics = []

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._step_end = None
        self._metrics_over_data()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._metrics_over_all()

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self._metrics_over_data()

    @override
    def on_test_end(self) -> None:
        super().on_test_end()
        self._metrics_over_all()


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit number that changes with any single bit of the tensor."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().reshape(-1).view(kind).long()
    odd = 2 * torch.arange(len(bits), device=bits.device) + 1  # no multiple of it is 0 modulo 2^64 below 2^64
    return (bits * odd).sum()
