"""Vision Transformer (Dosovitskiy et al., ICLR 2021).

Layers have the names of the widely used published code (``blocks.0.attn.qkv.weight``), so that published weights of the
same layout can be loaded.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.drop_path import DropPath, rates

_EPS = 1e-6  # of the layer normalisations
_STD = 0.02  # of the initial weights


class Attention(nn.Module):
    """Self-attention of several heads.

    Args:
        width: Of a token.
        heads: Number of heads; must divide ``width``.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: On the attention and on the output.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool, dropout: float, proj_bias: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width, bias=proj_bias)
        self.proj_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, width)`` to the same shape."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return self.proj_dropout(out)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, width)`` to the same shape."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a layer normalisation and beside a shortcut."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        qkv_bias: bool,
        dropout: float,
        drop_path: float,
        proj_bias: bool = True,
        eps: float = _EPS,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias, dropout, proj_bias)
        self.mlp = FeedForward(width, hidden, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, width)`` to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """Cuts an image into squares and maps each to a token."""

    def __init__(self, num_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(num_channels, width, patch_size, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to ``(batch, token, width)``, row by row."""
        return self.proj(image).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A Transformer on the patches of an image and one token of the class.

    The defaults are those of ViT-B/16 for ImageNet.

    Args:
        num_classes: Outputs.
        num_channels: Channels of an image.
        image_size: Height and width of an image.
        patch_size: Height and width of a patch; must divide ``image_size``.
        width: Of a token.
        depth: Number of blocks.
        heads: Number of heads; must divide ``width``.
        mlp_ratio: Hidden units of the feed-forward layers over ``width``.
        qkv_bias: Whether queries, keys and values have a bias.
        pool: What the linear layer sees: the ``class`` token, or the ``mean`` of the patches.
        dropout: In the blocks and after the embedding.
        drop_path: Probability of leaving out the branches of the last block in training; it grows linearly from 0 in
            the first.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pool: Literal["class", "mean"] = "class",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"model.net.patch_size={patch_size} does not divide model.net.image_size={image_size}")
        if heads < 1 or width % heads:
            raise ValueError(f"model.net.heads={heads} does not divide model.net.width={width}")
        if pool not in ("class", "mean"):
            raise ValueError(f"model.net.pool={pool!r} is unknown; choose class or mean")
        self.num_classes, self.num_channels, self.image_size, self.pool = num_classes, num_channels, image_size, pool
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbedding(num_channels, patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, width))
        self.dropout = nn.Dropout(dropout)
        hidden = round(mlp_ratio * width)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, qkv_bias, dropout, rate) for rate in rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=_STD)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embedded(self, image: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to tokens with positions ``(batch, 1 + patch, width)``, class first."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {image.shape[-2]} x {image.shape[-1]} pixels, but model.net.image_size={self.image_size}"
            )
        patches = self.patch_embed(image)  # of every weight sample, where there are several
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return self.dropout(tokens + self.pos_embed)

    def features(self, image: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to normalised tokens ``(batch, 1 + patch, width)``, the class first."""
        x = self.embedded(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def classified(self, tokens: Tensor) -> Tensor:
        """Normalised tokens ``(batch, 1 + patch, width)`` to logits ``(batch, class)``."""
        return self.head(tokens[:, 0] if self.pool == "class" else tokens[:, 1:].mean(1))

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        return self.classified(self.features(image))
