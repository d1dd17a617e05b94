"""DDP communication hooks that are counted, work on gloo as on NCCL, and pass through the emulated network.

torch's own hooks refuse some types on the CPU, and Lightning registers hooks on CUDA only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    torch keeps what a rank has not sent yet (errors) and the factors of the last step by the number of a bucket. Here
    they follow their parameters when DDP arranges its buckets anew, and can be saved by the names of parameters.

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
        self._buckets: dict[int, list[Tensor]] = {}  # parameters of every bucket, in their order there
        # Errors and factors Q of parameters that are in no bucket of the running arrangement, by identity.
        self._apart: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start to average the bucket."""
        if self.state.iter >= self.state.start_powerSGD_iter:
            self._arrange(bucket.index(), bucket.parameters(), bucket.buffer())
        before = self.state.total_numel_after_compression
        whole = bucket.buffer()
        future = powerSGD_hook.powerSGD_hook(self.state, bucket)
        # torch counts numbers once the first compressed step has begun.
        sent = self.state.total_numel_after_compression - before or whole.numel()
        return self._book(future, sent * whole.element_size(), whole.device)

    # ------------------------------------------------------------------------------------- errors and factors by name

    def _arrange(self, index: int, parameters: list[Tensor], like: Tensor) -> None:
        """Lay out errors and factors as the bucket has its parameters now."""
        wanted = [id(p) for p in parameters]
        if [id(p) for p in self._buckets.get(index, ())] == wanted:
            return
        for other, members in list(self._buckets.items()):
            if other == index or not {id(p) for p in members}.isdisjoint(wanted):
                self._apart |= self._parts(other)
                for memory in (self._buckets, self.state.error_dict, *self._factors()):
                    memory.pop(other, None)
        self._buckets[index] = list(parameters)
        known = {key: self._apart.pop(key) for key in wanted if key in self._apart}
        if not known:
            return  # torch begins with errors of zero and random factors
        errors = [known[id(p)][0].flatten().to(like) if id(p) in known else like.new_zeros(p.numel())
                  for p in parameters]  # fmt: skip
        self.state.error_dict[index] = torch.cat(errors)
        factors = [(known.get(id(p), (None, None))[1], n, m, r) for p, n, m, r in self._compressed(parameters)]
        if any(q is None or q.numel() != m * r for q, _, m, r in factors):  # another rank than before
            return
        self.state.p_memory_dict[index] = like.new_empty(sum(n * r for _, n, _, r in factors))
        self.state.q_memory_dict[index] = torch.cat([like.new_empty(0), *(q.flatten().to(like) for q, *_ in factors)])

    def _factors(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        return self.state.p_memory_dict, self.state.q_memory_dict

    def _compressed(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, int, int, int]]:
        """Those whose factors are sent, with rows, columns and rank, in the order in which torch keeps them."""
        by_shape: dict[tuple[int, int], list[tuple[Tensor, int, int, int]]] = {}
        for parameter in parameters:
            n, m = parameter.view(parameter.shape[0], -1).shape if parameter.ndim else (1, 1)
            rank = min(n, m, self.state.matrix_approximation_rank)
            if (n + m) * rank * self.state.min_compression_rate < n * m:
                by_shape.setdefault((n, m), []).append((parameter, n, m, rank))
        return [entry for entries in by_shape.values() for entry in entries]

    def _parts(self, index: int) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Errors and factors Q of the parameters of a bucket, by identity; nothing before the first compressed step."""
        parameters = self._buckets[index]
        if index not in self.state.error_dict:
            return {}
        compressed = self._compressed(parameters)
        errors = self.state.error_dict[index].split([p.numel() for p in parameters])
        factors = dict.fromkeys(map(id, parameters))
        if index in self.state.q_memory_dict:
            sizes = [m * r for _, _, m, r in compressed]
            factors |= {
                id(entry[0]): q
                for entry, q in zip(compressed, self.state.q_memory_dict[index].split(sizes), strict=True)
            }
        return {id(p): (error, factors[id(p)]) for p, error in zip(parameters, errors, strict=True)}

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """What the next step depends on, of this rank, on the CPU.

        Args:
            names: Of the parameters, by identity.
        """
        parts = dict(self._apart)
        for index in self._buckets:
            parts |= self._parts(index)
        return {
            "steps": self.state.iter,
            "numbers": [self.state.total_numel_before_compression, self.state.total_numel_after_compression],
            "errors": {names[key]: error.cpu().clone() for key, (error, _) in parts.items()},
            "factors": {names[key]: q.cpu().clone() for key, (_, q) in parts.items() if q is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Continue; ``parameters`` by their names. Errors of parameters that have another size now are dropped."""
        self.state.iter = state["steps"]
        self.state.total_numel_before_compression, self.state.total_numel_after_compression = state["numbers"]
        self._apart = {
            id(parameters[name]): (error, state["factors"].get(name))
            for name, error in state["errors"].items()
            if name in parameters and parameters[name].numel() == error.numel()
        }
