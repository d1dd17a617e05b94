"""Channels chosen by what they do instead of by their norms: those from which the next layer can be fitted best.

Our addition to the paper, for NT-R (`networks.fusion.reconstruction`), which fits the next layer anyway. From the
outputs backwards, the channels of a group are taken one by one, each the one that reduces most the squared error of a
ridge regression of what the layer that reads them should give: the mean of the members' outputs, or the channels that
were kept behind it, each weighted by what it moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from networks.fusion.assembly import Kept
from networks.fusion.layout import Axis, ChannelGroups, Layer, Part
from networks.fusion.reconstruction import inputs_and_outputs
from networks.fusion.selection import keep_best


@torch.no_grad()
def keep_fitting(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    widths: Mapping[int, int],
    scales: Sequence[float],
    batches: Sequence[Tensor],
    p: float = 2.0,
    ridge: float = 1e-2,
) -> Kept:
    """The channels of all networks from which the next layers can be fitted best.

    Groups that anything else than one linear layer reads are chosen by importance.

    Args:
        networks: The members, in evaluation mode.
        groups: Of every member.
        widths: Channels to keep, by group.
        scales: Of every member in the mean of the outputs.
        batches: Unlabelled inputs, ``(item, ...)`` each.
        p: See `networks.fusion.selection.importance`.
        ridge: Penalty of the regressions over the mean of the squared features.
    """
    known = groups[0]
    kept = keep_best(networks, groups, widths, scales, p)
    worth: dict[int, Tensor] = {}  # by group: how much the channels of all networks move what reads them
    for g in reversed(known.free):
        layer = _reader(known, g)
        if layer is None:
            continue
        behind = known.axes[layer.weight][0].parts[0].group
        pinned = known.groups[behind].pinned
        gram, cross, moved, made = _moments(networks, layer, None if pinned else kept[behind], scales, batches)
        weights = [network.get_submodule(layer.name).weight for network in networks]
        norms = [w.norm(dim=0) * (scale if pinned else 1) for w, scale in zip(weights, scales, strict=True)]
        worth[g] = torch.cat(norms).double() * moved
        if behind in worth:
            own = torch.cat([w for w in _of_members(worth[behind], weights, kept[behind])])
            cross = cross * (own / made.clamp(min=1e-12))
        chosen = torch.zeros(len(gram), dtype=torch.bool)
        chosen[_greedy(gram, cross, widths[g], ridge)] = True
        kept[g] = [one.nonzero()[:, 0] for one in chosen.split([w.shape[1] for w in weights])]
    return kept


def _reader(groups: ChannelGroups, g: int) -> Layer | None:
    """The linear layer that reads a group, if it alone does, and reads and makes nothing else."""
    readers = [slot.tensor for slot in groups.groups[g].slots if slot.role == "reader"]
    layer = next((one for one in groups.layers if [one.weight] == readers), None)
    if layer is None or layer.kind != "linear" or groups.axes[layer.weight].get(1) != Axis((Part(g),)):
        return None
    out = groups.axes[layer.weight][0]
    return layer if len(out.parts) == 1 and out == Axis((Part(out.parts[0].group),)) else None


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
        gram, cross = gram + (h.T @ h).double(), cross + (h.T @ t).double()
        features, targets = features + h.double().sum(0), targets + t.double().sum(0)
        squares, count = squares + t.double().square().sum(0), count + len(h)
    moved = (gram.diagonal() / count - (features / count).square()).clamp(min=0).sqrt()
    made = (squares / count - (targets / count).square()).clamp(min=0).sqrt()
    if layer.bias is not None:
        gram, cross = gram - torch.outer(features, features) / count, cross - torch.outer(features, targets) / count
    return gram, cross, moved, made


def _greedy(gram: Tensor, cross: Tensor, count: int, ridge: float) -> Tensor:
    """Features that explain targets best, one by one, by a Cholesky factorisation that grows with them.

    Args:
        gram: H^T H, (feature, feature) float64.
        cross: H^T Z, (feature, target) float64.
        count: Features to choose.
        ridge: Penalty over the mean of the diagonal.

    Returns:
        Their numbers, (count,).
    """
    left = gram.diagonal().clone()  # squares that the chosen ones do not explain
    penalty = (ridge * left.mean()).clamp(min=torch.finfo(left.dtype).tiny)
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
