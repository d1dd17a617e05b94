"""Small networks of every kind that can be fused, with statistics and factors that are not those of a new one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from networks.cnn import CNN
from networks.fusion.members import without_biases
from networks.lenet import LeNet
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.simple_vit import SimpleViT
from networks.vgg import VGG
from networks.vit import ViT


class ConvNet(nn.Module):
    """Convolution, batch normalisation, convolution with bias, flatten, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.fc1, self.fc2 = nn.Conv2d(8, 12, 3), nn.Linear(12 * 4, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.bn(self.conv1(x)).relu(), 2)
        return self.fc2(self.fc1(self.conv2(x).relu().flatten(1)).relu())


class Everything(nn.Module):
    """Depth-wise convolution, group normalisation, channels that are gated, concatenated, sliced and shared."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(2, 2 * width)
        self.other = nn.Conv2d(width, 6, 1)
        self.shift = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.gate = nn.Conv2d(width, width, 1)
        self.slope = nn.PReLU(2 * width + 6)
        self.head = nn.Linear(2 * width + 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        branch = self.other(x[:, :, 1:]) + self.shift
        y = torch.cat([self.norm(self.depthwise(x))[:, :, 1:], branch], 1)
        return self.head(self.slope(y.mean((2, 3))))


class Encoder(nn.Module):
    """Embedding, positions and a Transformer encoder of torch."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.positions).mean(1))


def no_bias(network: nn.Module) -> nn.Module:
    return without_biases(network)


# Builders by name, each of a number k of the member, and the shape of an example.
EXACT: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda k: MLP(hidden=(20, 14)), (2, 1, 8, 8)),
    "mlp without biases": (lambda k: no_bias(MLP(hidden=(20, 14))), (2, 1, 8, 8)),
    "mlp of unequal widths": (lambda k: MLP(hidden=(20 + 3 * k, 14 - k)), (2, 1, 8, 8)),
    "lenet": (lambda k: LeNet(image_size=16), (2, 3, 16, 16)),
    "lenet without biases": (lambda k: no_bias(LeNet(image_size=16)), (2, 3, 16, 16)),
    "cnn": (lambda k: CNN(widths=(6, 8)), (2, 1, 8, 8)),
    "convolution and flatten": (lambda k: ConvNet(), (2, 3, 8, 8)),
    "vgg": (lambda k: VGG(11, 10, 3, 0.05, 2, 32), (2, 3, 32, 32)),
    "vgg of unequal widths": (lambda k: VGG(11, 10, 3, 0.05 + 0.02 * k, 2, 32), (2, 3, 32, 32)),
    "vgg with three linear layers": (lambda k: VGG(11, 10, 3, 0.01, 2, 32, "original"), (2, 3, 32, 32)),
    "resnet18": (lambda k: ResNet(18, 10, 3, "cifar", 0.125), (2, 3, 8, 8)),
    "resnet50": (lambda k: ResNet(50, 10, 3, "imagenet", 0.0625), (2, 3, 32, 32)),
    "resnet-rs": (lambda k: ResNet(50, 10, 3, "rs", 0.125), (2, 3, 32, 32)),
    "everything": (lambda k: Everything(8), (2, 3, 6, 6)),
    "vit": (lambda k: ViT(10, 3, 8, 4, 16, 2, 2), (2, 3, 8, 8)),
    "transformer encoder": (lambda k: Encoder(), (2, 5)),
}


def example(shape: tuple[int, ...], items: int = 2) -> Tensor:
    """Inputs of a network; of integers where it reads tokens."""
    return torch.randint(11, (items, *shape[1:])) if len(shape) == 2 else torch.randn(items, *shape[1:])


def members(build: Callable[[int], nn.Module], count: int, seed: int = 0) -> list[nn.Module]:
    """Networks in evaluation, with random statistics, factors and shifts."""
    torch.manual_seed(seed)
    found = []
    for k in range(count):
        network = build(k)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.num_batches_tracked.fill_(7)
            if getattr(module, "weight", None) is not None and "Norm" in type(module).__name__:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        found.append(network.eval())
    return found


SIMPLE_VIT = (lambda k: SimpleViT(10, 3, 8, 4, 16, 2, 2), (2, 3, 8, 8))
