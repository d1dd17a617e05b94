"""What all estimators share: rows of a split array, iterations one at a time, state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from parallel.array.array import SplitArray


@dataclass(frozen=True)
class Step:
    """What one iteration found, the same on all ranks.

    Attributes:
        objective: What is minimised, before the update of this iteration.
        change: How much the result moved, in the estimator's own measure.
        converged: Whether further iterations would change nothing that matters.
    """

    objective: float
    change: float
    converged: bool


class Estimator:
    """Base of estimators that are fitted to the rows of an array.

    Subclasses implement `begin` and `iterate`, list the names of their fitted tensors in ``fitted``, and have
    `predict` or `transform`. The state is independent of the number of ranks.

    Args:
        max_iter: Most iterations of `fit`.
    """

    fitted: ClassVar[tuple[str, ...]] = ()
    supervised: ClassVar[bool] = False

    def __init__(self, max_iter: int = 1) -> None:
        if max_iter < 1:
            raise ValueError(f"max_iter={max_iter}: must be at least 1")
        self.max_iter, self.n_iter, self.objective, self.converged = max_iter, 0, float("nan"), False

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in parameters(self).items())
        return f"{type(self).__name__}({settings})"

    def fit(self, x: SplitArray, y: SplitArray | None = None) -> Estimator:
        """Iterate from the start until convergence, or ``max_iter`` times."""
        self.check_matrix(x)
        self.begin(x, y)
        while not self.converged and self.n_iter < self.max_iter:
            self.step(x, y)
        return self

    def step(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """One iteration, counted.

        Raises:
            ValueError: On all ranks, if the objective is not a number because rows are not finite.
        """
        done = self.iterate(x, y)
        if math.isnan(done.objective):
            finite_rows(self.rows(x), "raise")
        self.n_iter += 1
        self.objective, self.converged = done.objective, done.converged
        return done

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """Forget what was fitted, and choose where to start."""
        self.n_iter, self.objective, self.converged = 0, float("nan"), False

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """One iteration."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Fitted tensors in host memory, and the count of iterations."""
        state = {name: getattr(self, name) for name in self.fitted if getattr(self, name, None) is not None}
        state = {name: torch.as_tensor(value).detach().cpu() for name, value in state.items()}
        progress = [float(self.n_iter), self.objective, float(self.converged)]
        return state | {"progress": torch.tensor(progress, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name in self.fitted:
            setattr(self, name, state[name].clone() if name in state else None)
        count, self.objective, converged = state["progress"].tolist()
        self.n_iter, self.converged = int(count), bool(converged)

    def require_fitted(self) -> None:
        """Raise ValueError where nothing was fitted yet."""
        if self.fitted and getattr(self, self.fitted[0], None) is None:
            raise ValueError(f"{type(self).__name__} is not fitted yet: call fit(x) first")

    def check_matrix(self, x: SplitArray) -> None:
        """Refuse what is no split matrix of at least 32 bits.

        Raises:
            TypeError: For NumPy arrays and tensors.
            ValueError: For other shapes, and 16-bit types.
        """
        if not isinstance(x, SplitArray):
            raise TypeError(
                f"{type(self).__name__} takes split arrays, not {type(x).__module__}.{type(x).__name__}: "
                "parallel.array.from_global(x, split=0) makes one"
            )
        if x.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"{type(self).__name__} of {x.dtype}: 16 bits are too few; use astype(torch.float32)")
        if x.ndim != 2:
            raise ValueError(f"{type(self).__name__} takes a matrix of rows, not an array of shape {x.shape}")

    def rows(self, x: SplitArray) -> SplitArray:
        """A matrix whose rows are split, or whole on all ranks.

        Raises:
            TypeError: See `check_matrix`.
            ValueError: See `check_matrix`.
        """
        self.check_matrix(x)
        x = x.resplit(0) if x.split == 1 else x
        return x if x.dtype.is_floating_point else x.astype(torch.float64)

    def check_columns(self, x: SplitArray, number: int) -> None:
        """Raise ValueError unless rows have as many columns as those that were fitted."""
        if x.shape[1] != number:
            raise ValueError(f"{type(self).__name__} was fitted to rows of {number} columns, these have {x.shape[1]}")


def all_reduce(x: SplitArray, value: Tensor, op: str = "sum") -> Tensor:
    """Over the ranks that share the rows of ``x``; rows that all ranks have are counted once."""
    return x.comm.all_reduce(value, op) if x.split == 0 else value


def like_rows(x: SplitArray, local: Tensor) -> SplitArray:
    """A result with an entry for each row of ``x``."""
    return x.like(local, (x.shape[0], *local.shape[1:]), 0 if x.split == 0 else None, x.map if x.split == 0 else None)


def aligned_labels(x: SplitArray, y: SplitArray | None, name: str) -> Tensor:
    """Local labels of the local rows.

    Raises:
        ValueError: Where there are none, or another number.
    """
    if y is None:
        raise ValueError(f"{name} learns from labels: fit(x, y)")
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"{name}: {x.shape[0]} rows and {y.shape[0]} labels")
    return (y.resplit(0, x.map) if x.split == 0 else y.resplit(None)).local


def finite_rows(x: SplitArray, nan_policy: str, *others: SplitArray) -> tuple[SplitArray, ...]:
    """Arrays whose rows are all finite.

    Args:
        x: Rows.
        nan_policy: ``raise``, or ``omit`` rows with NaN or infinities.
        *others: Labels, cut alike.

    Raises:
        ValueError: Under ``raise``, with the number of such rows and the first one; for another policy.
    """
    if nan_policy not in ("raise", "omit"):
        raise ValueError(f"nan_policy={nan_policy!r}: choose raise or omit")
    good = torch.isfinite(x.local).flatten(1).all(1) if x.local.numel() else torch.ones(len(x.local), dtype=torch.bool)
    far = torch.iinfo(torch.int64).max
    bad = (~good).nonzero()[:, 0]
    first = torch.tensor([x.offset + int(bad[0]) if len(bad) else far], device=x.device)
    number = int(all_reduce(x, torch.tensor([len(bad)], device=x.device)))
    if not number:
        return (x, *others)
    if nan_policy == "raise":
        where = int(all_reduce(x, first, "min"))
        raise ValueError(
            f"{number} of {x.shape[0]} rows have NaN or infinities, the first is row {where}: clean the data, or "
            "nan_policy=omit"
        )
    mask = like_rows(x, good)
    return tuple(one[mask] for one in (x, *others))


def parameters(estimator: Any) -> dict[str, Any]:
    """Arguments of the constructor with their values, as of scikit-learn's ``get_params``."""
    import inspect

    names = [n for n in inspect.signature(type(estimator).__init__).parameters if n != "self"]
    return {name: getattr(estimator, name) for name in names if hasattr(estimator, name)}
