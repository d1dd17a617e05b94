"""The network that a pruning study has in its module: masked, smaller, or dense again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from networks.pruning.variants import Cuts, Variant, cut
from networks.pruning.weights import make_room, remove_masks


class NetworkSlot:
    """Puts networks of other sizes and masks into ``pl_module.net``, and makes checkpoints of any of them loadable.

    Attributes:
        full: The network before any cut; None before `attach`.
        cuts: Of the network that is in the module.
    """

    def __init__(self) -> None:
        self.full: nn.Module | None = None
        self.cuts: Cuts = []
        self._unhook: Callable[[], None] | None = None

    def attach(self, pl_module: pl.LightningModule) -> None:
        """Remember the network of a module, and listen to what Lightning asks it before it loads weights."""
        if self.full is None:
            self.full = copy.deepcopy(pl_module.net)
        if self._unhook is not None:
            return
        own = pl_module.__dict__.get("on_load_checkpoint")
        inner = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._reshape(pl_module, checkpoint.get("pruning", {}).get("cuts", []))
            remove_masks(pl_module)
            make_room(pl_module, checkpoint["state_dict"])
            inner(checkpoint)

        def unhook() -> None:
            del pl_module.on_load_checkpoint
            if own is not None:
                pl_module.on_load_checkpoint = own

        pl_module.on_load_checkpoint, self._unhook = on_load_checkpoint, unhook

    def detach(self) -> None:
        """Listen no more."""
        if self._unhook is not None:
            self._unhook()
            self._unhook = None

    def put(self, pl_module: pl.LightningModule, variant: Variant) -> None:
        """Put the network of a variant into the module."""
        self._reshape(pl_module, variant.cuts)
        remove_masks(pl_module.net)
        make_room(pl_module.net, variant.state)
        pl_module.net.load_state_dict(variant.state)
        pl_module.net.to(pl_module.device)

    def rewind(self, pl_module: pl.LightningModule, state: Mapping[str, Tensor]) -> None:
        """Give the network in the module the weights that a state of the full one has; its masks stay."""
        earlier = copy.deepcopy(self.full)
        earlier.load_state_dict(state)
        pl_module.net.load_state_dict(cut(earlier, self.cuts).state_dict(), strict=False)

    def _reshape(self, pl_module: pl.LightningModule, cuts: Cuts) -> None:
        """Put a network of other sizes into the module, if it does not have these already."""
        if not _same_cuts(cuts, self.cuts):
            pl_module.net = cut(self.full, cuts).to(pl_module.device).train(pl_module.net.training)
            self.cuts = list(cuts)


def _same_cuts(one: Cuts, other: Cuts) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the ``state_dict`` on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
