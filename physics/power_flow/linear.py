"""Power flow with matrices that are computed once: the DC approximation and fast decoupled load flow."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix, csc_matrix
from torch import Tensor

from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.factorization import SparseLU
from physics.power_flow.grid import Grid
from physics.power_flow.outcome import Outcome, Recorder

# A reactance below this (per unit) is replaced by the impedance where a formula divides by it.
_LEAST_REACTANCE = 1e-9


def dc_susceptances(grid: Grid) -> Tensor:
    """Susceptance of every branch in the DC approximation, ``1 / (x tap)``, per unit, ``[L]``; status aside."""
    x = torch.where(grid.x.abs() < _LEAST_REACTANCE, torch.hypot(grid.r, grid.x), grid.x)
    return 1 / (x * grid.tap)


def dc_angles(eq: Equations, p: Tensor, va: Tensor, status: Tensor | None = None) -> Tensor:
    """Angles of the DC approximation, rad, ``[n, B]``: all magnitudes 1, no losses, sines of angles linear.

    Args:
        eq: The equations, for their order.
        p: Scheduled active powers in that order, per unit, ``[n, B]``.
        va: Angles in that order, of which those of the slack buses are read, ``[n, B]``.
        status: Weights of the branches, ``[L, B]``; a matrix is factorised for every scenario then.
    """
    if status is not None:
        parts = [_dc_angles(eq, p[:, b : b + 1], va[:, b : b + 1], status[:, b]) for b in range(p.shape[1])]
        return torch.cat(parts, dim=1)
    return _dc_angles(eq, p, va, eq.grid.status)


def dc_factors(eq: Equations) -> SparseLU:
    """The factorised matrix of the DC approximation without the slack buses, in the order of the equations."""
    matrix = _laplacian(eq, eq.grid.status * dc_susceptances(eq.grid))
    return SparseLU(matrix[eq.num_slack :, eq.num_slack :], torch.float64)


def _dc_angles(eq: Equations, p: Tensor, va: Tensor, status: Tensor) -> Tensor:
    grid, given = eq.grid, eq.num_slack
    b = status * dc_susceptances(grid)
    matrix = _laplacian(eq, b)
    turned = b * grid.shift
    drawn = grid.g_shunt[eq.order].index_add(0, eq.f, -turned).index_add(0, eq.t, turned)
    right = (p - drawn[:, None])[given:]
    known = torch.from_numpy(matrix[given:, :given] @ va[:given].cpu().numpy()).to(p.device)
    out = va.clone()
    out[given:] = SparseLU(matrix[given:, given:], torch.float64).solve(right - known)
    return out


def _laplacian(eq: Equations, b: Tensor) -> csc_matrix:
    """Weighted Laplacian ``[n, n]`` of the branches in the order of the equations."""
    f, t, weight = (value.cpu().numpy() for value in (eq.f, eq.t, b))
    rows, columns = np.concatenate([f, f, t, t]), np.concatenate([f, t, f, t])
    values = np.concatenate([weight, -weight, -weight, weight])
    return coo_matrix((values, (rows, columns)), shape=(eq.num_buses,) * 2).tocsc()


def decoupled_matrices(eq: Equations, variant: str) -> tuple[csc_matrix, csc_matrix]:
    """``B'`` ``[n_pvpq, n_pvpq]`` and ``B''`` ``[n_pq, n_pq]`` of fast decoupled load flow.

    Stott and Alsac's XB ignores resistances in ``B'``, van Amerongen's BX in ``B''``. ``B'`` has no shunts, charging
    and taps, ``B''`` no phase shifts.

    Raises:
        ValueError: If the variant is neither ``xb`` nor ``bx``.
    """
    if variant not in ("xb", "bx"):
        raise ValueError(f"fast decoupled load flow {variant!r}: choose 'xb' or 'bx'")
    grid, n = eq.grid, eq.num_buses
    given, first = eq.num_slack, eq.first_pq

    def series(with_r: bool) -> tuple[Tensor, Tensor]:
        """``-Im(y)`` of the *from* and the *to* side."""
        sides = []
        for r, x in ((grid.r, grid.x), (grid.r + grid.r_asym, grid.x + grid.x_asym)):
            r = r if with_r else torch.where(x.abs() < _LEAST_REACTANCE, r, torch.zeros_like(r))
            sides.append(grid.status * torch.where(x == 0, torch.hypot(r, x), x) / (r * r + x * x))
        return sides[0], sides[1]

    from_side, to_side = series(variant == "bx")
    first_matrix = _matrix(eq, from_side, -from_side, -to_side, to_side, torch.zeros_like(grid.vm))
    from_side, to_side = series(variant == "xb")
    half_from = 0.5 * grid.status * grid.b
    half_to = 0.5 * grid.status * (grid.b + grid.b_asym)
    second_matrix = _matrix(
        eq,
        (from_side - half_from) / grid.tap**2,
        -from_side / grid.tap,
        -to_side / grid.tap,
        to_side - half_to,
        -grid.b_shunt[eq.order],
    )
    assert first_matrix.shape == (n, n)
    return first_matrix[given:, given:], second_matrix[first:, first:]


def _matrix(eq: Equations, ff: Tensor, ft: Tensor, tf: Tensor, tt: Tensor, own: Tensor) -> csc_matrix:
    f, t = eq.f.cpu().numpy(), eq.t.cpu().numpy()
    index = np.arange(eq.num_buses)
    rows, columns = np.concatenate([f, f, t, t, index]), np.concatenate([f, t, f, t, index])
    values = torch.cat([ff, ft, tf, tt, own]).cpu().numpy()
    return coo_matrix((values, (rows, columns)), shape=(eq.num_buses,) * 2).tocsc()


def fast_decoupled(
    eq: Equations, batch: Batch, state: State, variant: str, tol: float, max_iter: int, recorder: Recorder
) -> Outcome:
    """Fast decoupled load flow: ``va -= B'^-1 (dP/|V|)``, then ``vm -= B''^-1 (dQ/|V|)``; both are one iteration.

    Args:
        eq: The equations; a distributed slack is not supported.
        batch: Scenarios.
        state: Where they start.
        variant: ``xb`` or ``bx``.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most iterations.
        recorder: Of the history.

    Raises:
        ValueError: If the slack is distributed.
    """
    if eq.distributed:
        raise ValueError("method='fdlf_*' has no distributed slack; choose 'chord' or 'newton'")
    angles, magnitudes = decoupled_matrices(eq, variant)
    angle_factors = SparseLU(angles, torch.float64)
    magnitude_factors = SparseLU(magnitudes, torch.float64) if eq.num_magnitudes else None
    outcome = Outcome(eq, state)
    active = torch.arange(state.vm.shape[1], device=state.vm.device)
    now, given, a = state.clone(), batch, eq.num_angles
    mismatch = eq.mismatch(now, given)
    for iteration in range(max_iter + 1):
        recorder(iteration, active, mismatch)
        size = mismatch.abs().amax(0)
        leaves = ~(size > tol) | ~(size < 1e8)
        if iteration == max_iter:
            leaves[:] = True
        if leaves.any():
            outcome.write(active[leaves], now.select(leaves), mismatch[:, leaves], iteration)
            stays = ~leaves
            active, now, given, mismatch = active[stays], now.select(stays), given.select(stays), mismatch[:, stays]
        if not len(active):
            break
        now.va[eq.num_slack :] -= angle_factors.solve(mismatch[:a] / now.vm[eq.num_slack :])
        if magnitude_factors is not None:
            mismatch = eq.mismatch(now, given)
            now.vm[eq.first_pq :] -= magnitude_factors.solve(mismatch[a:] / now.vm[eq.first_pq :])
        mismatch = eq.mismatch(now, given)
    return outcome
