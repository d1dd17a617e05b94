"""The published WeatherMixer on one device, with torch's own layers, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.weather_mixer import WeatherMixer


class GroupedNorm(nn.Module):
    """Layer normalisation of each of some groups of channels, as devices with parts of them do."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channel)`` to the same shape."""
        parts = x.unflatten(-1, (self.groups, -1))
        return F.layer_norm(parts, parts.shape[-1:]).flatten(-2) * self.weight + self.bias


class ReferenceMixer(nn.Module):
    """Fields are ``(batch, channel, latitude, longitude)``; tokens are numbered latitude by latitude.

    Patches are embedded by a convolution along longitude and recovered by a transposed one, on the concatenation of the
    processed and of the embedded tokens, or on their normalised sum.
    """

    def __init__(
        self, height: int, width: int, num_inputs: int, num_outputs: int, patch: int, dim: int, blocks: int,
        hidden: int, wide: int, groups: int, concat: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        tokens = height * width // patch
        self.size, self.num_outputs, self.groups = (height, width), num_outputs, groups
        self.embed = nn.Conv1d(num_inputs, dim, patch, patch)
        self.norms = nn.ModuleList(GroupedNorm(dim, groups) for _ in range(2 * blocks + 1))
        self.token_in = nn.ModuleList(nn.Linear(tokens, hidden) for _ in range(blocks))
        self.token_out = nn.ModuleList(nn.Linear(hidden, tokens) for _ in range(blocks))
        self.channel_in = nn.ModuleList(nn.Linear(dim, wide) for _ in range(blocks))
        self.channel_out = nn.ModuleList(nn.Linear(wide, dim) for _ in range(blocks))
        self.concat = concat
        self.recover = nn.ConvTranspose1d((1 + concat) * dim, num_outputs, patch, patch)
        self.norm_y, self.norm_pair = GroupedNorm(num_outputs, groups), GroupedNorm(2 * num_outputs, groups)
        self.mix = nn.Linear(2 * num_outputs, num_outputs)

    def interleaved(self, y: Tensor, x: Tensor) -> Tensor:
        """The halves of both tensors side by side, as on devices with half of the channels each."""
        return torch.cat([y.unflatten(-1, (self.groups, -1)), x.unflatten(-1, (self.groups, -1))], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """One step."""
        lines = x.flatten(2)  # patches do not cross from one circle of latitude to the next
        z = first = self.embed(lines).transpose(1, 2)
        for n, (a, b, c, d) in enumerate(
            zip(self.token_in, self.token_out, self.channel_in, self.channel_out, strict=True)
        ):
            z = z + b(F.gelu(a(self.norms[2 * n](z).transpose(1, 2)))).transpose(1, 2)
            z = z + d(F.gelu(c(self.norms[2 * n + 1](z))))
        z = torch.cat([self.norms[-1](z), first], -1) if self.concat else self.norms[-1](z + first)
        y = self.norm_y(self.recover(z.transpose(1, 2)).transpose(1, 2))
        state = lines[:, : self.num_outputs].transpose(1, 2)
        out = self.mix(self.norm_pair(self.interleaved(y, state)))
        return out.transpose(1, 2).unflatten(2, self.size)


def reference_of(net: WeatherMixer, groups: int) -> ReferenceMixer:
    """The reference with the weights of a network of ours, whose tokens are numbered longitude by longitude."""
    height, width, patch = net.height, net.width, net.patch
    hidden, wide = net.blocks[0].token_in.outputs.size, net.blocks[0].channel_in.outputs.size
    ref = ReferenceMixer(
        height, width, net.num_inputs, net.num_outputs, patch, net.dim, len(net.blocks), hidden, wide, groups,
        net.skip == "concat",
    )  # fmt: skip
    columns = width // patch
    token = torch.arange(height * columns)  # of the reference
    ours = (token % columns) * height + token // columns
    with torch.no_grad():
        ref.embed.weight.copy_(net.embedding.weight.view(net.dim, net.num_inputs, patch))
        ref.embed.bias.copy_(net.embedding.bias)
        for n, block in enumerate(net.blocks):
            ref.token_in[n].weight.copy_(block.token_in.weight[:, ours])
            ref.token_in[n].bias.copy_(block.token_in.bias)
            ref.token_out[n].weight.copy_(block.token_out.weight[ours])
            ref.token_out[n].bias.copy_(block.token_out.bias[ours])
            for name in ("channel_in", "channel_out"):
                getattr(ref, name)[n].load_state_dict(getattr(block, name).state_dict())
            ref.norms[2 * n].load_state_dict(block.token_norm.state_dict())
            ref.norms[2 * n + 1].load_state_dict(block.channel_norm.state_dict())
        ref.norms[-1].load_state_dict(net.norm.state_dict())
        both = torch.cat([getattr(net.recovery, name) for name in net.recovery.weights], 1)
        ref.recover.weight.copy_(both.view(net.num_outputs, patch, -1).permute(2, 0, 1))
        ref.recover.bias.copy_(net.recovery.bias)
        ref.norm_y.load_state_dict(net.blend.norm.state_dict())
        pair = net.blend.pair_norm
        ref.norm_pair.weight.copy_(ref.interleaved(pair.weight_y, pair.weight_x))
        ref.norm_pair.bias.copy_(ref.interleaved(pair.bias_y, pair.bias_x))
        ref.mix.weight.copy_(ref.interleaved(net.blend.mix.weight_y, net.blend.mix.weight_x))
        ref.mix.bias.copy_(net.blend.mix.bias)
    return ref
