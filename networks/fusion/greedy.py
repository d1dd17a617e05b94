"""Channels chosen by what they do instead of by their norms: those from which the next layer can be fitted best.

Our addition to the paper, for NT-R (`networks.fusion.reconstruction`), which fits the next layer anyway. From the
inputs on, the channels of a group are taken one by one, each the one that reduces most the squared error of a ridge
regression of what the layer that reads them should give: all channels behind it in all members, each weighted by what
it moves there, or the mean of the members' outputs. Then that layer is fitted to the chosen ones, so that the next
choice is among channels as they will be, and not as they are in the members. A channel of an image is the block of its
pixels that the layer sees: the kernel of a convolution, all pixels where they are flattened.

On the way there is a network of which one group is as wide as in all members together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from networks.fusion.assembly import Kept, assemble, everything
from networks.fusion.layout import ChannelGroups, Layer
from networks.fusion.reconstruction import fit, inputs_and_outputs, is_regression
from networks.fusion.selection import keep_best
from networks.fusion.transplantation import origin_of, resized, sources_of

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

    Chosen by importance are groups that anything else than one layer reads, heads of attention, and channels whose
    pixels at a place are more than 4,096 in all networks together or whose layer cannot be fitted.

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
    readers = {g: found for g in known.free if (found := _reader(networks, known, g)) is not None}
    worth = {g: _worth(networks, *reader, batches) for g, reader in readers.items()}
    state = {g: every if g in readers else kept[g] for g, every in everything(groups).items()}
    partial, now = assemble(networks, groups, state, scales), resized(known, _counts(state))
    fitted: set[str] = set()
    for g, (layer, size) in readers.items():
        come_from = (sources_of(origin_of(state), len(networks)), scales)
        for earlier in known.layers[: known.layers.index(layer)]:
            if earlier.name not in fitted and _narrowed(earlier, groups, now) and is_regression(partial, earlier):
                fit(earlier, partial, come_from, networks, groups, batches, ridge, positions, seed)
                fitted.add(earlier.name)
        behind = known.axes[layer.weight][0].parts[0].group
        pinned = known.groups[behind].pinned
        generator = torch.Generator().manual_seed(seed)
        gram, cross = _moments(
            *(partial, networks, layer, None if pinned else state[behind], scales, batches, positions, generator),
            weights=worth.get(behind),
        )
        chosen = torch.zeros(len(gram) // size, dtype=torch.bool)
        chosen[_greedy(gram, cross, widths[g], ridge, size).cpu()] = True
        state[g] = [one.nonzero()[:, 0] for one in chosen.split([one.groups[g].width for one in groups])]
        own = {other: [torch.arange(now.groups[other].width)] for other in known.free} | {g: [chosen.nonzero()[:, 0]]}
        partial, now = assemble([partial], [now], own, [1.0]), resized(now, {g: widths[g]})
    return state


def _counts(kept: Kept) -> dict[int, int]:
    return {g: sum(map(len, own)) for g, own in kept.items()}


def _narrowed(layer: Layer, groups: Sequence[ChannelGroups], now: ChannelGroups) -> bool:
    """Whether a layer reads fewer channels than the members have together."""
    axis = groups[0].axis(layer.weight, 1)
    free = [] if axis is None else [part.group for part in axis.parts if not groups[0].groups[part.group].pinned]
    return any(now.groups[g].width < sum(one.groups[g].width for one in groups) for g in free)


def _reader(networks: Sequence[nn.Module], groups: ChannelGroups, g: int) -> tuple[Layer, int] | None:
    """The layer that reads a group, and its features per channel, if the group can be chosen by it."""
    readers = [slot.tensor for slot in groups.groups[g].slots if slot.role == "reader"]
    layer = next((one for one in groups.layers if [one.weight] == readers), None)
    if layer is None or g in groups.heads.values() or not is_regression(networks[0], layer):
        return None
    read, out = groups.axes[layer.weight].get(1), groups.axes[layer.weight][0]
    if read is None or read.outer != 1 or [part.group for part in read.parts] != [g]:
        return None
    if out.outer != 1 or len(out.parts) != 1 or out.parts[0].inner != 1:
        return None
    weight = networks[0].get_submodule(layer.name).weight
    size = read.parts[0].inner * weight[0, 0].numel()
    features = sum(network.get_submodule(layer.name).weight[0].numel() for network in networks)
    return None if size > 1 and features > _MOST_FEATURES else (layer, size)


def _worth(networks: Sequence[nn.Module], layer: Layer, size: int, batches: Sequence[Tensor]) -> Tensor:
    """How much a channel moves what reads it, ``(channel,)``.

    The channels of all networks, one network after the other.
    """
    found = []
    for network in networks:
        module = network.get_submodule(layer.name)
        sums = squares = 0.0
        count = 0
        for batch in batches:
            rows = inputs_and_outputs(network, module, layer, batch)[0].double()
            sums, squares, count = sums + rows.sum(0), squares + rows.square().sum(0), count + len(rows)
        deviation = (squares / count - (sums / count).square()).clamp(min=0).sqrt()
        found.append((module.weight.flatten(1).norm(dim=0).double() * deviation).view(-1, size).norm(dim=1))
    return torch.cat(found)


def _moments(
    partial: nn.Module,
    networks: Sequence[nn.Module],
    layer: Layer,
    kept: Sequence[Tensor] | None,
    scales: Sequence[float],
    batches: Sequence[Tensor],
    positions: int,
    generator: torch.Generator,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Products of what reaches a layer with itself, and with what the layer should give.

    Around their means where the layer has a bias, which is fitted as well. What it should give is brought to the
    deviation ``weights``.
    """
    gram = cross = features = targets = squares = 0.0
    count = 0
    for batch in batches:
        h = inputs_and_outputs(partial, partial.get_submodule(layer.name), layer, batch)[0]
        outs = [inputs_and_outputs(n, n.get_submodule(layer.name), layer, batch, rows=False)[1] for n in networks]
        if kept is None:
            t = sum(scale * out for scale, out in zip(scales, outs, strict=True))
        else:
            t = torch.cat([out[:, own.to(out.device)] for own, out in zip(kept, outs, strict=True)], 1)
        if layer.kind == "conv2d" and len(h) > positions:
            some = torch.randperm(len(h), generator=generator)[:positions].to(h.device)
            h, t = h[some], t[some]
        gram, cross = gram + (h.T @ h).double(), cross + (h.T @ t).double()
        features, targets = features + h.double().sum(0), targets + t.double().sum(0)
        squares, count = squares + t.double().square().sum(0), count + len(h)
    if layer.bias is not None:
        gram, cross = gram - torch.outer(features, features) / count, cross - torch.outer(features, targets) / count
    if weights is not None:
        deviation = (squares / count - (targets / count).square()).clamp(min=0).sqrt()
        cross = cross * (weights / deviation.clamp(min=1e-12))
    return gram, cross


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
