"""The residual network for images of 32 pixels of the original paper (He et al., CVPR 2016, section 4.2).

Three stages of 16, 32 and 64 channels; the literature on lottery tickets calls the 20-layer one ResNet-18 as well as
ResNet-20. Blocks and layer names are those of `networks.resnet`.
"""

from __future__ import annotations

from torch import Tensor, nn

from networks.drop_path import rates
from networks.resnet import Block

_WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """``depth = 6 n + 2`` layers: a convolution, three stages of n basic blocks, global mean, a linear layer.

    Shortcuts that change the number of channels are convolutions of 1 x 1 with batch normalisation: 272,474 parameters
    with 20 layers, 1,730,714 with 110.

    Args:
        depth: 20, 32, 44, 56, 110, ...
        num_classes: Outputs.
        num_channels: Channels of an image.
        width: Factor on all channel counts.
        drop_path: Probability of leaving out the last block in training; it grows linearly from 0 in the first.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        num_channels: int = 3,
        width: float = 1.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"model.net.depth={depth}: must be 6 n + 2, for example 8, 20, 32, 44, 56 or 110")
        if round(_WIDTHS[0] * width) < 1:
            raise ValueError(f"model.net.width={width} leaves no channels; 0.25 is a quarter of them")
        self.num_classes, self.num_channels = num_classes, num_channels
        number = (depth - 2) // 6
        widths = [round(w * width) for w in _WIDTHS]
        channels = widths[0]
        self.conv1 = nn.Conv2d(num_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        drops = iter(rates(drop_path, 3 * number))
        for stage, inner in enumerate(widths, start=1):
            blocks = []
            for i in range(number):
                blocks.append(Block(channels, inner, 1, 2 if stage > 1 and i == 0 else 1, False, next(drops)))
                channels = inner
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, image: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to the output of the last stage."""
        x = self.relu(self.bn1(self.conv1(image)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        return self.fc(self.features(image).mean((2, 3)))
