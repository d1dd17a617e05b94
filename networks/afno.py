"""Adaptive Fourier Neural Operator (FourCastNet; Pathak et al., arXiv 2202.11214; Guibas et al., arXiv 2111.13587).

Tokens on an h x w grid are mixed in the Fourier domain: every frequency passes through the same small complex network,
block-diagonal over channels. Symbols as in docs/experiments/energy_scaling.md: D width, k blocks of b = D / k channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.drop_path import DropPath
from parallel.sharding import JigsawGrid

COMPATS = (None, "nvlabs")


class AFNOFilter(nn.Module):
    """Mixing of tokens in the Fourier domain, with the input added to the result.

    z = rfft2(x); o1 = ReLU(z W1 + B1), o2 = o1 W2 + B2 as complex products with ReLU on real and imaginary parts, then
    soft shrinkage by ``shrinkage``; x + irfft2(o2). One product of real matrices does both parts: with [re | im] as one
    row, the weight of a block is [[W_r, W_i], [-W_i, W_r]].

    Args:
        dim: D.
        num_blocks: k; divides ``dim``.
        hidden_factor: Width of the hidden layer over b.
        shrinkage: lambda of the soft shrinkage.
        kept_modes: Share of the frequencies that pass: the lowest |k| of each axis; the others become zero.
        compat: ``nvlabs`` computes as the published layer does: the number of zonal modes comes from the number of rows
            (on grids of 2:1 half of them are lost), and a share below 1 keeps the highest meridional frequencies.

    Raises:
        ValueError: If ``num_blocks`` does not divide ``dim``, a share is not in (0, 1], or ``compat`` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int = 8,
        hidden_factor: int = 1,
        shrinkage: float = 0.01,
        kept_modes: float = 1.0,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        if dim % num_blocks:
            raise ValueError(f"num_blocks={num_blocks} does not divide dim={dim}; choose a divisor")
        if not 0 < kept_modes <= 1:
            raise ValueError(f"kept_modes={kept_modes}: give a share above 0, at most 1")
        if compat not in COMPATS:
            raise ValueError(f"compat={compat!r}: choose null or nvlabs")
        self.dim, self.num_blocks, self.shrinkage = dim, num_blocks, shrinkage
        self.kept_modes, self.compat = kept_modes, compat
        size, hidden = dim // num_blocks, dim // num_blocks * hidden_factor
        self.w1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, size, hidden))
        self.b1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden))
        self.w2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden, size))
        self.b2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix ``(batch, h, w, D)``; computed in float32 at least, whatever autocast says."""
        dtype = tokens.dtype
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.float() if dtype in (torch.float16, torch.bfloat16) else tokens
            h, w = x.shape[1:3]
            z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
            rows, columns = self._passed(h, w, x.device)
            mixed = self._mix(z[:, rows][:, :, columns])
            if len(rows) == h and columns.stop == z.shape[2]:
                spectrum = mixed
            else:
                spectrum = torch.zeros_like(z)
                spectrum[:, rows, columns] = mixed
            out = torch.fft.irfft2(spectrum, s=(h, w), dim=(1, 2), norm="ortho")
        return out.to(dtype) + tokens

    def _passed(self, h: int, w: int, device: torch.device) -> tuple[Tensor, slice]:
        """Meridional rows and zonal columns that pass the filter."""
        total, kept = h // 2 + 1, int((h // 2 + 1) * self.kept_modes)
        if self.compat == "nvlabs":
            low, high = max(total - kept, 0), min(total + kept, h)
            return torch.arange(low, high, device=device), slice(0, min(kept, w // 2 + 1))
        frequency = (torch.fft.fftfreq(h, device=device) * h).round().abs()
        limit = max(round(h // 2 * self.kept_modes), 0)
        rows = torch.nonzero(frequency <= limit).flatten()
        return rows, slice(0, max(round(w // 2 * self.kept_modes), 0) + 1)

    def _mix(self, z: Tensor) -> Tensor:
        """The complex network on ``(batch, rows, columns, D)``, frequencies as the rows of a batched real product."""
        shape, k = z.shape, self.num_blocks
        size = self.dim // k
        parts = torch.view_as_real(z).reshape(-1, k, size, 2)  # [frequency, block, channel, (re, im)]
        x = parts.permute(1, 0, 3, 2).reshape(k, -1, 2 * size)  # [block, frequency, re | im]
        x = F.relu(torch.baddbmm(_bias(self.b1), x, _matrix(self.w1)))
        x = torch.baddbmm(_bias(self.b2), x, _matrix(self.w2))
        x = F.softshrink(x, self.shrinkage) if self.shrinkage else x
        x = x.reshape(k, -1, 2, size).permute(1, 0, 3, 2).contiguous()
        return torch.view_as_complex(x).reshape(shape)

    def extra_repr(self) -> str:
        """For print(net)."""
        return f"{self.dim}, num_blocks={self.num_blocks}, kept_modes={self.kept_modes}, compat={self.compat}"


def _matrix(weight: Tensor) -> Tensor:
    """``(2, k, in, out)`` -> ``(k, 2 in, 2 out)`` so that [re | im] @ it is the complex product."""
    real, imaginary = weight
    return torch.cat((torch.cat((real, imaginary), 2), torch.cat((-imaginary, real), 2)), 1)


def _bias(bias: Tensor) -> Tensor:
    """``(2, k, out)`` -> ``(k, 1, 2 out)``."""
    return torch.cat(tuple(bias), 1)[:, None]


class AFNOBlock(nn.Module):
    """x + filter(LN(x)), then x + DropPath(MLP(LN(x))): two skips, the filter has one of its own besides."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **filter_options: object) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = AFNOFilter(dim, **filter_options)  # type: ignore[arg-type]
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, h, w, D)``."""
        x = x + self.filter(self.norm1(x))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class AFNONet(nn.Module):
    """FourCastNet's network: patches of a field, Fourier mixing, patches back to a field.

    Args:
        height: H, rows of the grid.
        width: W, columns.
        num_inputs: Channels of the input.
        num_outputs: Channels of the forecast; None: as many.
        patch_size: p; divides H and W.
        dim: D.
        depth: Blocks.
        num_blocks: k of the filters.
        mlp_ratio: Hidden width of the per-token network over D.
        drop_path: Probability that the last block's branch is left out; it grows linearly from 0.
        shrinkage: Of the filters.
        kept_modes: Of the filters.
        compat: ``nvlabs``: the published layer's frequencies, and its final norm, which nothing uses or trains.

    Raises:
        ValueError: If ``patch_size`` does not divide the grid; see `AFNOFilter`.
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_inputs: int,
        num_outputs: int | None = None,
        patch_size: int = 8,
        dim: int = 768,
        depth: int = 12,
        num_blocks: int = 8,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        shrinkage: float = 0.01,
        kept_modes: float = 1.0,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide the grid {height} x {width}; choose a divisor")
        self.height, self.width, self.patch_size = height, width, patch_size
        self.num_inputs, self.num_outputs = num_inputs, num_outputs or num_inputs
        h, w = height // patch_size, width // patch_size
        self.patch_embedding = nn.Conv2d(num_inputs, dim, patch_size, patch_size)
        self.position = nn.Parameter(torch.zeros(1, h, w, dim))
        self.blocks = nn.Sequential(
            *(
                AFNOBlock(
                    dim,
                    mlp_ratio,
                    drop_path * i / max(depth - 1, 1),
                    num_blocks=num_blocks,
                    shrinkage=shrinkage,
                    kept_modes=kept_modes,
                    compat=compat,
                )
                for i in range(depth)
            )
        )
        self.head = nn.Linear(dim, self.num_outputs * patch_size**2, bias=False)
        if compat == "nvlabs":
            # For the published files. It is in no forward pass: trainable, it would stop several processes.
            self.norm = nn.LayerNorm(dim, eps=1e-6).requires_grad_(False)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, field: Tensor, steps: int = 1) -> Tensor:
        """``(batch, num_inputs, H, W)`` -> ``(batch, num_outputs, H, W)``, the blocks applied ``steps`` times."""
        x = self.patch_embedding(field).movedim(1, -1) + self.position
        for _ in range(steps):
            x = self.blocks(x)
        patches = self.head(x)
        batch, h, w, _ = patches.shape
        p = self.patch_size
        patches = patches.reshape(batch, h, w, p, p, self.num_outputs)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.num_outputs, h * p, w * p)


class AFNOWeather(nn.Module):
    """FourCastNet behind the interface of the weather experiment: channels last, repeated steps, one rank an instance.

    Args:
        height: H of the grid.
        width: W.
        num_inputs: Channels of the input, outputs first.
        num_outputs: Channels of the forecast.
        patch_size: See `AFNONet`.
        dim: See `AFNONet`.
        depth: See `AFNONet`.
        num_blocks: See `AFNONet`.
        mlp_ratio: See `AFNONet`.
        drop_path: See `AFNONet`.
        shrinkage: See `AFNONet`.
        kept_modes: See `AFNONet`.
        compat: See `AFNONet`.
        seed: Of the initial weights.
        grid: The grid of ranks; only 1 x 1, with any number of data-parallel processes.

    Raises:
        ValueError: If an instance is cut over ranks.
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_inputs: int,
        num_outputs: int,
        patch_size: int = 4,
        dim: int = 64,
        depth: int = 4,
        num_blocks: int = 8,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        shrinkage: float = 0.01,
        kept_modes: float = 1.0,
        compat: str | None = None,
        seed: int = 0,
        grid: JigsawGrid | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid or JigsawGrid()
        if not self.grid.is_serial:
            raise ValueError(
                f"model.net=AFNOWeather on a grid of {self.grid.token_size} x {self.grid.channel_size} ranks: Fourier "
                "mixing needs whole fields; use strategy=ddp, or model=weather_mixer"
            )
        self.height, self.width = height, width
        self.num_inputs, self.num_outputs = num_inputs, num_outputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = AFNONet(
                height,
                width,
                num_inputs,
                num_outputs,
                patch_size=patch_size,
                dim=dim,
                depth=depth,
                num_blocks=num_blocks,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
                shrinkage=shrinkage,
                kept_modes=kept_modes,
                compat=compat,
            )

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        """``(batch, H, W, num_inputs)`` -> ``(batch, H, W, num_outputs)``, the blocks applied ``steps`` times."""
        return self.net(x.movedim(-1, 1), steps).movedim(1, -1)

    def parameter_kind(self, name: str) -> str:
        """``embedding``, ``recovery`` (the head) or ``processor``."""
        part = name.split(".")[1]
        return {"patch_embedding": "embedding", "position": "embedding", "head": "recovery"}.get(part, "processor")

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, batch: int = 1, steps: int = 1) -> int:
        """Of a forward pass, two per multiply-add, transforms left out; the backward pass takes twice as many."""
        net = self.net
        tokens, dim = self.height * self.width // net.patch_size**2, net.patch_embedding.out_channels
        ends = 2 * tokens * net.patch_size**2 * dim * (self.num_inputs + self.num_outputs)
        work = 0
        for block in net.blocks:
            size, hidden = block.filter.w1.shape[2:]
            frequencies = tokens // 2 + self.height // net.patch_size
            work += 2 * frequencies * block.filter.num_blocks * 4 * size * hidden * 2
            work += 2 * tokens * 2 * dim * block.mlp[0].out_features
        return batch * (ends + steps * work)
