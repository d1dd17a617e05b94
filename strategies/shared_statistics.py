"""``trainer.sync_batchnorm`` on every device: Lightning applies it before training and reverts it at its end.

Lightning's own plug-in puts torch's SyncBatchNorm in the place of every batch normalisation, which runs on accelerators
alone. This one leaves the modules as they are and runs wherever ranks can talk.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.plugins import LayerSync
from torch import nn
from typing_extensions import override

from parallel.sample_layout import SampleShare
from parallel.sample_norm import share_statistics


class SharedStatistics(LayerSync):
    """Batch normalisations train on the statistics of all ranks of a group.

    Args:
        share: Gives the group at a moment, which strategies may change in the course of a training.
    """

    def __init__(self, share: Callable[[], SampleShare]) -> None:
        self._share = share
        self._undo: Callable[[], None] | None = None

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        self._undo = share_statistics(model, self._share)
        return model

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        if self._undo is not None:
            self._undo()
        return model
