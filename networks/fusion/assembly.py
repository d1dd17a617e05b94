"""One network out of the channels of several: the concatenation of all, or of those that are kept.

Tensors are gathered block by block. The concatenation of m networks, which has m squared blocks of which m are not
zero, exists only where somebody asks for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.fusion.layout import Axis, ChannelGroups
from networks.fusion.tracing import trace
from networks.vit import Attention

Kept = dict[int, list[Tensor]]
"""Of every group that can change: the channels that are kept of every network, ascending, int64."""
Weighting = Literal["width", "equal"]


# ------------------------------------------------------------------------------------------------------------- networks


def require_members(networks: Sequence[nn.Module]) -> None:
    """Refuse networks that are too few, not of one architecture or not finite.

    Args:
        networks: At least two; widths may differ.

    Raises:
        ValueError: Names the layer in which they differ, or a tensor that is not finite.
    """
    if len(networks) < 2:
        raise ValueError(f"{len(networks)} network(s): fusion needs at least two members")
    states = [tensors(network) for network in networks]
    for k, state in enumerate(states):
        differing = next((n for n in (*states[0], *state) if n not in state or n not in states[0]), None)
        if differing is not None:
            raise ValueError(f"members differ at layer {differing}: it is in one of members 0 and {k} alone")
        for name, tensor in state.items():
            if tensor.is_complex():
                raise ValueError(f"member {k}: {name} is complex; real weights are known")
            suspicious = tensor.is_floating_point() and not math.isfinite(float(tensor.sum()))  # one pass is enough
            if suspicious and not bool(tensor.isfinite().all()):
                raise ValueError(f"member {k}: {name} is not finite; a diverged network cannot be fused")


def examined(networks: Sequence[nn.Module], example: Sequence[Any]) -> list[ChannelGroups]:
    """Groups of networks that can be fused.

    Args:
        networks: At least two, of one architecture; widths may differ.
        example: Arguments of their ``forward``.

    Raises:
        ValueError: See `require_members`; and where channels are connected in other ways, or in an unknown one.
    """
    require_members(networks)
    states = [tensors(network) for network in networks]
    found = [trace(networks[0], *example)]
    for k, (network, state) in enumerate(zip(networks[1:], states[1:], strict=True), start=1):
        if all(states[0][name].shape == state[name].shape for name in state):
            found.append(found[0])
            continue
        groups = trace(network, *example)
        _require_same(found[0], groups, states[0], state, k)
        found.append(groups)
    return found


def _require_same(
    one: ChannelGroups, other: ChannelGroups, first: Mapping[str, Tensor], state: Mapping[str, Tensor], k: int
) -> None:
    for name, tensor in first.items():
        axes, own = one.axes.get(name, {}), other.axes.get(name, {})
        fixed = [d for d in range(tensor.ndim) if not one.is_free(axes.get(d))]
        if tensor.ndim != state[name].ndim or any(tensor.shape[d] != state[name].shape[d] for d in fixed):
            raise ValueError(
                f"members differ at layer {name}: {tuple(tensor.shape)} in member 0, {tuple(state[name].shape)} in "
                f"member {k}; numbers of channels between layers may differ, inputs, outputs and kernels not"
            )
        if axes != own:
            raise ValueError(f"members differ at layer {name}: members 0 and {k} connect its channels in other ways")


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones once, buffers that no checkpoint has included."""
    return {name: t.detach() for name, t in (*network.named_parameters(), *network.named_buffers())}


def output_scales(groups: Sequence[ChannelGroups], kept: Kept | None = None, how: Weighting = "width") -> list[float]:
    """Weight of every network in the mean of the outputs (paper, section 2.2).

    Args:
        groups: Of the networks.
        kept: What is left of them; None: everything.
        how: ``width``: by the number of features that the last layer reads, s_k = in_k / sum_j in_j; ``equal``: 1 / m.

    Raises:
        ValueError: The weighting is unknown.
    """
    if how not in ("width", "equal"):
        raise ValueError(f"weighting={how!r} is unknown; choose width or equal")
    count = len(groups)
    if how == "equal":
        return [1 / count] * count
    features = []
    for k, one in enumerate(groups):
        widths = one.widths if kept is None else {**one.widths, **{g: len(kept[g][k]) for g in kept}}
        features.append(next((axis.length(widths) for axis in _last_inputs(one)), 0))
    total = sum(features)
    return [n / total for n in features] if total else [1 / count] * count


def _last_inputs(groups: ChannelGroups) -> Iterator[Axis]:
    for group in groups.groups:
        for slot in group.slots if group.pinned else ():
            for dim, axis in groups.axes[slot.tensor].items():
                if slot.role == "maker" and dim != slot.dim and groups.is_free(axis):
                    yield axis


def everything(groups: Sequence[ChannelGroups]) -> Kept:
    """All channels of all networks."""
    return {g: [torch.arange(one.groups[g].width) for one in groups] for g in groups[0].free}


# ------------------------------------------------------------------------------------------------------------- assembly


@torch.no_grad()
def assemble(
    networks: Sequence[nn.Module],
    groups: Sequence[ChannelGroups],
    kept: Kept,
    scales: Sequence[float],
    separate: bool = False,
) -> nn.Module:
    """A network of the channels that are kept; weights between channels of different networks are zero.

    Tensors without channels of their own (the bias of the last layer, ...) are means with the ``scales``, and so are
    the outputs.

    Args:
        networks: Where the channels come from.
        groups: Of every network.
        kept: Which are kept.
        scales: Of every network in the mean of the outputs; they add up to 1.
        separate: Whether normalisations over channels (LayerNorm, GroupNorm) keep the networks apart, as the exact
            concatenation needs; if not, they normalise all channels that are kept together.

    Raises:
        ValueError: A group would have no channel, or heads do not fill the width of the tokens.
    """
    known = groups[0]
    counts = {g: [len(channels) for channels in own] for g, own in kept.items()}
    widths = known.widths | {g: sum(own) for g, own in counts.items()}
    for g, width in widths.items():
        if width < 1:
            raise ValueError(f"no channel is left of {known.groups[g].name}; use a larger width")
    states = [tensors(network) for network in networks]
    # Its tensors are those of the first network until each is exchanged: they need not be copied first.
    given = (*networks[0].parameters(), *networks[0].buffers())
    fused = copy.deepcopy(networks[0], {id(tensor): tensor for tensor in given})
    aliases, learned = _aliases(fused), dict(fused.named_parameters())
    changed: set[str] = set()
    for name in states[0]:
        axes = known.axes.get(name, {})
        if not any(known.is_free(axis) for axis in axes.values()):
            new = _mean([state[name] for state in states], scales)
        else:
            new = _gathered(name, states, groups, kept, widths, counts, scales)
        if name in learned:
            new = nn.Parameter(new, learned[name].requires_grad)
        for alias in aliases[name]:
            _put(fused, alias, new)
            changed.add(alias.rpartition(".")[0])
    _adapt(fused, changed, known, widths, counts, separate)
    return fused


def _mean(values: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0].clone()
    terms = [scale * value for value, scale in zip(values, scales, strict=True) if scale]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _gathered(
    name: str,
    states: Sequence[Mapping[str, Tensor]],
    groups: Sequence[ChannelGroups],
    kept: Kept,
    widths: Mapping[int, int],
    counts: Mapping[int, Sequence[int]],
    scales: Sequence[float],
) -> Tensor:
    """A tensor of the fused network: blocks of its members, zero elsewhere."""
    axes = groups[0].axes[name]
    dims = sorted(axes)
    shape = list(states[0][name].shape)
    for dim in dims:
        shape[dim] = axes[dim].length(widths)
    order = [*dims, *(d for d in range(len(shape)) if d not in axes)]
    # Blocks along one axis that can change fill the tensor; along two of them they leave zeros between members.
    blank = sum(groups[0].is_free(axis) for axis in axes.values()) > 1
    out = states[0][name].new_zeros(shape) if blank else states[0][name].new_empty(shape)
    view = out.permute(order)
    scaled = any(not groups[0].is_free(axis) for axis in axes.values())  # the last layer: outputs are averaged
    for k, state in enumerate(states):
        block = state[name].permute(order)
        moves = [_moves(axes[dim], k, groups[k].widths, widths, kept, counts) for dim in dims]
        sources, targets = zip(*((source.to(block.device), target) for source, target in moves), strict=True)
        if not all(map(len, sources)):
            continue
        for i, source in enumerate(sources[:-1]):
            block = block.index_select(i, source)
        _write(view, targets, block, sources[-1], scales[k] if scaled else 1.0)
    return out


def _moves(
    axis: Axis,
    k: int,
    own: Mapping[int, int],
    widths: Mapping[int, int],
    kept: Kept,
    counts: Mapping[int, Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Entries of a network's axis that are kept, and where they go, ascending."""
    source, target = [], []
    for (group, here), (_, there) in zip(axis.places(own), axis.places(widths), strict=True):
        if group in kept:
            begin = sum(counts[group][:k])
            here, there = here[kept[group][k]], there[begin : begin + counts[group][k]]
        source.append(here.flatten())
        target.append(there.flatten())
    if len(target) == axis.outer == 1:  # in order already
        return source[0], target[0]
    places, order = torch.cat(target).sort()
    return torch.cat(source)[order], places


def _write(view: Tensor, targets: Sequence[Tensor], block: Tensor, source: Tensor, scale: float) -> None:
    """Write entries ``source`` of a block's last axis of channels, without a copy where their places are a run."""
    last = len(targets) - 1
    if all(int(target[-1]) - int(target[0]) + 1 == len(target) for target in targets):
        for i, target in enumerate(targets):
            view = view.narrow(i, int(target[0]), len(target))
        torch.index_select(block, last, source, out=view)
        if scale != 1:
            view.mul_(scale)
        return
    places = [t.to(view.device).view([-1 if i == j else 1 for j in range(len(targets))]) for i, t in enumerate(targets)]
    view[tuple(places)] = block.index_select(last, source) * scale


def _aliases(network: nn.Module) -> dict[str, list[str]]:
    """All names of every tensor, by the first one: tied weights stay tied."""
    every = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    names: dict[int, list[str]] = {}
    for name, tensor in every:
        names.setdefault(id(tensor), []).append(name)
    return {own[0]: own for own in names.values()}


def _put(network: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value


def _adapt(
    network: nn.Module,
    changed: set[str],
    groups: ChannelGroups,
    widths: Mapping[int, int],
    counts: Mapping[int, Sequence[int]],
    separate: bool,
) -> None:
    """Tell modules their new sizes."""
    for path in changed:
        module = network.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            multiplier = module.out_channels // module.groups
            module.out_channels = module.weight.shape[0]
            if module.groups > 1:
                module.groups = module.out_channels // multiplier
            module.in_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            known = module.running_mean if module.weight is None else module.weight
            module.num_features = module.num_features if known is None else len(known)
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
    for path, part in groups.norms.items():
        module = network.get_submodule(path)
        width = widths[part.group] * part.inner
        if separate and part.group in counts:
            _replace(network, path, _separated(module, path, [part.inner * own for own in counts[part.group]]))
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.normalized_shape = (width,)
        elif isinstance(module, nn.GroupNorm):
            if width % module.num_groups:
                raise ValueError(f"{path}: {width} channels do not make {module.num_groups} equal groups")
            module.num_channels = width
    for module in network.modules():
        if separate and isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused kernel, which would normalise all networks together
    for path, group in groups.heads.items():
        _set_heads(network.get_submodule(path), path, widths[group])


def _set_heads(module: nn.Module, path: str, heads: int) -> None:
    out = module.proj if isinstance(module, Attention) else module.out_proj
    if out.in_features != out.out_features:
        raise ValueError(
            f"{path}: {heads} heads are {out.in_features} wide, its tokens {out.out_features}; choose widths that keep "
            "both in proportion"
        )
    if isinstance(module, Attention):
        module.heads = heads
    else:
        module.num_heads = heads
        module.embed_dim = module.kdim = module.vdim = out.out_features


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


# -------------------------------------------------------------------------------------------------------- concatenation


@torch.no_grad()
def concat(networks: Sequence[nn.Module], *example: Any, weighting: Weighting = "width") -> nn.Module:
    """The ensemble as one network, exactly: its output is the weighted mean of theirs, in evaluation and in training.

    Hidden layers get block-diagonal weights (paper, section 2.2).

    Args:
        networks: At least two, of one architecture; widths may differ.
        example: Arguments of their ``forward``.
        weighting: See `output_scales`.

    Raises:
        ValueError: The networks do not fit together, or have parameters that act on the inputs themselves and differ.
    """
    groups = examined(networks, example)
    states = [tensors(network) for network in networks]
    axes = groups[0].axes
    for name, tensor in states[0].items():
        if name not in axes and tensor.is_floating_point() and any(not torch.equal(tensor, s[name]) for s in states):
            raise ValueError(
                f"{name} acts on the inputs, or on all channels alike, and differs between the members: no "
                "concatenation of them is exact"
            )
    return assemble(networks, groups, everything(groups), output_scales(groups, how=weighting), separate=True)


class SeparateLayerNorm(nn.Module):
    """Layer normalisation of each of several runs of channels on its own.

    Args:
        sizes: Lengths of the runs.
        norm: Whose factors, shifts and epsilon it takes, for all runs together.
    """

    def __init__(self, sizes: Sequence[int], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.sizes, self.eps = list(sizes), norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channel)`` to the same shape."""
        normed = torch.cat([F.layer_norm(run, run.shape[-1:], eps=self.eps) for run in x.split(self.sizes, -1)], -1)
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


def _separated(module: nn.Module, path: str, sizes: Sequence[int]) -> nn.Module:
    """A normalisation that keeps runs of channels apart."""
    if isinstance(module, nn.LayerNorm):
        return SeparateLayerNorm(sizes, module)
    if isinstance(module, nn.GroupNorm) and len(set(sizes)) == 1:
        module.num_groups *= len(sizes)
        module.num_channels = sum(sizes)
        return module
    raise ValueError(f"{path}: {type(module).__name__} over {list(sizes)} channels cannot keep the members apart")
