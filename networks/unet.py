"""U-Net: a class for every pixel of an image (Ronneberger, Fischer and Brox, MICCAI 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Stages that halve the resolution and double the channels, and back, with the finer features of the way down.

    Two convolutions 3 x 3 a stage, each with batch normalisation and ReLU; where the original cuts, here it pads, so
    that the output has the size of the input. The way up repeats pixels and mixes them by the convolutions.

    Args:
        num_classes: Outputs of a pixel.
        num_channels: Of an image.
        width: Channels of the finest stage.
        depth: How often the resolution is halved; sides must be multiples of 2^depth.
    """

    def __init__(self, num_classes: int, num_channels: int = 3, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        for key, value in (("num_classes", num_classes), ("num_channels", num_channels), ("width", width)):
            if value < 1:
                raise ValueError(f"model.net.{key}={value}: must be at least 1")
        if depth < 1:
            raise ValueError(f"model.net.depth={depth}: halve the resolution at least once")
        self.num_classes, self.num_channels, self.depth = num_classes, num_channels, depth
        self.multiple_of = 2**depth  # sides of images
        widths = [width * 2**stage for stage in range(depth + 1)]
        self.down = nn.ModuleList(
            _stage(before, after) for before, after in zip([num_channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _stage(coarse + fine, fine) for coarse, fine in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class, height, width)``."""
        if any(side % self.multiple_of for side in image.shape[-2:]):
            raise ValueError(
                f"data.image_size: sides of {image.shape[-2]} and {image.shape[-1]} pixels are no multiples of "
                f"{self.multiple_of}, which model.net.depth={self.depth} needs"
            )
        ways: list[Tensor] = []
        x = image
        for stage in self.down:
            x = stage(F.max_pool2d(x, 2) if ways else x)
            ways.append(x)
        for stage, fine in zip(self.up, ways[-2::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), fine], 1))
        return self.head(x)


def _stage(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True)]
    return nn.Sequential(*layers)
