"""VGG with batch normalisation: as published, for small images, and as the energy study uses it for X-ray images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

NUM_PARAMETERS = 20_035_266
"""Of VGG19 with one input channel and two classes."""

Depth = Literal[11, 13, 16, 19]

# Channels of the convolutions between two poolings.
_STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
_POOL_KERNEL = 2
_GRID, _HIDDEN = 7, 4096  # of the three linear layers of the original
_LARGEST_SIZE = 4096  # that is searched for when a size does not fit


class VGG(nn.Module):
    """Convolutions of 3 x 3 in five stages (Simonyan and Zisserman, ICLR 2015), each with batch normalisation and ReLU.

    Every stage ends with max-pooling over 2 x 2 pixels with a stride of ``pool_stride``. The study's stride of 3 leaves
    out every third row and column: 224 -> 75 -> 25 -> 8 -> 3 -> 1 pixels. What is left goes through an average pooling
    of one pixel with stride 2 (of 2 x 2 pixels it keeps the first) and one linear layer. The layers are numbered like
    those of the published code (``features.0.weight``, ``classifier.weight``).

    The usual variant for CIFAR-10 has a stride of 2 and images of 32 pixels. The original for ImageNet is
    ``head="original"`` with a stride of 2 and images of 224 pixels.

    Args:
        depth: 11, 13, 16 or 19: the name of the original, which has three linear layers.
        num_classes: Outputs.
        num_channels: Of the input, 1 for X-ray images.
        width: Factor on all channel counts.
        pool_stride: Stride of the max-poolings.
        image_size: Height and width of the images; one pixel must be left of them at the end. 224 with a stride of 3,
            32 or 64 with a stride of 2.
        head: ``linear``: one linear layer on what is left. ``original``: the means of a grid of 7 x 7 and three linear
            layers with 4,096 hidden units (times ``width``), ReLU and dropout; images of any size from 32 pixels.
    """

    def __init__(
        self,
        depth: Depth = 19,
        num_classes: int = 2,
        num_channels: int = 1,
        width: float = 1.0,
        pool_stride: int = 3,
        image_size: int = 224,
        head: Literal["linear", "original"] = "linear",
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"model.net.depth={depth} is unknown; choose one of {', '.join(map(str, _STAGES))}")
        if width <= 0 or round(_STAGES[depth][0][0] * width) < 1:
            raise ValueError(f"model.net.width={width} leaves no channels; 0.25 is a quarter of the published width")
        if pool_stride < 1:
            raise ValueError(f"model.net.pool_stride={pool_stride}: must be at least 1")
        if head not in ("linear", "original"):
            raise ValueError(f"model.net.head={head!r} is unknown; choose linear or original")
        self.num_classes, self.num_channels = num_classes, num_channels
        self.pool_stride, self.image_size, self.head = pool_stride, image_size, head
        self._check_size("model.net.image_size", image_size, image_size)
        layers: list[nn.Module] = []
        channels = num_channels
        for stage in _STAGES[depth]:
            for wanted in stage:
                out = round(wanted * width)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            layers.append(nn.MaxPool2d(_POOL_KERNEL, pool_stride))
        if head == "linear":
            self.features = nn.Sequential(*layers, nn.AvgPool2d(1, stride=2))
            self.classifier: nn.Module = nn.Linear(channels, num_classes)
        else:
            self.features = nn.Sequential(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d(_GRID)
            self.classifier = _three_layers(channels * _GRID**2, round(_HIDDEN * width), num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        height, width = image.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            self._check_size("data.image_size", height, width)
        features = self.features(image)
        return self.classifier((features if self.head == "linear" else self.avgpool(features)).flatten(1))

    def _check_size(self, key: str, height: int, width: int) -> None:
        """Refuse sizes of which not exactly one pixel is left (for the linear head), with the ones that fit."""
        left = [final_size(length, self.pool_stride) for length in (height, width)]
        if left == [1, 1] or (self.head == "original" and min(left) > 0):
            return
        fitting = [n for n in range(1, _LARGEST_SIZE) if final_size(n, self.pool_stride) == 1]
        range_ = f"from {fitting[0]} to {fitting[-1]}" if fitting else "none"
        if min(final_size(height, self.pool_stride), final_size(width, self.pool_stride)) < 1:
            why = "are too small: nothing is left of them after five poolings"
        else:
            why = "are too large: more than one pixel is left of them"
        raise ValueError(
            f"{key}: images of {height} x {width} pixels {why}; with model.net.pool_stride={self.pool_stride} the "
            f"sizes that fit are {range_}. Resize the images (data.image_size) or change model.net.pool_stride "
            "(2 for small images)"
        )


def _three_layers(inputs: int, hidden: int, num_classes: int) -> nn.Sequential:
    """The linear layers of the original."""
    return nn.Sequential(
        *(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout()),
        nn.Linear(hidden, num_classes),
    )


def final_size(size: int, pool_stride: int) -> int:
    """Pixels that are left of ``size`` before the linear layer; 0 if a pooling has less than its kernel to look at."""
    for _ in range(5):
        if size < _POOL_KERNEL:
            return 0
        size = (size - _POOL_KERNEL) // pool_stride + 1
    return (size - 1) // 2 + 1
