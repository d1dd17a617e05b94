"""What ranks do in the tests of Jigsaw: functions that are sent to a pool of processes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from networks.weather_mixer import WeatherMixer
from parallel.sharding import JigsawGrid, NormPlan, Plan, make_grid, ring, sharded_layer_norm
from parallel.sharding.blocks import block_of, whole
from parallel.sharding.linear import rows_of

SMALL = {"height": 4, "width": 16, "num_inputs": 7, "num_outputs": 5, "patch": 2, "dim": 16, "blocks": 2}


def field(batch: int, channels: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A random field ``(batch, latitude, longitude, channel)`` for `SMALL`."""
    shape = (batch, SMALL["height"], SMALL["width"], channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grid_for(token: int, channel: int) -> JigsawGrid:
    """The grid of a pool; the serial one in a process without a group."""
    if token * channel == 1 and not torch.distributed.is_initialized():
        return JigsawGrid()
    return make_grid(token, channel)


def pass_of(token: int, channel: int, steps: int, batch: int, dtype: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter, put together from the blocks of all ranks.

    The loss is a random linear function of the output, of which each rank has its own part.
    """
    kind = getattr(torch, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        grid = grid_for(token, channel)
        net = WeatherMixer(**SMALL | {"dropout": 0.1} | options, grid=grid)
    finally:
        torch.set_default_dtype(before)
    net.train()
    inputs, outputs = net.num_inputs, net.num_outputs
    x = grid.block(field(batch, inputs, 1, kind)).requires_grad_()
    out = net(x, steps)
    loss = (out * grid.block(field(batch, outputs, 2, kind), inputs)).sum()
    loss.backward()
    found = {"output": grid.gather(out.detach(), outputs, inputs), "input": grid.gather(x.grad, inputs)}
    layouts = net.layouts
    found |= {name: whole(p.grad, layouts[name], grid) for name, p in net.named_parameters()}
    for name, parameter in net.named_parameters():
        for tensor in (parameter, parameter.grad):
            rest = block_of(tensor).clone()
            rest[tuple(slice(0, length) for length in layouts[name].valid(grid.place))] = 0
            assert not rest.any(), f"padding of {name} has numbers"
    grid.close()
    return found


def mixed_pass(token: int, channel: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """`pass_of` with products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return pass_of(token, channel, 1, 2, "float32", options)


def norm_of_large_means() -> float:
    """Error of a layer normalisation over both ranks in float32, of channels with mean 1e4 and deviation 1."""
    grid = make_grid(1, 2)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    ours = sharded_layer_norm(
        x[:, 16 * grid.channel :][:, :16].float(), torch.ones(16), torch.zeros(16), NormPlan("", grid, (32,), (16,))
    )
    wanted = torch.nn.functional.layer_norm(x, (32,))[:, 16 * grid.channel :][:, :16]
    error = float((ours - wanted).abs().max())
    grid.close()
    return error


class Received(TorchDispatchMode):
    """Bytes that this rank receives in the collectives and messages of torch.distributed, whoever issues them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            size = torch.distributed.ProcessGroup.unbox(group).size()
            share = {
                "recv_": 1.0,
                "alltoall_base_": 1.0,
                "_allgather_base_": (size - 1) / size,
                "allreduce_": 2 * (size - 1) / size,
                "_reduce_scatter_base_": size - 1,
            }.get(name, 0.0)  # fmt: skip
            for tensor in args[0] if isinstance(args[0], list | tuple) else [args[0]]:
                if isinstance(tensor, Tensor):
                    self.bytes += share * tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def traffic_of(token: int, channel: int, options: dict[str, Any]) -> tuple[dict[Any, float], dict[Any, float], float]:
    """(counted, predicted) bytes by layer and direction of a step with two samples and repetitions, and all seen."""
    grid = make_grid(token, channel)
    net = WeatherMixer(**SMALL | options, grid=grid)
    x = grid.block(field(2, net.num_inputs, 1, torch.float32))
    with Received() as seen:
        net(x, 2).square().sum().backward()
    counted = {key: received for key, (_, received) in grid.traffic.by_layer().items()}
    predicted = {
        (name, direction): value
        for name, both in net.received_bytes(2, 2).items()
        for direction, value in zip(("forward", "backward"), both, strict=True)
    }
    grid.close()
    return counted, predicted, seen.bytes


class Transient(TorchDispatchMode):
    """The largest sum of bytes that are alive at a time among storages made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in before | self._known and storage.nbytes():
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _gone(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.alive -= size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


def transient_bytes(token: int, channel: int) -> tuple[int, int, int, int]:
    """(forward, backward) peak beside inputs and results of a pipelined layer, bytes of a block and a partial."""
    grid = make_grid(token, channel)
    plan = Plan("layer", grid, "token", 256 // channel, rows_of(256 // channel, token, channel))
    x = torch.randn(1, 64, 128 // channel)
    weight = torch.randn(plan.rows, 128 // channel)
    peaks = []
    with Transient() as seen:
        y = ring.forward(x, weight, plan)
        peaks.append(seen.peak - y.numel() * 4)
    with Transient() as seen:
        x_grad, weight_grad = ring.backward(torch.randn_like(y), x, weight, plan, True)
        peaks.append(seen.peak - 4 * (x_grad.numel() + weight_grad.numel() + y.numel()))
    grid.close()
    return peaks[0], peaks[1], 4 * weight.numel(), 4 * 64 * plan.rows
