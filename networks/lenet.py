"""LeNet (LeCun et al., Proc. IEEE 1998), with ReLU and max-pooling as it is usually built today."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class LeNet(nn.Module):
    """Two convolutions of 5 x 5, each with ReLU and max-pooling, and three linear layers.

    Args:
        num_classes: Outputs.
        num_channels: Channels of an image.
        image_size: Height and width of an image, at least 12: (size - 4) / 2, rounded down, twice, must leave a pixel.
        channels: Of the two convolutions.
        hidden: Widths of the two hidden linear layers.
    """

    def __init__(
        self,
        num_classes: int = 10,
        num_channels: int = 3,
        image_size: int = 32,
        channels: Sequence[int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
    ) -> None:
        super().__init__()
        if len(channels) != 2 or len(hidden) != 2 or min(*channels, *hidden) < 1:
            raise ValueError(
                f"model.net.channels={list(channels)}, model.net.hidden={list(hidden)}: two widths each, at least 1"
            )
        left = ((image_size - 4) // 2 - 4) // 2
        if left < 1:
            raise ValueError(f"model.net.image_size={image_size}: LeNet needs at least 12 pixels")
        self.num_classes, self.num_channels, self.image_size = num_classes, num_channels, image_size
        self.conv1, self.conv2 = nn.Conv2d(num_channels, channels[0], 5), nn.Conv2d(*channels, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(channels[1] * left**2, hidden[0])
        self.fc2, self.fc3 = nn.Linear(*hidden), nn.Linear(hidden[1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        x = self.pool(self.conv1(image).relu())
        x = self.pool(self.conv2(x).relu())
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())
