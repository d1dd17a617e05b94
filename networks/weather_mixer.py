"""WeatherMixer: an MLP-Mixer over patches of the globe, whole on one device or cut over a grid of ranks.

Source: Kieckhefen et al. (SC25, arXiv 2507.05753). Work grows linearly with the grid points for a fixed number of
hidden tokens, and one block sees the whole globe. The layers hold this rank's block of everything; on a grid of one
rank the network is the serial model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from networks.jigsaw_layers import (
    ChannelLinear,
    Choice,
    CounterDropout,
    Draw,
    JigsawLayerNorm,
    ShardedLayer,
    ShardedLinear,
    TokenLinear,
    Width,
)
from parallel.sharding import JigsawGrid
from parallel.sharding.layout import Layout

ParameterKind = Literal["embedding", "processor", "recovery", "blend"]
_CHANGE = 0.1  # of the network's output in the first forecast of blend=linear


class MixerBlock(nn.Module):
    """Two perceptrons of one hidden layer, the first over tokens, the second over channels, each beside a shortcut."""

    def __init__(
        self,
        name: str,
        grid: JigsawGrid,
        tokens: Width,
        token_hidden: Width,
        channels: Width,
        channel_hidden: Width,
        dropout: float,
        norm_groups: int,
        token_out_bias: bool,
        seed: int,
        variant: Choice,
        batch: int,
        pipelined: bool,
    ) -> None:
        super().__init__()
        how = {"variant": variant, "pipelined": pipelined}
        over_tokens, over_channels = batch * channels.size, batch * tokens.size
        self.token_norm = JigsawLayerNorm(f"{name}.token_norm", grid, [channels], norm_groups)
        self.token_in = TokenLinear(f"{name}.token_in", grid, tokens, token_hidden, seed, positions=over_tokens, **how)
        self.token_out = TokenLinear(
            f"{name}.token_out", grid, token_hidden, tokens, seed, positions=over_tokens, bias=token_out_bias, **how
        )
        self.channel_norm = JigsawLayerNorm(f"{name}.channel_norm", grid, [channels], norm_groups)
        self.channel_in = ChannelLinear(
            f"{name}.channel_in", grid, [channels], channel_hidden, seed, positions=over_channels, **how
        )
        self.channel_out = ChannelLinear(
            f"{name}.channel_out", grid, [channel_hidden], channels, seed, positions=over_channels, **how
        )
        layers = ("token_in", "token_out", "channel_in", "channel_out")
        self.drops = {layer: CounterDropout(f"{name}.{layer}", grid, dropout, seed) for layer in layers}

    def forward(self, z: Tensor, draw: Draw | None = None) -> Tensor:
        """``(batch, token, channel)``, the local block, to the same shape."""
        drops = self.drops
        hidden = drops["token_in"].after_gelu(self.token_in(self.token_norm(z)), draw)
        z = z + drops["token_out"](self.token_out(hidden), draw)
        hidden = drops["channel_in"].after_gelu(self.channel_in(self.channel_norm(z)), draw)
        return z + drops["channel_out"](self.channel_out(hidden), draw)


class Blend(nn.Module):
    """Makes the forecast of what the recovery gives and of the state before.

    ``linear``: A y + B x + b at every grid point, which begins as x + 0.1 y. ``residual``: x + y. ``reference``: a
    linear map of the layer-normalised pair, as published; it divides the state by its own spread and cannot represent
    the identity, which many channels hide and few do not.
    """

    def __init__(
        self,
        grid: JigsawGrid,
        kind: Literal["linear", "residual", "reference"],
        outputs: Width,
        norm_groups: int,
        seed: int,
        pipelined: bool,
    ) -> None:
        super().__init__()
        self.kind = kind
        parts = [outputs, outputs]
        if kind == "reference":
            self.norm = JigsawLayerNorm("blend.norm", grid, [outputs], norm_groups)
            self.pair_norm = JigsawLayerNorm("blend.pair_norm", grid, parts, norm_groups, ("y", "x"))
        if kind != "residual":
            diagonals = (_CHANGE, 1.0) if kind == "linear" else None
            self.mix = ChannelLinear(
                "blend.mix", grid, parts, outputs, seed, labels=("y", "x"), diagonals=diagonals, variant="weights",
                pipelined=pipelined,
            )  # fmt: skip

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Both ``(batch, point, channel)``, the same channels."""
        if self.kind == "residual":
            return x + y
        if self.kind == "linear":
            return self.mix(torch.cat([y, x.to(y.dtype)], -1))
        y = self.norm(y)
        return self.mix(self.pair_norm(torch.cat([y, x.to(y.dtype)], -1)))


class WeatherMixer(nn.Module):
    """Forecasts the state of the atmosphere a step ahead.

    Tokens are patches of ``patch`` points of one circle of latitude, numbered longitude by longitude (token = patch
    column * height + latitude); features of a patch are numbered channel by channel. So bands of longitudes and groups
    of channels are contiguous blocks of every tensor, whatever the grid of ranks.

    Args:
        height: Latitudes.
        width: Longitudes of the whole field.
        num_inputs: Channels of the input: the outputs' variables first, static fields last.
        num_outputs: Channels of the forecast.
        patch: Points of a patch, along longitude; must divide ``width``.
        dim: D, channels of a token.
        blocks: L.
        token_hidden: M_t, hidden units of token mixing; None: ``token_hidden_fraction`` times the number of tokens,
            which makes work quadratic in the number of grid points.
        token_hidden_fraction: See ``token_hidden``.
        channel_hidden_fraction: Hidden units of channel mixing over ``dim``.
        dropout: After GELU and after the second linear map of each perceptron, in training.
        token_out_bias: Bias of the second map of token mixing; layer normalisation takes it out again, so that it has
            no gradient, but the published parameter count includes it.
        norm: ``exact`` statistics over all channels, or ``grouped`` over each of ``norm_groups`` groups of them (the
            published model on two or four devices has two), whatever the grid.
        norm_groups: See ``norm``.
        blend: See `Blend`.
        skip: How the recovery sees the embedding z0 beside the processed z: ``concat`` maps [LN(z), z0], ``add``
            LN(z + z0), with half of the weights.
        positional: ``sinusoidal`` adds sines of latitude and longitude to the embedding; token mixing knows where its
            tokens are without.
        seed: Of initial weights and dropout.
        variant: What travels between ranks in linear layers, ``weights`` or ``activations``; ``auto``: what costs less,
            by layer.
        batch_hint: Samples of a step on a model instance, for which ``auto`` decides.
        pipelined: Overlap transfers and products.
        round_dims: Round ``dim`` and hidden widths up to what the grid divides, instead of refusing them.
        grid: Ranks; None: one.

    Raises:
        ValueError: For sizes that do not fit together or on the grid; names them and what would fit.
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_inputs: int,
        num_outputs: int,
        patch: int = 4,
        dim: int = 64,
        blocks: int = 3,
        token_hidden: int | None = None,
        token_hidden_fraction: float = 0.5,
        channel_hidden_fraction: float = 1.0,
        dropout: float = 0.0,
        token_out_bias: bool = True,
        norm: Literal["exact", "grouped"] = "exact",
        norm_groups: int = 2,
        blend: Literal["linear", "residual", "reference"] = "linear",
        skip: Literal["concat", "add"] = "concat",
        positional: Literal["none", "sinusoidal"] = "none",
        seed: int = 0,
        variant: Choice = "auto",
        batch_hint: int = 1,
        pipelined: bool = True,
        round_dims: bool = False,
        grid: JigsawGrid | None = None,
    ) -> None:
        super().__init__()
        grid = JigsawGrid() if grid is None else grid
        self._check_choices(
            norm=(norm, ("exact", "grouped")),
            blend=(blend, ("linear", "residual", "reference")),
            skip=(skip, ("concat", "add")),
            positional=(positional, ("none", "sinusoidal")),
            variant=(variant, ("auto", "weights", "activations")),
        )
        counts = {
            "height": height, "width": width, "num_inputs": num_inputs, "num_outputs": num_outputs, "patch": patch,
            "dim": dim, "blocks": blocks, "norm_groups": norm_groups, "batch_hint": batch_hint,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"model.net.{name}={value}: a number of 1 or more")
        if num_outputs > num_inputs:
            raise ValueError(
                f"model.net.num_outputs={num_outputs} are the first of model.net.num_inputs={num_inputs} channels, "
                "there cannot be more of them"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"model.net.dropout={dropout}: a probability in [0, 1)")
        local_width = grid.local_width(width, patch)
        self._check_channels(grid, num_inputs)
        self.grid, self.height, self.width, self.patch = grid, height, width, patch
        self.num_inputs, self.num_outputs, self.dim = num_inputs, num_outputs, dim
        self.dropout, self.skip, self.positional = dropout, skip, positional
        num_tokens = height * width // patch
        wanted = token_hidden if token_hidden is not None else int(token_hidden_fraction * num_tokens)
        name = "token_hidden" if token_hidden is not None else "token_hidden_fraction"
        hidden = self._fitting(name, wanted, round_dims)
        dim = self.dim = self._fitting("dim", dim, round_dims)
        wide = self._fitting("channel_hidden_fraction", int(channel_hidden_fraction * dim), round_dims)
        t, c = grid.token_size, grid.channel_size
        tokens, token_hidden_width = Width(num_tokens, num_tokens // t), Width(hidden, hidden // t)
        channels, channel_hidden = Width(dim, dim // c), Width(wide, wide // c)
        inputs = Width(num_inputs, grid.local_channels(num_inputs))
        outputs = Width(num_outputs, grid.local_channels(num_outputs, num_inputs))
        groups = norm_groups if norm == "grouped" else 1
        self.input_width, self.output_width, self.local_width = inputs, outputs, local_width

        def patches(of: Width) -> Width:
            return Width(of.size * patch, of.local * patch)

        how = {"variant": variant, "positions": batch_hint * num_tokens, "pipelined": pipelined}
        self.embedding = ChannelLinear("embedding", grid, [patches(inputs)], channels, seed, needs_x=False, **how)
        self.blocks = nn.ModuleList(
            MixerBlock(
                f"blocks.{number}", grid, tokens, token_hidden_width, channels, channel_hidden, dropout, groups,
                token_out_bias, seed, variant, batch_hint, pipelined,
            )
            for number in range(blocks)
        )  # fmt: skip
        self.norm = JigsawLayerNorm("norm", grid, [channels], groups)
        labels = ("processed", "embedded") if skip == "concat" else ("processed",)
        self.recovery = ChannelLinear(
            "recovery",
            grid,
            [channels for _ in labels],
            patches(outputs),
            seed,
            bias_repeats=patch,
            labels=labels,
            **how,
        )
        self.blend = Blend(grid, blend, outputs, groups, seed, pipelined)
        # Training forward passes so far: the counter of dropout, equal on all ranks.
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._inputs_valid = self._valid(outputs)

    # ----------------------------------------------------------------------------------------------------- checks

    @staticmethod
    def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"model.net.{name}={value!r} is unknown; choose {', '.join(known)}")

    @staticmethod
    def _check_channels(grid: JigsawGrid, num_inputs: int) -> None:
        if grid.channel_size > num_inputs:
            raise ValueError(
                f"strategy.channel={grid.channel_size}: there are only {num_inputs} input channels "
                f"(model.net.num_inputs) to share; use at most {num_inputs}"
            )

    def _fitting(self, name: str, value: int, round_dims: bool) -> int:
        """The width, if the grid divides it; with ``round_dims`` the next one that it does."""
        unit = math.lcm(self.grid.token_size, self.grid.channel_size)
        above = -(-value // unit) * unit
        if value < 1:
            raise ValueError(f"model.net.{name} gives a width of {value}; it must be 1 or more")
        if above == value or round_dims:
            return above
        below = above - unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"model.net.{name} gives a width of {value}, which a grid of {self.grid.token_size} x "
            f"{self.grid.channel_size} ranks (strategy.token x strategy.channel) needs as a multiple of {unit}: "
            f"use {near}, or model.net.round_dims=true"
        )

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        """Forecast the local block, the processor applied ``steps`` times.

        Args:
            x: ``(batch, latitude, longitude of this band, input channel of this group)``, padding channels 0.
            steps: Repetitions of the processor (latent rollout).

        Returns:
            ``(batch, latitude, longitude, output channel)``, the local block, 0 in padding channels.
        """
        expected = (self.height, self.local_width, self.input_width.local)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"a block of (latitude, longitude, channel) {tuple(x.shape[1:])}, but the network has {expected} "
                f"(model.net of {self.height} x {self.width} x {self.num_inputs} on a grid of {self.grid.token_size} x "
                f"{self.grid.channel_size})"
            )
        batch = len(x)
        embedded = self.embedding(self._to_patches(x))
        if self.positional == "sinusoidal":
            embedded = embedded + self._positions(embedded)
        z, number = embedded, self._next_draw()
        for repetition in range(steps):
            draw = None if number is None else Draw(number, repetition, self._samples(batch, x.device))
            for block in self.blocks:
                z = block(z, draw)
        y = self._to_points(self.recovery(self._beside(embedded, z)))
        state = x[..., : self.output_width.local]
        if self._inputs_valid < self.output_width.local:  # what follows are static fields or padding
            state = nn.functional.pad(
                state[..., : self._inputs_valid], (0, self.output_width.local - self._inputs_valid)
            )
        flat = self.blend(y.flatten(1, 2), state.flatten(1, 2))
        return flat.view(batch, self.height, self.local_width, -1)

    def _beside(self, embedded: Tensor, z: Tensor) -> Tensor:
        """What the recovery maps."""
        if self.skip == "add":
            return self.norm(z + embedded)
        z = self.norm(z)
        return torch.cat([z, embedded.to(z.dtype)], -1)

    def _valid(self, outputs: Width) -> int:
        """Output channels of this rank that are not padding."""
        found = self.grid.channels(outputs.size, self.num_inputs)
        return found.stop - found.start

    def _next_draw(self) -> int | None:
        """The number of this training pass; None where nothing is dropped."""
        if not self.training or not self.dropout:
            return None
        number = int(self.draws)
        self.draws += 1
        return number

    def _samples(self, batch: int, device: torch.device) -> Tensor:
        """Numbers of the samples within the batch of all instances, of which each has every data_size-th."""
        return torch.arange(batch, device=device) * self.grid.data_size + self.grid.data

    def _to_patches(self, x: Tensor) -> Tensor:
        """``(batch, latitude, longitude, channel)`` to ``(batch, token, channel * patch)``."""
        batch, height, width, channels = x.shape
        cut = x.view(batch, height, width // self.patch, self.patch, channels).permute(0, 2, 1, 4, 3)
        return cut.reshape(batch, -1, channels * self.patch)

    def _to_points(self, y: Tensor) -> Tensor:
        """The way back."""
        batch, columns = len(y), self.local_width // self.patch
        cut = y.view(batch, columns, self.height, -1, self.patch).permute(0, 2, 1, 4, 3)
        return cut.reshape(batch, self.height, self.local_width, -1)

    def _positions(self, z: Tensor) -> Tensor:
        """Sines of latitude and longitude of every token, in this rank's channels: ``(token, channel)``."""
        columns = self.local_width // self.patch
        column = torch.arange(columns, device=z.device) + self.grid.token * columns
        longitude = 2 * math.pi * column / (self.width // self.patch)
        latitude = math.pi * (torch.arange(self.height, device=z.device) + 0.5) / self.height
        channel = torch.arange(z.shape[-1], device=z.device) + self.grid.channel * z.shape[-1]
        frequency = (channel // 4 + 1).to(z.dtype)
        angles = torch.where(
            channel % 4 < 2,
            longitude.to(z.dtype)[:, None, None] * frequency,
            latitude.to(z.dtype)[None, :, None] * frequency,
        )
        return torch.sin(angles + (channel % 2) * (math.pi / 2)).flatten(0, 1).to(z.dtype)

    # ------------------------------------------------------------------------------------------------- what it costs

    def sharded_layers(self) -> Iterator[tuple[str, ShardedLayer]]:
        """(name, layer) of all layers with parameters."""
        for name, module in self.named_modules():
            if isinstance(module, ShardedLayer):
                yield name, module

    @property
    def layouts(self) -> dict[str, Layout]:
        """Which block of each parameter a rank holds, by the name of the parameter."""
        return {
            f"{name}.{parameter}": layout
            for name, layer in self.sharded_layers()
            for parameter, layout in layer.layouts.items()
        }

    @property
    def num_parameters(self) -> int:
        """Of the whole model, padding not counted."""
        return sum(layout.numel for layout in self.layouts.values())

    @property
    def variants(self) -> dict[str, str]:
        """What travels, by linear layer."""
        return {name: layer.plan.variant for name, layer in self.sharded_layers() if isinstance(layer, ShardedLinear)}

    def _passes(self, steps: int) -> Iterator[tuple[str, ShardedLayer, int, int]]:
        """(name, layer, positions of the whole field per sample, passes of a forward pass through it)."""
        tokens = self.height * self.width // self.patch
        for name, layer in self.sharded_layers():
            over = self.height * self.width if name.startswith("blend") else tokens
            if isinstance(layer, TokenLinear):
                over = self.dim
            yield name, layer, over, steps if name.startswith("blocks.") else 1

    def flops(self, batch: int = 1, steps: int = 1) -> int:
        """Of the products of a forward pass over all ranks of an instance, two per multiply-add; backward: twice that.

        Padding channels count: they are computed.
        """
        return sum(
            passes * layer.flops(batch * over)
            for _, layer, over, passes in self._passes(steps)
            if isinstance(layer, ShardedLinear)
        )

    def received_bytes(self, batch: int = 1, steps: int = 1, element: int = 4) -> dict[str, tuple[float, float]]:
        """Bytes that this rank receives in a training step, (forward, backward) by layer, from closed formulas.

        Args:
            batch: Samples of this instance.
            steps: Repetitions of the processor.
            element: Bytes of a number.
        """
        return {
            name: tuple(element * passes * part for part in layer.received(batch, over))
            for name, layer, over, passes in self._passes(steps)
        }

    @staticmethod
    def parameter_kind(name: str) -> ParameterKind:
        """Which part of the network a parameter belongs to: embedding and recovery have a smaller learning rate."""
        first = name.removeprefix("net.").split(".")[0]
        return first if first in ("embedding", "recovery", "blend") else "processor"
