"""Outages of branches: which ones island buses, exact solutions of the others, quick screening.

Taking a branch out changes the equations and unknowns of its two ends alone, so the Jacobian of the base case is
corrected by Woodbury's formula instead of factorised again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from physics.power_flow.buffers import Buffers
from physics.power_flow.chord import chord
from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.factorization import DenseInverse, Factorization
from physics.power_flow.flows import branch_flows
from physics.power_flow.grid import Grid, listed
from physics.power_flow.linear import dc_angles, dc_factors, dc_susceptances
from physics.power_flow.mixing import Mixing
from physics.power_flow.outcome import Outcome, Recorder
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import NotConverged, Solution
from physics.power_flow.solver import Solver, Start, solution_of
from physics.power_flow.topology import components, cuts

# Numbers that the corrections of the outages of one batch may have.
_CORRECTION_NUMBERS = 2**24


@dataclass(frozen=True, eq=False)
class Contingencies:
    """Outages of ``k`` branches at once.

    Args:
        branches: Indices of the branches that are out, ``[C, k]`` int64.
        islanding: Whether the outage cuts buses off from every slack, ``[C]`` bool. These have no power flow.
        islanded_buses: Number of buses cut off, ``[C]`` int64.
        names: ``names of the branches``, joined by `` + ``.
    """

    branches: Tensor
    islanding: Tensor
    islanded_buses: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Tensor) -> Contingencies:
        """Some of the outages, by index or mask."""
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        names = tuple(self.names[i] for i in index.tolist())
        return Contingencies(self.branches[index], self.islanding[index], self.islanded_buses[index], names)

    def solvable(self) -> Contingencies:
        """Those that island nothing."""
        return self.select(~self.islanding)

    def islanded(self) -> Contingencies:
        """Those that island buses."""
        return self.select(self.islanding)

    def status(self, grid: Grid) -> Tensor:
        """Weights of the branches after every outage, ``[L, C]``."""
        status = grid.status[:, None].repeat(1, len(self))
        return status.scatter_(0, self.branches.mT, 0.0)

    def scenarios(self, grid: Grid, s: Tensor | None = None) -> Scenarios:
        """As scenarios with ``status``, all with the injections ``s`` ``[n]`` (None: the grid's)."""
        s = grid.s_bus() if s is None else s
        return Scenarios(s[:, None].repeat(1, len(self)), None, self.status(grid), self.names)

    def buses_cut_off(self, grid: Grid, index: int) -> Tensor:
        """Indices of the buses that an outage cuts off, int64."""
        on = (grid.status != 0).cpu().numpy()
        on[self.branches[index].cpu().numpy()] = False
        part = components(grid.num_buses, grid.from_bus.cpu().numpy()[on], grid.to_bus.cpu().numpy()[on])
        alone = ~np.isin(part, part[grid.slack.cpu().numpy()])
        return torch.from_numpy(np.flatnonzero(alone)).to(grid.device)


def contingencies(grid: Grid, k: int = 1, among: Tensor | None = None) -> Contingencies:
    """All outages of ``k`` branches in service.

    Args:
        grid: The grid.
        k: 1 or 2.
        among: Indices of the branches that may go out; None: all in service. Those out of service are passed over.

    Raises:
        ValueError: If ``k`` is neither 1 nor 2.
    """
    if k not in (1, 2):
        raise ValueError(f"contingencies of k={k} branches: choose 1 or 2")
    on = (grid.status != 0).cpu().numpy()
    chosen = np.flatnonzero(on)
    if among is not None:
        chosen = np.array([b for b in among.tolist() if on[b]], dtype=np.int64)
    ends = grid.from_bus.cpu().numpy(), grid.to_bus.cpu().numpy()
    found = cuts(grid.num_buses, *ends, grid.slack.cpu().numpy(), on)
    if k == 1:
        branches = chosen[:, None]
        lost = np.where(found.bridge, found.size, 0)[chosen]
    else:
        branches = np.array(list(combinations(chosen.tolist(), 2)), dtype=np.int64).reshape(-1, 2)
        lost = found.cut_off(branches[:, 0], branches[:, 1])
    names = tuple(" + ".join(grid.branch_names[b] for b in out) for out in branches.tolist())
    lost = torch.from_numpy(lost).to(grid.device)
    return Contingencies(torch.from_numpy(branches).to(grid.device), lost > 0, lost, names)


class Woodbury:
    """Inverse of a base Jacobian corrected for the outage of every scenario.

    With ``E`` the unknowns at the ends of the branches that are out and ``D`` minus the branches' own Jacobian:
    ``(J0 + E D E^T)^-1 = J0^-1 - J0^-1 E (1 + D E^T J0^-1 E)^-1 D E^T J0^-1``.

    Args:
        factors: Of ``J0``.
        columns: ``J0^-1 E``, ``[4k, N_u, B]``.
        inner: ``(1 + D E^T J0^-1 E)^-1 D``, ``[4k, 4k, B]``.
        index: Which unknowns ``E`` selects, ``[4k, B]``; those that are none have zeros in ``inner``.
    """

    def __init__(self, factors: Factorization, columns: Tensor, inner: Tensor, index: Tensor) -> None:
        self._factors, self._columns, self._inner, self._index = factors, columns, inner, index

    @classmethod
    def of_outages(cls, eq: Equations, factors: Factorization, base: State, branches: Tensor) -> Woodbury:
        """For outages of branches ``[k, B]`` at the base state ``[n, 1]``."""
        k, count = branches.shape
        f, t = eq.f[branches], eq.t[branches]  # [k, B]
        angle, magnitude = eq.num_slack, eq.first_pq
        index = torch.stack([f - angle, t - angle, f - magnitude, t - magnitude], dim=1)  # [k, 4, B]
        there = index >= 0
        index[:, 2:] += eq.num_angles
        index = torch.where(there, index, 0)
        d = -_branch_jacobians(eq, base, branches)  # [k, 4, 4, B]
        d = d * there[:, :, None] * there[:, None]
        index = index.view(4 * k, count)
        columns = _inverse_columns(factors, index, eq.num_unknowns)
        at_ends = columns.gather(1, index[None].expand(4 * k, -1, -1)).double()  # [column, row, B]
        blocks = d.new_zeros(4 * k, 4 * k, count)
        for out in range(k):
            blocks[4 * out : 4 * out + 4, 4 * out : 4 * out + 4] = d[out]
        blocks = blocks.permute(2, 0, 1)  # [B, 4k, 4k]
        inner = torch.eye(4 * k, dtype=d.dtype, device=d.device) + blocks @ at_ends.permute(2, 1, 0)
        solved, info = torch.linalg.solve_ex(inner, blocks)
        solved = torch.where((info == 0)[:, None, None], solved, 0.0)  # an outage with a singular J: as without
        return cls(factors, columns, solved.permute(1, 2, 0).to(columns.dtype).contiguous(), index)

    def solve(self, b: Tensor) -> Tensor:
        """Apply it to ``[N_u, B]``; the result lasts until the next call."""
        x = self._factors.solve(b)
        weight = (self._inner * x.gather(0, self._index)[None]).sum(1)  # [4k, B]
        for column, share in zip(self._columns, weight, strict=True):
            x.addcmul_(column, share[None], value=-1)
        return x

    def select(self, columns: Tensor) -> Woodbury:
        """For some of the scenarios."""
        parts = self._columns[..., columns], self._inner[..., columns], self._index[:, columns]
        return Woodbury(self._factors, *parts)


def _inverse_columns(factors: Factorization, index: Tensor, size: int) -> Tensor:
    """Columns of the inverse, ``[K, N, B]`` for indices ``[K, B]``."""
    if isinstance(factors, DenseInverse):
        return factors.inverse[:, index].permute(1, 0, 2).contiguous()
    wanted, place = torch.unique(index, return_inverse=True)
    unit = torch.zeros(size, len(wanted), dtype=torch.float32, device=index.device)
    unit[wanted, torch.arange(len(wanted), device=index.device)] = 1
    return factors.solve(unit)[:, place].permute(1, 0, 2).contiguous()


def _branch_jacobians(eq: Equations, base: State, branches: Tensor) -> Tensor:
    """Derivatives of ``(P_f, P_t, Q_f, Q_t)`` of branches by ``(va_f, va_t, vm_f, vm_t)``, ``[k, 4, 4, B]``."""
    status = eq.grid.status[branches]
    ff, ft, tf, tt = (status * y[branches] for y in eq.full)
    f, t = eq.f[branches], eq.t[branches]
    vm, v = base.vm[:, 0], torch.polar(base.vm, base.va)[:, 0]
    v_f, v_t, m_f, m_t = v[f], v[t], vm[f], vm[t]
    a = v_f * (ft * v_t).conj()  # what the other end adds to the power of this one
    b = v_t * (tf * v_f).conj()
    own_f, own_t = m_f * m_f * ff.conj(), m_t * m_t * tt.conj()
    s_f = torch.stack([1j * a, -1j * a, (2 * own_f + a) / m_f, a / m_t], dim=1)
    s_t = torch.stack([-1j * b, 1j * b, b / m_f, (2 * own_t + b) / m_t], dim=1)
    return torch.stack([s_f.real, s_t.real, s_f.imag, s_t.imag], dim=1)


def _refuse_islanding(grid: Grid, outages: Contingencies) -> None:
    if bool(outages.islanding.any()):
        names = [outages.names[i] for i in outages.islanding.nonzero()[:, 0].tolist()]
        raise ValueError(
            f"{grid.name}: the outage of {listed(names)} cuts buses off from every slack and has no power flow; "
            "solve Contingencies.solvable() and report Contingencies.islanded()"
        )


@torch.no_grad()
def solve_contingencies(
    grid: Grid,
    outages: Contingencies,
    s: Tensor | None = None,
    tol: float = 1e-8,
    max_iter: int = 40,
    start: Start = "auto",
    solver: Solver | None = None,
) -> Solution:
    """Voltages after every outage, by chord iterations with the base case's Jacobian corrected by Woodbury's formula.

    Outages that do not contract go to Newton's method, with line search, and to Levenberg-Marquardt.

    Args:
        grid: The grid.
        outages: None of them islanding.
        s: Complex injections, per unit, ``[n]``; None: the grid's.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Chord iterations before Newton's method takes over.
        start: Of the base case, see `Solver.solve`.
        solver: Of this grid, to be used again; None: a new one.

    Raises:
        ValueError: If an outage islands buses.
        NotConverged: If the base case has no solution.
    """
    _refuse_islanding(grid, outages)
    solver = solver or Solver(grid)
    eq = solver.equations
    base, factors, batch = _base_case(solver, s, tol, start)
    count = len(outages)
    outcome = Outcome.empty(eq, count)
    recorder = Recorder(eq, batch, False)
    for columns, branches in _parts(eq, outages):
        state, given = _outage_batch(eq, base, batch, branches)
        inverse = Woodbury.of_outages(eq, factors, base, branches)
        chord(eq, given, state, inverse, tol, max_iter, outcome, columns, recorder, Buffers(batch.p))
    names = ["chord"] * count
    left = (~(outcome.mismatch <= tol)).nonzero()[:, 0]
    if len(left):
        _, given = _outage_batch(eq, base, batch, outages.branches.mT)

        def begin(columns: Tensor) -> State:
            return State(*(value.expand(-1, len(columns)).clone() for value in base))

        solver.fall_back(given, outcome, names, begin, tol, recorder)
    return solution_of(eq, outcome, names, tol, recorder)


def _base_case(solver: Solver, s: Tensor | None, tol: float, start: Start) -> tuple[State, Factorization, Batch]:
    """State, factorised Jacobian and scheduled powers of the case without outages."""
    grid, eq = solver.grid, solver.equations
    s = grid.s_bus() if s is None else s
    scenarios = Scenarios(s[:, None], names=("base case",)).check(grid)
    base, factors, mismatch, _ = solver.base(scenarios, start, tol)
    if factors is None or not mismatch <= tol:
        raise NotConverged(
            f"{grid.name}: the base case has no solution (max|F| = {mismatch:.2e}), so outages have none"
        )
    return base, factors, eq.batch(scenarios)


def _parts(eq: Equations, outages: Contingencies) -> list[tuple[Tensor, Tensor]]:
    """Outages in batches whose corrections fit the memory: their numbers ``[B]`` and their branches ``[k, B]``."""
    k = outages.branches.shape[1]
    width = max(16, _CORRECTION_NUMBERS // (4 * k * eq.num_unknowns))
    everyone = torch.arange(len(outages), device=outages.branches.device)
    return [(part, outages.branches[part].mT) for part in everyone.split(width)]


def _outage_batch(eq: Equations, base: State, batch: Batch, branches: Tensor) -> tuple[State, Batch]:
    """The base state and powers for outages of branches ``[k, B]``."""
    count = branches.shape[1]
    state = State(*(value.expand(-1, count).clone() for value in base))
    p, q = (value.expand(-1, count) for value in (batch.p, batch.q))
    return state, Batch(p, q, eq.weighted_changes(branches, -eq.grid.status[branches]))


@dataclass(frozen=True, eq=False)
class Screening:
    """Estimated state after every outage, from few steps.

    Args:
        loading: Largest current of either end of every branch, as a share of its limit, ``[L, C]``; nan where it has
            none.
        overloaded: ``loading > 1``, ``[L, C]`` bool.
        vm: Voltage magnitudes, per unit, ``[n, C]``.
        max_mismatch: What is left of ``max|F|``, ``[C]``; nan for ``dc``.
    """

    loading: Tensor
    overloaded: Tensor
    vm: Tensor
    max_mismatch: Tensor


@torch.no_grad()
def screen(
    grid: Grid,
    outages: Contingencies,
    limits: Tensor | None = None,
    steps: int = 1,
    method: str = "woodbury",
    s: Tensor | None = None,
    start: Start = "auto",
    solver: Solver | None = None,
) -> Screening:
    """Estimate flows after outages without solving them.

    Args:
        grid: The grid.
        outages: None of them islanding.
        limits: Current limits of the branches, per unit, ``[L]``; None: ``rate_mva``.
        steps: Woodbury chord steps from the base case.
        method: ``woodbury``, or ``dc`` for the linear approximation, whose active powers stand for currents.
        s: Complex injections, per unit, ``[n]``; None: the grid's.
        start: Of the base case, see `Solver.solve`.
        solver: Of this grid, to be used again; None: a new one.

    Raises:
        ValueError: Unknown method; an outage that islands buses.
        NotConverged: If the base case has no solution.
    """
    if method not in ("woodbury", "dc"):
        raise ValueError(f"screening by {method!r}: choose 'woodbury' or 'dc'")
    _refuse_islanding(grid, outages)
    solver = solver or Solver(grid)
    limits = grid.rate_mva / grid.base_mva if limits is None else limits
    limits = torch.where(limits.isfinite(), limits, torch.nan)[:, None]
    if method == "dc":
        loading = dc_outage_flows(solver.equations, outages.branches, grid.s_bus() if s is None else s).abs() / limits
        vm = torch.ones(grid.num_buses, len(outages), dtype=grid.dtype, device=grid.device)
        return Screening(loading, loading > 1, vm, torch.full_like(vm[0], torch.nan))
    eq = solver.equations
    base, factors, batch = _base_case(solver, s, 1e-8, start)
    loadings, magnitudes, mismatches = [], [], []
    status = outages.status(grid)
    for columns, branches in _parts(eq, outages):
        state, given = _outage_batch(eq, base, batch, branches)
        inverse = Woodbury.of_outages(eq, factors, base, branches)
        mixing = Mixing(Buffers(batch.p))
        for _ in range(steps):
            eq.step(state, mixing.step(inverse.solve(eq.mismatch(state, given))))
        mismatches.append(eq.mismatch(state, given).abs().amax(0))
        vm, va = eq.in_grid_order(state.vm), eq.in_grid_order(state.va)
        flows = branch_flows(grid, vm, va, status[:, columns])
        loadings.append(torch.maximum(flows.i_from.abs(), flows.i_to.abs()) / limits)
        magnitudes.append(vm)
    loading = torch.cat(loadings, dim=1)
    return Screening(loading, loading > 1, torch.cat(magnitudes, dim=1), torch.cat(mismatches))


def dc_outage_flows(eq: Equations, branches: Tensor, s: Tensor) -> Tensor:
    """Active power of every branch after outages in the DC approximation, per unit, ``[L, C]``.

    Args:
        eq: The equations of the grid.
        branches: Branches that are out, ``[C, k]``; they island nothing.
        s: Complex injections, per unit, ``[n]``.
    """
    grid, given = eq.grid, eq.num_slack
    b = grid.status * dc_susceptances(grid)
    va = dc_angles(eq, s.real[eq.order, None], grid.va[eq.order, None])  # [n, 1]
    flow = b * (va[eq.f, 0] - va[eq.t, 0] - grid.shift)
    k = branches.shape[1]
    # Taking a branch out is feeding its flow in at one end and out at the other (Woodbury's formula on B').
    out, place = torch.unique(branches, return_inverse=True)
    unit = torch.zeros(eq.num_buses, len(out), dtype=grid.dtype, device=grid.device)
    index = torch.arange(len(out), device=grid.device)
    unit[eq.f[out], index] += 1
    unit[eq.t[out], index] -= 1
    unit[given:] = dc_factors(eq).solve(unit[given:])
    unit[:given] = 0
    shift = (unit[eq.f] - unit[eq.t]) * b[:, None]  # flow of every branch for 1 fed in across a branch, [L, U]
    mutual = shift[branches[:, :, None], place[:, None, :]]  # [C, k, k]
    eye = torch.eye(k, dtype=grid.dtype, device=grid.device)
    fed = torch.linalg.solve(eye - mutual, flow[branches][..., None])[..., 0]  # [C, k]
    after = flow[:, None] + (shift[:, place] * fed).sum(-1)
    return after.scatter(0, branches.mT, 0.0)
