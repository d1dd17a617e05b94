"""A Jacobian factorised once and applied to many right-hand sides, as a preconditioner or exactly."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

# Unknowns up to which a dense inverse is faster than sparse triangular solves: on a CPU, on a GPU.
DENSE_UP_TO = {"cpu": 300, "cuda": 20_000}


class Factorization(Protocol):
    """Solves with one matrix for many right-hand sides."""

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``b`` ``[N, B]``, in the precision of the factorisation."""
        ...

    def solve_transposed(self, b: Tensor) -> Tensor:
        """``A^-T b``."""
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

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``."""
        return self.inverse @ b.to(self.inverse.dtype)

    def solve_transposed(self, b: Tensor) -> Tensor:
        """``A^-T b``."""
        return self.inverse.mT @ b.to(self.inverse.dtype)


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
        self._factors: tuple[Tensor, ...] | None = None
        self._transposed: tuple[Tensor, ...] | None = None

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``."""
        device = b.device
        b = b.to("cpu", self.dtype)
        if b.shape[1] < 4 or not _mkl_solves():
            return torch.from_numpy(self.lu.solve(b.double().numpy())).to(device)
        if self._factors is None:
            self._factors = (*_permutations(self.lu), _csr(self.lu.L, self.dtype), _csr(self.lu.U, self.dtype))
        row, column, lower, upper = self._factors
        y = _triangular(lower, b[row], upper=False, unit=True)
        return _triangular(upper, y, upper=True, unit=False)[column].to(device)

    def solve_transposed(self, b: Tensor) -> Tensor:
        """``A^-T b``: ``A^T = Pc U^T L^T Pr`` in the permutations of `solve`."""
        device = b.device
        b = b.to("cpu", self.dtype)
        if b.shape[1] < 4 or not _mkl_solves():
            return torch.from_numpy(self.lu.solve(b.double().numpy(), "T")).to(device)
        if self._transposed is None:
            row, column = _permutations(self.lu)
            back = (torch.argsort(column), torch.argsort(row))
            self._transposed = (*back, _csr(self.lu.U.T, self.dtype), _csr(self.lu.L.T, self.dtype))
        column, row, lower, upper = self._transposed
        y = _triangular(lower, b[column], upper=False, unit=False)
        return _triangular(upper, y, upper=True, unit=True)[row].to(device)


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


def _permutations(lu: SuperLU) -> tuple[Tensor, Tensor]:
    """Rows to take of a right-hand side, rows to take of the result: ``A^-1 b = (U^-1 L^-1 b[row])[column]``."""
    row = np.empty_like(lu.perm_r)
    row[lu.perm_r] = np.arange(len(row))
    return torch.from_numpy(row.astype(np.int64)), torch.from_numpy(lu.perm_c.astype(np.int64))


def _csr(matrix: csc_matrix, dtype: torch.dtype) -> Tensor:
    """A sparse CSR tensor."""
    csr = csr_matrix(matrix)
    csr.sort_indices()
    parts = csr.indptr.astype(np.int64), csr.indices.astype(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
        return torch.sparse_csr_tensor(
            *(torch.from_numpy(part) for part in parts),
            torch.from_numpy(csr.data).to(dtype),
            size=csr.shape,
            check_invariants=False,
        )


def _triangular(matrix: Tensor, b: Tensor, upper: bool, unit: bool) -> Tensor:
    return torch.triangular_solve(b, matrix, upper=upper, unitriangular=unit).solution


@cache
def _mkl_solves() -> bool:
    """Whether this build of torch has triangular solves of sparse CSR tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            two = _csr(csc_matrix(np.array([[1.0, 0.0], [1.0, 2.0]])), torch.float64)
            x = _triangular(two, torch.ones(2, 4, dtype=torch.float64), upper=False, unit=False)
    except RuntimeError:
        return False
    return bool(torch.allclose(x, torch.tensor([[1.0], [0.0]], dtype=x.dtype).expand(2, 4)))
