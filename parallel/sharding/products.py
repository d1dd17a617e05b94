"""Matrix products along the last or the second last dimension of an activation, without transposed copies of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FeatureDim = Literal[-1, -2]  # which dimension of (batch, token, channel) a linear layer maps


def apply(x: Tensor, w: Tensor, dim: FeatureDim, out: Tensor | None = None) -> Tensor:
    """Map features ``in`` of ``x`` to ``out``.

    Args:
        x: ``(batch, position, in)`` for ``dim`` -1, ``(batch, in, position)`` for -2.
        w: ``(out, in)``.
        dim: Dimension of the features.
        out: Where to write; may be a part of a larger tensor.

    Returns:
        ``(batch, position, out)`` or ``(batch, out, position)``.
    """
    return _product(x, w.t() if dim == -1 else w, dim, out)


def apply_transposed(g: Tensor, w: Tensor, dim: FeatureDim, add_to: Tensor | None = None) -> Tensor:
    """Map features ``out`` of a gradient back to ``in``: the gradient of `apply` with respect to ``x``.

    Args:
        g: ``(batch, position, out)`` or ``(batch, out, position)``.
        w: ``(out, in)``.
        dim: Dimension of the features.
        add_to: Add to this tensor, in place.
    """
    matrix = w if dim == -1 else w.t()
    if add_to is None:
        return _product(g, matrix, dim, None)
    if dim == -1:
        flat = add_to.view(-1, add_to.shape[-1])
        torch.addmm(flat, g.reshape(-1, g.shape[-1]), matrix, out=flat)
    else:
        for mine, part in zip(add_to, g, strict=True):
            torch.addmm(mine, matrix, part, out=mine)
    return add_to


def _product(x: Tensor, matrix: Tensor, dim: FeatureDim, out: Tensor | None) -> Tensor:
    if dim == -1:
        flat = x.reshape(-1, x.shape[-1])
        if out is None:
            return torch.mm(flat, matrix).view(*x.shape[:-1], matrix.shape[1])
        if out.shape[0] == 1:  # rows of the flat matrix are equally far from each other, whatever part of a tensor
            torch.mm(flat, matrix, out=out[0])
        else:
            for mine, part in zip(out, x, strict=True):
                torch.mm(part, matrix, out=mine)
        return out
    if out is None:
        out = x.new_empty(x.shape[0], matrix.shape[0], x.shape[2])
    for mine, part in zip(out, x, strict=True):
        torch.mm(matrix, part, out=mine)
    return out


def outer(g: Tensor, x: Tensor, dim: FeatureDim, out: Tensor | None = None, add: bool = False) -> Tensor:
    """The gradient of `apply` with respect to the weight.

    Args:
        g: Gradient of the result.
        x: What was mapped.
        dim: Dimension of the features.
        out: Where to write.
        add: Add to ``out``.

    Returns:
        ``(out, in)``.
    """
    if dim == -1:
        left, right = g.reshape(-1, g.shape[-1]).t(), x.reshape(-1, x.shape[-1])
    else:  # one product over samples and positions together: sums of matrices as large as the weight would cost more
        left, right = _features_first(g), _features_first(x).t()
    return torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)


def _features_first(x: Tensor) -> Tensor:
    """``(batch, feature, position)`` to ``(feature, batch * position)``."""
    return x[0] if len(x) == 1 else x.transpose(0, 1).reshape(x.shape[1], -1)
