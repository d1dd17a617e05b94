"""Is the feedback a descent direction? Angles between surrogate and true gradients (F3, section 2.7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.feedback.learning import BlockChain, Gradients
from networks.feedback.weights import FeedbackMatrix


def cosine(first: Gradients, second: Gradients) -> float:
    """Cosine of the angle between two gradients of a block; NaN where one of them is zero."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        return float("nan")
    dot = sum((a.double() * b.double()).sum() for a, b in pairs)
    norms = [sum(x.double().square().sum() for x in column) for column in zip(*pairs, strict=True)]
    return float(dot / (norms[0] * norms[1]).sqrt())


def norm(gradients: Gradients) -> float:
    """Euclidean norm of the gradient of a block."""
    found = [g.double().square().sum() for g in gradients if g is not None]
    return float(torch.stack(found).sum().sqrt()) if found else 0.0


def mean_jacobians(net: BlockChain, x: Tensor) -> list[Tensor]:
    """Of the raw outputs with respect to the output of each hidden block, means over the batch, (C, d) each.

    For a linear chain that is the product of the later weights, which feedback weights are compared with.
    """
    hidden: list[Tensor] = []
    with torch.enable_grad():
        for block in net.blocks[:-1]:
            x = block.forward(x)
            if not x.requires_grad:
                x.requires_grad_()
            hidden.append(x)
        raw = net.blocks[-1].forward(x)
    if not hidden:
        return []
    rows = [
        torch.autograd.grad(raw[:, c].sum(), hidden, retain_graph=c + 1 < raw.shape[1]) for c in range(raw.shape[1])
    ]
    return [torch.stack([one.flatten(1).mean(0) for one in column]) for column in zip(*rows, strict=True)]


def alignments(net: BlockChain, matrices: Sequence[FeedbackMatrix], x: Tensor, sign: float = 1.0) -> list[float]:
    """Cosine of ``-sign B`` with the mean Jacobian of each hidden block.

    What feedback says of an output, target minus output, is the negative of its true gradient: weights align with -B.
    """
    jacobians = mean_jacobians(net, x)
    return [
        cosine([-sign * matrix.matrix(jacobian.dtype)], [jacobian])
        for matrix, jacobian in zip(matrices, jacobians, strict=True)
    ]


def staleness(remembered: Tensor, current: Tensor) -> float:
    """How much errors have changed since the samples' last visit, relative to what they are now."""
    return float((remembered - current).norm() / current.norm())
