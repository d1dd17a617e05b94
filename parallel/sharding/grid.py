"""The ranks of one model instance as a grid of longitude bands and channel groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from parallel.collectives import Interconnect
from parallel.groups import Group, destroy
from parallel.ledger import Ledger
from parallel.network_model import NetworkModel
from parallel.sharding.layout import ceil_div, clip
from parallel.sharding.traffic import Traffic

_ALONE = Group((0,), None)
AXES = ("data_parallel", "token", "channel")  # of the mesh


@dataclass(frozen=True)
class JigsawGrid:
    """Where this rank stands: band ``token`` of T and group ``channel`` of C, in instance ``data`` of the model.

    Source: Kieckhefen et al., "Jigsaw" (SC25, arXiv 2507.05753); rank = (data * T + token) * C + channel.
    ``JigsawGrid()`` is a model on one device, without any communication and without torch.distributed. A grid with
    sizes but no groups serves to count parameters and work.

    Attributes:
        token_size: T, longitude bands.
        channel_size: C, groups of channels.
        token: Band of this rank.
        channel: Group of channels of this rank.
        data_size: Instances of the model, which see different samples.
        data: Instance of this rank.
        token_group: Ranks with the same channels, one for each band.
        channel_group: Ranks of the same band, one for each group of channels.
        instance_group: All ranks of this instance.
        data_group: Ranks with the same block in other instances.
        mesh: Device mesh (token, channel) of the parameters; None: they are plain tensors.
        world_mesh: The mesh of all ranks, (data_parallel, token, channel).
        interconnect: Counts and delays what is sent.
        traffic: What each layer has received.
    """

    token_size: int = 1
    channel_size: int = 1
    token: int = 0
    channel: int = 0
    data_size: int = 1
    data: int = 0
    token_group: Group = _ALONE
    channel_group: Group = _ALONE
    instance_group: Group = _ALONE
    data_group: Group = _ALONE
    mesh: DeviceMesh | None = None
    world_mesh: DeviceMesh | None = None
    interconnect: Interconnect | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        """Ranks of an instance."""
        return self.token_size * self.channel_size

    @property
    def is_serial(self) -> bool:
        """Whether one rank holds the whole model."""
        return self.size == 1

    @cached_property
    def place(self) -> dict[str, int]:
        """Index of this rank by axis."""
        return {"token": self.token, "channel": self.channel}

    @cached_property
    def parts(self) -> dict[str, int]:
        """Ranks by axis."""
        return {"token": self.token_size, "channel": self.channel_size}

    @property
    def communicates(self) -> bool:
        """Whether there are other ranks of this instance to talk to."""
        return self.interconnect is not None and self.size > 1

    # ----------------------------------------------------------------------------------------- blocks of a field

    def local_width(self, width: int, patch: int = 1) -> int:
        """Columns of this rank's band.

        Raises:
            ValueError: If the patches of a circle of latitude cannot be shared evenly.
        """
        if width % patch:
            raise ValueError(f"model.net.patch={patch} does not divide model.net.width={width}")
        if (width // patch) % self.token_size:
            fitting = [n for n in range(1, width // patch + 1) if (width // patch) % n == 0]
            near = min(fitting, key=lambda n: (abs(n - self.token_size), n))
            raise ValueError(
                f"strategy.token={self.token_size} does not divide the {width // patch} patches of a circle of "
                f"latitude (model.net.width={width} / model.net.patch={patch}); the nearest that does is {near}"
            )
        return width // self.token_size

    def longitudes(self, width: int, patch: int = 1) -> slice:
        """This rank's columns of a field."""
        local = self.local_width(width, patch)
        return slice(self.token * local, (self.token + 1) * local)

    def local_channels(self, num: int, num_inputs: int | None = None) -> int:
        """Channels of this rank's block, padding included.

        Args:
            num: Channels of the whole field.
            num_inputs: Of the network, where ``num`` are its outputs: they are cut where the inputs are, so that
                output k and input k, the same variable a step earlier, are on one rank.
        """
        return num if self.channel_size == 1 else ceil_div(num_inputs or num, self.channel_size)

    def channels(self, num: int, num_inputs: int | None = None) -> slice:
        """This rank's channels of a field; fewer than `local_channels` where the block is padded, perhaps none."""
        local = self.local_channels(num, num_inputs)
        return clip(self.channel * local, local, num)

    def pad_channels(self, block: Tensor, num: int, num_inputs: int | None = None) -> Tensor:
        """Add the padding to a block ``(..., channel)`` that has the channels of `channels`."""
        missing = self.local_channels(num, num_inputs) - block.shape[-1]
        return F.pad(block, (0, missing)) if missing else block

    def block(self, whole: Tensor, num_inputs: int | None = None) -> Tensor:
        """Cut a field ``(..., latitude, longitude, channel)`` into this rank's block."""
        num = whole.shape[-1]
        part = whole[..., self.longitudes(whole.shape[-2]), self.channels(num, num_inputs)]
        return self.pad_channels(part, num, num_inputs).contiguous()

    def gather(self, block: Tensor, num: int, num_inputs: int | None = None) -> Tensor:
        """The whole field, of which every rank of the instance brings its block; for figures and tests.

        Args:
            block: ``(..., latitude, longitude, channel)``.
            num: Channels of the whole field.
            num_inputs: See `local_channels`.
        """
        if not self.communicates:
            return block[..., :num]
        parts = [torch.empty_like(block, memory_format=torch.contiguous_format) for _ in self.instance_group.ranks]
        dist.all_gather(parts, block.contiguous(), group=self.instance_group.handle)
        size = self.channel_size
        bands = [torch.cat(parts[t * size : (t + 1) * size], -1) for t in range(self.token_size)]
        return torch.cat(bands, -2)[..., :num]

    # --------------------------------------------------------------------------------------------- exact sums

    def _sum(self, tensor: Tensor, group: Group) -> Tensor:
        total = tensor.detach().clone()
        if self.interconnect is not None and group.size > 1:
            total = total.contiguous()
            self.interconnect.all_reduce(total, group).wait()
        return total

    def sum_over_instance(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks of the instance, without gradient; called on all of them."""
        return self._sum(tensor, self.instance_group)

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sum over the bands, without gradient."""
        return self._sum(tensor, self.token_group)

    def sum_over_channels(self, tensor: Tensor) -> Tensor:
        """Sum over the groups of channels, without gradient."""
        return self._sum(tensor, self.channel_group)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Sum over the instances, without gradient."""
        return self._sum(tensor, self.data_group)

    def close(self) -> None:
        """Destroy the groups; called on all ranks together, after which nothing can be sent."""
        if self.world_mesh is not None and dist.is_initialized():
            destroy(self.token_group, self.channel_group, self.instance_group, self.data_group)


def check_sizes(token: int, channel: int, data: int | str, world_size: int) -> int:
    """Instances of the model.

    Args:
        token: Longitude bands.
        channel: Groups of channels.
        data: Instances; ``auto``: as many as there are ranks for.
        world_size: Ranks.

    Raises:
        ValueError: Unless ``token * channel * data == world_size``.
    """
    for name, value in (("token", token), ("channel", channel), ("data", data)):
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1) and (name, value) != (
            "data",
            "auto",
        ):
            allowed = "1 or more, or auto" if name == "data" else "1 or more"
            raise ValueError(f"strategy.{name}={value!r}: it counts ranks, {allowed}")
    size = token * channel
    if data == "auto":
        if world_size % size:
            raise ValueError(
                f"strategy.token={token} x strategy.channel={channel} = {size} ranks hold a model, and trainer.devices "
                f"x trainer.num_nodes = {world_size} is no multiple of it; use {_nearest(world_size, size)} processes"
            )
        return world_size // size
    if size * data != world_size:
        raise ValueError(
            f"strategy.token={token} x strategy.channel={channel} x strategy.data={data} = {size * data} ranks, but "
            f"trainer.devices x trainer.num_nodes = {world_size}"
        )
    return data


def _nearest(world_size: int, size: int) -> int:
    return max(size, round(world_size / size) * size)


def make_grid(
    token: int,
    channel: int,
    data: int | str = "auto",
    interconnect: Interconnect | None = None,
    device_type: str = "cpu",
    timeout: timedelta | None = None,
) -> JigsawGrid:
    """Make the groups of a grid; called on all ranks together after torch.distributed was initialised.

    Args:
        token: T, longitude bands.
        channel: C, groups of channels.
        data: Instances of the model; ``auto``: as many as there are ranks for.
        interconnect: Counts what is sent; None: a new one without an emulated network.
        device_type: Of the mesh, ``cpu`` or ``cuda``.
        timeout: Of the groups.

    Raises:
        ValueError: If the sizes do not fit the number of ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    data = check_sizes(token, channel, data, world)
    if interconnect is None:
        interconnect = Interconnect(world, NetworkModel(), Ledger(rank, world))
    size = token * channel
    place_data, (place_token, place_channel) = rank // size, divmod(rank % size, channel)
    numbers = torch.arange(world).view(data, token, channel)
    # Of one rank too: the mesh wants them. Never the default group, whose timeout is somebody else's.
    groups = [
        _own_group(numbers.movedim(dim, -1).reshape(-1, length).tolist(), timeout)
        for dim, length in enumerate((data, token, channel))
    ]
    instance = _own_group(numbers.reshape(data, -1).tolist(), timeout)
    mesh = DeviceMesh.from_group([group.handle for group in groups], device_type, numbers, mesh_dim_names=AXES)
    return JigsawGrid(
        token,
        channel,
        place_token,
        place_channel,
        data,
        place_data,
        token_group=groups[1],
        channel_group=groups[2],
        instance_group=instance,
        data_group=groups[0],
        mesh=mesh["token", "channel"] if size > 1 else None,
        world_mesh=mesh,
        interconnect=interconnect,
    )


def _own_group(families: list[list[int]], timeout: timedelta | None) -> Group:
    """New groups for all families; the one that holds this rank."""
    rank, mine = dist.get_rank(), None
    for ranks in families:  # all ranks take part in the creation of every group
        handle = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            mine = Group(tuple(ranks), handle)
    assert mine is not None, f"rank {rank} is in none of {families}"
    return mine


def grid_of(trainer: Any) -> JigsawGrid:
    """The grid of a Trainer's strategy; under strategies that know of none, every rank is an instance of its own.

    Args:
        trainer: Lightning's, or None for a model outside of a run.
    """
    if trainer is None:
        return JigsawGrid()
    grid = getattr(trainer.strategy, "grid", None)
    if grid is not None:
        return grid
    return JigsawGrid(data_size=trainer.world_size, data=trainer.global_rank)
