"""Random arrays that are the same for every number of ranks: Philox4x32-10, counted by global element.

Element ``i`` of a stream is a function of (seed, stream, i) alone. A block of the cipher gives 128 bits; an element
takes one block, so that neither the split nor the order in which ranks compute can change it.

Source: Salmon, Moraes, Dror and Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray, normalized_axis
from parallel.array.chunks import balanced, offsets
from parallel.array.comm import Comm
from parallel.array.factories import Shape, _shape

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_BLOCK = 1 << 16  # elements at a time: temporaries stay small


def philox(counter: Tensor | np.ndarray, key: tuple[int, int], high: tuple[int, int] = (0, 0)) -> list[np.ndarray]:
    """The four 32-bit words of each block.

    Args:
        counter: 64-bit numbers, the lower half of the counters.
        key: Two 32-bit words.
        high: The upper half of the counters, two 32-bit words.

    Returns:
        Four arrays of uint32 values as uint64.
    """
    low = np.asarray(counter).astype(np.uint64)
    mask, shift = np.uint64(_MASK), np.uint64(32)
    x0, x1 = low & mask, low >> shift
    x2, x3 = np.full_like(x0, high[0]), np.full_like(x0, high[1])
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = x0 * np.uint64(_MULTIPLIERS[0]), x2 * np.uint64(_MULTIPLIERS[1])
        x0, x1, x2, x3 = (
            (p1 >> shift) ^ x1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> shift) ^ x3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [x0, x1, x2, x3]


def _words(counter: np.ndarray, seed: int, stream: int) -> list[np.ndarray]:
    seed %= 1 << 64
    return philox(counter, (seed & _MASK, seed >> 32), (stream & _MASK, (stream >> 32) & _MASK))


def uniform_at(counter: np.ndarray, seed: int, stream: int = 0) -> np.ndarray:
    """Uniform float64 in [0, 1) for numbered elements; 53 bits."""
    a, b, _, _ = _words(counter, seed, stream)
    return ((a >> np.uint64(5)) * 67108864.0 + (b >> np.uint64(6))) / 9007199254740992.0


def normal_at(counter: np.ndarray, seed: int, stream: int = 0) -> np.ndarray:
    """Standard normal float64 for numbered elements, by Box and Muller."""
    a, b, c, d = _words(counter, seed, stream)
    u = ((a >> np.uint64(5)) * 67108864.0 + (b >> np.uint64(6)) + 1.0) / 9007199254740992.0  # in (0, 1]
    v = ((c >> np.uint64(5)) * 67108864.0 + (d >> np.uint64(6))) / 9007199254740992.0
    return _lockstep(np.sqrt, -2.0 * _lockstep(np.log, u)) * _lockstep(np.cos, 2.0 * np.pi * v)


def _lockstep(function: np.ufunc, values: np.ndarray) -> np.ndarray:
    """A function whose last elements are computed as all others.

    Vectorised loops may leave what does not fill a register to other code, which rounds differently, and where a rank's
    part ends must not show.
    """
    rest = -len(values) % 64
    return function(np.concatenate([values, np.ones(rest)]))[: len(values)] if rest else function(values)


def _numbers_of(shape: Sequence[int], split: int | None, comm: Comm) -> tuple[np.ndarray, tuple[int, ...]]:
    """Global numbers (C order) of the local elements, and the local shape."""
    if split is None:
        return np.arange(int(np.prod(shape, dtype=np.int64))), tuple(shape)
    axis = normalized_axis(split, len(shape))
    rows = balanced(shape[axis], comm.size)
    first, count = offsets(rows)[comm.rank], rows[comm.rank]
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    outer = int(np.prod(shape[:axis], dtype=np.int64))
    part = np.arange(first * inner, (first + count) * inner)
    numbers = (np.arange(outer)[:, None] * (shape[axis] * inner) + part).reshape(-1)
    return numbers, (*shape[:axis], count, *shape[axis + 1 :])


class Generator:
    """Draws arrays one after the other, each from a stream of its own.

    Args:
        seed: Any whole number.
        stream: Number of the first array.
    """

    def __init__(self, seed: int = 0, stream: int = 0) -> None:
        self.seed, self.stream = int(seed), int(stream)

    def _next(self) -> int:
        self.stream += 1
        return self.stream - 1

    def _drawn(self, at, shape: Shape, dtype: torch.dtype, split: int | None, comm: Comm | None) -> SplitArray:
        comm, shape, stream = comm or Comm.world(), _shape(shape), self._next()
        numbers, local_shape = _numbers_of(shape, split, comm)
        local = torch.empty(len(numbers), dtype=dtype)
        for i in range(0, len(numbers), _BLOCK):
            local[i : i + _BLOCK] = torch.from_numpy(at(numbers[i : i + _BLOCK], self.seed, stream))
        return SplitArray(local.reshape(local_shape), shape, split, comm)

    def random(
        self, shape: Shape, dtype: torch.dtype = torch.float32, split: int | None = None, comm: Comm | None = None
    ) -> SplitArray:
        """Uniform in [0, 1)."""
        if dtype == torch.float32:
            return self._drawn(_uniform24, shape, dtype, split, comm)
        return self._drawn(uniform_at, shape, dtype, split, comm)

    def uniform(
        self,
        low: float,
        high: float,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        split: int | None = None,
        comm: Comm | None = None,
    ) -> SplitArray:
        """Uniform in [low, high)."""
        found = self.random(shape, dtype, split, comm)
        found.local.mul_(high - low).add_(low)
        return found

    def normal(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        split: int | None = None,
        comm: Comm | None = None,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> SplitArray:
        """Normal."""
        found = self._drawn(normal_at, shape, dtype, split, comm)
        if (mean, std) != (0.0, 1.0):
            found.local.mul_(std).add_(mean)
        return found

    def integers(
        self, low: int, high: int, shape: Shape, split: int | None = None, comm: Comm | None = None
    ) -> SplitArray:
        """Whole numbers in [low, high), int64; fewer than 2^53 different ones.

        Raises:
            ValueError: If there is none.
        """
        if not 0 < high - low < 1 << 53:
            raise ValueError(f"integers({low}, {high}): there must be at least one number, and fewer than 2^53")

        def at(numbers: np.ndarray, seed: int, stream: int) -> np.ndarray:
            return low + np.floor(uniform_at(numbers, seed, stream) * (high - low)).astype(np.int64)

        return self._drawn(at, shape, torch.int64, split, comm)

    def permutation(self, length: int, split: int | None = None, comm: Comm | None = None) -> SplitArray:
        """The numbers below ``length`` in random order: a sort by random keys."""
        from parallel.array.sorting import argsort

        return argsort(self.random((length,), torch.float64, split, comm), axis=0)

    def shuffle(self, array: SplitArray) -> SplitArray:
        """Rows of an array in random order."""
        from parallel.array.indexing import take

        return take(array, self.permutation(array.shape[0], 0 if array.split == 0 else None, array.comm), 0)

    def choice(self, length: int, number: int, comm: Comm | None = None) -> Tensor:
        """``number`` different numbers below ``length``, the same on every rank; in the order of their draws."""
        if number > length:
            raise ValueError(f"choice: {number} different numbers of {length}")
        del comm
        stream = self._next()
        # Floyd's method: as many draws as numbers, whatever the length.
        chosen: dict[int, None] = {}
        draws = uniform_at(np.arange(number), self.seed, stream)
        for draw, top in zip(draws, range(length - number, length), strict=True):
            one = min(int(draw * (top + 1)), top)
            chosen[top if one in chosen else one] = None
        return torch.tensor(list(chosen), dtype=torch.int64)


def _uniform24(numbers: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Uniform float32 with all bits that a float32 below 1 can have; none is rounded up to 1."""
    return ((_words(numbers, seed, stream)[0] >> np.uint64(8)) * np.float64(1 / 16777216)).astype(np.float32)


def rand(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, split: int | None = None, comm: Comm | None = None
) -> SplitArray:
    """Uniform in [0, 1), a function of the seed alone."""
    return Generator(seed).random(shape, dtype, split, comm)


def randn(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, split: int | None = None, comm: Comm | None = None
) -> SplitArray:
    """Standard normal, a function of the seed alone."""
    return Generator(seed).normal(shape, dtype, split, comm)


def randint(
    low: int, high: int, shape: Shape, seed: int = 0, split: int | None = None, comm: Comm | None = None
) -> SplitArray:
    """Whole numbers in [low, high), a function of the seed alone."""
    return Generator(seed).integers(low, high, shape, split, comm)


def randperm(length: int, seed: int = 0, split: int | None = None, comm: Comm | None = None) -> SplitArray:
    """A random permutation, a function of the seed alone."""
    return Generator(seed).permutation(length, split, comm)
