"""Channels chosen by what they do instead of by their norms: those from which the next layer can be fitted best.

Our addition to the paper, for NT-R (`networks.fusion.reconstruction`), which fits the next layer anyway. From the
outputs backwards, the channels of a group are taken one by one, each the one that reduces most the squared error of a
ridge regression of what the layer that reads them should give: the mean of the members' outputs, or the channels that
were kept behind it, each weighted by what it moves. A channel of an image is the block of its pixels that the layer
sees: the kernel of a convolution, all pixels where they are flattened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from networks.fusion.assembly import Kept
from networks.fusion.layout import ChannelGroups, Layer
from networks.fusion.reconstruction import inputs_and_outputs, is_regression
from networks.fusion.selection import keep_best

_MOST_FEATURES = 4096  # of blocks of pixels: their products are a square matrix of float64, updated for every choice


@torch.no_grad()
def keep_fitting(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    widths: Mapping[int, int],
    scales: Sequence[float],
    batches: Sequence[Tensor],
    p: float = 2.0,
    ridge: float = 1e-2,
    positions: int = 8192,
    seed: int = 0,
) -> Kept:
    """The channels of all networks from which the next layers can be fitted best.

    Groups that anything else than one layer reads, convolutions of more than 4,096 values of all networks together,
    and those that are not fitted (padded otherwise than with zeros, in groups), are chosen by importance.

    Args:
        networks: The members, in evaluation mode.
        groups: Of every member.
        widths: Channels to keep, by group.
        scales: Of every member in the mean of the outputs.
        batches: Unlabelled inputs, ``(item, ...)`` each.
        p: See `networks.fusion.selection.importance`.
        ridge: Penalty of the regressions over the mean of the squared features.
        positions: Places of an image that a batch gives to the regression of a convolution, at most, drawn at random.
        seed: Of that draw.
    """
    known = groups[0]
    kept = keep_best(networks, groups, widths, scales, p)
    worth: dict[int, Tensor] = {}  # by group: how much the channels of all networks move what reads them
    for g in reversed(known.free):
        layer, size = _reader(networks, known, g)
        weights = [] if layer is None else [network.get_submodule(layer.name).weight.flatten(1) for network in networks]
        if layer is None or (size > 1 and sum(w.shape[1] for w in weights) > _MOST_FEATURES):
            continue
        behind = known.axes[layer.weight][0].parts[0].group
        pinned = known.groups[behind].pinned
        generator = torch.Generator().manual_seed(seed)
        gram, cross, moved, made = _moments(
            *(networks, layer, None if pinned else kept[behind], scales, batches, positions, generator)
        )
        norms = [w.norm(dim=0) * (scale if pinned else 1) for w, scale in zip(weights, scales, strict=True)]
        worth[g] = (torch.cat(norms).double() * moved).view(-1, size).norm(dim=1)
        if behind in worth:
            own = torch.cat([w for w in _of_members(worth[behind], weights, kept[behind])])
            cross = cross * (own / made.clamp(min=1e-12))
        chosen = torch.zeros(len(gram) // size, dtype=torch.bool)
        chosen[_greedy(gram, cross, widths[g], ridge, size)] = True
        kept[g] = [one.nonzero()[:, 0] for one in chosen.split([w.shape[1] // size for w in weights])]
    return kept


def _reader(networks: Sequence[nn.Module], groups: ChannelGroups, g: int) -> tuple[Layer | None, int]:
    """The layer that reads a group, if it alone does, and reads and makes nothing else; its features per channel."""
    readers = [slot.tensor for slot in groups.groups[g].slots if slot.role == "reader"]
    layer = next((one for one in groups.layers if [one.weight] == readers), None)
    if layer is None or not is_regression(networks[0], layer):
        return None, 1
    read, out = groups.axes[layer.weight].get(1), groups.axes[layer.weight][0]
    if read is None or read.outer != 1 or [part.group for part in read.parts] != [g]:
        return None, 1
    if out.outer != 1 or len(out.parts) != 1 or out.parts[0].inner != 1:
        return None, 1
    if layer.kind == "linear":
        return layer, read.parts[0].inner
    return layer, networks[0].get_submodule(layer.name).weight[0, 0].numel()


def _of_members(values: Tensor, weights: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
    """Entries of the kept outputs of every network."""
    parts = values.split([w.shape[0] for w in weights])
    return [part[own.to(part.device)] for part, own in zip(parts, kept, strict=True)]


def _moments(
    networks: Sequence[nn.Module],
    layer: Layer,
    kept: Sequence[Tensor] | None,
    scales: Sequence[float],
    batches: Sequence[Tensor],
    positions: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of what reaches a layer in all networks, with itself and with what it should give, and deviations.

    Around their means where the layer has a bias, which is fitted as well.
    """
    gram = cross = features = targets = squares = 0.0
    count = 0
    for batch in batches:
        pairs = [inputs_and_outputs(n, n.get_submodule(layer.name), layer, batch) for n in networks]
        h = torch.cat([rows for rows, _ in pairs], 1)
        if kept is None:
            t = sum(scale * out for scale, (_, out) in zip(scales, pairs, strict=True))
        else:
            t = torch.cat([out[:, own.to(out.device)] for own, (_, out) in zip(kept, pairs, strict=True)], 1)
        if layer.kind == "conv2d" and len(h) > positions:
            some = torch.randperm(len(h), generator=generator)[:positions].to(h.device)
            h, t = h[some], t[some]
        gram, cross = gram + (h.T @ h).double(), cross + (h.T @ t).double()
        features, targets = features + h.double().sum(0), targets + t.double().sum(0)
        squares, count = squares + t.double().square().sum(0), count + len(h)
    moved = (gram.diagonal() / count - (features / count).square()).clamp(min=0).sqrt()
    made = (squares / count - (targets / count).square()).clamp(min=0).sqrt()
    if layer.bias is not None:
        gram, cross = gram - torch.outer(features, features) / count, cross - torch.outer(features, targets) / count
    return gram, cross, moved, made


def _greedy(gram: Tensor, cross: Tensor, count: int, ridge: float, size: int = 1) -> Tensor:
    """Channels that explain targets best, one by one.

    Args:
        gram: H^T H, (feature, feature) float64.
        cross: H^T Z, (feature, target) float64.
        count: Channels to choose.
        ridge: Penalty over the mean of the diagonal.
        size: Features of a channel, side by side.

    Returns:
        Their numbers, (count,).
    """
    penalty = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    return _single(gram, cross, count, penalty) if size == 1 else _blocks(gram, cross, count, penalty, size)


def _single(gram: Tensor, cross: Tensor, count: int, penalty: Tensor) -> Tensor:
    """Channels of one feature, by a Cholesky factorisation that grows with them."""
    left = gram.diagonal().clone()  # squares that the chosen ones do not explain
    cross, factor = cross.clone(), gram.new_zeros(len(gram), count)
    chosen: list[int] = []
    for i in range(count):
        gain = cross.square().sum(1) / (left + penalty)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        root = (left[best] + penalty).sqrt()
        column = (gram[:, best] - factor[:, :i] @ factor[best, :i]) / root
        factor[:, i] = column
        cross -= torch.outer(column, cross[best] / root)
        left = (left - column.square()).clamp(min=0)
        chosen.append(best)
    return torch.tensor(chosen, device=gram.device)


def _blocks(gram: Tensor, cross: Tensor, count: int, penalty: Tensor, size: int) -> Tensor:
    """Channels of several features: what the chosen ones explain is taken out of all products."""
    number = len(gram) // size
    gram, cross = gram.clone(), cross.clone()
    gram.diagonal().add_(penalty)
    each = torch.arange(number, device=gram.device)
    chosen: list[int] = []
    for _ in range(count):
        own = gram.view(number, size, number, size)[each, :, each]  # (channel, size, size)
        mine = cross.view(number, size, -1)
        gain = (mine * torch.linalg.solve(own, mine)).sum((1, 2))
        gain[chosen] = -1.0
        best = int(gain.argmax())
        rows = slice(best * size, (best + 1) * size)
        column, factor = gram[:, rows].clone(), torch.linalg.cholesky(own[best])
        explained = torch.cholesky_solve(torch.cat([gram[rows], cross[rows]], 1), factor)
        gram -= column @ explained[:, : len(gram)]
        cross -= column @ explained[:, len(gram) :]
        gram[rows], gram[:, rows] = 0.0, 0.0
        gram[rows, rows] = torch.eye(size, dtype=gram.dtype, device=gram.device)  # chosen: must stay solvable
        chosen.append(best)
    return torch.tensor(chosen, device=gram.device)
