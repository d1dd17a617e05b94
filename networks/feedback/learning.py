"""Gradients of a chain of blocks: by backpropagation through all of it, or block by block from feedback (F3, 2.2).

A *surrogate* is a function ``(number of the block, its output h) -> gradient of the same shape``: what a hidden block
takes for the gradient of the loss with respect to its output. Within a block gradients are exact.

``apply(i, gradients)`` gets the gradients of block ``i`` (None for a parameter that the block has not used) as soon as
they are known. Weights may be changed in it: a block has done its work by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from networks.feedback.blocks import Block
from networks.feedback.objectives import Objective

Gradients = list[Tensor | None]
Apply = Callable[[int, Gradients], None]
Surrogate = Callable[[int, Tensor], Tensor]


class BlockChain:
    """Blocks with their parameters and the objective of the last one.

    Args:
        blocks: In order.
        objective: Of what the last one gives.
    """

    def __init__(self, blocks: Sequence[Block], objective: Objective) -> None:
        self.blocks, self.objective = list(blocks), objective
        self.parameters: list[list[nn.Parameter]] = [block.parameters() for block in blocks]

    @property
    def last(self) -> int:
        """Number of the last block."""
        return len(self.blocks) - 1

    def sizes(self, example: Tensor) -> list[int]:
        """Features per sample that the hidden blocks give for inputs like ``example``; changes no statistics."""
        found = []
        with torch.no_grad():
            for block in self.blocks[:-1]:
                example = block.forward(example)
                found.append(example[0].numel())
        return found

    def _output(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the last block gives, (batch, C), and its loss."""
        raw = self.blocks[-1].forward(x)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        if raw.shape != target.shape:
            raise ValueError(f"the network gives {tuple(raw.shape)}, the targets are {tuple(target.shape)}")
        return raw, self.objective.loss(raw, target)

    def in_forward(self, x: Tensor, target: Tensor, surrogate: Surrogate | None, apply: Apply) -> tuple[Tensor, Tensor]:
        """Step through the blocks; each is done, and forgotten, before the next one begins.

        Args:
            x: Inputs.
            target: (batch, C).
            surrogate: Gradients of hidden blocks, known before the forward pass; None: only the last one learns.
            apply: Gets the gradients of every block.

        Returns:
            What the last block gave before its step, (batch, C), and its loss; without a graph.
        """
        for i, block in enumerate(self.blocks[:-1]):
            if surrogate is None:
                with torch.no_grad():
                    x = block.forward(x)
            else:
                x = self.learn_hidden(i, x, surrogate, apply)
        return self.learn_last(x, target, apply)

    def learn_hidden(self, i: int, x: Tensor, surrogate: Surrogate, apply: Apply) -> Tensor:
        """Step through hidden block ``i``; what it gave before its step, without a graph."""
        if not self.parameters[i]:
            with torch.no_grad():
                return self.blocks[i].forward(x)
        with torch.enable_grad():
            h = self.blocks[i].forward(x)
        apply(i, _local(h, self.parameters[i], surrogate(i, h)))
        return h.detach()

    def learn_last(self, x: Tensor, target: Tensor, apply: Apply) -> tuple[Tensor, Tensor]:
        """Step through the last block; result as of `in_forward`."""
        with torch.enable_grad():
            raw, loss = self._output(x, target)
        apply(self.last, _local(loss, self.parameters[-1]))
        return raw.detach(), loss.detach()

    def one_shot(
        self, x: Tensor, target: Tensor, surrogate: Callable[[Tensor], Surrogate], apply: Apply
    ) -> tuple[Tensor, Tensor]:
        """A forward pass with a graph that is cut between blocks, then the gradients of all of them.

        Args:
            x: Inputs.
            target: (batch, C).
            surrogate: Makes the surrogate of what the last block has given.
            apply: Gets the gradients of every block.

        Returns:
            As `in_forward`.
        """
        outputs = []
        with torch.enable_grad():
            for block in self.blocks[:-1]:
                outputs.append(block.forward(x))
                x = outputs[-1].detach()
            raw, loss = self._output(x, target)
        known = surrogate(raw.detach())
        for i, h in enumerate(outputs):
            if self.parameters[i]:
                apply(i, _local(h, self.parameters[i], known(i, h)))
        apply(self.last, _local(loss, self.parameters[-1]))
        return raw.detach(), loss.detach()

    def backpropagate(self, x: Tensor, target: Tensor, apply: Apply) -> tuple[Tensor, Tensor]:
        """The true gradients of all blocks; arguments and result as those of `one_shot`."""
        with torch.enable_grad():
            for block in self.blocks[:-1]:
                x = block.forward(x)
            raw, loss = self._output(x, target)
        every = [p for group in self.parameters for p in group]
        gradients = list(torch.autograd.grad(loss, every, allow_unused=True))
        for i, group in enumerate(self.parameters):
            if group:
                apply(i, [gradients.pop(0) for _ in group])
        return raw.detach(), loss.detach()


def _local(output: Tensor, parameters: list[nn.Parameter], delta: Tensor | None = None) -> Gradients:
    """Vector-Jacobian product of a block."""
    if not parameters:
        return []
    return list(torch.autograd.grad(output, parameters, delta, allow_unused=True))
