"""The mismatch equations ``F(u) = 0`` of a grid: which voltages are unknown, residuals, Jacobians and their products.

``u = [va_pv, va_pq, vm_pq]`` and ``F = [P_pv, P_pq, Q_pq]``, calculated minus scheduled, in per unit. With a
distributed slack the shared imbalance follows as the last unknown, the active power of the reference bus as the last
equation.
"""

from __future__ import annotations

import torch
from scipy.sparse import csc_matrix
from torch import Tensor

from physics.power_flow.admittance import BranchAdmittances, admittances, shunts
from physics.power_flow.batch import Batch, Changes, State
from physics.power_flow.buffers import Buffers
from physics.power_flow.grid import BusType, Grid
from physics.power_flow.jacobian_pattern import JacobianPattern
from physics.power_flow.mismatch import residual
from physics.power_flow.product import Product, add_changes
from physics.power_flow.scenarios import Scenarios

__all__ = ["Batch", "Changes", "Equations", "JacobianPattern", "Product", "State", "residual"]


class Equations:
    """The equations of one grid. Tensors are in an order of their own: slack buses first, then PV, then PQ.

    So the unknowns are contiguous rows. `Scenarios` and voltages in the order of the grid are brought in by `batch` and
    `state`, and out by `in_grid_order`.

    Args:
        grid: The grid; gradients are not followed.
        bus_type: Types other than those of the grid, ``[n]``.
        dense: Multiply by a dense admittance matrix.
    """

    def __init__(self, grid: Grid, bus_type: Tensor | None = None, dense: bool = False) -> None:
        self.grid = grid
        self._dense = dense
        kind = grid.bus_type if bus_type is None else bus_type
        slack, pv, pq = ((kind == which).nonzero()[:, 0] for which in (BusType.SLACK, BusType.PV, BusType.PQ))
        self.distributed = grid.slack_weights is not None
        if self.distributed:
            pv, slack = torch.cat([pv, slack[1:]]).sort().values, slack[:1]
        self.num_slack, self.num_pv, self.num_pq = len(slack), len(pv), len(pq)
        self.first_pq = self.num_slack + self.num_pv
        self.num_buses = n = grid.num_buses
        self.num_angles, self.num_magnitudes = n - self.num_slack, self.num_pq
        self.num_unknowns = self.num_angles + self.num_magnitudes + int(self.distributed)
        self.order = torch.cat([slack, pv, pq])
        self.position = torch.empty_like(self.order)
        self.position[self.order] = torch.arange(n, device=self.order.device)
        self.device, self.dtype = grid.device, grid.dtype
        with torch.no_grad():
            self._assemble()

    def _assemble(self) -> None:
        """Sparse matrices of the grid in our order."""
        grid, n = self.grid, self.num_buses
        self.f, self.t = self.position[grid.from_bus], self.position[grid.to_bus]
        self.full = admittances(grid, status=torch.ones_like(grid.status))  # of branches in service
        self.weights = grid.slack_weights[self.order] if self.distributed else None
        own = torch.arange(n, device=self.device)
        rows, columns = torch.cat([self.f, self.f, self.t, self.t, own]), torch.cat([self.f, self.t] * 2 + [own])
        # Every pair of buses has one entry, whether its branches are in service or not.
        key, entry = torch.unique(rows * n + columns, return_inverse=True)
        self.rows, self.columns = key // n, key % n
        num_branches = grid.num_branches
        self.entry_ff, self.entry_ft, self.entry_tf, self.entry_tt = entry[: 4 * num_branches].view(4, -1)
        self.diagonal = entry[4 * num_branches :]
        values = torch.cat([*(grid.status * y for y in self.full), shunts(grid)[self.order]])
        self.y = values.new_zeros(len(key)).index_add(0, entry, values)
        self.product = Product(self.rows, self.columns, self.y, n, dense=self._dense)
        self._transposed: Product | None = None
        self._pattern: JacobianPattern | None = None

    @property
    def transposed_product(self) -> Product:
        """With the transposed admittance matrix."""
        if self._transposed is None:
            self._transposed = Product(self.columns, self.rows, self.y, self.num_buses, dense=self._dense)
        return self._transposed

    @property
    def pattern(self) -> JacobianPattern:
        """Where the entries of the Jacobian are."""
        if self._pattern is None:
            self._pattern = JacobianPattern(self)
        return self._pattern

    # ---------------------------------------------------------------------------------------------------- in and out

    def batch(self, scenarios: Scenarios) -> Batch:
        """Scheduled powers and changed branches in our order."""
        s = scenarios.s.detach()
        changes = None
        if scenarios.admittances is not None:
            changes = self.admittance_changes(scenarios.admittances)
        elif scenarios.status is not None:
            changes = self.changes(scenarios.status.detach())
        return Batch(s.real[self.order].to(self.dtype), s.imag[self.order].to(self.dtype), changes)

    def changes(self, status: Tensor) -> Changes | None:
        """Branches whose weights ``[L, B]`` are not those of the grid; None if there are none.

        Scenarios with fewer changes than others are filled up with changes of nothing.
        """
        difference = status.to(self.dtype) - self.grid.status[:, None]
        most = int((difference != 0).sum(0).max()) if difference.numel() else 0
        if not most:
            return None
        branch = difference.abs().topk(most, dim=0).indices
        return self.weighted_changes(branch, difference.gather(0, branch))

    def admittance_changes(self, y: BranchAdmittances) -> Changes | None:
        """Branches whose admittances ``[L, B]`` are not those of the grid in any scenario; None if there are none."""
        own = [(self.grid.status * value)[:, None] for value in self.full]
        change = [value.detach() - mine for value, mine in zip(y, own, strict=True)]
        branch = torch.stack([(value != 0).any(1) for value in change]).any(0).nonzero()[:, 0]
        if not len(branch):
            return None
        branches = branch[:, None].expand(-1, y.ff.shape[1])
        return Changes(branches, self.f[branches], self.t[branches], *(value[branch] for value in change))

    def weighted_changes(self, branch: Tensor, weight: Tensor) -> Changes:
        """Changes of the weights of branches ``[K, B]`` by ``weight`` ``[K, B]``."""
        return Changes(branch, self.f[branch], self.t[branch], *(weight * y[branch] for y in self.full))

    def state(self, vm: Tensor, va: Tensor, share: Tensor | None = None) -> State:
        """A copy of voltages ``[n, B]`` in our order."""
        if share is None:
            share = vm.new_zeros(int(self.distributed), vm.shape[1])
        return State(vm.detach()[self.order].to(self.dtype), va.detach()[self.order].to(self.dtype), share)

    def in_grid_order(self, value: Tensor) -> Tensor:
        """Rows back in the order of the grid's buses."""
        return value[self.position]

    def bus_of_row(self, row: Tensor) -> Tensor:
        """Index of the bus (in the grid's order) of a row of ``F``."""
        position = row + self.num_slack
        magnitude = row - self.num_angles + self.first_pq
        position = torch.where(row < self.num_angles, position, magnitude)
        position = torch.where(row >= self.num_angles + self.num_magnitudes, torch.zeros_like(row), position)
        return self.order[position]

    def targets(self, batch: Batch) -> Tensor:
        """Scheduled powers of the equations, ``[N_u, B]``."""
        rows = [batch.p[self.num_slack :], batch.q[self.first_pq :]]
        return torch.cat([*rows, batch.p[: self.num_slack]] if self.distributed else rows)

    # ------------------------------------------------------------------------------------------------------ residual

    def injections(
        self, state: State, changes: Changes | None = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Real and imaginary parts of the voltages ``[2n, B]``, calculated ``P`` and ``Q`` ``[n, B]``.

        Args:
            state: Voltages.
            changes: Of branches.
            buffers: Memory of the results; None: fresh.
        """
        n, count = state.vm.shape
        buffers = buffers or Buffers(state.vm)
        ef, current = self._currents(state, changes, buffers)
        e, f, i_real, i_imag = ef[:n], ef[n:], current[:n], current[n:]
        p = torch.mul(e, i_real, out=buffers("p", n, count)).addcmul_(f, i_imag)
        q = torch.mul(f, i_real, out=buffers("q", n, count)).addcmul_(e, i_imag, value=-1)
        return ef, p, q

    def _currents(self, state: State, changes: Changes | None, buffers: Buffers) -> tuple[Tensor, Tensor]:
        """Voltages and currents in real and imaginary parts, ``[2n, B]``."""
        n, count = state.vm.shape
        ef = buffers("ef", 2 * n, count)
        torch.cos(state.va, out=ef[:n]).mul_(state.vm)
        torch.sin(state.va, out=ef[n:]).mul_(state.vm)
        current = self.product(ef, buffers("current", 2 * n, count))
        if changes is not None:
            add_changes(current, ef, changes)
        return ef, current

    def mismatch(self, state: State, batch: Batch, buffers: Buffers | None = None) -> Tensor:
        """``F``, ``[N_u, B]``.

        Args:
            state: Voltages.
            batch: Scheduled powers and changes of branches.
            buffers: Memory of the result, overwritten by the next call; None: fresh.
        """
        buffers = buffers or Buffers(state.vm)
        n, count = state.vm.shape
        ef, current = self._currents(state, batch.changes, buffers)
        out = buffers("mismatch", self.num_unknowns, count)
        a, m, first = self.num_angles, self.num_magnitudes, self.num_slack
        real, imag = ef[:n], ef[n:]

        def active(rows: slice, out: Tensor) -> None:
            torch.mul(real[rows], current[:n][rows], out=out).addcmul_(imag[rows], current[n:][rows])
            out.sub_(batch.p[rows])
            if self.distributed:
                out.sub_(self.weights[rows, None] * state.share)

        active(slice(first, n), out[:a])
        if self.distributed:
            active(slice(0, first), out[a + m :])
        rows, reactive = slice(self.first_pq, n), out[a : a + m]
        torch.mul(imag[rows], current[:n][rows], out=reactive)
        reactive.addcmul_(real[rows], current[n:][rows], value=-1).sub_(batch.q[rows])
        return out

    def mismatch_of(self, p: Tensor, q: Tensor, state: State, batch: Batch) -> Tensor:
        """``F`` of calculated powers, ``[N_u, B]``."""
        out = p.new_empty(self.num_unknowns, p.shape[1])
        a, m = self.num_angles, self.num_magnitudes
        if self.distributed:
            imbalance = p - batch.p - self.weights[:, None] * state.share
            out[:a], out[a + m :] = imbalance[1:], imbalance[:1]
        else:
            torch.sub(p[self.num_slack :], batch.p[self.num_slack :], out=out[:a])
        torch.sub(q[self.first_pq :], batch.q[self.first_pq :], out=out[a : a + m])
        return out

    def step(self, state: State, du: Tensor, scale: float = -1.0) -> None:
        """``u += scale du`` in place."""
        a, m = self.num_angles, self.num_magnitudes
        state.va[self.num_slack :].add_(du[:a], alpha=scale)
        state.vm[self.first_pq :].add_(du[a : a + m], alpha=scale)
        if self.distributed:
            state.share.add_(du[a + m :], alpha=scale)

    def unknowns(self, state: State) -> Tensor:
        """``u``, ``[N_u, B]``."""
        return torch.cat([state.va[self.num_slack :], state.vm[self.first_pq :], state.share])

    def with_unknowns(self, state: State, u: Tensor) -> State:
        """The state with other unknowns ``[N_u, B]``; what is given stays."""
        a, m = self.num_angles, self.num_magnitudes
        return State(
            vm=torch.cat([state.vm[: self.first_pq], u[a : a + m]]),
            va=torch.cat([state.va[: self.num_slack], u[:a]]),
            share=u[a + m :],
        )

    def loss_and_gradient(self, state: State, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The paper's loss, the mean of ``F^2`` ``[B]``, its gradient ``[N_u, B]``, and ``F`` ``[N_u, B]``."""
        ef, p, q = self.injections(state, batch.changes)
        mismatch = self.mismatch_of(p, q, state, batch)
        weight = mismatch * (2 / len(mismatch))
        gradient = self.transposed_product_of(ef, p, q, state, weight, batch.changes)
        return mismatch.square().mean(0), gradient, mismatch

    # ------------------------------------------------------------------------------------------------------ Jacobian

    def jacobian_values(self, state: State, changes: Changes | None = None) -> Tensor:
        """Entries of the Jacobians, ``[nnz, B]``, in the order of `pattern` (columns, then rows)."""
        v = torch.polar(state.vm, state.va)
        y = self.y[:, None]
        if changes is not None:
            y = y.expand(-1, v.shape[1]).clone()
            entries = self.entry_ff, self.entry_ft, self.entry_tf, self.entry_tt
            for entry, dy in zip(entries, changes[3:], strict=True):
                y.scatter_add_(0, entry[changes.branch], dy)
        s = v[self.rows] * (y * v[self.columns]).conj()
        total = torch.zeros_like(v).index_add_(0, self.rows, s)
        per_vm = s / state.vm[self.columns]
        own = total / state.vm
        d = self.diagonal
        p_va, q_va, p_vm, q_vm = s.imag.clone(), -s.real, per_vm.real.clone(), per_vm.imag.clone()
        p_va[d] -= total.imag
        q_va[d] += total.real
        p_vm[d] += own.real
        q_vm[d] += own.imag
        return self.pattern.arranged(p_va, p_vm, q_va, q_vm)

    def jacobian(self, state: State, changes: Changes | None = None) -> csc_matrix:
        """The Jacobian of a batch of one as a sparse matrix."""
        values = self.jacobian_values(state, changes)[:, 0].cpu().numpy()
        return self.pattern.matrix(values)

    def transposed_jacobian_product(self, state: State, weight: Tensor, changes: Changes | None = None) -> Tensor:
        """``J(u)^T w`` of every scenario without any matrix, ``[N_u, B]``.

        With ``z = w_P + j w_Q`` the derivative of ``sum(w F)`` is ``Re(h dV)``, ``h = conj(z I) + Y^T (z conj(V))``.
        """
        return self.transposed_product_of(*self.injections(state, changes), state, weight, changes)

    def transposed_product_of(
        self,
        ef: Tensor,
        p: Tensor,
        q: Tensor,
        state: State,
        weight: Tensor,
        changes: Changes | None = None,
        buffers: Buffers | None = None,
    ) -> Tensor:
        """The same where `injections` are known; in memory that the next call with the same ``buffers`` overwrites."""
        a, m = self.num_angles, self.num_magnitudes
        buffers = buffers or Buffers(p)
        z_p, z_q = (buffers(name, *p.shape) for name in ("z_p", "z_q"))
        z_p[: self.num_slack], z_q[: self.first_pq] = 0, 0
        z_p[self.num_slack :] = weight[:a]
        z_q[self.first_pq :] = weight[a : a + m]
        if self.distributed:
            z_p[:1] = weight[a + m :]
        by_va, by_vm = self._transposed_at_buses(ef, p, q, state, z_p, z_q, changes, buffers)
        out = buffers("transposed", *weight.shape)
        out[:a], out[a : a + m] = by_va[self.num_slack :], by_vm[self.first_pq :]
        if self.distributed:
            out[a + m :] = -(self.weights[:, None] * z_p).sum(0, keepdim=True)
        return out

    def transposed_full_product(
        self, state: State, z_p: Tensor, z_q: Tensor, changes: Changes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Derivatives of ``sum(z_p P + z_q Q)`` over all buses by all angles and all magnitudes, ``[n, B]`` each."""
        return self._transposed_at_buses(*self.injections(state, changes), state, z_p, z_q, changes, Buffers(z_p))

    def _transposed_at_buses(
        self,
        ef: Tensor,
        p: Tensor,
        q: Tensor,
        state: State,
        z_p: Tensor,
        z_q: Tensor,
        changes: Changes | None,
        buffers: Buffers,
    ) -> tuple[Tensor, Tensor]:
        n, count = p.shape
        e, f = ef[:n], ef[n:]
        w = buffers("w", 2 * n, count)
        torch.mul(z_p, e, out=w[:n]).addcmul_(z_q, f)
        torch.mul(z_q, e, out=w[n:]).addcmul_(z_p, f, value=-1)
        back = self.transposed_product(w, buffers("back", 2 * n, count))
        if changes is not None:
            add_changes(back, w, changes._replace(ft=changes.tf, tf=changes.ft))
        # h V = conj(z) S + V (Y^T w)
        real = torch.mul(z_p, p, out=buffers("real", n, count)).addcmul_(z_q, q)
        real.addcmul_(e, back[:n]).addcmul_(f, back[n:], value=-1)
        turned = torch.mul(z_q, p, out=buffers("turned", n, count)).addcmul_(z_p, q, value=-1)  # minus imaginary
        turned.addcmul_(e, back[n:], value=-1).addcmul_(f, back[:n], value=-1)
        return turned, real.div_(state.vm)

    def jacobian_product(self, state: State, du: Tensor, changes: Changes | None = None) -> Tensor:
        """``J(u) du`` of every scenario without any matrix, ``[N_u, B]``."""
        n, a, m = self.num_buses, self.num_angles, self.num_magnitudes
        v = torch.polar(state.vm, state.va)
        turn, grow = torch.zeros_like(state.va), torch.zeros_like(state.vm)
        turn[self.num_slack :] = du[:a]
        grow[self.first_pq :] = du[a : a + m] / state.vm[self.first_pq :]
        dv = v * torch.complex(grow, turn)

        def current(x: Tensor) -> Tensor:
            parts = torch.cat([x.real, x.imag])
            out = self.product(parts, torch.empty_like(parts))
            if changes is not None:
                add_changes(out, parts, changes)
            return torch.complex(out[:n], out[n:])

        ds = dv * current(v).conj() + v * current(dv).conj()
        rows = [ds.real[self.num_slack :], ds.imag[self.first_pq :]]
        if self.distributed:
            rows = [ds.real[1:] - self.weights[1:, None] * du[a + m :], rows[1]]
            rows.append(ds.real[:1] - self.weights[:1, None] * du[a + m :])
        return torch.cat(rows)
