"""Pruned networks as files, and the way from a dense network to any of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from networks.pruning.groups import Keep, shrink
from networks.pruning.weights import make_room, remove_masks

Stage = Literal["dense", "control", "pruned", "tuned"]
Cuts = list[Keep]
"""Removals of channels one after the other: positions of each count within the network that the one before has left."""


@dataclass
class Variant:
    """One network of a pruning study.

    Attributes:
        stage: ``dense``: as trained. ``control``: trained for as many more epochs as a pruned one. ``pruned``: masked
            or shrunk, not trained since. ``tuned``: trained since.
        density: What was asked for, 1 for dense.
        method: ``l1``, ``structured``, ...; ``none`` for dense.
        state: ``state_dict`` of the network, masks included.
        cuts: Channels that stay; empty where nothing was removed but single weights.
        about: What else is known: epochs, validation loss, configuration.
    """

    stage: Stage
    density: float
    method: str
    state: dict[str, Tensor]
    cuts: Cuts = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its file and its row: ``dense``, ``control``, ``l1_0.512``, ``l1_0.512_tuned``."""
        if self.stage in ("dense", "control"):
            return self.stage
        return f"{self.method}_{self.density:.4g}" + ("_tuned" if self.stage == "tuned" else "")

    def build(self, dense: nn.Module) -> nn.Module:
        """The network itself, made of a dense one of the original sizes, which stays as it is."""
        network = cut(dense, self.cuts)
        remove_masks(network)
        make_room(network, self.state)
        network.load_state_dict(self.state)
        return network

    def save(self, folder: Path) -> Path:
        """Write ``<folder>/<name>.pt``, which ``torch.load(weights_only=True)`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.pt"
        torch.save({name: getattr(self, name) for name in _FIELDS}, path)
        return path


_FIELDS = ("stage", "density", "method", "state", "cuts", "about")


def load_variant(path: Path | str) -> Variant:
    """Read what `Variant.save` wrote.

    Raises:
        ValueError: The file holds something else.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or set(_FIELDS) - content.keys():
        raise ValueError(f"{path} is not a network of a pruning study (<run>/pruned/<name>.pt)")
    return Variant(**{name: content[name] for name in _FIELDS})


def cut(network: nn.Module, cuts: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """A copy of a network without the channels that were removed one after the other."""
    if not cuts:
        return copy.deepcopy(network)
    for keep in cuts:
        network = shrink(network, keep)
    return network


def rebuild(module: nn.Module, pruning: Mapping[str, Any] | None, state: Mapping[str, Tensor]) -> None:
    """Prepare a module with an attribute ``net`` for the weights of a checkpoint of a pruned run.

    Args:
        module: Freshly built, dense.
        pruning: ``checkpoint["pruning"]``; None: the run was not pruned.
        state: Its ``state_dict``, from which the places of masks are read.
    """
    if pruning and pruning["cuts"]:
        module.net = cut(module.net, pruning["cuts"])
    make_room(module, state)
