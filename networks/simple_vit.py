"""SimpleViT: a Vision Transformer without a class token, with fixed positions (Beyer, Zhai and Kolesnikov, 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.vit import Block

_EPS = 1e-5
_TEMPERATURE = 10_000.0


class SimpleViT(nn.Module):
    """Patches are normalised, mapped to tokens and normalised again; the classes are read off their mean.

    "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580). The defaults are those of Özdemir et al., "Sampling
    Parallelism for Fast and Efficient Bayesian Learning" (2026), for CIFAR-10: 2,676,778 parameters. All weights are in
    linear layers, so that `networks.bayes.to_bayesian` makes all but the normalisations random.

    Args:
        num_classes: Outputs.
        num_channels: Channels of an image.
        image_size: Height and width of an image.
        patch_size: Height and width of a patch; must divide ``image_size``.
        width: Of a token; a multiple of 4 (sine and cosine of two coordinates), at least 8.
        depth: Number of blocks.
        heads: Number of heads; must divide ``width``.
        mlp_ratio: Hidden units of the feed-forward layers over ``width``.
        dropout: After every map of a block.
    """

    positions: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        num_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"model.net.patch_size={patch_size} does not divide model.net.image_size={image_size}")
        if heads < 1 or width < 8 or width % heads or width % 4:
            raise ValueError(
                f"model.net.width={width}: must be a multiple of 4 and of model.net.heads={heads}, and at least 8"
            )
        self.num_classes, self.num_channels, self.image_size = num_classes, num_channels, image_size
        self.patch_size = patch_size
        pixels = num_channels * patch_size**2
        self.patch_embed = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, width), nn.LayerNorm(width))
        side = image_size // patch_size
        self.register_buffer("positions", sine_cosine_positions(side, width), persistent=False)
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, qkv_bias=False, dropout=dropout, drop_path=0.0, proj_bias=False, eps=_EPS)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def embedded(self, image: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to tokens ``(batch, patch, width)`` with positions."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {image.shape[-2]} x {image.shape[-1]} pixels, but model.net.image_size={self.image_size}"
            )
        size = self.patch_size
        patches = image.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1)
        return self.patch_embed(patches.flatten(3).flatten(1, 2)) + self.positions

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        x = self.embedded(image)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def sine_cosine_positions(side: int, width: int) -> Tensor:
    """Code of the places on a square grid, ``(side^2, width)``: sin and cos of x and of y at width / 4 frequencies.

    Args:
        side: Patches in a row.
        width: Multiple of 4, at least 8.
    """
    frequencies = _TEMPERATURE ** -(torch.arange(width // 4) / (width // 4 - 1))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
