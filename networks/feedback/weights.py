"""Fixed random feedback weights (F3, section 2.4): a matrix of C rows, one per output, and d columns per block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal[
    "trinomial",
    "binomial",
    "discrete_uniform",
    "kaiming_uniform",
    "kaiming_uniform_repeat_line",
    "identity_repeat_pm",
    "identity_repeat",
    "identity_fill_zero",
    "constant",
    "alternate_negative",
    "chunked_negative",
    "cartesian_product",
]
Storage = Literal["auto", "float32", "int8"]
_NAMED_VALUES = {"trinomial": (-1.0, 0.0, 1.0), "binomial": (0.0, 1.0)}
_NEED_VALUES = ("discrete_uniform", "cartesian_product")
_REAL = ("kaiming_uniform", "kaiming_uniform_repeat_line")  # their entries are no small integers
_MOST_INT8 = 127


@dataclass(frozen=True)
class FeedbackWeights:
    """How feedback weights are drawn.

    With C outputs and d features of a block (``s`` is the scalar, columns are counted from 0):

    - ``trinomial``: each entry s times -1, 0 or 1; ``binomial``: s times 0 or 1; ``discrete_uniform``: s times one of
      ``values``; all equally probable;
    - ``kaiming_uniform``: s times U(-1/sqrt(d), 1/sqrt(d)); ``kaiming_uniform_repeat_line``: one such column, repeated;
    - ``identity_repeat_pm``: s [I, -I, I, ...] cut to d columns; ``identity_repeat``: s [I, I, ...];
      ``identity_fill_zero``: s [I, 0, ...];
    - ``constant``: s everywhere; ``alternate_negative``: -s in the columns 0, 2, ..., else s; ``chunked_negative``: -s
      in the second half of the columns, else s;
    - ``cartesian_product``: the columns are all combinations of ``values``, so that d must be their number to the
      power of C.

    Args:
        kind: One of these.
        scalar: s: a number, ``ones``, ``zeros`` or ``1/C``.
        values: Of ``discrete_uniform`` and ``cartesian_product``.
        storage: ``int8``: entries over s, one byte each; ``float32``; ``auto``: int8 where entries over s are whole
            numbers of at most 127.
        seed: Of the private random generator.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    kind: Kind = "trinomial"
    scalar: float | str = "ones"
    values: Sequence[float] | None = None
    storage: Storage = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for key, value, allowed in (("kind", self.kind, get_args(Kind)), ("storage", self.storage, get_args(Storage))):
            if value not in allowed:
                raise ValueError(f"model.feedback.{key}={value!r} is unknown; choose one of {', '.join(allowed)}")
        if isinstance(self.scalar, str) and self.scalar not in ("ones", "zeros", "1/C"):
            raise ValueError(f"model.feedback.scalar={self.scalar!r}: must be a number, ones, zeros or 1/C")
        if self.kind in _NEED_VALUES and not self.values:
            raise ValueError(
                f"model.feedback.kind={self.kind} needs model.feedback.values, for instance [-1, 0, 1]; trinomial and "
                "binomial have their own"
            )
        if self.kind not in _NEED_VALUES and self.values is not None:
            raise ValueError(f"model.feedback.values={list(self.values)}: {self.kind} has none; set it to null")
        if self.storage == "int8" and not self._fits_int8():
            raise ValueError(
                f"model.feedback.storage=int8: the entries of {self.kind} are no whole numbers up to {_MOST_INT8}: "
                "use float32, or auto"
            )

    def _entries(self) -> Sequence[float]:
        return _NAMED_VALUES.get(self.kind, self.values or ())

    def _fits_int8(self) -> bool:
        whole = all(float(v).is_integer() and abs(v) <= _MOST_INT8 for v in self._entries())
        return self.kind not in _REAL and whole

    def factor(self, num_outputs: int) -> float:
        """The scalar as a number."""
        named = {"ones": 1.0, "zeros": 0.0, "1/C": 1 / num_outputs}
        return named[self.scalar] if isinstance(self.scalar, str) else float(self.scalar)

    def draw(self, num_outputs: int, sizes: Sequence[int]) -> nn.ModuleList:
        """A `FeedbackMatrix` for each number of features.

        Raises:
            ValueError: If a matrix of that shape cannot be: fewer features than outputs where an identity would lose
                outputs, or a number of features that is not that of all combinations.
        """
        generator = torch.Generator().manual_seed(self.seed)
        stored = torch.int8 if self.storage != "float32" and self._fits_int8() else torch.float32
        return nn.ModuleList(
            FeedbackMatrix(self._unscaled(num_outputs, d, generator).to(stored), self.factor(num_outputs))
            for d in sizes
        )

    def _unscaled(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        """Entries over s, (rows, columns) float32."""
        kind, column = self.kind, torch.arange(columns)
        if kind in ("trinomial", "binomial", "discrete_uniform"):
            values = torch.tensor(self._entries(), dtype=torch.float32)
            return values[torch.randint(len(values), (rows, columns), generator=generator)]
        if kind in _REAL:
            drawn = columns if kind == "kaiming_uniform" else 1
            uniform = 2 * torch.rand(rows, drawn, generator=generator) - 1
            return (uniform / math.sqrt(columns)).expand(rows, columns).contiguous()
        if kind.startswith("identity"):
            return self._identity(rows, columns)
        if kind == "cartesian_product":
            return self._combinations(rows, columns)
        sign: dict[str, Callable[[], Tensor]] = {
            "constant": lambda: torch.ones(columns),
            "alternate_negative": lambda: torch.where(column % 2 == 0, -1.0, 1.0),
            "chunked_negative": lambda: torch.where(column >= columns // 2, -1.0, 1.0),
        }
        return sign[kind]().expand(rows, columns).contiguous()

    def _identity(self, rows: int, columns: int) -> Tensor:
        if columns < rows:
            raise ValueError(
                f"model.feedback.kind={self.kind}: a block of {columns} features would hear nothing of "
                f"{rows - columns} of the {rows} outputs; make it wider or use another kind"
            )
        chunk, column = torch.arange(columns) // rows, torch.arange(columns) % rows
        if self.kind == "identity_repeat_pm":
            value = torch.where(chunk % 2 == 0, 1.0, -1.0)
        else:
            value = torch.where((chunk == 0) | (self.kind == "identity_repeat"), 1.0, 0.0)
        return torch.where(torch.arange(rows)[:, None] == column, value, 0.0)

    def _combinations(self, rows: int, columns: int) -> Tensor:
        wanted = len(self.values) ** rows
        if columns != wanted:
            raise ValueError(
                f"model.feedback.kind=cartesian_product: {len(self.values)} values for {rows} outputs have {wanted} "
                f"combinations, but a block has {columns} features; make all blocks {wanted} wide"
            )
        return torch.tensor(list(itertools.product(self.values, repeat=rows)), dtype=torch.float32).T.contiguous()


class FeedbackMatrix(nn.Module):
    """A fixed matrix B (C, d), as entries and a common factor; never trained.

    Args:
        entries: B over the factor, (C, d).
        factor: A number.
    """

    entries: Tensor

    def __init__(self, entries: Tensor, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("entries", entries)

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """B, (C, d)."""
        dtype = dtype or (self.entries.dtype if self.entries.is_floating_point() else torch.float32)
        entries = self.entries.to(dtype)
        return entries if self.factor == 1 else entries * self.factor

    def forward(self, error: Tensor) -> Tensor:
        """``e B``: errors (batch, C) to (batch, d)."""
        return error @ self.matrix(error.dtype)
