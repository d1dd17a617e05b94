"""Multilayer perceptron on the pixels of an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them; layers are numbered ``layers.0``, ``layers.1``, ...

    Args:
        num_classes: Outputs.
        num_channels: Channels of an image.
        image_size: Height and width of an image.
        hidden: Widths of the hidden layers.
        dropout: After each hidden layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        num_channels: int = 1,
        image_size: int = 8,
        hidden: Sequence[int] = (512, 512),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ValueError(f"model.net.hidden={list(hidden)}: widths must be at least 1")
        self.num_classes, self.num_channels, self.image_size = num_classes, num_channels, image_size
        widths = [num_channels * image_size**2, *hidden, num_classes]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        x = image.flatten(1)
        for layer in self.layers[:-1]:
            x = self.dropout(layer(x).relu())
        return self.layers[-1](x)
