"""A mixer block cut by Jigsaw against Megatron-style tensor parallelism, in the same processes in turns.

The peer is torch.distributed.tensor.parallel: the linear layers of the block are column- and row-parallel, input,
residual stream and layer normalisation are whole on every rank. The block has 1024 tokens of 256 channels, 512 hidden
tokens and 256 hidden channels, one sample; a step is forward and backward, one thread a process, gloo. The paper has no
such measurement: its column of Megatron-LM is copied from the publication of that, on other hardware.

Four processes share two cores here, so wall time of four ranks says how much all of them compute and copy together.
Activations are what autograd saves for the backward pass, parameters not counted.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import REPEATS, Clock, Lap, Timing, interleave, ratio_row, time_rows
from benchmarks.record import Result, Row
from networks.jigsaw_layers import Width
from networks.weather_mixer import MixerBlock
from parallel.sharding import JigsawGrid, make_grid
from parallel.sharding.memory import SavedBytes

CLAIM: str = (
    "On two processes the best grid of Jigsaw takes at most 0.7 of the time of tensor parallelism for a mixer block, "
    "on four the grid 2 x 2 no longer than it, with at most 0.45 of its activations."
)

TOKENS, CHANNELS, TOKEN_HIDDEN, CHANNEL_HIDDEN = 1024, 256, 512, 256
PEER = "tensor parallel"
# Of the design study, in ms: serial 179, two processes 98 (2 x 1) and 191 (peer), four 356 (2 x 2, prototype) and 252.
EARLIER = {2: "0.51 in the design study", 4: "1.41 in the design study, before rings and a fused normalisation"}


class PlainBlock(nn.Module):
    """The block with torch's own layers."""

    def __init__(self, tokens: int, channels: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token_in, self.token_out = nn.Linear(tokens, token_hidden), nn.Linear(token_hidden, tokens)
        self.channel_in, self.channel_out = nn.Linear(channels, channel_hidden), nn.Linear(channel_hidden, channels)

    def forward(self, z: Tensor) -> Tensor:
        """``(batch, token, channel)`` to the same shape."""
        hidden = F.gelu(self.token_in(self.token_norm(z).transpose(1, 2)))
        z = z + self.token_out(hidden).transpose(1, 2)
        return z + self.channel_out(F.gelu(self.channel_in(self.channel_norm(z))))


def tensor_parallel(sizes: tuple[int, int, int, int]) -> PlainBlock:
    """The peer on all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    plan = {f"{kind}_in": ColwiseParallel() for kind in ("token", "channel")}
    plan |= {f"{kind}_out": RowwiseParallel() for kind in ("token", "channel")}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(PlainBlock(*sizes), mesh, plan)


def jigsaw(grid: JigsawGrid, sizes: tuple[int, int, int, int]) -> MixerBlock:
    """Our block on a grid."""
    parts = {"token": grid.token_size, "channel": grid.channel_size}
    tokens, token_hidden = (Width(size, size // parts["token"]) for size in (sizes[0], sizes[2]))
    channels, channel_hidden = (Width(size, size // parts["channel"]) for size in (sizes[1], sizes[3]))
    return MixerBlock(
        "block", grid, tokens, token_hidden, channels, channel_hidden, dropout=0.0, norm_groups=1, token_out_bias=True,
        seed=0, variant="auto", batch=1, pipelined=True,
    )  # fmt: skip


def stepping(block: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        block.zero_grad()
        out = block(x)
        out.backward(torch.ones_like(out))
        x.grad = None

    return step


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of a block, its parameters not counted."""
    with SavedBytes(block.parameters()) as saved:
        out = block(x)  # alive while it is counted, so that no storage is counted twice or used again
    assert out.requires_grad
    return saved.total


def variants(world: int, sizes: tuple[int, int, int, int]) -> dict[str, tuple[nn.Module, Tensor]]:
    """Blocks and inputs of this rank, by name; called on all ranks together."""
    tokens, channels, *_ = sizes
    x = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(1))
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    if world == 1:
        torch.manual_seed(0)
        found["one process, torch"] = (PlainBlock(*sizes), x.clone().requires_grad_())
        found["one process, ours"] = (jigsaw(JigsawGrid(), sizes), x.clone().requires_grad_())
        return found
    found[PEER] = (tensor_parallel(sizes), x.clone().requires_grad_())
    for token in (t for t in range(1, world + 1) if world % t == 0):
        grid = make_grid(token, world // token)
        band, group = tokens // token, channels // grid.channel_size
        part = x[:, grid.token * band :][:, :band, grid.channel * group :][..., :group]
        found[f"{token} x {world // token}"] = (jigsaw(grid, sizes), part.contiguous().requires_grad_())
    return found


def _rank(rank: int, world: int, folder: str, repeats: int, calls: int, sizes: tuple[int, int, int, int]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    blocks, clock = variants(world, sizes), Clock()

    def timed(step: Callable[[], None]) -> Callable[[], Lap]:
        def laps() -> Lap:
            dist.barrier()
            begin = clock.now()
            for _ in range(calls):
                step()
            own = clock.now().cpu - begin.cpu
            dist.barrier()
            return Lap((clock.now().wall - begin.wall) / calls, own / calls)

        return laps

    laps = interleave({name: timed(stepping(*both)) for name, both in blocks.items()}, repeats)
    found = {
        name: {"laps": [(lap.wall, lap.cpu) for lap in laps[name]], "saved": saved_bytes(*both)}
        for name, both in blocks.items()
    }
    Path(folder, f"{world}-{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(world: int, repeats: int, calls: int, sizes: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """What every rank of ``world`` fresh processes has found, by variant."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, folder, repeats, calls, sizes), nprocs=world)
        return [json.loads(Path(folder, f"{world}-{rank}").read_text()) for rank in range(world)]


def run(
    repeats: int = REPEATS,
    calls: int = 10,
    sizes: tuple[int, int, int, int] = (TOKENS, CHANNELS, TOKEN_HIDDEN, CHANNEL_HIDDEN),
    worlds: tuple[int, ...] = (1, 2, 4),
) -> Result:
    """Time steps of all variants on one, two and four processes."""
    rows: list[Row] = []
    for world in worlds:
        every = measure(world, repeats, calls, sizes)
        timings = {
            name: Timing.of([
                Lap(every[0][name]["laps"][n][0], sum(rank[name]["laps"][n][1] for rank in every) / world)
                for n in range(repeats)
            ])
            for name in every[0]
        }  # fmt: skip
        what = f"mixer block, {world} process(es)"
        rows += time_rows(what, timings)
        saved = {name: max(rank[name]["saved"] for rank in every) for name in every[0]}
        rows += [
            {"what": f"{what}, activations of a process", "variant": name, "value": size / 2**20, "unit": "MiB"}
            for name, size in saved.items()
        ]
        if world > 1:
            rows += _ratios(what, world, timings, saved)
    return Result(rows, {"tokens": sizes[0], "channels": sizes[1], "repeats": repeats, "calls": calls, "threads": 1})


def _ratios(what: str, world: int, timings: dict[str, Timing], saved: dict[str, int]) -> list[Row]:
    grids = [name for name in timings if name != PEER]
    best = min(grids, key=lambda name: sorted(timings[name].wall)[len(timings[name].wall) // 2])
    if world == 2:
        return [ratio_row(what, timings, best, PEER, at_most=0.7, note=EARLIER[2])]
    square = "2 x 2" if "2 x 2" in grids else best
    rows = [ratio_row(what, timings, square, PEER, at_most=1.0, note=EARLIER.get(world, ""))]
    rows += [ratio_row(what, timings, name, PEER) for name in grids if name != square]
    share = saved[square] / saved[PEER]
    name = f"{what}, activations, ratio"
    return [*rows, {"what": name, "variant": f"{square} / {PEER}", "value": share, "unit": "", "at_most": 0.45}]
