"""Where the entries of a Jacobian are: fixed by the grid, whatever the voltages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csc_matrix
from torch import Tensor

if TYPE_CHECKING:
    from physics.power_flow.equations import Equations


class JacobianPattern:
    """Where the derivatives of the entries of ``Y`` go in the Jacobian, by columns (CSC).

    Args:
        equations: Whose Jacobian.
    """

    def __init__(self, equations: Equations) -> None:
        eq = equations
        a, m = eq.num_angles, eq.num_magnitudes
        self.size = eq.num_unknowns
        i, k = eq.rows.cpu().numpy(), eq.columns.cpu().numpy()
        # Index of a bus among the angles (also of its P) and among the magnitudes (also of its Q); negative: none.
        angle, magnitude = np.arange(eq.num_buses) - eq.num_slack, np.arange(eq.num_buses) - eq.first_pq
        p_row, q_row = np.where(angle < 0, -1, angle), np.where(magnitude < 0, -1, magnitude + a)
        va_column, vm_column = p_row.copy(), q_row
        if eq.distributed:
            p_row[0] = a + m
        blocks = [(p_row, va_column), (p_row, vm_column), (q_row, va_column), (q_row, vm_column)]
        row = np.concatenate([r[i] for r, _ in blocks])
        column = np.concatenate([c[k] for _, c in blocks])
        self.constant = np.zeros(0)
        if eq.distributed:
            row = np.concatenate([row, p_row])
            column = np.concatenate([column, np.full(eq.num_buses, a + m)])
            self.constant = -eq.weights.cpu().numpy()
        there = np.flatnonzero((row >= 0) & (column >= 0))
        there = there[np.lexsort((row[there], column[there]))]
        self.rows, self.columns = row[there], column[there]
        self.indptr = np.concatenate([[0], np.cumsum(np.bincount(self.columns, minlength=self.size))])
        self._taken = torch.from_numpy(there).to(eq.device)
        self._constant = torch.from_numpy(self.constant).to(eq.device, eq.dtype)[:, None]

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return len(self.rows)

    def arranged(self, p_va: Tensor, p_vm: Tensor, q_va: Tensor, q_vm: Tensor) -> Tensor:
        """Derivatives at the entries of ``Y`` as entries of the Jacobian, ``[nnz, B]``."""
        constant = self._constant.expand(-1, p_va.shape[1])
        return torch.cat([p_va, p_vm, q_va, q_vm, constant])[self._taken]

    def matrix(self, values: np.ndarray) -> csc_matrix:
        """The Jacobian with given entries ``[nnz]``."""
        return csc_matrix((np.ascontiguousarray(values), self.rows, self.indptr), shape=(self.size, self.size))

    def dense(self, values: Tensor) -> Tensor:
        """Jacobians with given entries ``[nnz, B]``, ``[B, N_u, N_u]``."""
        place = torch.from_numpy(self.rows * self.size + self.columns).to(values.device)
        out = values.new_zeros(values.shape[1], self.size * self.size)
        return out.index_copy_(1, place, values.mT).view(-1, self.size, self.size)
