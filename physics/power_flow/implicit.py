"""Voltages as a differentiable function of injections, set-points and everything about the grid.

For ``F(u, p) = 0`` and a loss ``l(u)``: ``lambda = J^-T dl/du`` and ``dl/dp = -(dF/dp)^T lambda``. So a backward pass
is one adjoint solve per scenario, with one factorised Jacobian as preconditioner of all, and one vector-Jacobian
product of the residual, which reaches whatever the residual depends on. How the forward pass found ``u`` does not
matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from physics.power_flow.admittance import BranchAdmittances, admittances
from physics.power_flow.buffers import Buffers
from physics.power_flow.equations import State, residual
from physics.power_flow.factorization import Factorization, SingularMatrix, factorize
from physics.power_flow.grid import BRANCH_PARAMETERS, Grid
from physics.power_flow.mixing import Mixing
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import Solution
from physics.power_flow.solver import Solver, Start

# Adjoint solves: relative bound on the residual, and steps before a scenario is factorised by itself.
_ADJOINT_TOLERANCE, _ADJOINT_STEPS = 1e-10, 30
# What gradients can reach, beside ``s``, ``vm`` and ``status``: tensors of the grid.
_OF_GRID = (*BRANCH_PARAMETERS, "g_shunt", "b_shunt", "va", "slack_weights")


class _Problem:
    """A solved batch: what `PowerFlow` needs beside tensors.

    Args:
        solver: Of the grid.
        scenarios: What was solved.
        solution: Its solution.
        names: Of the differentiable tensors, in the order in which they are passed.
    """

    def __init__(self, solver: Solver, scenarios: Scenarios, solution: Solution, names: Sequence[str]) -> None:
        self.solver, self.eq, self.names = solver, solver.equations, tuple(names)
        eq, grid = self.eq, solver.grid
        self.batch = eq.batch(scenarios)
        share = None if solution.slack_power is None else solution.slack_power[None]
        self.state = eq.state(solution.vm, solution.va, share)
        self.magnitudes = eq.order[eq.first_pq :]
        self.angles = eq.order[eq.num_slack :]
        self.grid = grid
        self._factors: Factorization | None = None
        self._failed = False

    @property
    def u(self) -> Tensor:
        """The solution's unknowns, ``[N_u, B]``."""
        return self.eq.unknowns(self.state)

    def voltages(self, u: Tensor, vm: Tensor, va: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes and angles ``[n, B]`` from unknowns, set-points ``[n]`` or ``[n, B]`` and slack angles ``[n]``."""
        a, m = self.eq.num_angles, self.eq.num_magnitudes
        count = u.shape[1]
        vm = (vm[:, None] if vm.ndim == 1 else vm).expand(-1, count)
        return (
            vm.index_copy(0, self.magnitudes, u[a : a + m]),
            va[:, None].expand(-1, count).index_copy(0, self.angles, u[:a]),
        )

    def residual(self, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``F`` as a differentiable function of everything, ``[N_u, B]``."""
        value = dict(zip(self.names, tensors, strict=True))
        grid = self.grid.replace(
            **{name: value[name] for name in ("g_shunt", "b_shunt", "slack_weights") if name in value}
        )
        vm, va = self.voltages(u, value["vm"], value["va"])
        status = value["status"]
        status = status[:, None].expand(-1, u.shape[1]) if status.ndim == 1 else status
        share = u[self.eq.num_angles + self.eq.num_magnitudes :] if self.eq.distributed else None
        return residual(grid, vm, va, value["s"], status, share, **{name: value[name] for name in BRANCH_PARAMETERS})

    def products(self, adjoint: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        """``-(dF/dp)^T lambda`` for the tensors that need it: the gradients of one backward pass.

        The same as with autograd through `residual`, without the intermediate results of every scenario. With
        ``w = z conj(V)``, where ``z = lambda_P + j lambda_Q`` at the buses, ``sum(lambda F)`` changes with an
        admittance between the buses ``i`` and ``k`` by ``Re(w_i V_k dy)``, summed over the scenarios that share it.
        """
        eq, state, changes = self.eq, self.state, self.batch.changes
        wanted = {name for name, need in zip(self.names, needed, strict=True) if need}
        value = dict(zip(self.names, tensors, strict=True))
        a, m = eq.num_angles, eq.num_magnitudes
        z_p, z_q = torch.zeros_like(state.vm), torch.zeros_like(state.vm)
        z_p[eq.num_slack :], z_q[eq.first_pq :] = -adjoint[:a], -adjoint[a : a + m]
        if eq.distributed:
            z_p[:1] = -adjoint[a + m :]
        found: dict[str, Tensor] = {}
        if "s" in wanted:
            found["s"] = -torch.complex(eq.in_grid_order(z_p), eq.in_grid_order(z_q))
        if {"vm", "va"} & wanted:
            by_va, by_vm = eq.transposed_full_product(state, z_p, z_q, changes)
            by_va[eq.num_slack :], by_vm[eq.first_pq :] = 0, 0
            found["va"] = eq.in_grid_order(by_va.sum(1))
            by_vm = eq.in_grid_order(by_vm)
            found["vm"] = by_vm.sum(1) if value["vm"].ndim == 1 else by_vm
        square = state.vm * state.vm
        if "g_shunt" in wanted:
            found["g_shunt"] = eq.in_grid_order((z_p * square).sum(1))
        if "b_shunt" in wanted:
            found["b_shunt"] = -eq.in_grid_order((z_q * square).sum(1))
        if "slack_weights" in wanted:
            found["slack_weights"] = -eq.in_grid_order((z_p * state.share).sum(1))
        branch = [name for name in (*BRANCH_PARAMETERS, "status") if name in wanted]
        if branch:
            found |= self._branch_products(torch.complex(z_p, z_q), value, branch)
        return [found[name] if need else None for name, need in zip(self.names, needed, strict=True)]

    def _branch_products(self, z: Tensor, value: dict[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        """`products` with the parameters of the branches."""
        eq, grid = self.eq, self.grid
        v = torch.polar(self.state.vm, self.state.va)
        w = z * v.conj()
        v_f, v_t, w_f, w_t = v[eq.f], v[eq.t], w[eq.f], w[eq.t]
        leaves = {name: value[name].detach().requires_grad_() for name in wanted}
        with torch.enable_grad():
            given = {name: leaves.get(name, value[name].detach()) for name in (*BRANCH_PARAMETERS, "status")}
            status = given.pop("status")
            y = admittances(grid, status if status.ndim == 1 else status.mT, **given)
        pairs = (w_f, v_f), (w_f, v_t), (w_t, v_f), (w_t, v_t)
        if y.ff.ndim == 1:
            by_y = [(one * two).sum(1).conj() for one, two in pairs]
        else:
            by_y = [(one * two).conj().mT for one, two in pairs]
        gradients = torch.autograd.grad(list(y), list(leaves.values()), by_y, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """``J^-1 b``, or ``J^-T b``, for every scenario at the solution, ``[N_u, B]``."""
        eq, state, changes = self.eq, self.state, self.batch.changes
        factors = self._factorized()
        if factors is None:
            return self.solver.newton_steps(state, b, self.batch, transposed)
        buffers, injections = Buffers(b), eq.injections(state, changes)

        def product(x: Tensor) -> Tensor:
            if transposed:
                return eq.transposed_product_of(*injections, state, x, changes, buffers)
            return eq.jacobian_product(state, x, changes)

        apply = factors.solve_transposed if transposed else factors.solve
        mixing, bound = Mixing(buffers), _ADJOINT_TOLERANCE * b.abs().amax(0)
        x, rest = torch.zeros_like(b), b.clone()
        for _ in range(_ADJOINT_STEPS):
            x += mixing.step(apply(rest))
            torch.sub(b, product(x), out=rest)
            left = ~(rest.abs().amax(0) <= bound)
            if not bool(left.any()):
                return x
        columns = left.nonzero()[:, 0]
        batch = self.batch.select(columns)
        x[:, columns] = self.solver.newton_steps(state.select(columns), b[:, columns], batch, transposed)
        return x

    def _factorized(self) -> Factorization | None:
        """The Jacobian at the mean of the solutions; None if it is singular."""
        if self._factors is None and not self._failed:
            mean = State(*(value.mean(1, keepdim=True) for value in self.state))
            try:
                self._factors = factorize(self.eq.jacobian(mean), self.eq.device)
            except SingularMatrix:
                self._failed = True
        return self._factors


class PowerFlow(torch.autograd.Function):
    """The solution ``u`` of ``F(u, p) = 0`` as a function of ``p``; use `power_flow`.

    It can be differentiated twice.
    """

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor) -> Tensor:
        """The unknowns, ``[N_u, B]``."""
        u = problem.u
        ctx.problem = problem
        ctx.save_for_backward(u, *tensors)
        return u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to ``p``."""
        problem = ctx.problem
        u, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *problem.products(problem.solve(gradient, transposed=True), tensors, needed)
        adjoint = _Adjoint.apply(problem, u, gradient, *tensors)
        # Views, so that the derivative of F with respect to p alone is taken although u depends on p.
        u, tensors = u.view_as(u), [t.view_as(t) for t in tensors]
        wanted = [t for t, n in zip(tensors, needed, strict=True) if n]
        f = problem.residual(u, tensors)
        found = torch.autograd.grad(f, wanted, -adjoint, create_graph=True, allow_unused=True)
        gradients = iter(found)
        return None, *(next(gradients) if n else None for n in needed)


class _Adjoint(torch.autograd.Function):
    """``lambda = J(u, p)^-T g`` as a function of ``u``, ``g`` and ``p``."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, u: Tensor, g: Tensor, *tensors: Tensor) -> Tensor:
        adjoint = problem.solve(g, transposed=True)
        ctx.problem = problem
        ctx.save_for_backward(u, adjoint, *tensors)
        return adjoint

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With ``mu = J^-1 gradient``: ``mu`` for ``g``, ``-d(lambda^T J mu)`` for ``u`` and ``p``."""
        problem = ctx.problem
        u, adjoint, *tensors = ctx.saved_tensors
        mu = problem.solve(gradient, transposed=False)
        needed = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed[1:], strict=True)]
            row = torch.autograd.grad(problem.residual(u, tensors), u, adjoint, create_graph=True)[0]
            wanted = [t for t, n in zip([u, *tensors], needed, strict=True) if n]
            found = torch.autograd.grad((row * mu).sum(), wanted, allow_unused=True) if wanted else ()
        gradients = iter(found)

        def following(need: bool) -> Tensor | None:
            value = next(gradients) if need else None
            return None if value is None else -value

        of_u = following(needed[0])
        return None, of_u, mu, *(following(n) for n in needed[1:])


def power_flow(
    grid: Grid,
    s: Tensor | None = None,
    vm: Tensor | None = None,
    status: Tensor | None = None,
    *,
    method: str = "chord",
    tol: float = 1e-10,
    start: Start = "auto",
    solver: Solver | None = None,
    allow_failures: bool = False,
    **parameters: Tensor,
) -> tuple[Tensor, Tensor, Solution]:
    """Solve and differentiate.

    Gradients flow to ``s``, ``vm``, ``status``, ``parameters`` and to whichever tensors of ``grid`` need one:
    ``power_flow(grid.replace(x=log_x.exp()), s)``. They can be differentiated once more.

    Args:
        grid: The grid.
        s: Complex injections, per unit, ``[n, B]`` (None: the grid's).
        vm: Set-points, per unit, ``[n, B]`` or ``[n]``; rows of PQ buses are not read (None: the grid's).
        status: Weights of the branches, ``[L, B]`` or ``[L]`` (None: the grid's).
        method: See `Solver.solve`.
        tol: Bound on ``max|F|``, per unit.
        start: See `Solver.solve`.
        solver: Of this very grid, to be used again; None: a new one.
        allow_failures: Return also where scenarios have not converged; their gradients mean nothing.
        parameters: Branch parameters other than the grid's (`BRANCH_PARAMETERS`), ``[L]`` or ``[B, L]``.

    Returns:
        Voltage magnitude (per unit) and angle (rad), ``[n, B]``, and the solution they were taken from.

    Raises:
        NotConverged: If a scenario has no solution.
    """
    s = grid.s_bus()[:, None] if s is None else s
    count = s.shape[1]
    status = grid.status if status is None else status
    vm = grid.vm if vm is None else vm
    value = {name: getattr(grid, name) for name in _OF_GRID if getattr(grid, name) is not None} | parameters
    tensors = {"s": s, "vm": vm, "status": status} | value
    scenarios = Scenarios(s.detach(), None if vm.ndim == 1 else vm.detach())
    plain = _detached(grid.replace(vm=vm if vm.ndim == 1 else grid.vm))
    if any(value[name].ndim == 2 for name in BRANCH_PARAMETERS):
        with torch.no_grad():
            own = status if status.ndim == 1 else status.mT
            y = admittances(plain, own, **{name: value[name].detach() for name in BRANCH_PARAMETERS})
            y = BranchAdmittances(*(part.expand(count, -1).mT for part in y))
        scenarios = dataclasses.replace(scenarios, admittances=y)
        shared = {name: value[name].detach() for name in BRANCH_PARAMETERS}
        plain = plain.replace(**{name: t.mean(0) if t.ndim == 2 else t for name, t in shared.items()})
    else:
        plain = plain.replace(**{name: tensor.detach() for name, tensor in parameters.items()})
        if status.ndim == 2:
            scenarios = dataclasses.replace(scenarios, status=status.detach())
        else:
            plain = plain.replace(status=status.detach())
    solver = solver or Solver(plain)
    solution = solver.solve(scenarios, method, tol=tol, start=start)
    if not allow_failures:
        solution.require_converged(grid, scenarios)
    problem = _Problem(solver, scenarios, solution, tuple(tensors))
    u = PowerFlow.apply(problem, *tensors.values())
    vm, va = problem.voltages(u, vm, grid.va)
    return vm, va, solution


def _detached(grid: Grid) -> Grid:
    return grid.map(lambda tensor: tensor.detach())


class PowerFlowLayer(nn.Module):
    """`power_flow` as a module that holds its grid and starts from its last solution.

    Args:
        grid: The grid; ``.to(device)`` moves it.
        method: See `Solver.solve`.
        tol: Bound on ``max|F|``, per unit.
    """

    def __init__(self, grid: Grid, method: str = "chord", tol: float = 1e-10) -> None:
        super().__init__()
        self.grid, self.method, self.tol = grid, method, tol
        self._start: Start = "auto"

    def forward(
        self, s: Tensor | None = None, vm: Tensor | None = None, status: Tensor | None = None, **fields: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Voltages ``(vm, va)``, per unit and rad, ``[n, B]``; see `power_flow`.

        Args:
            s: Complex injections, per unit, ``[n, B]`` (None: the grid's).
            vm: Set-points, per unit, ``[n]`` or ``[n, B]`` (None: the grid's).
            status: Weights of the branches, ``[L]`` or ``[L, B]`` (None: the grid's).
            fields: Replace those of the grid (``x=...``, ``tap=...``, ``b_shunt=...``).

        Raises:
            NotConverged: If a scenario has no solution.
        """
        batched = {name: value for name, value in fields.items() if name in BRANCH_PARAMETERS and value.ndim == 2}
        grid = self.grid.replace(**{name: value for name, value in fields.items() if name not in batched})
        vm, va, solution = power_flow(
            grid, s, vm, status, method=self.method, tol=self.tol, start=self._start, **batched
        )
        self._start = solution.vm.mean(1), solution.va.mean(1)
        return vm, va

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PowerFlowLayer:
        super()._apply(fn, recurse)
        self.grid, self._start = self.grid.map(fn), "auto"
        return self
