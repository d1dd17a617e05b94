"""Blocks of one network on several processes: activations go forward, nothing comes back (F3, section 7).

What hidden blocks are told is known when an epoch begins, so that a process can update its blocks with a batch and turn
to the next one while the processes behind it work on the batch before: a pipeline without bubbles, whose weights are
those of one process. Errors go from the last process to all others once per epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from networks.feedback.error_store import ErrorStore
from networks.feedback.learning import BlockChain, Gradients, Surrogate
from networks.feedback.objectives import ErrorInfo, error, is_delayed, signal

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets, numbers of the samples


def shares(costs: Sequence[float], size: int) -> list[range]:
    """Consecutive blocks for each process, so that the most loaded one has as little as possible.

    Args:
        costs: Of every block.
        size: Number of processes.

    Raises:
        ValueError: If there are fewer blocks than processes.
    """
    if not 1 <= size <= len(costs):
        raise ValueError(f"{len(costs)} blocks cannot be shared by {size} processes: take at most {len(costs)}")
    # Least maximum over the last block of the first p processes, block by block.
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [(total[end], [0]) for end in range(len(costs) + 1)]
    for parts in range(2, size + 1):
        best = [
            min(
                ((max(best[cut][0], total[end] - total[cut]), [*best[cut][1], cut]) for cut in range(parts - 1, end)),
                default=(float("inf"), []),
            )
            for end in range(len(costs) + 1)
        ]
    begins = best[len(costs)][1]
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(costs)], strict=True)]


@dataclass
class Traffic:
    """Messages of this process, counted."""

    forward: int = 0
    backward: int = 0  # towards the input: there are none
    epoch: int = 0  # collectives at the end of an epoch


@dataclass
class BlockPipeline:
    """This process's part of the training of a chain of blocks.

    All processes see the same batches in the same order; only the first one looks at the inputs.

    Args:
        chain: The whole network; weights of other processes' blocks are not touched.
        mine: Numbers of the blocks of this process, consecutive.
        told: Form of the delayed error, or ``one_hot_target``.
        feedback: Makes the surrogate of a signal (batch, C).
        errors: Of all training samples, equal on all processes when an epoch begins.
        step: Updates a block with its gradients.
        hidden_sizes: Features of every hidden block.
        group: Of the processes, in the order of their blocks; None: all.

    Raises:
        ValueError: For signals that are not known before the forward pass.
    """

    chain: BlockChain
    mine: range
    told: ErrorInfo
    feedback: Callable[[Tensor], Surrogate]
    errors: ErrorStore
    step: Callable[[int, Gradients], None]
    hidden_sizes: Sequence[int]
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        if not is_delayed(self.told) and self.told != "one_hot_target":
            raise ValueError(
                f"{self.told} is not known before the forward pass: blocks cannot be updated in a pipeline"
            )
        self._sent: list[tuple[dist.Work, Tensor]] = []

    @property
    def is_first(self) -> bool:
        """Whether this process has the first block."""
        return self.mine.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this process has the last block."""
        return self.mine.stop == len(self.chain.blocks)

    def epoch(self, batches: Iterable[Batch]) -> list[float]:
        """Train on the batches of an epoch, then exchange the errors; losses on the last process."""
        losses = [loss for batch in batches if (loss := self._batch(*batch)) is not None]
        for work, _ in self._sent:
            work.wait()
        self._sent = []
        if is_delayed(self.told):
            self._share_errors()
        return [float(loss) for loss in losses]

    def _batch(self, x: Tensor, target: Tensor, index: Tensor) -> Tensor | None:
        chain, rank = self.chain, dist.get_rank(self.group)
        if not self.is_first:
            x = x.new_empty(len(x), self.hidden_sizes[self.mine.start - 1])
            dist.recv(x, group=self.group, group_src=rank - 1)
        remembered = self.errors.read(index, target) if is_delayed(self.told) else None
        surrogate = self.feedback(signal(self.told, target, remembered))
        for i in self.mine:
            if i == chain.last:
                raw, loss = chain.learn_last(x, target, self.step)
                if is_delayed(self.told):
                    self.errors.write(index, error(self.told, chain.objective, raw, target))
                return loss
            x = chain.learn_hidden(i, x, surrogate, self.step)
        self._sent.append((dist.isend(flat := x.flatten(1), group=self.group, group_dst=rank + 1), flat))
        self.traffic.forward += 1
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        return None

    def _share_errors(self) -> None:
        """Give all processes the errors of the epoch, from the last one."""
        last = dist.get_world_size(self.group) - 1
        for tensor in (self.errors.rows, visited := self.errors.visited.to(torch.uint8)):
            dist.broadcast(tensor, group=self.group, group_src=last)
            self.traffic.epoch += 1
        self.errors.visited.copy_(visited.bool())
        self.errors.news()
