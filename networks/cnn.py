"""A plain convolutional network for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class CNN(nn.Module):
    """Stages of convolution 3 x 3, batch normalisation and ReLU; max-pooling between them, global mean at the end.

    Args:
        num_classes: Outputs.
        num_channels: Channels of an image.
        widths: Channels of each stage; with n stages images need 2^(n-1) pixels.
        convolutions: Convolutions per stage.
        dropout: Before the linear layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        num_channels: int = 1,
        widths: Sequence[int] = (32, 64, 128),
        convolutions: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not widths or any(width < 1 for width in widths):
            raise ValueError(f"model.net.widths={list(widths)}: at least one stage of at least one channel")
        if convolutions < 1:
            raise ValueError(f"model.net.convolutions={convolutions}: must be at least 1")
        self.num_classes, self.num_channels = num_classes, num_channels
        self.num_stages, self.smallest_size = len(widths), 2 ** (len(widths) - 1)
        layers: list[nn.Module] = []
        channels = num_channels
        for stage, width in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        if min(image.shape[-2:]) < self.smallest_size:
            raise ValueError(
                f"data.image_size: images of {image.shape[-2]} x {image.shape[-1]} pixels are too small for "
                f"{self.num_stages} stages; use model.net.widths with fewer"
            )
        return self.classifier(self.features(image).mean((2, 3)))
