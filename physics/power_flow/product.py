"""Currents of a batch of voltages: products with the admittance matrix, and what changed branches add to them."""

from __future__ import annotations

import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from physics.power_flow.batch import Changes
from physics.power_flow.factorization import csr_tensor, multiplies_csr


class Product:
    """``Y V`` in real arithmetic: one real sparse matrix ``[[G, -B], [B, G]]`` on ``[e; f]``.

    This is faster than complex sparse products, and needs no device that has them.

    Args:
        rows: Of the entries of ``Y``.
        columns: Of the entries of ``Y``, each pair once.
        y: Their complex values.
        n: Number of buses.
        dense: Keep a dense matrix.
    """

    def __init__(self, rows: Tensor, columns: Tensor, y: Tensor, n: int, dense: bool = False) -> None:
        row = torch.cat([rows, rows, rows + n, rows + n]).cpu().numpy()
        column = torch.cat([columns, columns + n, columns, columns + n]).cpu().numpy()
        value = torch.cat([y.real, -y.imag, y.imag, y.real]).cpu().numpy()
        matrix = csr_matrix((value, (row, column)), shape=(2 * n, 2 * n))
        matrix.sort_indices()
        self._matrix = matrix
        self._tensor = torch.from_numpy(matrix.toarray()).to(y.device) if dense else csr_tensor(matrix, y.device)
        self._by_torch = y.device.type != "cpu" or multiplies_csr()

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """The product with ``[2n, B]``, written to ``out``."""
        if not self._by_torch:
            return out.copy_(torch.from_numpy(self._matrix @ x.numpy()))
        return torch.addmm(out, self._tensor, x, beta=0, alpha=1, out=out)


def add_changes(current: Tensor, ef: Tensor, changes: Changes) -> None:
    """Add the currents of changed branches to ``[2n, B]`` in place."""
    n = len(ef) // 2
    v_f = torch.complex(ef[:n].gather(0, changes.f), ef[n:].gather(0, changes.f))
    v_t = torch.complex(ef[:n].gather(0, changes.t), ef[n:].gather(0, changes.t))
    at_f, at_t = changes.ff * v_f + changes.ft * v_t, changes.tf * v_f + changes.tt * v_t
    for place, value in ((changes.f, at_f), (changes.t, at_t)):
        current[:n].scatter_add_(0, place, value.real)
        current[n:].scatter_add_(0, place, value.imag)
