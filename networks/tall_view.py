"""The two-dimensional tall view of a weight, which low-rank methods decompose."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def is_transposed(shape: Sequence[int]) -> bool:
    """Whether the tall view of a weight of this shape is the transpose of its ``(out, rest)`` matrix."""
    return shape[0] < _rest(shape)


def tall_shape(shape: Sequence[int]) -> tuple[int, int]:
    """``(m, n)`` with ``m >= n`` of the tall view of a weight of this shape.

    Raises:
        ValueError: The weight has fewer than two dimensions.
    """
    rest = _rest(shape)
    return max(shape[0], rest), min(shape[0], rest)


def to_tall(weight: Tensor) -> tuple[Tensor, bool]:
    """Flatten a weight ``(out, ...)`` to ``(out, rest)`` and transpose it if ``out < rest``.

    It is a view where the memory layout allows, and differentiable in any case.

    Returns:
        The matrix ``(m, n)`` with ``m >= n``, and whether it was transposed.

    Raises:
        ValueError: The weight has fewer than two dimensions.
    """
    transposed = is_transposed(weight.shape)
    matrix = weight.flatten(1)
    return (matrix.T if transposed else matrix), transposed


def from_tall(matrix: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """The weight of this shape whose tall view is the matrix ``(m, n)``: the inverse of `to_tall`."""
    return (matrix.T if transposed else matrix).reshape(tuple(shape))


def _rest(shape: Sequence[int]) -> int:
    if len(shape) < 2:
        raise ValueError(f"a tensor of shape {tuple(shape)} has no matrix view; low-rank methods need two dimensions.")
    rest = 1
    for size in shape[1:]:
        rest *= size
    return rest
