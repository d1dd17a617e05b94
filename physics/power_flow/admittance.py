"""Admittances of branches and buses as differentiable functions of the branch parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from physics.power_flow.factorization import csr_tensor
from physics.power_flow.grid import BRANCH_PARAMETERS, Grid


class BranchAdmittances(NamedTuple):
    """Complex admittances of every branch, per unit, ``[..., L]``.

    The current into the branch at its *from* end is ``ff V_f + ft V_t``, at its *to* end ``tf V_f + tt V_t``.
    """

    ff: Tensor
    ft: Tensor
    tf: Tensor
    tt: Tensor


def admittances(grid: Grid, status: Tensor | None = None, **parameters: Tensor) -> BranchAdmittances:
    """Admittances of the branches.

    With ``y = 1/(r + jx)``, ``a = tap exp(j shift)`` and ``c = g + jb``: ``ff = (y + c/2)/|a|^2``,
    ``ft = -y/conj(a)``, ``tf = -y'/a``, ``tt = y' + c'/2``, where the primes add the asymmetric terms.

    Args:
        grid: Its tensors are used where nothing else is given; gradients flow to them.
        status: ``[..., L]``, multiplies the whole branch.
        parameters: Any of `BRANCH_PARAMETERS`, ``[..., L]``; shapes broadcast, so that batch axes come first.

    Raises:
        TypeError: If a parameter is unknown.
    """
    if unknown := sorted(set(parameters) - set(BRANCH_PARAMETERS)):
        raise TypeError(f"unknown branch parameters {', '.join(unknown)}; there are {', '.join(BRANCH_PARAMETERS)}")
    value = {name: parameters.get(name, getattr(grid, name)) for name in BRANCH_PARAMETERS}
    on = grid.status if status is None else status
    r, x, g, b = value["r"], value["x"], value["g"], value["b"]
    tap, shift = value["tap"], value["shift"]
    y_from = on * _inverse(r, x)
    y_to = on * _inverse(r + value["r_asym"], x + value["x_asym"])
    half_from = 0.5 * on * _complex(g, b)
    half_to = 0.5 * on * _complex(g + value["g_asym"], b + value["b_asym"])
    turn = torch.polar(torch.ones_like(shift), shift) / tap
    return BranchAdmittances(
        ff=(y_from + half_from) / tap**2, ft=-y_from * turn, tf=-y_to * turn.conj(), tt=y_to + half_to
    )


def _complex(real: Tensor, imag: Tensor) -> Tensor:
    return torch.complex(*torch.broadcast_tensors(real, imag))


def _inverse(r: Tensor, x: Tensor) -> Tensor:
    """``1 / (r + jx)``."""
    square = r * r + x * x
    return _complex(r / square, -x / square)


def shunts(grid: Grid) -> Tensor:
    """Complex shunt admittance of every bus, per unit, ``[n]``."""
    return torch.complex(grid.g_shunt, grid.b_shunt)


def ybus(grid: Grid, status: Tensor | None = None, **parameters: Tensor) -> Tensor:
    """Dense bus admittance matrix, complex ``[..., n, n]``; differentiable, batch axes as in `admittances`."""
    y = admittances(grid, status, **parameters)
    n, f, t = grid.num_buses, grid.from_bus, grid.to_bus
    diagonal = torch.arange(n, device=grid.device)
    place = torch.cat([f * n + f, f * n + t, t * n + f, t * n + t, diagonal * n + diagonal])
    batch = y.ff.shape[:-1]
    values = torch.cat([*y, shunts(grid).expand(*batch, n)], dim=-1)
    return values.new_zeros(*batch, n * n).index_add(-1, place, values).view(*batch, n, n)


def ybus_sparse(grid: Grid) -> Tensor:
    """Bus admittance matrix as a sparse CSR tensor, complex ``[n, n]``, duplicates summed; not differentiable.

    It has an entry for every pair of buses with a branch, in service or not, and for every bus.
    """
    with torch.no_grad():
        y = admittances(grid)
        f, t = grid.from_bus, grid.to_bus
        diagonal = torch.arange(grid.num_buses, device=grid.device)
        rows, columns = torch.cat([f, f, t, t, diagonal]), torch.cat([f, t, f, t, diagonal])
        values = torch.cat([*y, shunts(grid)])
        place = rows.cpu().numpy(), columns.cpu().numpy()
        matrix = csr_matrix((values.cpu().numpy(), place), shape=(grid.num_buses, grid.num_buses))
        return csr_tensor(matrix, grid.device)
