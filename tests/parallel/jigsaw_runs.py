"""What ranks do in the tests of Jigsaw: functions that are sent to a pool of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from networks.weather_mixer import WeatherMixer
from parallel.sharding import JigsawGrid, make_grid
from parallel.sharding.blocks import block_of, whole

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
    padding = sum(float(block_of(p).abs().sum()) - float(own.abs().sum()) for p, own in _blocks(net, layouts, grid))
    assert abs(padding) < 1e-9, "padding has weights"
    grid.close()
    return found


def _blocks(net: WeatherMixer, layouts: Any, grid: JigsawGrid) -> Any:
    for name, parameter in net.named_parameters():
        part = block_of(parameter)
        yield parameter, part[tuple(slice(0, length) for length in layouts[name].valid(grid.place))]
