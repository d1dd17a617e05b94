"""Channels that must go together, and the smaller network without them (pruning study, sections 2.2 and 2.3).

A network declares its groups in a method ``dim_groups()``: each is a set of channels with every slice of every tensor
that holds them. To declare them takes microseconds, where a search through the graph of a Fourier or auto-correlation
network takes minutes. Removal is real: the result is a plain smaller network without masks. What a network was trained
with at its full width stays (softmax scale, divisor of an auto-correlation, divisor of a LayerNorm), so that the
removal of channels that are zero changes no forecast.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

Kind = Literal["ff", "qk", "v", "stream"]
Granularity = Literal["ff", "qk", "v", "heads", "stream"]
Allocation = Literal["uniform", "global"]
Keep = dict[str, Tensor]
"""Positions that stay, ascending, by name of the group; a group that is not named stays whole."""


class Slice(NamedTuple):
    """Where the channels of a group lie in one tensor.

    Attributes:
        module: Owner of the tensor.
        name: Parameter or buffer.
        axis: Axis along which the channels lie.
        start: Position of the first one; an axis may hold several groups, or one several times.
        heads_axis: Axis of the heads where they have one of their own; ``axis`` then counts within a head.
    """

    module: nn.Module
    name: str
    axis: int
    start: int = 0
    heads_axis: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        return getattr(self.module, self.name)


@dataclass
class DimGroup:
    """Channels that can only be removed from all slices at once.

    Attributes:
        name: Within the network, ``encoder.0.attention.qk``.
        kind: ``ff`` hidden channels of a feed-forward block; ``qk`` and ``v`` channels of queries and keys, of values;
            ``stream`` channels of a residual stream.
        width: Channels, per head where there are heads.
        slices: All places that hold them.
        heads: Heads; channel c of head h has position ``h * width + c``, and every head keeps equally many.
        attentions: Modules whose attribute ``heads`` follows.
    """

    name: str
    kind: Kind
    width: int
    slices: list[Slice]
    heads: int = 1
    attentions: list[nn.Module] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Positions: channels of all heads."""
        return self.heads * self.width


def rows(layer: nn.Module, start: int = 0) -> list[Slice]:
    """Outputs of a linear or convolutional layer."""
    named = ("weight", "bias") if layer.bias is not None else ("weight",)
    return [Slice(layer, name, 0, start) for name in named]


def columns(layer: nn.Module, start: int = 0) -> list[Slice]:
    """Inputs of a linear or convolutional layer."""
    return [Slice(layer, "weight", 1, start)]


def norm(layer: nn.Module, start: int = 0) -> list[Slice]:
    """Channels of a LayerNorm or a BatchNorm, its statistics included."""
    named = ("weight", "bias", "running_mean", "running_var")
    return [Slice(layer, name, 0, start) for name in named if isinstance(getattr(layer, name, None), Tensor)]


def backbone_of(network: nn.Module) -> nn.Module:
    """The part of a network that declares groups: itself, or the first module within it that does.

    Raises:
        ValueError: Nothing in it does.
    """
    for module in network.modules():
        if hasattr(module, "dim_groups"):
            return module
    raise ValueError(
        f"{type(network).__name__} declares no groups of channels (dim_groups), so it has no structure to remove: "
        "choose callbacks.pruning.method=l1 or another one that masks single weights"
    )


def dim_groups(network: nn.Module) -> list[DimGroup]:
    """All groups of a network, checked: every slice has as many channels as its group, names are unique."""
    groups = backbone_of(network).dim_groups()
    assert len({group.name for group in groups}) == len(groups), "names of groups repeat"
    for group in groups:
        for part in group.slices:
            length = part.tensor.shape[part.axis]
            fits = length == group.width if part.heads_axis is not None else length >= part.start + group.size
            assert fits, f"{group.name}: {part.name} {list(part.tensor.shape)} has no {group.size} channels there"
    return groups


# --------------------------------------------------------------------------------------------------------- importance


def importance(group: DimGroup) -> Tensor:
    """How much each position weighs, (heads * width,), float64, with mean 1.

    The sum of squares of every weight matrix that goes with the channel, averaged over those matrices and divided by
    the mean of the group: what torch-pruning's ``MagnitudeImportance`` computes by default. Biases, norms, tables of
    positions and whatever is not trained do not count.
    """
    weights = [part for part in group.slices if part.name in ("weight", "kernel") and part.tensor.ndim > 1]
    found = []
    for part in [part for part in weights if part.tensor.requires_grad] or weights:
        squares = part.tensor.detach().double().square()
        if part.heads_axis is not None:
            axes = [axis for axis in range(squares.ndim) if axis not in (part.heads_axis, part.axis)]
            found.append(squares.sum(axes).flatten())
        else:
            axes = [axis for axis in range(squares.ndim) if axis != part.axis]
            found.append(squares.sum(axes)[part.start : part.start + group.size])
    scores = torch.stack(found).mean(0)
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


# ---------------------------------------------------------------------------------------------------------- what stays


def choose(
    network: nn.Module,
    ratio: float,
    granularity: Sequence[Granularity] = ("ff", "qk", "v", "stream"),
    allocation: Allocation = "uniform",
) -> Keep:
    """The channels that stay when a part of them goes, the least important first.

    Args:
        network: Declares groups.
        ratio: Part of the channels that goes, in [0, 1).
        granularity: What is removed; ``heads`` removes whole heads (their number is rounded, one stays).
        allocation: ``uniform``: the same part of every group. ``global``: the least important channels of all groups
            together, of which some may keep a single channel (per head).

    Raises:
        ValueError: For a ratio outside [0, 1), one that would empty a group, or an unknown option.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} would empty the network: it must lie in [0, 1), the part of channels that go")
    if wrong := [name for name in granularity if name not in get_args(Granularity)]:
        raise ValueError(f"granularity={wrong[0]!r} is unknown; choose among {', '.join(get_args(Granularity))}")
    if allocation not in get_args(Allocation):
        raise ValueError(f"allocation={allocation!r} is unknown; choose one of {', '.join(get_args(Allocation))}")
    groups = dim_groups(network)
    keep: Keep = {}
    heads = _kept_heads(groups, ratio) if "heads" in granularity else {}
    chosen = [group for group in groups if group.kind in granularity]
    scores = {group.name: importance(group).view(group.heads, group.width) for group in chosen}
    if allocation == "uniform":
        widths = {group.name: max(1, round((1 - ratio) * group.width)) for group in chosen}
    else:
        widths = _global_widths(chosen, scores, ratio)
    for group in chosen:
        order = scores[group.name].argsort(dim=1, descending=True, stable=True)[:, : widths[group.name]]
        within = order.sort(dim=1).values
        keep[group.name] = (within + group.width * torch.arange(group.heads).unsqueeze(1).to(within)).flatten().cpu()
    for group in groups:
        if group.kind in ("qk", "v") and group.name in heads:
            positions = keep.get(group.name, torch.arange(group.size))
            keep[group.name] = positions[torch.isin(positions // group.width, heads[group.name])]
    return {name: positions for name, positions in keep.items() if len(positions) < _size(groups, name)}


def _size(groups: Iterable[DimGroup], name: str) -> int:
    return next(group.size for group in groups if group.name == name)


def _kept_heads(groups: Sequence[DimGroup], ratio: float) -> dict[str, Tensor]:
    """Heads that stay, by the name of the groups of the attention, the most important of queries, keys and values."""
    found = {}
    for qk, v in _attention_pairs(groups):
        scores = sum(importance(group).view(group.heads, group.width).sum(1) for group in (qk, v))
        number = max(1, round((1 - ratio) * qk.heads))
        found[qk.name] = found[v.name] = scores.argsort(descending=True, stable=True)[:number].sort().values.cpu()
    return found


def _attention_pairs(groups: Sequence[DimGroup]) -> list[tuple[DimGroup, DimGroup]]:
    """The ``qk`` and the ``v`` group of every attention."""
    values = {id(group.attentions[0]): group for group in groups if group.kind == "v"}
    return [(group, values[id(group.attentions[0])]) for group in groups if group.kind == "qk"]


def _global_widths(groups: Sequence[DimGroup], scores: Mapping[str, Tensor], ratio: float) -> dict[str, int]:
    """Widths that are left when the least important channels of all groups go together.

    Heads lose their least important channel at the same time, whose importance is the mean over heads; the most
    important channel of a group always stays.
    """
    units = sum(group.width for group in groups)
    removable = sorted(
        (value, group.name) for group in groups for value in scores[group.name].sort(dim=1).values.mean(0)[:-1].tolist()
    )
    number = round(ratio * units)
    if number > len(removable):
        raise ValueError(
            f"ratio={ratio} would empty a group: {units} channels in {len(groups)} groups, each keeps one; "
            f"at most {len(removable) / units:.4f} can go"
        )
    widths = {group.name: group.width for group in groups}
    for _, name in removable[:number]:
        widths[name] -= 1
    return widths


# -------------------------------------------------------------------------------------------------------------- shrink


class TrimmedLayerNorm(nn.LayerNorm):
    """LayerNorm over channels of which some were removed: mean and variance are still divided by the trained width.

    A removed channel was zero, or is taken to be: it stays in the statistics as a zero, so that the removal of channels
    that are zero changes nothing.
    """

    trained_width: int

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise (..., channel)."""
        width, missing = tokens.shape[-1], self.trained_width - tokens.shape[-1]
        mean = tokens.sum(-1, keepdim=True) / self.trained_width
        centred = tokens - mean
        variance = (centred.square().sum(-1, keepdim=True) + missing * mean.square()) / self.trained_width
        assert width == len(self.weight)
        return torch.addcmul(self.bias, centred * (variance + self.eps).rsqrt(), self.weight)


def shrink(network: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """A smaller copy of a network: the slices that stay, in layers of fitting sizes.

    Args:
        network: Declares groups (`dim_groups`), or holds a module that does.
        keep: Positions that stay, by group; see `choose`.

    Raises:
        ValueError: A name is unknown, a group would be empty, or its heads would keep different numbers of channels.
    """
    small = copy.deepcopy(network)
    groups = dim_groups(small)
    kept = _checked(groups, keep)
    places: dict[tuple[int, str, int], list[tuple[Slice, DimGroup]]] = {}
    for group in groups:
        for part in group.slices:
            places.setdefault((id(part.module), part.name, part.axis), []).append((part, group))
    for entries in places.values():
        if any(group.name in keep for _, group in entries):
            _cut(entries, kept)
    for group in groups:
        for attention in group.attentions:
            attention.heads = len(_per_head(group, kept[group.name]))
    for module in small.modules():
        _fit(module)
    return small


def _checked(groups: Sequence[DimGroup], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    known = {group.name for group in groups}
    if unknown := [name for name in keep if name not in known]:
        raise ValueError(f"there is no group {unknown[0]!r}; there are {', '.join(sorted(known))}")
    kept = {group.name: torch.as_tensor(keep.get(group.name, torch.arange(group.size))).long() for group in groups}
    for group in groups:
        positions = kept[group.name]
        if not len(positions):
            raise ValueError(f"group {group.name} would be empty: keep at least one of its channels (per head)")
        if bool((positions.diff() <= 0).any()) or int(positions[0]) < 0 or int(positions[-1]) >= group.size:
            raise ValueError(f"group {group.name}: positions must ascend within 0..{group.size - 1}")
        if len({len(part) for part in _per_head(group, positions).values()}) > 1:
            raise ValueError(f"group {group.name}: all heads that stay must keep equally many channels")
    for qk, v in _attention_pairs(groups):
        if _per_head(qk, kept[qk.name]).keys() != _per_head(v, kept[v.name]).keys():
            raise ValueError(f"{qk.name} and {v.name} must keep the same heads")
    return kept


def _per_head(group: DimGroup, positions: Tensor) -> dict[int, Tensor]:
    """Channels that stay by head; heads of which nothing stays are missing."""
    head = positions // group.width
    return {int(h): positions[head == h] - int(h) * group.width for h in head.unique()}


def _cut(entries: Sequence[tuple[Slice, DimGroup]], kept: Mapping[str, Tensor]) -> None:
    """Keep what stays of one axis of one tensor."""
    part, group = entries[0]
    old = part.tensor
    if part.heads_axis is not None:
        heads = _per_head(group, kept[group.name])
        # An earlier cut of another axis has already taken heads away.
        whole = old.shape[part.heads_axis] == group.heads
        chosen = [
            old.detach().select(part.heads_axis, head if whole else number)
            .index_select(part.axis - (part.axis > part.heads_axis), channels.to(old.device))
            for number, (head, channels) in enumerate(heads.items())
        ]  # fmt: skip
        new = torch.stack(chosen, part.heads_axis)
    else:
        positions = torch.cat([p.start + kept[g.name] for p, g in sorted(entries, key=lambda entry: entry[0].start)])
        new = old.detach().index_select(part.axis, positions.to(old.device))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(part.module, part.name, new)


def _fit(module: nn.Module) -> None:
    """Let the sizes that a layer knows of itself follow its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.BatchNorm1d):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.normalized_shape != tuple(module.weight.shape):
        if not isinstance(module, TrimmedLayerNorm):
            module.trained_width = math.prod(module.normalized_shape)
            module.__class__ = TrimmedLayerNorm
        module.normalized_shape = tuple(module.weight.shape)


def zero_removed(network: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Set what `shrink` would remove to zero in place, tables of positions included: the masked large network."""
    groups = dim_groups(network)
    kept = _checked(groups, keep)
    with torch.no_grad():
        for group in groups:
            alive = torch.zeros(group.size, dtype=torch.bool).index_fill(0, kept[group.name], True)
            for part in group.slices:
                tensor = part.tensor
                if part.heads_axis is not None:
                    shape = [1] * tensor.ndim
                    shape[part.heads_axis], shape[part.axis] = group.heads, group.width
                    tensor.mul_(alive.view(shape).to(tensor))
                elif part.name != "running_var":  # a variance of zero is no statistic of a channel that is zero
                    window = tensor.narrow(part.axis, part.start, group.size)
                    shape = [1] * tensor.ndim
                    shape[part.axis] = group.size
                    window.mul_(alive.view(shape).to(tensor))


def widths(network: nn.Module) -> dict[str, Any]:
    """Sizes of all groups, ``channels`` or ``heads x channels``, for tables."""
    return {g.name: g.width if g.heads == 1 else f"{g.heads} x {g.width}" for g in dim_groups(network)}
