"""A Jacobian factorised once and applied to many right-hand sides, as a preconditioner or exactly."""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

from physics.power_flow.buffers import Buffers

# Unknowns up to which a dense inverse is faster than sparse triangular solves: on a CPU, on a GPU.
DENSE_UP_TO = {"cpu": 200, "cuda": 20_000}
# Right-hand sides below which SuperLU itself is faster.
_FEW = 4


class Factorization(Protocol):
    """Solves with one matrix for many right-hand sides. A result lasts until the next solve; copy what is to stay."""

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``b`` ``[N, B]``, in the precision of the factorisation."""
        ...

    def solve_transposed(self, b: Tensor) -> Tensor:
        """``A^-T b``."""
        ...

    def select(self, columns: Tensor) -> Factorization:
        """For some of the right-hand sides: the same."""
        ...


class SingularMatrix(ArithmeticError):
    """A matrix cannot be factorised."""


def sparse_lu(matrix: csc_matrix, order: bool = True) -> SuperLU:
    """LU with minimum degree on ``A^T + A`` and pivots on the diagonal where they are not small.

    Args:
        matrix: Square.
        order: Whether to order at all; False: the matrix is ordered already.

    Raises:
        SingularMatrix: If a pivot is exactly zero or not finite.
    """
    if not np.isfinite(matrix.data).all():
        raise SingularMatrix("the matrix is not finite")
    try:
        return splu(
            matrix,
            permc_spec="MMD_AT_PLUS_A" if order else "NATURAL",
            diag_pivot_thresh=1e-3,
            options={"SymmetricMode": True},
        )
    except RuntimeError as error:  # SuperLU: "Factor is exactly singular"
        raise SingularMatrix(str(error)) from None


class DenseInverse:
    """The inverse as a dense matrix; in float32 it is a preconditioner, whose fixed point stays exact.

    Args:
        matrix: What to invert.
        dtype: Precision of the inverse.
        device: Where.

    Raises:
        SingularMatrix: If the matrix is singular.
    """

    def __init__(self, matrix: csc_matrix, dtype: torch.dtype, device: torch.device) -> None:
        dense = torch.from_numpy(matrix.toarray()).to(device)
        inverse, info = torch.linalg.inv_ex(dense)
        if int(info) or not bool(inverse.isfinite().all()):
            raise SingularMatrix("the matrix is singular")
        self.inverse = inverse.to(dtype)
        self._buffers = Buffers(self.inverse)

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``."""
        return self._product(self.inverse, b)

    def solve_transposed(self, b: Tensor) -> Tensor:
        """``A^-T b``."""
        return self._product(self.inverse.mT, b)

    def select(self, columns: Tensor) -> Self:
        """The same for any right-hand sides."""
        return self

    def _product(self, matrix: Tensor, b: Tensor) -> Tensor:
        if b.dtype != matrix.dtype:
            b = self._buffers("b", *b.shape).copy_(b)
        return torch.mm(matrix, b, out=self._buffers("x", *b.shape))


class _Factors(NamedTuple):
    """``x = (second^-1 first^-1 b[rows])[columns]`` with a lower and an upper triangular matrix."""

    rows: Tensor
    first: Tensor
    second: Tensor
    columns: Tensor
    unit: tuple[bool, bool]


class SparseLU:
    """Sparse triangular factors; where torch has MKL it applies them to all columns at once, several times faster.

    Args:
        matrix: What to factorise.
        dtype: Precision of the triangular solves.

    Raises:
        SingularMatrix: If the matrix is singular.
    """

    def __init__(self, matrix: csc_matrix, dtype: torch.dtype) -> None:
        self.lu = sparse_lu(matrix)
        self.dtype = dtype
        self._buffers = Buffers(torch.empty(0, dtype=dtype))
        self._factors: dict[str, _Factors] = {}

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``."""
        return self._solved(b, "N")

    def solve_transposed(self, b: Tensor) -> Tensor:
        """``A^-T b``."""
        return self._solved(b, "T")

    def select(self, columns: Tensor) -> Self:
        """The same for any right-hand sides."""
        return self

    def _solved(self, b: Tensor, which: str) -> Tensor:
        size, count = b.shape
        if count < _FEW or not _solves_csr():
            return torch.from_numpy(self.lu.solve(b.cpu().double().numpy(), which)).to(b.device)
        if which not in self._factors:
            self._factors[which] = self._arranged(which)
        rows, first, second, columns, (first_unit, second_unit) = self._factors[which]
        x, y = self._buffers("x", size, count), self._buffers("y", size, count)
        x.copy_(b)
        torch.index_select(x, 0, rows, out=y)
        _triangular(first, y, upper=False, unit=first_unit, out=x)
        _triangular(second, x, upper=True, unit=second_unit, out=y)
        return torch.index_select(y, 0, columns, out=x).to(b.device)

    def _arranged(self, which: str) -> _Factors:
        """SuperLU's ``Pr A Pc = L U`` as matrices of torch; transposed, ``A^T = Pc U^T L^T Pr``."""
        row = np.empty_like(self.lu.perm_r)
        row[self.lu.perm_r] = np.arange(len(row))
        rows, columns = (torch.from_numpy(index.astype(np.int64)) for index in (row, self.lu.perm_c))
        lower, upper = csr_matrix(self.lu.L), csr_matrix(self.lu.U)
        cpu = torch.device("cpu")
        if which == "N":
            pair, unit = (lower, upper), (True, False)
        else:
            pair, unit = (csr_matrix(upper.T), csr_matrix(lower.T)), (False, True)
            rows, columns = torch.argsort(columns), torch.argsort(rows)
        first, second = (csr_tensor(matrix, cpu).to(self.dtype) for matrix in pair)
        return _Factors(rows, first, second, columns, unit)


def factorize(
    matrix: csc_matrix, device: torch.device, dtype: torch.dtype = torch.float32, kind: str = "auto"
) -> Factorization:
    """Factorise a matrix in the way that suits its size and the device.

    Args:
        matrix: Square, on the CPU.
        device: Where right-hand sides are.
        dtype: Precision of the solves; float32 makes a preconditioner.
        kind: ``dense``, ``sparse`` or ``auto``.

    Raises:
        SingularMatrix: If the matrix is singular.
        ValueError: If the kind is unknown.
    """
    if kind not in ("auto", "dense", "sparse"):
        raise ValueError(f"factorization {kind!r}: choose 'auto', 'dense' or 'sparse'")
    if kind == "dense" or (kind == "auto" and matrix.shape[0] <= DENSE_UP_TO.get(device.type, 0)):
        return DenseInverse(matrix, dtype, device)
    return SparseLU(matrix, dtype)


def csr_tensor(matrix: csr_matrix, device: torch.device) -> Tensor:
    """A sparse matrix as a CSR tensor."""
    matrix.sort_indices()
    parts = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state", invariants are not checked
        return torch.sparse_csr_tensor(
            *(torch.from_numpy(part).to(device) for part in parts), size=matrix.shape, check_invariants=False
        )


def _triangular(matrix: Tensor, b: Tensor, upper: bool, unit: bool, out: Tensor) -> None:
    """``out = matrix^-1 b``."""
    torch.triangular_solve(b, matrix, upper=upper, unitriangular=unit, out=(out, b.new_empty(0)))


_PROBE = csr_matrix(np.array([[1.0, 0.0], [1.0, 2.0]]))


@cache
def multiplies_csr() -> bool:
    """Whether this build of torch multiplies CSR tensors on a CPU into a given result."""
    one = torch.ones(2, 4, dtype=torch.float64)
    out = torch.full_like(one, torch.nan)
    try:
        torch.addmm(out, csr_tensor(_PROBE, one.device), one, beta=0, alpha=1, out=out)
    except RuntimeError:
        return False
    return out.tolist() == [[1.0] * 4, [3.0] * 4]


@cache
def _solves_csr() -> bool:
    """Whether this build of torch has triangular solves of CSR tensors on a CPU."""
    one = torch.ones(2, 4, dtype=torch.float64)
    out = torch.full_like(one, torch.nan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _triangular(csr_tensor(_PROBE, one.device), one, upper=False, unit=False, out=out)
    except RuntimeError:
        return False
    return out.tolist() == [[1.0] * 4, [0.0] * 4]
