"""The Transformer of the paper's proof of concept: tokens are rows of one flat state (F3, section 2.6)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from networks.feedback.blocks import Block, chain


class TokenBlock(nn.Module):
    """Attention and a perceptron with tanh, each behind a normalisation and beside a shortcut, on a flat state.

    Args:
        tokens: T.
        width: Features of a token, w.
        heads: Heads of the attention.
        head_width: Features of one head.
        hidden: Features between the two layers of the perceptron.
    """

    def __init__(self, tokens: int, width: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.tokens, self.width, self.heads = tokens, width, heads
        inner = heads * head_width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))

    def forward(self, state: Tensor) -> Tensor:
        """``(batch, T w)`` to the same shape."""
        x = state.view(len(state), self.tokens, self.width)
        x = x + self._attention(self.norm1(x))
        return (x + self.mlp(self.norm2(x))).flatten(1)


class TokenNetwork(nn.Module):
    """A Transformer whose state between blocks is flat, so that any of them can get feedback.

    One linear layer maps all patches of the image together to all tokens; there are no positions and no token of the
    class. Blocks: embedding and first Transformer block, the other Transformer blocks, a layer with tanh, the output.

    Args:
        num_classes: Outputs.
        num_channels: Channels of an image.
        image_size: Height and width of an image.
        patch_size: Height and width of a patch; must divide ``image_size``. There are as many tokens as patches.
        width: Of a token.
        depth: Transformer blocks.
        heads: Of the attention.
        head_width: Features of one head.
        hidden: Of the perceptron in a block.

    Raises:
        ValueError: Names the argument.
    """

    def __init__(
        self,
        num_classes: int = 10,
        num_channels: int = 1,
        image_size: int = 28,
        patch_size: int = 7,
        width: int = 32,
        depth: int = 4,
        heads: int = 8,
        head_width: int = 64,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"model.net.patch_size={patch_size} does not divide model.net.image_size={image_size}")
        sizes = {"width": width, "depth": depth, "heads": heads, "head_width": head_width, "hidden": hidden}
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"model.net.{key}={value}: must be at least 1")
        self.num_classes, self.num_channels, self.image_size, self.patch_size = (
            num_classes, num_channels, image_size, patch_size,
        )  # fmt: skip
        tokens = (image_size // patch_size) ** 2
        pixels, state = math.prod((num_channels, image_size, image_size)), tokens * width
        self.embedding = nn.Linear(pixels, state)
        self.layers = nn.ModuleList(TokenBlock(tokens, width, heads, head_width, hidden) for _ in range(depth))
        self.mixing = nn.Sequential(nn.Linear(state, state), nn.Tanh())
        self.head = nn.Linear(state, num_classes)

    def embedded(self, image: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to the flat state: patch by patch, each with its pixels and channels."""
        size = self.patch_size
        patches = image.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1)
        return self.embedding(patches.flatten(1))

    def feedback_blocks(self) -> list[Block]:
        """Blocks as in the paper's program."""
        first, *others = self.layers
        blocks = [chain("embedding+layers.0", [self.embedded, first], [self.embedding, first])]
        blocks += [chain(f"layers.{i}", [layer], [layer]) for i, layer in enumerate(others, start=1)]
        return [*blocks, *(chain(name, [layer], [layer]) for name, layer in self._ends())]

    def _ends(self) -> list[tuple[str, nn.Module]]:
        return [("mixing", self.mixing), ("head", self.head)]

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        x = self.embedded(image)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.mixing(x))
