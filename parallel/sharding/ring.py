"""The linear layers of `parallel.sharding.linear` with their transfers behind their products.

Blocks of the weight walk around the ring of the gather group while the block at hand is multiplied, and a partial
result leaves for the next rank of the reduce group as soon as it is finished. Two blocks of the weight and two of the
partial results exist at a time (one more of the latter with more than two ranks in the reduce group); no weight is ever
whole on a rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.collectives import Transfer, num_bytes
from parallel.sharding import products
from parallel.sharding.layout import Piece
from parallel.sharding.linear import Plan
from parallel.sharding.traffic import Direction


def _neighbours(ranks: tuple[int, ...], index: int) -> tuple[int, int]:
    """(next, previous) rank of a ring."""
    return ranks[(index + 1) % len(ranks)], ranks[(index - 1) % len(ranks)]


def _walk(weight: Tensor, plan: Plan, direction: Direction) -> Iterator[tuple[int, Tensor]]:
    """(index, block) of all stored blocks of the weight, this rank's first; the next one is always on its way."""
    size, index, group = plan.gather_size, plan.gather_index, plan.gather_group
    following, previous = _neighbours(group.ranks, index) if size > 1 else (0, 0)
    block, free = weight.contiguous(), None
    for step in range(size):
        transfers: list[Transfer] = []
        if step + 1 < size:
            coming = torch.empty_like(block) if free is None else free
            transfers = plan.grid.interconnect.exchange([(block, previous)], [(coming, following)], group, True)
            plan.received(direction, "weight", num_bytes(coming))
        yield (index + step) % size, block
        _wait(transfers)
        if transfers:  # what was sent on is free for the block after the next, unless it is the parameter
            block, free = coming, block if step else None


def forward(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """The output block, see `parallel.sharding.linear.sharded_linear`.

    A partial result of features that rank ``o`` of the reduce group owns begins at rank ``o + 1``, goes around the
    ring, every rank adding its own, and ends at ``o``. Ranks begin with those of their predecessor, so that all are at
    work.
    """
    size, index, group = plan.reduce_size, plan.reduce_index, plan.reduce_group
    following, previous = _neighbours(group.ranks, index) if size > 1 else (0, 0)
    shape = list(x.shape)
    shape[plan.dim] = plan.features
    out, cut = x.new_empty(shape), plan.pieces()
    sent: list[Transfer] = []  # one at most; keeps its tensor alive

    def hops(piece: Piece) -> int:
        """Ranks that have added to the piece before this one."""
        return (index - piece.owner - 1) % size

    def buffer(piece: Piece) -> Tensor:
        shape[plan.dim] = piece.length
        return plan.wide(x.new_empty(0)).new_empty(shape)

    def exchange(ready: Tensor | None, needed: Piece | None) -> tuple[Tensor | None, Transfer | None]:
        """Send a finished partial result on and begin to receive the one that is needed next."""
        for transfer in sent:
            transfer.wait()
        sent.clear()
        coming = buffer(needed) if needed is not None and hops(needed) else None
        sends = [(ready, following)] if ready is not None else []
        receives = [(coming, previous)] if coming is not None else []
        if not sends and not receives:
            return None, None
        transfers = plan.grid.interconnect.exchange(sends, receives, group, together=size == 2)
        sent.extend(transfers[: len(sends)])
        if coming is None:
            return None, None
        plan.received("forward", "partial", num_bytes(coming))
        return coming, transfers[-1]

    for block_index, block in _walk(weight, plan, "forward"):
        order = sorted(cut[block_index], key=hops)
        coming, arriving = exchange(None, order[0] if order else None)
        for number, piece in enumerate(order):
            own = out.narrow(plan.dim, piece.features.start, piece.length) if piece.owner == index else None
            in_place = own is not None and plan.wide(own) is own
            partial = products.apply(x, block[piece.rows], plan.dim, own if in_place else None)
            if not in_place:
                partial = plan.wide(partial)
            if arriving is not None:
                arriving.wait()
                partial.add_(coming)
            if own is not None and not in_place:
                own.copy_(partial)
            after = order[number + 1] if number + 1 < len(order) else None
            coming, arriving = exchange(partial if own is None else None, after)
            del partial
    for transfer in sent:
        transfer.wait()
    return out


class _Gathering:
    """Brings the gradient of output features to the ranks of a reduce group from those that own the features.

    Args:
        grad: Gradient of the output block of this rank.
        plan: Of the layer.
    """

    def __init__(self, grad: Tensor, plan: Plan) -> None:
        self._grad, self._plan = grad, plan
        self._sent: list[list[Transfer]] = []

    def fetch(self, wanted: list[Piece]) -> list[tuple[Piece, Tensor, Transfer | None]]:
        """Begin to gather the pieces of a block; this rank's own come first, since they are there.

        Returns:
            (piece, gradient of its features, what to wait for).
        """
        plan, group, index = self._plan, self._plan.reduce_group, self._plan.reduce_index
        own = [(piece, self._grad.narrow(plan.dim, piece.features.start, piece.length), None)
               for piece in wanted if piece.owner == index]  # fmt: skip
        others = [piece for piece in wanted if piece.owner != index]
        if plan.reduce_size == 1:
            return own
        shape, received = list(self._grad.shape), []
        for piece in others:
            shape[plan.dim] = piece.length
            received.append(self._grad.new_empty(shape))
        sends = [
            (part, rank)
            for _, whole, _ in own
            for part in [whole.contiguous()]
            for number, rank in enumerate(group.ranks)
            if number != index
        ]
        receives = [(part, group.ranks[piece.owner]) for part, piece in zip(received, others, strict=True)]
        if not wanted:
            return []
        transfers = plan.grid.interconnect.exchange(sends, receives, group, together=plan.reduce_size == 2)
        while len(self._sent) > 1:  # of the block before the last
            _wait(self._sent.pop(0))
        self._sent.append(transfers[: len(sends)])
        if others:
            plan.received("backward", "activation", sum(map(num_bytes, received)))
        return own + list(zip(others, received, transfers[len(sends) :], strict=True))

    def finish(self) -> None:
        """Wait until everything was sent."""
        while self._sent:
            _wait(self._sent.pop())


def _wait(transfers: list[Transfer]) -> None:
    for transfer in transfers:
        transfer.wait()


def carries(plan: Plan, passenger: Tensor, x: Tensor) -> bool:
    """Whether the one message of weight gradients between two ranks can take a sum over them with it."""
    return plan.gather_size == 2 and passenger.dtype == plan.wide(x.new_empty(0)).dtype


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, needs_x: bool, passenger: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the input block and of the stored block of the weight.

    While the blocks of the weight walk around the ring (for the gradient of the input), the sums of their gradients
    follow one step behind, so that each ends at the rank that stores the block. ``passenger`` is a vector that is
    summed over the two ranks of the gather group on the way, in place (`carries`): a message less.
    """
    size, index, group = plan.gather_size, plan.gather_index, plan.gather_group
    following, previous = _neighbours(group.ranks, index) if size > 1 else (0, 0)
    cut, gathering = plan.pieces(), _Gathering(grad, plan)
    walk = _walk(weight, plan, "backward") if needs_x else (((index + step) % size, None) for step in range(size))
    fetched = gathering.fetch(cut[index])
    x_grad = coming = free = own_grad = None
    moving: list[Transfer] = []  # the sum that this rank has sent on, and the one that it gets
    for step, (block_index, block) in enumerate(walk):
        now = fetched
        if step + 1 < size:  # the next block's are on their way while those of this block are used
            fetched = gathering.fetch(cut[(block_index + 1) % size])
        x_grad = _input_gradient(now, block, x_grad, plan)
        if step == 0:
            own_grad, _ = _block_gradient(now, x, None, plan)  # waits for the sum of the others
            continue
        _wait(moving)
        seats = 0 if passenger is None else len(passenger)
        block_grad, message = _block_gradient(now, x, coming, plan, seats)
        if passenger is not None:
            message[-seats:] = passenger
        coming = torch.empty_like(message) if free is None else free
        moving = plan.grid.interconnect.exchange([(message, previous)], [(coming, following)], group, True)
        plan.received("backward", "weight_gradient", num_bytes(block_grad))
        free = block_grad  # once it was sent
    _wait(moving)
    if passenger is not None:
        plan.received("backward", "shared_gradient", num_bytes(passenger))
        coming, others = coming.split([own_grad.numel(), len(passenger)])
        passenger.add_(others)
        coming = coming.view_as(own_grad)
    if coming is not None:
        own_grad.add_(coming)
    gathering.finish()
    return x_grad, own_grad


_Parts = list[tuple[Piece, Tensor, Transfer | None]]


def _input_gradient(parts: _Parts, block: Tensor | None, x_grad: Tensor | None, plan: Plan) -> Tensor | None:
    """The gradient of the input so far; waits for the parts."""
    for piece, part, transfer in parts:
        if transfer is not None:
            transfer.wait()
        if block is not None:
            x_grad = products.apply_transposed(part, block[piece.rows], plan.dim, x_grad)
    return x_grad


def _block_gradient(parts: _Parts, x: Tensor, sums: Tensor | None, plan: Plan, seats: int = 0) -> tuple[Tensor, Tensor]:
    """The gradient of one block of the weight, added to the sums of other ranks in place if there are any.

    Returns:
        (gradient, what to send of it): the same, or a vector with so many ``seats`` behind it.
    """
    if sums is not None and sums.dtype == x.dtype:
        for piece, part, _ in parts:
            products.outer(part, x, plan.dim, sums[piece.rows], add=True)
        return sums, sums
    shape, filled = (plan.rows, x.shape[plan.dim]), 0
    message = x.new_empty(math.prod(shape) + seats)
    block_grad = message[: math.prod(shape)].view(shape)
    for piece, part, _ in parts:
        products.outer(part, x, plan.dim, block_grad[piece.rows])
        filled = max(filled, piece.rows.stop)
    block_grad[filled:] = 0  # padding
    if sums is not None:
        block_grad = sums.add_(block_grad)
        return block_grad, block_grad
    message = plan.wide(message)
    block_grad = message[: math.prod(shape)].view(shape)
    return block_grad, message if seats else block_grad
