"""Residual networks: ResNet (He et al., CVPR 2016) and ResNet-RS (Bello et al., NeurIPS 2021).

Layers have the names of the widely used published code (``layer1.0.conv1.weight``, ``fc.weight``), and the stride of a
bottleneck sits in its 3 x 3 convolution, as there, so that published weights of the same layout can be loaded.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from networks.drop_path import DropPath, rates

Depth = Literal[18, 26, 34, 50, 101, 152]
Stem = Literal["imagenet", "cifar", "rs"]

_BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_BASIC = (18, 34)  # the others have bottlenecks
_WIDTHS = (64, 128, 256, 512)
_SQUEEZE = 4  # channels over hidden units of a squeeze-and-excitation layer


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a number in (0, 1) that the means of all channels decide (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // _SQUEEZE, 1), nn.Conv2d(channels // _SQUEEZE, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to the same shape."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """A residual block: two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1 with ``expansion`` 4.

    Args:
        inputs: Channels that come in.
        width: Channels inside.
        expansion: Channels that go out, in units of ``width``: 1 (basic) or 4 (bottleneck).
        stride: Of the block.
        rs: Whether it is one of ResNet-RS: squeeze-and-excitation, and a mean over 2 x 2 pixels on the shortcut.
        drop_path: Probability of leaving the branch out in training.
    """

    def __init__(self, inputs: int, width: int, expansion: int, stride: int, rs: bool, drop_path: float) -> None:
        super().__init__()
        outputs = width * expansion
        bottleneck = expansion > 1
        self.conv1 = _conv(inputs, width, 1) if bottleneck else _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.se = SqueezeExcitation(outputs) if rs else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            if rs:
                pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
                first: list[nn.Module] = [pool if stride > 1 else nn.Identity(), _conv(inputs, outputs, 1)]
            else:
                first = [_conv(inputs, outputs, 1, stride)]
            self.downsample = nn.Sequential(*first, nn.BatchNorm2d(outputs))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the branch."""
        return self.bn3 if hasattr(self, "bn3") else self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            branch = self.bn3(self.conv3(self.relu(branch)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(self.se(branch)) + shortcut)


class ResNet(nn.Module):
    """Residual network of four stages, global mean and a linear layer.

    Args:
        depth: 18 or 34 (basic blocks), 26, 50, 101 or 152 (bottlenecks).
        num_classes: Outputs.
        num_channels: Channels of an image.
        stem: ``imagenet``: convolution 7 x 7 of stride 2 and max-pooling, for images of about 224 pixels. ``cifar``:
            convolution 3 x 3 of stride 1, for 32 pixels and fewer. ``rs``: ResNet-RS, three convolutions 3 x 3 and a
            fourth of stride 2 in place of the pooling, squeeze-and-excitation, mean-pooled shortcuts.
        width: Factor on all channel counts.
        dropout: Before the linear layer (ResNet-RS: 0.25).
        drop_path: Probability of leaving out the last block in training; it grows linearly from 0 in the first.
        zero_init: Whether every branch begins at zero (Goyal et al., 2017), which helps large batches.
    """

    def __init__(
        self,
        depth: Depth = 18,
        num_classes: int = 1000,
        num_channels: int = 3,
        stem: Stem = "imagenet",
        width: float = 1.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"model.net.depth={depth} is unknown; choose one of {', '.join(map(str, _BLOCKS))}")
        if stem not in ("imagenet", "cifar", "rs"):
            raise ValueError(f"model.net.stem={stem!r} is unknown; choose imagenet, cifar or rs")
        if round(_WIDTHS[0] * width) < (2 * _SQUEEZE if stem == "rs" else 1):
            raise ValueError(f"model.net.width={width} leaves too few channels; 0.25 is a quarter of them")
        self.num_classes, self.num_channels = num_classes, num_channels
        widths = [round(w * width) for w in _WIDTHS]
        expansion = 1 if depth in _BASIC else 4
        channels = widths[0]
        self.conv1 = _stem(stem, num_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = _pool(stem, channels)
        drops = iter(rates(drop_path, sum(_BLOCKS[depth])))
        for stage, (number, inner) in enumerate(zip(_BLOCKS[depth], widths, strict=True), start=1):
            blocks = []
            for i in range(number):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(Block(channels, inner, expansion, stride, stem == "rs", next(drops)))
                channels = inner * expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        self._initialize(zero_init)

    def _initialize(self, zero_init: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block) and zero_init:
                nn.init.zeros_(module.last_norm.weight)

    def features(self, image: Tensor) -> Tensor:
        """``(batch, channel, height, width)`` to the output of the last stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(batch, channel, height, width)`` to logits ``(batch, class)``."""
        return self.fc(self.dropout(self.features(image).mean((2, 3))))


def _stem(stem: Stem, num_channels: int, width: int) -> nn.Module:
    if stem == "imagenet":
        return _conv(num_channels, width, 7, 2)
    if stem == "cifar":
        return _conv(num_channels, width, 3)
    half = width // 2
    return nn.Sequential(
        *(_conv(num_channels, half, 3, 2), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
        *(_conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
        _conv(half, width, 3),
    )


def _pool(stem: Stem, width: int) -> nn.Module:
    if stem == "imagenet":
        return nn.MaxPool2d(3, 2, padding=1)
    if stem == "cifar":
        return nn.Identity()
    return nn.Sequential(_conv(width, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
