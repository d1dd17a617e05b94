"""Makes alike what groups have counted apart, before their optimizer states are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from parallel.collectives import Interconnect
from parallel.groups import Group
from strategies.ab_training.optimizer_slots import OptimizerSlots


def level_states(
    slots: OptimizerSlots,
    common: Sequence[nn.Parameter],
    scaler: torch.amp.GradScaler | None,
    interconnect: Interconnect,
    world: Group,
    device: torch.device,
) -> None:
    """Make alike what optimizers have counted and begun to keep of the parameters that all groups train.

    Groups may have used a part of the network in different steps, or left out steps whose scaled gradients have
    overflown. Of the latter the scale is levelled too, or gradients of different scales would be averaged.

    Args:
        slots: Places of the parameters in optimizers.
        common: Parameters that all groups train.
        scaler: Of the gradients; None: they are not scaled.
        interconnect: Counts what is sent.
        world: All ranks, which come here together.
        device: Of this rank.
    """
    counts = slots.counts(common)
    state = scaler.state_dict() if scaler is not None else {"scale": 0.0, "_growth_tracker": 0}
    scale = torch.tensor([-state["scale"], -state["_growth_tracker"]], dtype=torch.float64)
    largest = torch.cat([scale, counts.flatten(), -counts.flatten()]).to(device)
    interconnect.all_reduce(largest, world, op=dist.ReduceOp.MAX).wait()
    scale, high, low = largest.cpu().split([2, counts.numel(), counts.numel()])
    if scaler is not None:
        scaler.load_state_dict(state | {"scale": -float(scale[0]), "_growth_tracker": -int(scale[1])})
    slots.level(common, -low.view_as(counts), high.view_as(counts))
