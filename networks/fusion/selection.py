"""Which channels live on: their importance, and the best ones of all networks together (paper, section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from networks.fusion.assembly import Kept, tensors
from networks.fusion.layout import ChannelGroups

_COUNTED = ("maker", "reader", "norm")


@torch.no_grad()
def importance(
    network: nn.Module,
    groups: ChannelGroups,
    group: int,
    p: float = 2.0,
    scale: float = 1.0,
    state: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What the channels of a group weigh: the sum over their rows, columns and factors of abs(w)^p.

    Biases and statistics do not count. All groups are ranked within themselves, so that neither a mean in the place of
    the sum nor a normalisation would change anything.

    Args:
        network: Whose channels they are.
        groups: Its groups.
        group: Number of the group.
        p: 2: squared Euclidean norms.
        scale: Of the last layer, which is averaged over the networks.
        state: The tensors of the network, where they are at hand.

    Returns:
        ``(channel,)``.
    """
    state = tensors(network) if state is None else state
    widths = groups.widths
    total: Tensor | None = None
    for slot in groups.groups[group].slots:
        if slot.role not in _COUNTED:
            continue
        axes = groups.axes[slot.tensor]
        weight = state[slot.tensor]
        if any(not groups.is_free(axis) for axis in axes.values()):
            weight = weight * scale
        others = [d for d in range(weight.ndim) if d != slot.dim]
        if p == 2 and others and slot.dim == 0:  # no copy of the weights, which pays along rows alone
            power = torch.linalg.vector_norm(weight, dim=others).square()
        else:
            power = weight.square() if p == 2 else weight.abs().pow(p)
            power = power.sum(others) if others else power
        for g, places in axes[slot.dim].places(widths):
            if g == group:
                own = power[places.to(power.device)].sum(1)
                total = own if total is None else total + own
    if total is None:
        return torch.zeros(widths[group])
    return total


def keep_best(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    widths: Mapping[int, int],
    scales: Sequence[float],
    p: float = 2.0,
) -> Kept:
    """The most important channels of all networks together, as many as the fused network has.

    All groups are judged by the networks as they were, before any of them is pruned.

    Args:
        networks: The members.
        groups: Of every member.
        widths: Channels to keep, by group.
        scales: Of every member in the last layer.
        p: See `importance`.

    Raises:
        ValueError: A group has fewer channels than are asked for.
    """
    known = [(*each, tensors(each[0])) for each in zip(networks, groups, scales, strict=True)]
    return {
        group: best_of(
            [importance(network, one, group, p, scale, state) for network, one, scale, state in known],
            widths[group],
            groups[0].groups[group].name,
        )
        for group in groups[0].free
    }


def best_of(scores: Sequence[Tensor], count: int, name: str) -> list[Tensor]:
    """The channels with the highest scores over all networks, ascending within each; ties go to the first.

    Args:
        scores: ``(channel,)`` of every network.
        count: How many.
        name: Of the group, for messages.

    Raises:
        ValueError: There are not so many.
    """
    every = torch.cat(list(scores))
    if not 1 <= count <= len(every):
        raise ValueError(f"{name}: {count} channels are asked for, the members have {len(every)} together")
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[every.sort(descending=True, stable=True).indices[:count].cpu()] = True
    return [one.nonzero()[:, 0] for one in chosen.split([len(score) for score in scores])]
