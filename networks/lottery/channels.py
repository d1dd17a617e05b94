"""Which layers make and which read the same channels: what must lose a channel together.

Known are perceptrons, VGG, residual networks and the feed-forward layers of Transformers, by themselves or inside of
any other network; of everything else nothing is said, and it keeps its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from networks.cifar_resnet import CifarResNet
from networks.mlp import MLP
from networks.resnet import Block, ResNet
from networks.vgg import VGG
from networks.vit import FeedForward


@dataclass(frozen=True)
class Channels:
    """Channels, or hidden units, between layers.

    Attributes:
        makers: Layers whose outputs they are; those of several layers are added up.
        norms: The batch normalisation behind each maker, None where there is none.
        readers: Layers whose inputs they are.
        activation: Between the only maker, its normalisation and the readers, entry by entry; None: something else
            happens there, so that a channel without weights is not known to be constant.
    """

    makers: tuple[str, ...]
    norms: tuple[str | None, ...]
    readers: tuple[str, ...]
    activation: Callable[[Tensor], Tensor] | None = None


def channels(network: nn.Module) -> list[Channels]:
    """All that is known of a network, from input to output."""
    found: list[Channels] = []
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for kind, of in _KNOWN.items():
            if isinstance(module, kind):
                found += [
                    Channels(
                        tuple(prefix + name for name in one.makers),
                        tuple(None if name is None else prefix + name for name in one.norms),
                        tuple(prefix + name for name in one.readers),
                        one.activation,
                    )
                    for one in of(module)
                ]
    order = {name: i for i, (name, _) in enumerate(network.named_modules())}
    return sorted(found, key=lambda one: order[one.makers[0]])


def _between(maker: str, norm: str | None, reader: str, activation: Callable[[Tensor], Tensor] = F.relu) -> Channels:
    return Channels((maker,), (norm,), (reader,), activation)


def _of_mlp(network: MLP) -> Iterator[Channels]:
    for i in range(len(network.layers) - 1):
        yield _between(f"layers.{i}", None, f"layers.{i + 1}")


def _of_vgg(network: VGG) -> Iterator[Channels]:
    convolutions = [i for i, module in enumerate(network.features) if hasattr(module, "stride") and _has_weight(module)]
    first = "classifier" if network.head == "linear" else "classifier.0"
    readers = [*(f"features.{i}" for i in convolutions[1:]), first]
    for i, reader in zip(convolutions, readers, strict=True):  # pooling leaves constants what they are
        yield _between(f"features.{i}", f"features.{i + 1}", reader)
    if network.head != "linear":
        yield _between("classifier.0", None, "classifier.3")
        yield _between("classifier.3", None, "classifier.6")


def _has_weight(module: nn.Module) -> bool:
    return bool(next(module.parameters(recurse=False), None) is not None)


def _of_block(block: Block) -> Iterator[Channels]:
    yield _between("conv1", "bn1", "conv2")
    if hasattr(block, "conv3"):
        yield _between("conv2", "bn2", "conv3")


def _of_resnet(network: CifarResNet | ResNet) -> Iterator[Channels]:
    """The residual stream of each stage: the outputs of its blocks, which shortcuts add up."""
    stages = [getattr(network, name) for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(network, name)]
    if any(not isinstance(block.se, nn.Identity) for stage in stages for block in stage):
        return  # ResNet-RS: squeeze-and-excitation mixes channels
    makers: list[tuple[str, str]] = [("conv1", "bn1")]
    readers: list[str] = []
    for number, stage in enumerate(stages, start=1):
        for i, block in enumerate(stage):
            path = f"layer{number}.{i}"
            readers.append(f"{path}.conv1")
            if block.downsample is not None:  # another stream begins
                readers.append(f"{path}.downsample.{len(block.downsample) - 2}")
                yield _stream(makers, readers)
                last = len(block.downsample) - 1
                makers, readers = [(f"{path}.downsample.{last - 1}", f"{path}.downsample.{last}")], []
            end = 3 if hasattr(block, "conv3") else 2
            makers.append((f"{path}.conv{end}", f"{path}.bn{end}"))
    yield _stream(makers, [*readers, "fc"])


def _stream(makers: list[tuple[str, str]], readers: list[str]) -> Channels:
    return Channels(tuple(maker for maker, _ in makers), tuple(norm for _, norm in makers), tuple(readers))


def _of_feed_forward(_: FeedForward) -> Iterator[Channels]:
    yield _between("fc1", None, "fc2", F.gelu)


_KNOWN: dict[type | tuple[type, ...], Callable[..., Iterator[Channels]]] = {
    MLP: _of_mlp,
    VGG: _of_vgg,
    (CifarResNet, ResNet): _of_resnet,
    Block: _of_block,
    FeedForward: _of_feed_forward,
}
