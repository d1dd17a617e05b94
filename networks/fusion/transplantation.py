"""Neuron transplantation: the best channels of several networks in one of their size (paper, sections 2.2 to 2.5)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from networks.fusion.assembly import Kept, Weighting, assemble, output_scales, tensors
from networks.fusion.layout import ChannelGroups
from networks.fusion.selection import best_of, importance, keep_best

Order = Literal["joint", "iterative", "hierarchical", "prune_merge"]
ORDERS = get_args(Order)


class RedundancyWarning(UserWarning):
    """Channels that two members have in common were kept twice: there is nothing to gain from fusing equal networks."""


Sources = dict[int, list[tuple[Tensor, Tensor, float]]]
"""By group and member: fused channels, the member's channels that they stand for, and their weight in a mean."""


@dataclass(frozen=True)
class Transplant:
    """A fused network and where its channels come from.

    Attributes:
        network: The fused network.
        origin: By group that can change: member and channel of every fused channel, ``(channel,)`` int64 each.
        scales: Weight of every member in the outputs.
    """

    network: nn.Module
    origin: dict[int, tuple[Tensor, Tensor]]
    scales: list[float]

    @property
    def sources(self) -> Sources:
        """The same by member: which fused channels are its own, which of its channels they are, all with weight 1."""
        return sources_of(self.origin, len(self.scales))


def sources_of(origin: Mapping[int, tuple[Tensor, Tensor]], members: int) -> Sources:
    """By member what ``origin`` is by fused channel; all weights are 1."""
    found: Sources = {}
    for g, (member, channel) in origin.items():
        places = [(member == k).nonzero()[:, 0] for k in range(members)]
        found[g] = [(own, channel[own], 1.0) for own in places]
    return found


def transplant(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    order: Order = "joint",
    fraction: float | None = None,
    target_width: float = 1.0,
    p: float = 2.0,
    weighting: Weighting = "width",
    base: int = 2,
    choose: Callable[..., Kept] = keep_best,
) -> Transplant:
    """Concatenate and prune.

    Args:
        networks: The members.
        groups: Of every member (`networks.fusion.assembly.examined`).
        order: ``joint``: all members are concatenated and pruned once. ``iterative``: one after the other joins what
            there is, half and half, so that early ones fade. ``hierarchical``: a tree of fusions of ``base`` networks.
            ``prune_merge``: every member is pruned to its share first.
        fraction: Of two members, the part of the channels that comes from the second; each is pruned to its part, then
            they are merged (0: the first member, 1: the second). None: the most important ones, whose they may be.
        target_width: Channels of the fused network over those of the first member.
        p: Of the norm that importance adds up.
        weighting: Of the members in the mean of the outputs, see `networks.fusion.assembly.output_scales`.
        base: Networks that a node of the tree fuses, 2 or 3.
        choose: Of ``joint``: which channels live on, given the networks, groups, widths, scales and p.

    Raises:
        ValueError: Names the argument.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; choose one of {', '.join(ORDERS)}")
    if base not in (2, 3):
        raise ValueError(f"base={base}: a node of the tree fuses 2 or 3 networks")
    if fraction is not None and (len(networks) != 2 or not 0 <= fraction <= 1):
        raise ValueError(f"fraction={fraction}: is the part of the second of two members, between 0 and 1")
    if target_width <= 0:
        raise ValueError(f"target_width={target_width}: must be positive; 1 is the width of a member")
    widths = _widths(groups, target_width)
    if fraction is not None or order == "prune_merge":
        found = _merged(networks, groups, _shares(widths, len(networks), fraction), p, weighting)
    elif order == "joint":
        found = _joint(networks, groups, widths, p, weighting, choose)
    else:
        found = _staged(networks, groups, widths, p, weighting, order, base)
    if pairs := redundant(networks, groups, found):
        warnings.warn(
            f"{pairs} channels were kept of two members that have them in common: fusing equal networks gains nothing",
            RedundancyWarning,
            stacklevel=2,
        )
    return found


def _widths(groups: Sequence[ChannelGroups], target_width: float) -> dict[int, int]:
    """Channels of the fused network by group: a count, not a ratio, so that no rounding loses one."""
    widths = {}
    for g in groups[0].free:
        own, there = groups[0].groups[g].width, sum(one.groups[g].width for one in groups)
        widths[g] = own if target_width == 1 else max(1, round(target_width * own))
        if widths[g] > there:
            raise ValueError(
                f"target_width={target_width}: {widths[g]} channels of {groups[0].groups[g].name}, but the members "
                f"have {there} together; use at most {there / own:g}"
            )
    return widths


def _joint(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    widths: dict[int, int],
    p: float,
    weighting: Weighting,
    choose: Callable[..., Kept] = keep_best,
) -> Transplant:
    scales = output_scales(groups, how=weighting)
    kept = choose(networks, groups, widths, scales, p=p)
    return Transplant(assemble(networks, groups, kept, scales), origin_of(kept), scales)


def _shares(widths: dict[int, int], members: int, fraction: float | None) -> dict[int, list[int]]:
    """Channels that every member gives, by group."""
    if fraction is None:
        return {g: [width // members + (k < width % members) for k in range(members)] for g, width in widths.items()}
    return {g: [width - round(fraction * width), round(fraction * width)] for g, width in widths.items()}


def _merged(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    shares: dict[int, list[int]],
    p: float,
    weighting: Weighting,
) -> Transplant:
    """Prune every member to its share, then concatenate."""
    kept: Kept = {}
    for g, counts in shares.items():
        kept[g] = []
        for network, one, count in zip(networks, groups, counts, strict=True):
            if count == 0:
                kept[g].append(torch.zeros(0, dtype=torch.int64))
            else:
                kept[g] += best_of([importance(network, one, g, p)], count, one.groups[g].name)
    scales = output_scales(groups, kept, weighting)
    return Transplant(assemble(networks, groups, kept, scales), origin_of(kept), scales)


def _staged(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    widths: dict[int, int],
    p: float,
    weighting: Weighting,
    order: Order,
    base: int,
) -> Transplant:
    """Fusions of fusions."""
    leaves = []
    for k, (network, one) in enumerate(zip(networks, groups, strict=True)):
        channels = {g: torch.arange(one.groups[g].width) for g in one.free}
        origin = {g: (torch.full_like(own, k), own) for g, own in channels.items()}
        leaves.append((Transplant(network, origin, [float(j == k) for j in range(len(networks))]), one))

    def fuse(nodes: list[tuple[Transplant, ChannelGroups]]) -> tuple[Transplant, ChannelGroups]:
        joined = _joint([n.network for n, _ in nodes], [one for _, one in nodes], widths, p, weighting)
        origin = {}
        for g, (member, channel) in joined.origin.items():
            pairs = [nodes[int(k)][0].origin[g] for k in member]
            origin[g] = tuple(torch.stack([pair[i][c] for pair, c in zip(pairs, channel, strict=True)]) for i in (0, 1))
        columns = zip(*(n.scales for n, _ in nodes), strict=True)
        scales = [sum(s * own for s, own in zip(joined.scales, column, strict=True)) for column in columns]
        return Transplant(joined.network, origin, scales), resized(nodes[0][1], widths)

    if order == "iterative":
        done = leaves[0]
        for leaf in leaves[1:]:
            done = fuse([done, leaf])
        return done[0]
    while len(leaves) > 1:
        nodes = [leaves[i : i + base] for i in range(0, len(leaves), base)]
        if len(nodes) > 1 and len(nodes[-1]) == 1:
            nodes[-2:] = [nodes[-2] + nodes[-1]]  # nobody waits alone, and weighs as much as all others later
        leaves = [fuse(node) for node in nodes]
    return leaves[0][0]


def resized(groups: ChannelGroups, widths: dict[int, int]) -> ChannelGroups:
    """The same groups with other widths."""
    changed = tuple(dataclasses.replace(one, width=widths.get(g, one.width)) for g, one in enumerate(groups.groups))
    return dataclasses.replace(groups, groups=changed)


def origin_of(kept: Kept) -> dict[int, tuple[Tensor, Tensor]]:
    """Member and channel of every channel of the network that `networks.fusion.assembly.assemble` makes of them."""
    return {
        g: (torch.cat([torch.full_like(own, k) for k, own in enumerate(each)]), torch.cat(list(each)))
        for g, each in kept.items()
    }


def provenance(groups: ChannelGroups, origin: dict[int, tuple[Tensor, Tensor]], members: int) -> dict[str, list[int]]:
    """Channels that come from every member, by the name of the group."""
    return {groups.groups[g].name: torch.bincount(k, minlength=members).tolist() for g, (k, _) in origin.items()}


@torch.no_grad()
def redundant(networks: Sequence[nn.Module], groups: Sequence[ChannelGroups], found: Transplant) -> int:
    """Pairs of fused channels of the first group whose weights are equal in two members.

    The first group reads the inputs, which all members have in common: equal rows are equal functions.
    """
    g = next(iter(found.origin), None)
    slot = None if g is None else next((s for s in groups[0].groups[g].slots if s.role == "maker"), None)
    if slot is None:
        return 0
    member, channel = found.origin[g]
    first, rows = [], []
    for k, network in enumerate(networks):
        places = next(p for i, p in groups[k].axes[slot.tensor][slot.dim].places(groups[k].widths) if i == g)
        weight = tensors(network)[slot.tensor].movedim(slot.dim, 0)
        own = places[channel[member == k]].to(weight.device)
        first.append(weight[(..., *[0] * (weight.ndim - 1))][own].flatten(1)[:, 0])
        rows.append((weight, own))
    _, group, counts = torch.unique(torch.cat(first), return_inverse=True, return_counts=True)
    alike = (counts[group] > 1).nonzero()[:, 0].tolist()  # whoever differs in one weight differs
    if not alike:
        return 0
    whole = torch.cat([weight[own].flatten(1) for weight, own in rows])[alike]
    return len(whole) - len(torch.unique(whole, dim=0))
