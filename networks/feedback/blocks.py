"""Networks as chains of blocks, the units that are trained on their own (F3, section 2.1).

``blocks_of(net)`` cuts any network that it knows, without changing it: a block refers to layers of the network, which
go on to own their parameters, so that the names in a checkpoint stay what they are. The blocks one after the other are
the network.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from networks.cifar_resnet import CifarResNet
from networks.cnn import CNN
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.simple_vit import SimpleViT
from networks.vgg import VGG
from networks.vit import ViT


@dataclass(frozen=True)
class Block:
    """A stretch of a network.

    Attributes:
        name: For logs.
        forward: What it computes.
        parts: Modules and parameters of the network that it uses.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    parts: tuple[nn.Module | nn.Parameter, ...]

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters, each once."""
        found: dict[nn.Parameter, None] = {}
        for part in self.parts:
            found |= dict.fromkeys([part] if isinstance(part, nn.Parameter) else part.parameters())
        return [p for p in found if p.requires_grad]


def chain(name: str, steps: Sequence[Callable[[Tensor], Tensor]], parts: Iterable[nn.Module | nn.Parameter]) -> Block:
    """A block that applies ``steps`` one after the other."""
    return Block(name, functools.partial(_apply, tuple(steps)), tuple(parts))


def _apply(steps: tuple[Callable[[Tensor], Tensor], ...], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def blocks_of(net: nn.Module, boundaries: Sequence[int] | None = None) -> list[Block]:
    """The blocks of a network.

    Known are `nn.Sequential` (layers without parameters belong to the layer before them), the networks of this program
    for images, and every module with a method ``feedback_blocks() -> list[Block]``.

    Args:
        net: The network.
        boundaries: Numbers of the blocks that begin a larger one, ascending; what lies between them is joined. None:
            the blocks as they are. ``[]``: one block, the whole network.

    Raises:
        ValueError: For a network that cannot be cut, shared parameters, or numbers that are no blocks.
    """
    found = net.feedback_blocks() if hasattr(net, "feedback_blocks") else _cut(net)
    _require_partition(net, found)
    return found if boundaries is None else join(found, boundaries)


def join(blocks: Sequence[Block], boundaries: Sequence[int]) -> list[Block]:
    """Fewer, larger blocks, which begin with those of the numbers ``boundaries`` (and with the first).

    Raises:
        ValueError: If the numbers do not ascend between 1 and the number of blocks.
    """
    edges = [0, *boundaries, len(blocks)]
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"model.boundaries={list(boundaries)}: give ascending numbers of blocks between 1 and {len(blocks) - 1}; "
            f"the network has the blocks {', '.join(f'{i} {block.name}' for i, block in enumerate(blocks))}"
        )
    joined = []
    for begin, end in itertools.pairwise(edges):
        group = blocks[begin:end]
        parts = [part for block in group for part in block.parts]
        joined.append(chain("+".join(b.name for b in group), [b.forward for b in group], parts))
    return joined


def _require_partition(net: nn.Module, blocks: Sequence[Block]) -> None:
    """Every trainable parameter of the network is in exactly one block."""
    names = {p: name for name, p in net.named_parameters()}
    owner: dict[nn.Parameter, str] = {}
    for block in blocks:
        for parameter in block.parameters():
            if parameter in owner:
                raise ValueError(
                    f"{names.get(parameter, 'a parameter')} belongs to the blocks {owner[parameter]} and {block.name}: "
                    "blocks are updated one after the other, which leaves no meaning to a shared weight; untie it, or "
                    "join the blocks (model.boundaries)"
                )
            owner[parameter] = block.name
    if left := [name for p, name in names.items() if p.requires_grad and p not in owner]:
        raise ValueError(f"{type(net).__name__}: {', '.join(left[:5])} belong to no block")


# ---------------------------------------------------------------------------------------------------- known networks


@functools.singledispatch
def _cut(net: nn.Module) -> list[Block]:
    raise ValueError(
        f"model.net: {type(net).__name__} cannot be cut into blocks; use a torch.nn.Sequential, or give the network a "
        "method feedback_blocks() that returns a list of networks.feedback.Block"
    )


def _learns(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _cut_layers(layers: Iterable[tuple[str, nn.Module]], prefix: str = "") -> list[Block]:
    """Layers in a row: one without parameters belongs to the one before it, the first ones to the one after them."""
    groups: list[list[tuple[str, nn.Module]]] = [[]]
    for name, layer in layers:
        if _learns(layer) and any(_learns(other) for _, other in groups[-1]):
            groups.append([])
        groups[-1].append((name, layer))
    blocks = []
    for group in groups:
        names, modules = zip(*group, strict=True) if group else ((), ())
        label = next((name for name, layer in group if _learns(layer)), "-".join(names))
        blocks.append(chain(prefix + label, modules, modules))
    return blocks


@_cut.register
def _(net: nn.Sequential) -> list[Block]:
    return _cut_layers(net.named_children())


@_cut.register
def _(net: MLP) -> list[Block]:
    *hidden, last = net.layers
    blocks = []
    for i, layer in enumerate(hidden):
        first = [_flat] if i == 0 else []
        blocks.append(chain(f"layers.{i}", [*first, layer, _rectified, net.dropout], [layer]))
    return [*blocks, chain(f"layers.{len(hidden)}", [last] if hidden else [_flat, last], [last])]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _rectified(x: Tensor) -> Tensor:
    return x.relu()


def _pixel_mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _token_mean(x: Tensor) -> Tensor:
    return x.mean(1)


@_cut.register
def _(net: ViT) -> list[Block]:
    first = Block("embedding", net.embedded, (net.patch_embed, net.cls_token, net.pos_embed))
    last = chain("head", [net.norm, net.classified], [net.norm, net.head])
    return _embedding_with_first(first, net.blocks, last)


@_cut.register
def _(net: SimpleViT) -> list[Block]:
    first = Block("embedding", net.embedded, (net.patch_embed,))
    last = chain("head", [net.norm, _token_mean, net.head], [net.norm, net.head])
    return _embedding_with_first(first, net.blocks, last)


def _embedding_with_first(embedding: Block, middle: Iterable[nn.Module], last: Block) -> list[Block]:
    """The embedding goes with the first Transformer block, as in the paper's program."""
    blocks = [chain(f"blocks.{i}", [module], [module]) for i, module in enumerate(middle)]
    joined = [embedding, *blocks, last]
    return join(joined, range(2, len(joined))) if blocks else joined


@_cut.register(ResNet)
@_cut.register(CifarResNet)
def _(net: ResNet | CifarResNet) -> list[Block]:
    stem = [net.conv1, net.bn1, net.relu, *([net.maxpool] if hasattr(net, "maxpool") else [])]
    blocks = [chain("conv1", stem, stem)]
    for stage in range(1, 5):
        if (layers := getattr(net, f"layer{stage}", None)) is not None:
            blocks += [chain(f"layer{stage}.{i}", [block], [block]) for i, block in enumerate(layers)]
    head = [_pixel_mean, *([net.dropout] if hasattr(net, "dropout") else []), net.fc]
    return [*blocks, chain("fc", head, [net.fc])]


@_cut.register
def _(net: VGG) -> list[Block]:
    blocks = _convolutions(net.features, "features.")
    between = [net.avgpool, _flat] if net.head == "original" else [_flat]
    blocks[-1] = chain(blocks[-1].name, [blocks[-1].forward, *between], blocks[-1].parts)
    if isinstance(net.classifier, nn.Sequential):
        return blocks + _cut_layers(net.classifier.named_children(), "classifier.")
    return [*blocks, chain("classifier", [net.classifier], [net.classifier])]


@_cut.register
def _(net: CNN) -> list[Block]:
    last = chain("classifier", [_pixel_mean, net.classifier], [net.classifier])
    return [*_convolutions(net.features, "features."), last]


def _convolutions(layers: nn.Sequential, prefix: str) -> list[Block]:
    """A block for every convolution with the normalisation, activation and pooling behind it."""
    blocks: list[Block] = []
    begins = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for begin, end in itertools.pairwise([*begins, len(layers)]):
        group = list(layers[begin:end])
        blocks.append(chain(f"{prefix}{begin}", group, group))
    return blocks
