"""Synchronous data parallelism, whole or with compressed gradients: the baselines of the other strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from typing_extensions import override

from parallel.collectives import gather_objects
from parallel.gradient_hooks import GradientHook, PowerSGDHook
from strategies.cluster import ClusterStrategy

Compression = Literal["none", "fp16", "bf16", "powersgd"]
_WIRE_TYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# Every bucket of PowerSGD waits in gloo's threads for its own collectives; a second bucket could wait forever.
_ONE_BUCKET_MB = 1 << 14


class DDP(ClusterStrategy):
    """Averages gradients over all ranks in every step.

    Args:
        compression: What crosses the wire: ``none`` the gradients as they are, ``fp16`` or ``bf16`` half the bytes,
            ``powersgd`` low-rank factors with error feedback (Vogels et al., NeurIPS 2019).
        powersgd_rank: Rank of the factors.
        powersgd_start: Steps with whole gradients before the first compressed one, at least 2.
        **cluster: See `ClusterStrategy`.

    Raises:
        ValueError: For an unknown compression or sizes that are too small.
    """

    def __init__(
        self,
        compression: Compression = "none",
        powersgd_rank: int = 1,
        powersgd_start: int = 10,
        **cluster: Any,
    ) -> None:
        if compression not in (*_WIRE_TYPES, "powersgd"):
            raise ValueError(f"strategy.compression={compression!r}: choose none, fp16, bf16 or powersgd")
        if powersgd_rank < 1:
            raise ValueError(f"strategy.powersgd_rank={powersgd_rank}: a rank is 1 or more")
        if powersgd_start < 2:
            raise ValueError(f"strategy.powersgd_start={powersgd_start}: torch needs 2 steps or more before the first")
        super().__init__(**cluster)
        self.compression, self.powersgd_rank, self.powersgd_start = compression, powersgd_rank, powersgd_start

    @override
    def setup_environment(self) -> None:
        over_gloo = self.compression == "powersgd" and self.root_device.type == "cpu"
        if over_gloo and self._ddp_kwargs["find_unused_parameters"]:
            raise ValueError(
                "strategy.find_unused_parameters=true with strategy.compression=powersgd ends processes on the CPU "
                "(torch's PowerSGD over gloo): use strategy.compression=bf16"
            )
        super().setup_environment()
        if over_gloo:
            self._ddp_kwargs["bucket_cap_mb"] = _ONE_BUCKET_MB

    @override
    def gradient_hook(self) -> GradientHook:
        if self.compression == "powersgd":
            return PowerSGDHook(
                self.interconnect, self.gradient_group, self._delay, self.powersgd_rank, self.powersgd_start
            )
        return GradientHook(self.interconnect, self.gradient_group, self._delay, _WIRE_TYPES[self.compression])

    @override
    def check_module(self) -> None:
        if self.compression == "powersgd" and self.scaler is not None:
            raise ValueError(
                "strategy.compression=powersgd adds what it has not sent to the next gradients, infinite for ever "
                "after the first overflow of trainer.precision=16-mixed: use bf16-mixed, or strategy.compression=fp16"
            )

    def _named(self) -> dict[str, torch.Tensor]:
        return dict(self.lightning_module.named_parameters())  # those that have stopped to learn have errors too

    @override
    def state_dict(self) -> dict[str, Any]:
        """With what every rank has not sent yet: as many numbers as the network has, times the number of ranks."""
        state = super().state_dict()
        if isinstance(self.__dict__.get("_hook"), PowerSGDHook):
            mine = self._hook.state_dict({id(p): name for name, p in self._named().items()})
            state["powersgd"] = gather_objects(mine, self.groups.world, self.root_device)
        return state

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        ranks = state.get("powersgd")
        if ranks and isinstance(self.__dict__.get("_hook"), PowerSGDHook):
            if len(ranks) == self.groups.world.size:
                mine = ranks[self.global_rank]
            else:  # the mean of what nobody has seen yet stays what it was
                errors = {name: sum(one["errors"][name] for one in ranks) / len(ranks) for name in ranks[0]["errors"]}
                mine = ranks[0] | {"errors": errors}
            self._hook.load_state_dict(mine, self._named())
