"""Properties of split arrays: every operation on random shapes, splits, maps and types is what NumPy says.

A case draws arrays and yields pairs (ours, NumPy's). It runs on any number of ranks: `run` is sent to them.
"""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import parallel.array as pa
from parallel.array import reductions, shaping
from parallel.array.array import SplitArray
from parallel.array.comm import Comm
from parallel.groups import Group

Pair = tuple[Any, Any]
CASES: dict[str, Callable[[Draw], Iterator[Pair]]] = {}
REAL = (np.float32, np.float64)
TYPES = (np.float32, np.float64, np.int32, np.int64)
TOLERANCE = {"float32": 1e-6, "complex64": 1e-6}
_COMMS: dict[int, Comm | None] = {}


def comm_of(size: int) -> Comm | None:
    """Comm of the first ``size`` ranks of the pool; None on the others."""
    if size == 1:
        return Comm()
    if size not in _COMMS:
        handle = dist.group.WORLD if size == dist.get_world_size() else dist.new_group(list(range(size)))
        mine = dist.get_rank() < size
        _COMMS[size] = Comm(Group(tuple(range(size)), handle), timeout_s=60) if mine else None
    return _COMMS[size]


class Draw:
    """Random arrays, the same on every rank; lengths of 0, below the number of ranks, and not divisible by it."""

    def __init__(self, seed: int, comm: Comm) -> None:
        self.rng, self.comm = np.random.default_rng(seed), comm

    def length(self, low: int = 0) -> int:
        return int(self.rng.choice([n for n in (0, 1, 2, 3, 5, 8, 13) if n >= low]))

    def shape(self, ndim: int | None = None, low: int = 0) -> tuple[int, ...]:
        ndim = int(self.rng.integers(1, 4)) if ndim is None else ndim
        return tuple(self.length(low) for _ in range(ndim))

    def values(self, shape: tuple[int, ...], dtype: Any = None, types: Any = TYPES) -> np.ndarray:
        dtype = np.dtype(types[self.rng.integers(len(types))] if dtype is None else dtype)
        if dtype.kind == "f":
            return self.rng.normal(size=shape).astype(dtype)
        if dtype.kind == "c":
            return (self.rng.normal(size=shape) + 1j * self.rng.normal(size=shape)).astype(dtype)
        if dtype.kind == "b":
            return self.rng.random(shape) < 0.5
        return self.rng.integers(-5, 6, size=shape).astype(dtype)

    def split_of(self, values: np.ndarray, split: int | None = -9) -> SplitArray:
        """The array with a random split, and a random map in half of the cases."""
        if split == -9:
            split = [None, *range(values.ndim)][self.rng.integers(values.ndim + 1)]
        array = pa.from_global(values, split, self.comm)
        if split is not None and self.rng.random() < 0.5:
            cuts = np.sort(self.rng.integers(0, values.shape[split] + 1, size=3))[: self.comm.size - 1]
            # Drawn alike on every number of ranks, so that all see the same arrays.
            map_ = np.diff([0, *cuts, values.shape[split]])
            array = array.resplit(split, tuple(int(n) for n in map_))
        elif split is not None:
            self.rng.integers(0, 2, size=3)
        return array

    def both(
        self, ndim: int | None = None, dtype: Any = None, low: int = 0, types: Any = TYPES
    ) -> tuple[SplitArray, np.ndarray]:
        values = self.values(self.shape(ndim, low), dtype, types)
        return self.split_of(values), values

    def axis(self, values: np.ndarray) -> int:
        return int(self.rng.integers(-values.ndim, values.ndim))


def case(name: str) -> Callable[..., Any]:
    def register(function: Callable[[Draw], Iterator[Pair]]) -> Callable[[Draw], Iterator[Pair]]:
        CASES[name] = function
        return function

    return register


def compare(ours: Any, expected: Any) -> str | None:
    """What is wrong; None: equal to the last bit where nothing is computed, else to 1e-6 (fp32), 1e-12 (fp64)."""
    if isinstance(ours, tuple | list) and not isinstance(expected, np.ndarray):
        if len(ours) != len(expected):
            return f"{len(ours)} results, expected {len(expected)}"
        return next((w for a, b in zip(ours, expected, strict=True) if (w := compare(a, b))), None)
    if isinstance(ours, SplitArray):
        rows = ours.local.shape[ours.split] if ours.split is not None else None
        if rows is not None and rows != ours.map[ours.comm.rank]:
            return f"local rows {rows}, map {ours.map}"
        found = ours.numpy()
    else:
        found = np.asarray(ours)
    expected = np.asarray(expected)
    if found.shape != expected.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    if found.dtype.kind in "biu" and expected.dtype.kind in "biu":
        return None if np.array_equal(found, expected) else f"{found} != {expected}"
    limit = TOLERANCE.get(str(found.dtype), 1e-12)
    scale = np.maximum(
        np.abs(np.nan_to_num(expected.astype(np.complex128 if expected.dtype.kind == "c" else np.float64))), 1.0
    )
    with np.errstate(all="ignore"):
        same = np.array_equal(np.isnan(found), np.isnan(expected)) and np.all(
            (found == expected) | np.isnan(found) | (np.abs(found - expected) <= limit * scale)
        )
    return None if same else f"{found} != {expected}"


def run(name: str, size: int, seeds: tuple[int, ...]) -> list[str]:
    """Run a case with several seeds on ``size`` ranks; what is wrong."""
    comm = comm_of(size)
    wrong = []
    for seed in seeds if comm is not None else ():
        try:
            draw = Draw(zlib.crc32(f"{name} {seed}".encode()), comm)
            with np.errstate(all="ignore"):
                for ours, expected in CASES[name](draw):
                    if message := compare(ours, expected):
                        wrong.append(f"{name} seed {seed}: {message}")
        except Exception:
            wrong.append(f"{name} seed {seed}: {traceback.format_exc()}")
    return wrong


# ------------------------------------------------------------------------------------------------------- element-wise

_POSITIVE = {"log", "log2", "log10", "log1p", "sqrt", "reciprocal", "arccosh"}
_UNIT = {"arcsin", "arccos", "arctanh"}
_NO_NUMPY = {"erf", "invert", "bitwise_invert"}
for _name in pa.elementwise.ANALYTIC if hasattr(pa, "elementwise") else ():
    if _name in _NO_NUMPY:
        continue

    @case(f"unary {_name}")
    def _(draw: Draw, name: str = _name) -> Iterator[Pair]:
        a, x = draw.both(types=(*REAL, np.int32))
        if name in _POSITIVE:
            a, x = abs(a) + 1, np.abs(x) + 1
        elif name in _UNIT:
            a, x = a / 10, x / 10
        yield getattr(pa, name)(a), getattr(np, name)(x)


for _name in ("abs", "negative", "positive", "square", "sign", "floor", "ceil", "trunc", "rint", "isnan", "isinf",
              "isfinite", "isposinf", "isneginf", "signbit", "logical_not", "conj", "nan_to_num"):  # fmt: skip

    @case(f"unary {_name}")
    def _(draw: Draw, name: str = _name) -> Iterator[Pair]:
        a, x = draw.both(types=REAL)
        if name.startswith("is") and x.size:
            x = np.where(x > 1, np.nan, np.where(x < -1, np.inf, np.where(x > 0.5, -np.inf, x))).astype(x.dtype)
            a = draw.split_of(x)
        yield getattr(pa, name)(a), getattr(np, name)(x)


def _broadcastable(draw: Draw, dtype: Any = None, low: int = 1) -> tuple[np.ndarray, np.ndarray]:
    shape = draw.shape(low=low)
    other = [1 if draw.rng.random() < 0.3 else n for n in shape][int(draw.rng.integers(0, len(shape))) :]
    x, y = draw.values(shape, dtype), draw.values(tuple(other), dtype)
    return (x, y) if draw.rng.random() < 0.5 else (y, x)


for _name in (*pa.elementwise.BINARY, *pa.elementwise.BINARY_ANALYTIC):

    @case(f"binary {_name}")
    def _(draw: Draw, name: str = _name) -> Iterator[Pair]:
        whole = name.startswith(("bitwise", "gcd", "lcm"))
        dtype = np.int64 if whole else REAL[draw.rng.integers(2)]
        x, y = _broadcastable(draw, dtype)
        if name in ("floor_divide", "remainder", "mod", "fmod", "divide", "true_divide", "power"):
            x, y = np.abs(x) + 1, np.abs(y) + 1
        if "shift" in name:
            x, y = np.abs(x), np.abs(y)
        yield getattr(pa, name)(draw.split_of(x), draw.split_of(y)), getattr(np, name)(x, y)


@case("operators with numbers and arrays")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(types=TYPES)
    yield a + 2, x + 2
    yield 2 - a, 2 - x
    yield a * 0.5, (x * 0.5)
    yield a / 2, x / 2
    yield -a, -x
    yield a > 0, x > 0
    yield (a > 0) & (a < 2), (x > 0) & (x < 2)
    yield a + x, x + x
    yield abs(a) ** 2, np.abs(x) ** 2
    yield a == a, x == x


@case("clip, round, where, isclose")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(types=REAL)
    yield pa.clip(a, -0.5, 0.7), np.clip(x, -0.5, 0.7)
    yield pa.round(a, 2), np.round(x, 2)
    yield pa.where(a > 0, a, -1.0), np.where(x > 0, x, x.dtype.type(-1))
    yield pa.isclose(a, a + 1e-9), np.isclose(x, x + x.dtype.type(1e-9))
    z = draw.values(x.shape, np.complex64)
    c = draw.split_of(z)
    yield pa.real(c), z.real
    yield pa.imag(c), z.imag
    yield pa.conj(c), z.conj()


# --------------------------------------------------------------------------------------------------------- reductions

for _name in ("sum", "prod", "any", "all", "mean", "var", "std", "count_nonzero"):

    @case(f"reduction {_name}")
    def _(draw: Draw, name: str = _name) -> Iterator[Pair]:
        a, x = draw.both(low=1 if name in ("mean", "var", "std") else 0)
        if name == "prod":
            a, x = draw.both(types=(np.float64, np.int64))
        axis = [None, draw.axis(x), tuple(range(min(2, x.ndim)))][draw.rng.integers(3)]
        reference = x.astype(np.float64) if x.dtype == np.float32 and name not in ("any", "all") else x
        keep = bool(draw.rng.integers(2))
        yield getattr(pa, name)(a, axis=axis, keepdims=keep), getattr(np, name)(reference, axis=axis, keepdims=keep)


for _name in ("max", "min", "argmax", "argmin", "ptp"):

    @case(f"reduction {_name}")
    def _(draw: Draw, name: str = _name) -> Iterator[Pair]:
        a, x = draw.both(low=1)
        if x.dtype.kind == "f" and name != "ptp" and draw.rng.random() < 0.4:
            x = np.where(draw.rng.random(x.shape) < 0.1, np.nan, x).astype(x.dtype)
            a = draw.split_of(x)
        axis = None if draw.rng.random() < 0.4 else draw.axis(x)
        yield getattr(pa, name)(a, axis=axis), getattr(np, name)(x, axis=axis)


for _name in ("cumsum", "cumprod"):

    @case(f"cumulative {_name}")
    def _(draw: Draw, name: str = _name) -> Iterator[Pair]:
        a, x = draw.both(types=(np.float64, np.int64))
        axis = draw.axis(x)
        yield getattr(pa, name)(a, axis), getattr(np, name)(x, axis=axis)


@case("nansum, average, cov")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(types=(np.float64,))
    x = np.where(x > 1, np.nan, x)
    yield pa.nansum(draw.split_of(x)), np.nansum(x)
    a, x = draw.both(2, np.float64, low=2)
    w = np.abs(draw.values(x.shape, np.float64)) + 0.1
    yield pa.average(a, 0, draw.split_of(w)), np.average(x, 0, w)
    yield pa.cov(a), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


@case("skew and kurtosis")
def _(draw: Draw) -> Iterator[Pair]:
    from scipy import stats

    a, x = draw.both(types=(np.float64,), low=3)
    axis = None if draw.rng.random() < 0.4 else draw.axis(x)
    yield pa.skew(a, axis), stats.skew(x, axis=axis)
    yield pa.kurtosis(a, axis), stats.kurtosis(x, axis=axis)
    ddof = int(draw.rng.integers(2))
    yield pa.var(a, axis, ddof=ddof), np.var(x, axis=axis, ddof=ddof)
    yield pa.std(a, axis, ddof=ddof), np.std(x, axis=axis, ddof=ddof)


# --------------------------------------------------------------------------------------------------- layouts and shapes


@case("resplit, balance, redistribute")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both()
    for split in (None, *range(x.ndim)):
        moved = a.resplit(split)
        yield moved, x
        yield moved.balance(), x
        yield moved.resplit(a.split), x
    yield a.balance().is_balanced, True


@case("halo")
def _(draw: Draw) -> Iterator[Pair]:
    x = draw.values((draw.length(1), 2))
    a = draw.split_of(x, 0)
    before, after = int(draw.rng.integers(0, 5)), int(draw.rng.integers(0, 5))
    rows = a.local.shape[0]
    first, last = max(a.offset - before, 0), min(a.offset + rows + after, len(x))
    yield a.halo(before, after).numpy() if a.comm.size > 1 else x[first:last], x[first:last] if rows else x[:0]


@case("reshape")
def _(draw: Draw) -> Iterator[Pair]:
    shape = [(12,), (3, 4), (2, 6), (2, 3, 2), (1, 12), (12, 1)][draw.rng.integers(6)]
    other = [(12,), (4, 3), (6, 2), (2, 2, 3), (1, 12), (-1, 3), (12, 1, 1)][draw.rng.integers(7)]
    x = draw.values(shape)
    a = draw.split_of(x)
    yield pa.reshape(a, other), x.reshape(other)
    yield pa.ravel(a), x.ravel()
    if len(other) > 1:
        yield pa.reshape(a, other, split=1), x.reshape(other)
    empty = draw.values((0, 3))
    yield pa.reshape(draw.split_of(empty), (3, 0)), empty.reshape(3, 0)


@case("axes")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(3)
    order = tuple(int(i) for i in draw.rng.permutation(3))
    yield pa.transpose(a, order), x.transpose(order)
    yield a.T, x.T
    yield pa.swapaxes(a, 0, 2), np.swapaxes(x, 0, 2)
    yield pa.moveaxis(a, 0, 2), np.moveaxis(x, 0, 2)
    yield pa.expand_dims(a, 1), np.expand_dims(x, 1)
    one = draw.values((draw.length(), 1, 3))
    yield pa.squeeze(draw.split_of(one), 1), one.squeeze(1)
    yield pa.broadcast_to(draw.split_of(one), (2, *one.shape)), np.broadcast_to(one, (2, *one.shape))


@case("joining")
def _(draw: Draw) -> Iterator[Pair]:
    shape = list(draw.shape(2))
    axis = int(draw.rng.integers(2))
    other = list(shape)
    other[axis] = draw.length()
    x, y = draw.values(tuple(shape), np.float64), draw.values(tuple(other), np.float32)
    yield pa.concatenate([draw.split_of(x), draw.split_of(y)], axis), np.concatenate([x, y], axis)
    z = draw.values(tuple(shape), np.float64)
    yield pa.stack([draw.split_of(x), draw.split_of(z)], axis), np.stack([x, z], axis)
    yield pa.vstack([draw.split_of(x), draw.split_of(z)]), np.vstack([x, z])
    yield pa.hstack([draw.split_of(x), draw.split_of(z)]), np.hstack([x, z])
    v, w = draw.values((5,)), draw.values((5,))
    yield pa.column_stack([draw.split_of(v), draw.split_of(w)]), np.column_stack([v, w])
    yield pa.hstack([draw.split_of(v), draw.split_of(w)]), np.hstack([v, w])


@case("order along an axis")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both()
    axis = draw.axis(x)
    yield pa.flip(a, axis), np.flip(x, axis)
    shift = int(draw.rng.integers(-9, 10))
    yield pa.roll(a, shift, axis), np.roll(x, shift, axis)
    yield pa.repeat(a, 3, axis), np.repeat(x, 3, axis)
    yield pa.tile(a, 2, 0), np.concatenate([x, x], 0)
    yield pa.pad(a, [(1, 2)] * x.ndim), np.pad(x, [(1, 2)] * x.ndim)


@case("parts of matrices")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(2)
    k = int(draw.rng.integers(-2, 3))
    yield pa.triu(a, k), np.triu(x, k)
    yield pa.tril(a, k), np.tril(x, k)
    yield pa.diagonal(a), np.diagonal(x)
    yield pa.trace(a), np.trace(x.astype(np.float64) if x.dtype == np.float32 else x)


@case("differences")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both()
    axis = draw.axis(x)
    for n in (1, 2):
        yield pa.diff(a, n, axis), np.diff(x, n, axis)


@case("convolution")
def _(draw: Draw) -> Iterator[Pair]:
    x, k = draw.values((draw.length(3),)), draw.values((int(draw.rng.integers(1, 4)),))
    k = k.astype(x.dtype)
    for mode in ("full", "same", "valid"):
        expected = np.convolve(x.astype(np.float64) if x.dtype == np.float32 else x, k, mode)
        yield pa.convolve(draw.split_of(x), torch.from_numpy(k), mode), expected


@case("factories")
def _(draw: Draw) -> Iterator[Pair]:
    shape = draw.shape()
    split = [None, *range(len(shape))][draw.rng.integers(len(shape) + 1)]
    yield pa.zeros(shape, split=split, comm=draw.comm), np.zeros(shape)
    yield pa.ones(shape, torch.int64, split, draw.comm), np.ones(shape, np.int64)
    yield pa.full(shape, 3.5, split=split, comm=draw.comm), np.full(shape, 3.5)
    n = draw.length()
    on = None if split is None else 0
    yield pa.arange(n, split=on, comm=draw.comm), np.arange(n)
    yield pa.arange(2, 11, 3, split=on, comm=draw.comm), np.arange(2, 11, 3)
    yield pa.arange(0.5, 4, 0.3, split=on, comm=draw.comm), np.arange(0.5, 4, 0.3)
    yield pa.linspace(-1, 2, n, split=on, comm=draw.comm), np.linspace(-1, 2, n)
    yield pa.logspace(-1, 2, n, split=on, comm=draw.comm), np.logspace(-1, 2, n)
    yield pa.eye(n, 4, 1, split=[None, 0, 1][draw.rng.integers(3)], comm=draw.comm), np.eye(n, 4, 1)
    a, x = draw.both()
    yield pa.zeros_like(a), np.zeros_like(x)
    yield pa.ones_like(a), np.ones_like(x)
    yield pa.from_local(a.local, a.split, draw.comm), x


# ----------------------------------------------------------------------------------------------------------- indexing


def _slice(draw: Draw, n: int) -> slice:
    step = int(draw.rng.choice([1, 1, 2, 3, -1, -2]))
    ends = [None if draw.rng.random() < 0.3 else int(draw.rng.integers(-n - 1, n + 2)) for _ in range(2)]
    return slice(ends[0], ends[1], step)


@case("slices and numbers")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(low=1)
    for _ in range(4):
        key = [_slice(draw, n) if draw.rng.random() < 0.6 else int(draw.rng.integers(-n, n)) for n in x.shape]
        key = tuple(key[: int(draw.rng.integers(1, x.ndim + 1))])
        yield a[key], x[key]
    yield a[...], x[...]
    yield a[..., 0], x[..., 0]
    yield a[None], x[None]
    yield a[:, None], x[:, None]


@case("masks")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both()
    mask = draw.values(x.shape, np.bool_)
    yield a[draw.split_of(mask)], x[mask]
    yield a[mask], x[mask]
    yield a[a > 0], x[x > 0]
    rows = draw.values(x.shape[:1], np.bool_)
    yield a[rows], x[rows]
    yield a[draw.split_of(rows)], x[rows]
    yield pa.nonzero(a > 0), np.nonzero(x > 0)
    chosen = a[draw.split_of(rows)]
    yield chosen + 1, x[rows] + 1
    yield chosen.balance().is_balanced, True


@case("arrays of indices")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(low=1)
    axis = int(draw.rng.integers(x.ndim))
    index = draw.rng.integers(-x.shape[axis], x.shape[axis], size=draw.length())
    yield pa.take(a, index, axis), np.take(x, index, axis)
    yield pa.take(a, draw.split_of(index), axis), np.take(x, index, axis)
    key = (slice(None),) * axis + (index,)
    yield a[key], x[key]
    square = draw.rng.integers(0, x.shape[0], size=(2, 3))
    yield a[square], x[square]
    if x.ndim > 1:
        other = draw.rng.integers(0, x.shape[1], size=len(index))
        first = draw.rng.integers(0, x.shape[0], size=len(index))
        yield a[first, other], x[first, other]


@case("assignment")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(low=1)
    a, x = a.copy(), x.copy()
    for _ in range(3):
        key = tuple(_slice(draw, n) if draw.rng.random() < 0.7 else int(draw.rng.integers(-n, n)) for n in x.shape)
        a[key] = 7
        x[key] = 7
        yield a, x
        value = draw.values(x[key].shape, x.dtype)
        x[key] = value
        a[key] = draw.split_of(value) if value.ndim and draw.rng.random() < 0.5 else value
        yield a, x
    mask = draw.values(x.shape, np.bool_)
    a[draw.split_of(mask)] = -3
    x[mask] = -3
    yield a, x
    index = draw.rng.permutation(x.shape[0])[: draw.rng.integers(1, x.shape[0] + 1)]
    value = draw.values((len(index), *x.shape[1:]), x.dtype)
    a[index] = value
    x[index] = value
    yield a, x


# ------------------------------------------------------------------------------------------------------------ sorting


def _sortable(draw: Draw, ndim: int | None = None) -> tuple[SplitArray, np.ndarray]:
    a, x = draw.both(ndim)
    if x.dtype.kind == "f" and draw.rng.random() < 0.5:
        x = np.where(x > 1, np.nan, np.where(x < -1, np.inf, np.round(x))).astype(x.dtype)
        a = draw.split_of(x)
    return a, x


@case("sort and argsort")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = _sortable(draw)
    axis = draw.axis(x)
    yield pa.sort(a, axis), np.sort(x, axis)
    yield pa.argsort(a, axis), np.argsort(x, axis, kind="stable")


@case("sort long vectors")
def _(draw: Draw) -> Iterator[Pair]:
    n = int(draw.rng.integers(500, 2000))
    x = draw.rng.integers(0, 20, n) * np.float32(0.5) if draw.rng.random() < 0.5 else draw.rng.normal(size=n)
    a = draw.split_of(x, 0)
    yield pa.sort(a), np.sort(x)
    yield pa.argsort(a), np.argsort(x, kind="stable")
    yield max(pa.sort(a).map) - min(pa.sort(a).map) <= 1, True
    yield pa.sort(a, descending=True), np.sort(x)[::-1]
    yield pa.argsort(a, descending=True), np.argsort(-x, kind="stable")


@case("unique")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = _sortable(draw)
    values, inverse, counts = pa.unique(a, return_counts=True, return_inverse=True)
    expected = np.unique(x, return_counts=True)
    yield values, expected[0]
    yield counts, expected[1]
    yield inverse, np.unique(x, return_inverse=True)[1].reshape(x.shape)
    long = draw.rng.integers(0, 300, 1000)
    yield pa.unique(draw.split_of(long)), np.unique(long)


for _name in ("linear", "lower", "higher", "midpoint", "nearest"):

    @case(f"percentile {_name}")
    def _(draw: Draw, name: str = _name) -> Iterator[Pair]:
        a, x = draw.both(low=1)
        axis = None if draw.rng.random() < 0.4 else draw.axis(x)
        x = x.astype(np.float64) if x.dtype.kind == "f" else x
        q = [0, 12.5, 50, 99, 100]
        yield pa.percentile(a, q, axis, name), np.percentile(x, q, axis, method=name)
        yield pa.median(a, axis), np.median(x, axis)


@case("topk, histogram, bincount, searchsorted")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(low=1, types=REAL)
    axis = draw.axis(x)
    k = int(draw.rng.integers(1, x.shape[axis] + 1))
    yield pa.topk(a, k, axis)[0], -np.sort(-x, axis).take(range(k), axis)
    yield pa.topk(a, k, axis)[1], np.argsort(-x, axis, kind="stable").take(range(k), axis)
    yield pa.topk(a, k, axis, largest=False)[0], np.sort(x, axis).take(range(k), axis)
    yield pa.histogram(a, 7), np.histogram(x, 7, (float(x.min()), float(x.max())))
    n = np.abs(draw.values((draw.length(),), np.int64))
    yield pa.bincount(draw.split_of(n), minlength=3), np.bincount(n, minlength=3)
    edges = np.array([-1.0, 0.0, 1.0])
    yield (
        pa.digitize(draw.split_of(x.astype(np.float64)), pa.from_global(edges, None, draw.comm)),
        np.digitize(x, edges),
    )


# ----------------------------------------------------------------------------------------------------------- products


@case("matmul")
def _(draw: Draw) -> Iterator[Pair]:
    m, k, n = draw.length(), draw.length(), draw.length()
    x, y = draw.values((m, k), np.float64), draw.values((k, n), np.float64)
    for s in (None, 0, 1):
        for t in (None, 0, 1):
            a, b = draw.split_of(x, s), draw.split_of(y, t)
            yield a @ b, x @ y
    v = draw.values((k,), np.float64)
    yield draw.split_of(x) @ draw.split_of(v), x @ v
    yield draw.split_of(v) @ draw.split_of(y), v @ y
    yield draw.split_of(v) @ draw.split_of(v), v @ v
    yield pa.outer(draw.split_of(v), draw.split_of(v)), np.outer(v, v)
    batch, other = draw.values((3, m, k), np.float64), draw.values((3, k, n), np.float64)
    yield draw.split_of(batch) @ draw.split_of(other), batch @ other


@case("norm and vdot")
def _(draw: Draw) -> Iterator[Pair]:
    a, x = draw.both(types=(np.float64,))
    yield pa.norm(a), np.linalg.norm(x)
    yield pa.vdot(a, a), np.vdot(x, x)
    axis = draw.axis(x)
    yield pa.norm(a, axis), np.linalg.norm(x, axis=axis)


# ------------------------------------------------------------------------------------------------------------- random


@case("random numbers do not know the ranks")
def _(draw: Draw) -> Iterator[Pair]:
    shape, alone = draw.shape(), Comm()
    split = [None, *range(len(shape))][draw.rng.integers(len(shape) + 1)]
    seed = int(draw.rng.integers(1 << 40))
    for function in (pa.rand, pa.randn):
        for dtype in (torch.float32, torch.float64):
            ours = function(*shape, seed=seed, dtype=dtype, split=split, comm=draw.comm).numpy()
            yield bool(np.array_equal(ours, function(*shape, seed=seed, dtype=dtype, comm=alone).numpy())), True
    ours = pa.randint(-3, 9, shape, seed, split, draw.comm).numpy()
    yield bool(np.array_equal(ours, pa.randint(-3, 9, shape, seed, None, alone).numpy())), True
    order = pa.randperm(17, seed, 0, draw.comm)
    yield bool(np.array_equal(order.numpy(), pa.randperm(17, seed, None, alone).numpy())), True
    yield pa.sort(order), np.arange(17)


assert {"sum", "any"} <= set(reductions.NAMES) and "pad" in shaping.NAMES
