"""DDP communication hooks that are counted, work on gloo as on NCCL, and pass through the emulated network.

torch's own hooks refuse some types on the CPU, and Lightning registers hooks on CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from parallel.collectives import Interconnect, num_bytes
from parallel.groups import Group
from parallel.network_model import Delay


# Without annotations: torch compares them, as objects, with those of its own hooks.
def call(hook, bucket):
    """What ``register_comm_hook(hook, call)`` of DDP wants to be given beside a hook of this module."""
    return hook(bucket)


class GradientHook:
    """Averages a bucket of gradients by an all-reduce, in ``wire_dtype`` where given.

    Args:
        interconnect: Counts and delays.
        group: Ranks to average over.
        delay: Completes futures when the emulated network delivers.
        wire_dtype: Type on the wire; None: that of the gradients. Gradients are divided before they are cast, so that
            sums stay in range.
    """

    def __init__(
        self, interconnect: Interconnect, group: Group, delay: Delay, wire_dtype: torch.dtype | None = None
    ) -> None:
        self.interconnect, self.group, self.delay, self.wire_dtype = interconnect, group, delay, wire_dtype

    def __call__(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start to average the bucket."""
        gradients = bucket.buffer()
        gradients.div_(self.group.size)
        sent = gradients if self.wire_dtype is None else gradients.to(self.wire_dtype)
        future = dist.all_reduce(sent, group=self.group.handle, async_op=True).get_future()
        late = self._book(future, num_bytes(sent), sent.device)

        def finish(done: torch.futures.Future[Any]) -> Tensor:
            value = done.value()
            value = value[0] if isinstance(value, list | tuple) else value
            return value if self.wire_dtype is None else gradients.copy_(value)

        return late.then(finish)

    def _book(self, future: Any, payload: int, device: torch.device) -> Any:
        ready_at = self.interconnect.book("all_reduce", self.group, payload)
        return self.delay.until(future, ready_at, device) if ready_at else future


class PowerSGDHook(GradientHook):
    """Low-rank gradients with error feedback (Vogels et al., NeurIPS 2019), torch's implementation.

    Args:
        interconnect: Counts and delays.
        group: Ranks to average over.
        delay: Completes futures when the emulated network delivers.
        rank: Of the approximation of every matrix.
        start_step: Whole gradients are averaged before, at least 2 steps.
        seed: Of the first directions, the same on all ranks.
    """

    def __init__(
        self, interconnect: Interconnect, group: Group, delay: Delay, rank: int, start_step: int, seed: int = 0
    ) -> None:
        super().__init__(interconnect, group, delay)
        self.state = powerSGD_hook.PowerSGDState(
            process_group=group.handle, matrix_approximation_rank=rank, start_powerSGD_iter=start_step,
            random_seed=seed,
        )  # fmt: skip

    def __call__(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start to average the bucket."""
        before = self.state.total_numel_after_compression
        whole = bucket.buffer()
        future = powerSGD_hook.powerSGD_hook(self.state, bucket)
        # torch counts numbers once the first compressed step has begun.
        sent = self.state.total_numel_after_compression - before or whole.numel()
        return self._book(future, sent * whole.element_size(), whole.device)
