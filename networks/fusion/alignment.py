"""Averaging of networks, as they are or after their channels were put into one order (baselines of transplantation).

``rebasin``: permutations that bring all weights together, group by group until nothing changes (Ainsworth et al., Git
Re-Basin, ICLR 2023, weight matching). ``ot``: from the input on, every layer's rows are matched by their distance, the
columns following the layer before (Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, by weights).
Between as many channels with equal masses an optimal transport is a permutation, which is what is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from networks.fusion.assembly import assemble, tensors
from networks.fusion.layout import ChannelGroups

Permutation = dict[int, Tensor]
"""By group: which channel of the network comes to every place."""


@torch.no_grad()
def average(networks: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """The mean of all weights and statistics.

    Args:
        networks: Of one architecture and one width.
        weights: Of the networks; None: equal.

    Raises:
        ValueError: The networks have tensors of other shapes.
    """
    weights = [1 / len(networks)] * len(networks) if weights is None else list(weights)
    fused = copy.deepcopy(networks[0])
    states = [tensors(network) for network in networks]
    require_equal_shapes(states)
    for name, tensor in tensors(fused).items():
        if tensor.is_floating_point():
            tensor.copy_(sum(w * state[name] for w, state in zip(weights, states, strict=True)))
    return fused


def require_equal_shapes(states: Sequence[dict[str, Tensor]]) -> None:
    """Refuse networks of different widths, of which there is no mean."""
    for k, state in enumerate(states):
        for name, tensor in states[0].items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"members differ at layer {name}: {tuple(tensor.shape)} in member 0, {tuple(state[name].shape)} in "
                    f"member {k}; averaging needs equal widths, transplantation (method nt) does not"
                )


def permuted(network: nn.Module, groups: ChannelGroups, order: Permutation) -> nn.Module:
    """The same function with its channels in another order."""
    return assemble([network], [groups], {g: [own] for g, own in order.items()}, [1.0])


@torch.no_grad()
def match_weights(
    reference: nn.Module, network: nn.Module, groups: ChannelGroups, seed: int = 0, rounds: int = 100
) -> Permutation:
    """Permutations of a network's channels that maximise the inner product of its weights with another's.

    Args:
        reference: What to come close to.
        network: Whose channels are permuted.
        groups: Of both.
        seed: Of the order in which groups are taken.
        rounds: Passes over the groups at most.
    """
    first, second = tensors(reference), tensors(network)
    order = {g: torch.arange(groups.groups[g].width) for g in groups.free}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        changed = False
        for i in torch.randperm(len(groups.free), generator=generator).tolist():
            g = groups.free[i]
            gain = _similarity(groups, g, first, second, order)
            rows, columns = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
            assert (rows[1:] > rows[:-1]).all()
            new = torch.from_numpy(columns)
            old, best = (gain[torch.arange(len(gain)), one.to(gain.device)].sum() for one in (order[g], new))
            if best > old + 1e-6 * gain.abs().max():
                order[g], changed = new, True
        if not changed:
            break
    return order


def _similarity(
    groups: ChannelGroups, g: int, first: dict[str, Tensor], second: dict[str, Tensor], order: Permutation
) -> Tensor:
    """Inner products of the channels of two networks, ``(channel, channel)``, all other groups in their order."""
    total: Tensor | None = None
    for slot in groups.groups[g].slots:
        if slot.role == "buffer":
            continue
        one, other = first[slot.tensor], second[slot.tensor]
        other = _reordered(groups, slot.tensor, other, {k: v for k, v in order.items() if k != g}, skip=slot.dim)
        for own, places in groups.axes[slot.tensor][slot.dim].places(groups.widths):
            if own == g:
                index = places.to(one.device)
                a, b = (t.movedim(slot.dim, 0)[index].flatten(1) for t in (one, other))
                total = a @ b.T if total is None else total + a @ b.T
    assert total is not None
    return total


def _reordered(groups: ChannelGroups, name: str, tensor: Tensor, order: Permutation, skip: int | None = None) -> Tensor:
    """A tensor with the channels along its axes in another order."""
    for dim, axis in groups.axes[name].items():
        if dim != skip and any(part.group in order for part in axis.parts):
            places = [here[order[g]] if g in order else here for g, here in axis.places(groups.widths)]
            whole = torch.empty(axis.length(groups.widths), dtype=torch.int64)
            for (_, there), here in zip(axis.places(groups.widths), places, strict=True):
                whole[there.flatten()] = here.flatten()
            tensor = tensor.index_select(dim, whole.to(tensor.device))
    return tensor


@torch.no_grad()
def match_layers(reference: nn.Module, network: nn.Module, groups: ChannelGroups) -> Permutation:
    """Permutations by optimal transport between the rows of every layer, from the input on.

    Args:
        reference: What to come close to.
        network: Whose channels are permuted.
        groups: Of both.
    """
    first, second = tensors(reference), tensors(network)
    order: Permutation = {}
    for g in groups.free:
        squared: Tensor | None = None
        for slot in groups.groups[g].slots:
            if slot.role not in ("maker", "bias"):
                continue
            one = first[slot.tensor]
            other = _reordered(groups, slot.tensor, second[slot.tensor], order, skip=slot.dim)
            for own, places in groups.axes[slot.tensor][slot.dim].places(groups.widths):
                if own == g:
                    index = places.to(one.device)
                    a, b = (t.movedim(slot.dim, 0)[index].flatten(1).double() for t in (one, other))
                    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
                    squared = distance if squared is None else squared + distance
        assert squared is not None
        order[g] = torch.from_numpy(linear_sum_assignment(squared.sqrt().cpu().numpy())[1])
    return order
