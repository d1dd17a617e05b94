"""What the entries of a network's tensors belong to: groups of channels, and where a channel lies along an axis.

A *group* is a set of channels that live and die together: the rows of the layer that makes them, their entries in
normalisations and biases, the columns of every layer that reads them, and the same in all layers that a shortcut adds
up. An *axis* of a tensor lists the channels of one or several groups, each with as many entries as it has there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Role = Literal["maker", "reader", "norm", "bias", "buffer"]


@dataclass(frozen=True)
class Part:
    """Channels of one group along an axis, ``inner`` neighbouring entries each (pixels after flattening)."""

    group: int
    inner: int = 1


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor: its parts one after the other, all of that ``outer`` times (queries, keys and values).

    Attributes:
        parts: What lies along it.
        outer: How often.
    """

    parts: tuple[Part, ...]
    outer: int = 1

    def length(self, widths: Mapping[int, int]) -> int:
        """Entries, where groups have these widths."""
        return self.outer * sum(part.inner * widths[part.group] for part in self.parts)

    def places(self, widths: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
        """The group of every part, and where its channels lie: ``(channel, entry)`` int64, not to be changed."""
        return iter(_places(self.parts, self.outer, tuple(widths[part.group] for part in self.parts)))


@functools.lru_cache(maxsize=1024)
def _places(parts: tuple[Part, ...], outer: int, widths: tuple[int, ...]) -> tuple[tuple[int, Tensor], ...]:
    whole = sum(part.inner * width for part, width in zip(parts, widths, strict=True))
    begin, found = 0, []
    with torch.inference_mode(False):  # whoever needs them next may want gradients
        for part, width in zip(parts, widths, strict=True):
            own = torch.arange(width * part.inner, device="cpu").view(width, 1, part.inner) + begin
            repeats = torch.arange(outer, device="cpu").view(1, outer, 1) * whole
            found.append((part.group, (own + repeats).reshape(width, outer * part.inner)))
            begin += part.inner * width
    return tuple(found)


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor that a group's channels lie along.

    Attributes:
        tensor: Its name in the state of the network.
        dim: Which axis.
        role: ``maker``: rows of a layer that makes the channels; ``reader``: columns of one that reads them; ``norm``:
            factors of a normalisation; ``bias``: what is added; ``buffer``: statistics.
    """

    tensor: str
    dim: int
    role: Role


@dataclass(frozen=True)
class Group:
    """Channels that belong together.

    Attributes:
        name: Of the layer that makes them first.
        width: How many there are.
        slots: Where they are.
        pinned: Whether they are outputs of the network, which stay as they are.
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    pinned: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer whose weights can be fitted to what it should give.

    Attributes:
        name: Its path.
        kind: ``linear`` or ``conv2d``.
        weight: Name of its weight.
        bias: Name of its bias; None: it has none.
    """

    name: str
    kind: Literal["linear", "conv2d"]
    weight: str
    bias: str | None


@dataclass(frozen=True)
class ChannelGroups:
    """Groups of channels of a network, found by running it once (`networks.fusion.tracing.trace`).

    Attributes:
        groups: In the order in which they are made.
        axes: By tensor and dimension: what lies along that axis. Axes that are not listed are the same in every
            network: inputs, places of a kernel.
        layers: Layers that can be fitted, in the order of execution.
        norms: Normalisations over all channels of a token or of several channels, by path, and what lies along them.
        heads: Attention modules by path, and the group whose channels are their heads.
    """

    groups: tuple[Group, ...]
    axes: Mapping[str, Mapping[int, Axis]]
    layers: tuple[Layer, ...] = ()
    norms: Mapping[str, Part] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def widths(self) -> dict[int, int]:
        """Channels of every group, by its number."""
        return dict(enumerate(group.width for group in self.groups))

    @property
    def free(self) -> list[int]:
        """Numbers of the groups that can change: all but the outputs."""
        return [i for i, group in enumerate(self.groups) if not group.pinned]

    def is_free(self, axis: Axis | None) -> bool:
        """Whether channels along an axis can change."""
        return axis is not None and any(not self.groups[part.group].pinned for part in axis.parts)

    def axis(self, tensor: str, dim: int) -> Axis | None:
        """What lies along an axis; None: the same in every network."""
        return self.axes.get(tensor, {}).get(dim)
