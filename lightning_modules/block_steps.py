"""Steps of an optimizer block by block: gradients are accumulated, averaged over processes, clipped and applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from networks.feedback.learning import Gradients
from parallel.collectives import Transfer


class BlockSteps:
    """Takes the gradients of one block after the other and steps the one optimizer of a module with each of them.

    The optimizer skips parameters without a gradient, so that it holds the state of every block and each is stepped
    alone. For the Trainer the last block's step is the step: it counts, and strategies and hooks see it.

    Several processes average over the ranks that share the data. The gradients of a block travel while the next block
    computes; then the block is stepped.

    Args:
        module: Whose optimizer and Trainer they are.
        parameters: Of every block.
        accumulate: Batches of a step.
        clip_norm: Largest norm of the gradient of a block; None: not clipped.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        parameters: Sequence[list[nn.Parameter]],
        accumulate: int,
        clip_norm: float | None,
    ) -> None:
        self.module, self.parameters = module, parameters
        self.accumulate, self.clip_norm = accumulate, clip_norm
        self._sums: dict[int, Gradients] = {}  # of the batches of the running step
        self._batches = 0
        self._together = self._steps = True
        self.stepped = False  # whether the last batch ended with a step
        self._under_way: list[tuple[int, Gradients, Transfer | None, Tensor | None]] = []

    def forget(self) -> None:
        """Drop what a training that ended has left."""
        self._sums, self._batches, self._under_way = {}, 0, []

    def begin(self, last: bool, together: bool) -> None:
        """A batch begins.

        Args:
            last: Whether the epoch ends with it; a step is then taken whatever was accumulated.
            together: Whether all blocks are stepped at the end of the batch instead of each as soon as it can be.
        """
        self._batches += 1
        self._together = together
        self._steps = last or self._batches >= self.accumulate

    def take(self, block: int, gradients: Gradients, mean: bool) -> None:
        """Gradients of a block.

        Args:
            block: Its number.
            gradients: Of its parameters.
            mean: Whether they are means over the batch (and are to be means over batches and processes), or sums.
        """
        if mean and self.accumulate > 1:
            gradients = [None if g is None else g / self.accumulate for g in gradients]
        if (before := self._sums.pop(block, None)) is not None:
            gradients = [_sum(a, b) for a, b in zip(before, gradients, strict=True)]
        if not self._steps:
            self._sums[block] = gradients
            return
        self._complete()
        self._under_way.append((block, gradients, *self._reduced(gradients, mean)))
        if self._under_way[0][2] is None:
            self._complete()

    def finish(self) -> None:
        """The batch is over: everything is stepped."""
        self._complete()
        self.stepped = self._steps
        if self._steps:
            self.module.optimizers().step()
            for group in self.parameters:
                for parameter in group:
                    parameter.grad = None
            self._batches = 0

    # ------------------------------------------------------------------------------------------------------- processes

    def _reduced(self, gradients: Gradients, mean: bool) -> tuple[Transfer | None, Tensor | None]:
        """Sums or means over the ranks that share the data, as one vector on its way; None: there is one rank."""
        strategy = self.module.trainer.strategy
        group = getattr(strategy, "gradient_group", None)
        if group is None or group.size < 2:
            return None, None
        vector = torch.cat([g.flatten() for g in gradients if g is not None])
        if mean:
            vector /= group.size
        return strategy.interconnect.all_reduce(vector, group), vector

    # ----------------------------------------------------------------------------------------------------------- steps

    def _complete(self) -> None:
        """Step what is under way."""
        under_way, self._under_way = self._under_way, []
        for block, gradients, transfer, vector in under_way:
            if transfer is not None:
                transfer.wait()
                gradients = _unpacked(vector, gradients)
            self._step(block, gradients)

    def _step(self, block: int, gradients: Gradients) -> None:
        parameters = self.parameters[block]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        if self._together or block == len(self.parameters) - 1:  # `finish` steps
            return
        optimizer: Any = self.module.optimizers().optimizer
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _unpacked(vector: Tensor, gradients: Gradients) -> Gradients:
    """Pieces of a vector in the shapes of the gradients."""
    pieces = iter(vector.split([g.numel() for g in gradients if g is not None]))
    return [None if g is None else next(pieces).view_as(g) for g in gradients]
