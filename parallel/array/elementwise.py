"""Functions of single elements: of one array (nothing is sent), of two (the smaller one moves to the larger).

Types are promoted as torch does, so that float32 stays float32; whole numbers become float64 where NumPy makes them so
(divisions, roots, functions of analysis).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.chunks import Map
from parallel.array.factories import from_global

Operand = Any  # SplitArray, Tensor, NumPy array, number

ANALYTIC = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "arcsin": torch.asin,
    "arccos": torch.acos,
    "arctan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "arcsinh": torch.asinh,
    "arccosh": torch.acosh,
    "arctanh": torch.atanh,
    "deg2rad": torch.deg2rad,
    "rad2deg": torch.rad2deg,
    "reciprocal": torch.reciprocal,
    "sinc": torch.sinc,
    "erf": torch.erf,
    "cbrt": lambda x: torch.sign(x) * x.abs().pow(1 / 3),
}
PLAIN = {
    "abs": torch.abs,
    "negative": torch.neg,
    "positive": lambda x: x,
    "square": torch.square,
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "rint": torch.round,
    "conj": torch.conj_physical,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "isposinf": torch.isposinf,
    "isneginf": torch.isneginf,
    "signbit": torch.signbit,
    "logical_not": torch.logical_not,
    "bitwise_invert": torch.bitwise_not,
    "invert": torch.bitwise_not,
}


def _of_whole(function: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """A division of whole numbers that gives 0 where the divisor is 0, as NumPy's do.

    torch raises there: on the one rank that has the 0, while the others would wait for it.
    """

    def divided(a: Any, b: Any) -> Tensor:
        if torch.result_type(a, b).is_floating_point:
            return function(a, b)
        zero = torch.as_tensor(b) == 0
        return torch.where(zero, 0, function(a, torch.where(zero, 1, b)))

    return divided


BINARY = {
    "add": torch.add,
    "subtract": torch.subtract,
    "multiply": torch.multiply,
    "floor_divide": _of_whole(torch.floor_divide),
    "remainder": _of_whole(torch.remainder),
    "mod": _of_whole(torch.remainder),
    "fmod": _of_whole(torch.fmod),
    "power": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "bitwise_and": torch.bitwise_and,
    "bitwise_or": torch.bitwise_or,
    "bitwise_xor": torch.bitwise_xor,
    "bitwise_left_shift": torch.bitwise_left_shift,
    "bitwise_right_shift": torch.bitwise_right_shift,
    "gcd": torch.gcd,
    "lcm": torch.lcm,
}
# Whole numbers give float64, as NumPy has it.
BINARY_ANALYTIC = {
    "divide": torch.true_divide,
    "true_divide": torch.true_divide,
    "arctan2": torch.atan2,
    "hypot": torch.hypot,
    "logaddexp": torch.logaddexp,
    "copysign": torch.copysign,
    "nextafter": torch.nextafter,
}


def map_local(array: SplitArray, function: Callable[[Tensor], Tensor]) -> SplitArray:
    """Apply a function that keeps the shape to the local rows."""
    return array.like(function(array.local), array.shape, array.split, array.map or None)


def _real(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()


def _analytic(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[SplitArray], SplitArray]:
    def apply(array: SplitArray) -> SplitArray:
        return map_local(array, lambda local: function(_real(local)))

    note = "; whole numbers give float64, where NumPy has 1 // x" if name == "reciprocal" else ", as NumPy has it"
    return _named(apply, name, f"``{name}`` of every element{note}.")


def _plain(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[SplitArray], SplitArray]:
    def apply(array: SplitArray) -> SplitArray:
        return map_local(array, function)

    return _named(apply, name, f"``{name}`` of every element, as NumPy has it.")


def _two(name: str, function: Callable[[Tensor, Tensor], Tensor], analytic: bool) -> Callable[..., SplitArray]:
    def apply(a: Operand, b: Operand) -> SplitArray:
        return binary(function, a, b, analytic)

    return _named(apply, name, f"``{name}`` of two arrays or numbers, element by element, with broadcasting.")


def _named(function: Any, name: str, doc: str) -> Any:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


globals().update({name: _analytic(name, function) for name, function in ANALYTIC.items()})
globals().update({name: _plain(name, function) for name, function in PLAIN.items()})
globals().update({name: _two(name, function, False) for name, function in BINARY.items()})
globals().update({name: _two(name, function, True) for name, function in BINARY_ANALYTIC.items()})
EXTRA = ("clip", "round", "where", "isclose", "nan_to_num", "real", "imag")
NAMES = (*ANALYTIC, *PLAIN, *BINARY, *BINARY_ANALYTIC, *EXTRA)


def clip(array: SplitArray, low: float | None = None, high: float | None = None) -> SplitArray:
    """Values within bounds; None: no bound."""
    return map_local(array, lambda local: local.clamp(low, high))


def round(array: SplitArray, decimals: int = 0) -> SplitArray:
    """Values rounded to decimals, halves to even ones."""
    return map_local(array, lambda local: torch.round(local, decimals=decimals) if local.is_floating_point() else local)


def nan_to_num(array: SplitArray, nan: float = 0.0) -> SplitArray:
    """NaN replaced, infinities by the largest numbers."""
    return map_local(array, lambda local: torch.nan_to_num(local, nan=nan))


def real(array: SplitArray) -> SplitArray:
    """Real parts."""
    return map_local(array, lambda local: local.real if local.is_complex() else local)


def imag(array: SplitArray) -> SplitArray:
    """Imaginary parts."""
    return map_local(array, lambda local: local.imag if local.is_complex() else torch.zeros_like(local))


def isclose(a: Operand, b: Operand, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> SplitArray:
    """Whether elements are equal within ``atol + rtol |b|``."""
    return binary(lambda x, y: torch.isclose(*_same(x, y), rtol, atol, equal_nan), a, b)


def _same(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def where(condition: SplitArray, a: Operand, b: Operand) -> SplitArray:
    """Elements of ``a`` where the condition holds, of ``b`` elsewhere."""
    (c, x, y), shape, split, map_, comm_of = aligned(condition, a, b)
    return comm_of.like(torch.where(c, *_weak(x, y, a, b)), shape, split, map_ or None)


def binary(function: Callable[..., Tensor], a: Operand, b: Operand, analytic: bool = False) -> SplitArray:
    """A function of two operands that broadcasts; see `aligned` for what moves."""
    (x, y), shape, split, map_, one = aligned(a, b)
    x, y = _weak(x, y, a, b)
    if analytic and not any(t.is_floating_point() or t.is_complex() for t in (x, y)):
        x, y = x.double(), y.double()
    return one.like(function(x, y), shape, split, map_ or None)


def _weak(x: Tensor, y: Tensor, a: Operand, b: Operand) -> tuple[Tensor, Tensor]:
    """Numbers of Python take the type of the array, unless it has whole numbers and they have not."""
    for number, other, first in ((a, y, True), (b, x, False)):
        if isinstance(number, bool | int | float | complex):
            dtype = other.dtype
            if isinstance(number, float) and not (dtype.is_floating_point or dtype.is_complex):
                dtype = torch.float64
            elif isinstance(number, complex) and not dtype.is_complex:
                dtype = torch.promote_types(dtype, torch.complex64) if dtype.is_floating_point else torch.complex128
            elif isinstance(number, int) and not isinstance(number, bool) and dtype == torch.bool:
                dtype = torch.int64
            value = torch.tensor(number, dtype=dtype, device=other.device)
            if first:
                return value, other.to(torch.promote_types(dtype, other.dtype))
            return other.to(torch.promote_types(dtype, other.dtype)), value
    return x, y


def aligned(*operands: Operand) -> tuple[list[Tensor], tuple[int, ...], int | None, Map, SplitArray]:
    """Local parts of operands that broadcast against each other, on one layout.

    The layout is that of the largest split operand. The others move: whole ones are cut (nothing is sent), those of the
    same axis but another map are redistributed, those of another axis resplit, an axis of length 1 is replicated.

    Returns:
        Local tensors; global shape, split and map of the result; an array of the right `Comm`.

    Raises:
        ValueError: If the shapes do not broadcast.
    """
    like = next((x for x in operands if isinstance(x, SplitArray)), None)
    if like is None:
        raise ValueError("one of the operands must be a SplitArray; make one with from_global or from_local")
    arrays = [x if isinstance(x, SplitArray) else _whole(x, like) for x in operands]
    try:
        shape = tuple(np.broadcast_shapes(*(x.shape for x in arrays)))
    except ValueError:
        layouts = ", ".join(f"{x.shape} split={x.split} map={x.map}" for x in arrays)
        raise ValueError(f"shapes that do not broadcast: {layouts}") from None

    def axis_of(x: SplitArray) -> int | None:
        """The axis of the result that is split; None: nothing is, or an axis of length 1 that is stretched."""
        if x.split is None or (x.shape[x.split] == 1 and shape[x.split + len(shape) - x.ndim] != 1):
            return None
        return x.split + len(shape) - x.ndim

    leader = max((x for x in arrays if axis_of(x) is not None), key=lambda x: x.size, default=None)
    if leader is None:
        return [x.resplit(None).local for x in arrays], shape, None, (), like
    split, map_ = axis_of(leader), leader.map
    parts = []
    for x in arrays:
        own = split - (len(shape) - x.ndim)
        stretched = own < 0 or (x.shape[own] == 1 and shape[split] != 1)
        parts.append((x.resplit(None) if stretched else x.resplit(own, map_)).local)
    return parts, shape, split, map_, like


def _whole(value: Any, like: SplitArray) -> SplitArray:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return from_global(tensor.to(like.device), None, like.comm)
