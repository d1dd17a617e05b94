"""One entry for all solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from physics.power_flow.buffers import Buffers
from physics.power_flow.chord import chord
from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.factorization import Factorization, SingularMatrix, factorize
from physics.power_flow.first_order import RMSpropSettings, Settings, adam_settings, first_order
from physics.power_flow.grid import Grid
from physics.power_flow.lbfgs import lbfgs
from physics.power_flow.linear import dc_angles, fast_decoupled
from physics.power_flow.newton import NewtonSteps, homotopy, levenberg_marquardt, newton
from physics.power_flow.outcome import Outcome, Recorder
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import Solution

# Most iterations where nothing else is asked for.
ITERATIONS = {
    "newton": 20, "chord": 60, "fdlf_xb": 100, "fdlf_bx": 100, "lm": 100, "homotopy": 60, "lbfgs": 1000, "adam": 1000,
    "rmsprop": 1000, "dc": 0,
}  # fmt: skip
METHODS = tuple(ITERATIONS)
# Of the fallback: Newton's method with line search, Levenberg-Marquardt.
_SEARCHED_ITERATIONS, _DAMPED_ITERATIONS = 40, 60
# max|F| of the mean scenario around which chord iterations go, per unit: a point to expand at need not be exact.
_BASE_TOLERANCE = 1e-3
# Methods that start flat; those whose failures go to the fallback.
_FIRST_ORDER = ("lbfgs", "adam", "rmsprop")
_FALL_BACK = ("chord", "newton", "fdlf_xb", "fdlf_bx")
# Elements of an array that chord iterations take at once on a CPU, but at least so many scenarios.
CHUNK_ELEMENTS, LEAST_CHUNK = 300_000, 64

Start = str | Solution | tuple[Tensor, Tensor]


def solve(grid: Grid, scenarios: Scenarios | None = None, method: str = "chord", **options: Any) -> Solution:
    """Solve the power flow of every scenario; see `Solver.solve` for the options.

    Args:
        grid: The grid.
        scenarios: The scenarios; None: the grid's own injections.
        method: One of `METHODS`.
        options: ``tol``, ``max_iter``, ``start``, ``fallback``, ``record``, ``settings`` of `Solver.solve`, and
            ``dense`` of `Solver`.

    Raises:
        ValueError: Unknown method or start, scenarios that do not fit the grid.
    """
    dense = options.pop("dense", False)
    return Solver(grid, dense=dense).solve(scenarios, method, **options)


class Solver:
    """Solves scenarios of one grid; keeps what depends on the grid alone, to be used again.

    Args:
        grid: The grid. Its tensors must not be changed in place while the solver is in use.
        bus_type: Types other than those of the grid, ``[n]``.
        dense: Multiply by a dense admittance matrix, as the paper does with small grids.
    """

    def __init__(self, grid: Grid, bus_type: Tensor | None = None, dense: bool = False) -> None:
        self.grid = grid
        self.equations = Equations(grid, bus_type, dense)
        self.newton_steps = NewtonSteps(self.equations)

    @torch.no_grad()
    def solve(
        self,
        scenarios: Scenarios | None = None,
        method: str = "chord",
        *,
        tol: float = 1e-8,
        max_iter: int | None = None,
        start: Start | None = None,
        fallback: bool = True,
        record: bool = False,
        settings: Settings | None = None,
    ) -> Solution:
        """Solve the power flow of every scenario.

        Args:
            scenarios: The scenarios; None: the grid's own injections.
            method: One of `METHODS`. ``dc`` is the linear approximation, which never converges.
            tol: Bound on ``max|F|`` of every scenario, per unit.
            max_iter: Most iterations of the method; None: its default.
            start: ``dc``, ``flat`` (angles of the slack, magnitudes 1 at PQ buses), ``case`` (the grid's ``vm``,
                ``va``), ``auto`` (of ``dc`` and ``case`` the one with less mismatch), or a warm start: a `Solution`, or
                ``(vm, va)`` of shape ``[n]``, ``[n, 1]`` or ``[n, B]``. None: ``flat`` for first-order methods, as in
                the paper, otherwise ``auto``. Set-points of slack and PV buses always come from scenarios and grid.
                ``chord`` solves the mean scenario from there and starts all others at its solution, unless a warm
                start has ``B`` columns.
            fallback: Whether scenarios that the method leaves unsolved go to Newton's method, then with line search,
                then to Levenberg-Marquardt; other methods than ``chord``, ``newton`` and ``fdlf_*`` have none.
            record: Whether to keep the history of ``max|F|`` against seconds.
            settings: Of ``adam`` and ``rmsprop``; None: the paper's for the grid's name.

        Raises:
            ValueError: Unknown method or start, scenarios that do not fit the grid.
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}")
        grid, eq = self.grid, self.equations
        scenarios = (Scenarios.base(grid) if scenarios is None else scenarios).check(grid)
        batch = eq.batch(scenarios)
        recorder = Recorder(eq, batch, record)
        max_iter = ITERATIONS[method] if max_iter is None else max_iter
        if start is None:
            start = "flat" if method in _FIRST_ORDER else "auto"
        if method == "chord":
            outcome, begin = self._chord(scenarios, batch, start, tol, max_iter, recorder)
        else:
            state = starting_state(eq, scenarios, start, batch)
            begin = state.select
            if method == "newton":
                outcome = newton(eq, batch, state, tol, max_iter, recorder, steps=self.newton_steps)
            elif method in ("fdlf_xb", "fdlf_bx"):
                outcome = fast_decoupled(eq, batch, state, method[-2:], tol, max_iter, recorder)
            elif method == "lm":
                outcome = levenberg_marquardt(eq, batch, state, tol, max_iter, recorder)
            elif method == "homotopy":
                outcome = homotopy(eq, batch, state, tol, max_iter, recorder, self.newton_steps)
            elif method == "lbfgs":
                outcome = lbfgs(eq, batch, state, tol, max_iter, recorder)
            elif method == "dc":
                outcome = _unsolved(eq, starting_state(eq, scenarios, "dc", batch), batch, recorder)
            else:
                chosen = adam_settings(grid.name) if method == "adam" else RMSpropSettings()
                outcome = first_order(eq, batch, state, settings or chosen, tol, max_iter, recorder)
        names = [method] * len(scenarios)
        if method in _FALL_BACK:
            if fallback:
                self.fall_back(batch, outcome, names, begin, tol, recorder)
            _not_worse_than_start(eq, batch, outcome, begin, tol)
        return solution_of(eq, outcome, names, tol, recorder)

    def _chord(
        self, scenarios: Scenarios, batch: Batch, start: Start, tol: float, max_iter: int, recorder: Recorder
    ) -> tuple[Outcome, Callable[[Tensor], State]]:
        """Chord iterations around the mean scenario; also where given scenarios start."""
        eq, count = self.equations, len(scenarios)
        base_tol = max(tol, _BASE_TOLERANCE)
        base, factors, size, taken = self.base(scenarios, start, base_tol, recorder if count == 1 else None)
        solved, warm = size <= base_tol, None
        if not solved or (not isinstance(start, str) and count > 1 and _columns(start) == count):
            warm = starting_state(eq, scenarios, start, batch)
        points = None if scenarios.vm is None else scenarios.vm.detach()[eq.order[: eq.first_pq]].to(eq.dtype)

        def begin(columns: Tensor | slice, buffers: Buffers | None = None) -> State:
            source = base if warm is None else State(*(value[:, columns] for value in warm))
            width = batch.p[:, columns].shape[1]
            buffers = buffers or Buffers(batch.p)
            out = State(*(buffers(name, len(x), width).copy_(x) for name, x in source._asdict().items()))
            held = self.grid.vm[eq.order[: eq.first_pq], None] if points is None else points[:, columns]
            out.vm[: eq.first_pq] = held
            return out

        outcome = Outcome.empty(eq, count)
        width = count if eq.device.type != "cpu" else max(LEAST_CHUNK, CHUNK_ELEMENTS // eq.num_buses)
        buffers = Buffers(batch.p)
        for first in range(0, count, width):
            columns = torch.arange(first, min(first + width, count), device=eq.device)
            part = slice(first, first + len(columns))
            state, given = begin(part, buffers), batch.narrow(part)
            if factors is None or not solved:
                mismatch = eq.mismatch(state, given)
                recorder(0, columns, mismatch)
                outcome.write(columns, state, mismatch, 0)
                continue
            chord(eq, given, state, factors, tol, max_iter, outcome, columns, recorder, buffers)
        if count == 1:
            outcome.iterations += taken
        return outcome, begin

    def base(
        self, scenarios: Scenarios, start: Start = "auto", tol: float = 1e-8, recorder: Recorder | None = None
    ) -> tuple[State, Factorization | None, float, int]:
        """Solve the mean of the scenarios, or if it has no solution their median, by Newton's method.

        Args:
            scenarios: Their status is not looked at.
            start: See `solve`; warm starts are averaged.
            tol: Bound on ``max|F|``, per unit.
            recorder: Of the history; None: nothing is recorded.

        Returns:
            The state ``[n, 1]``, the factorised Jacobian there (None: singular), ``max|F|``, and steps taken.
        """
        eq = self.equations
        vm = None if scenarios.vm is None else scenarios.vm.mean(1, keepdim=True)
        if not isinstance(start, str):
            parts = (start.vm, start.va) if isinstance(start, Solution) else start
            start = tuple(value if value.ndim == 1 else value.mean(1) for value in parts)
        silent, taken = Recorder(eq, eq.batch(scenarios.select([0])), False), 0
        # A scenario beyond all measure may leave the mean without a solution; the median does not see it.
        attempts: list[Callable[[], Tensor]] = [lambda: scenarios.s.mean(1, keepdim=True)]
        if len(scenarios) > 1:
            s = scenarios.s
            attempts.append(lambda: torch.complex(*(x.median(1, keepdim=True).values for x in (s.real, s.imag))))
        for injections in attempts:
            middle = Scenarios(injections(), vm, names=("middle",))
            batch = eq.batch(middle)
            state = starting_state(eq, middle, start, batch)
            for most, search in ((ITERATIONS["newton"], False), (_SEARCHED_ITERATIONS, True)):
                found = newton(eq, batch, state, tol, most, recorder or silent, search, self.newton_steps)
                taken += int(found.iterations)
                if float(found.mismatch) <= tol:
                    break
            if float(found.mismatch) <= tol:
                break
        try:
            factors = factorize(eq.jacobian(found.state), eq.device)
        except SingularMatrix:
            factors = None
        return found.state, factors, float(found.mismatch), taken

    def fall_back(
        self,
        batch: Batch,
        outcome: Outcome,
        names: list[str],
        begin: Callable[[Tensor], State],
        tol: float,
        recorder: Recorder,
    ) -> None:
        """Newton's method, with line search, and Levenberg-Marquardt for what is left, from the same start."""
        eq, steps = self.equations, self.newton_steps
        attempts: list[tuple[str, Callable[[Batch, State], Outcome]]] = [
            ("newton", lambda b, s: newton(eq, b, s, tol, ITERATIONS["newton"], recorder, steps=steps)),
            ("newton_search", lambda b, s: newton(eq, b, s, tol, _SEARCHED_ITERATIONS, recorder, True, steps)),
            ("lm", lambda b, s: levenberg_marquardt(eq, b, s, tol, _DAMPED_ITERATIONS, recorder)),
        ]
        for name, attempt in attempts:
            left = (~(outcome.mismatch <= tol)).nonzero()[:, 0]
            if not len(left):
                return
            if name == names[0]:
                continue
            recorder.restrict(left)
            found = attempt(batch.select(left), begin(left))
            recorder.restrict(None)
            for column, better in zip(left.tolist(), outcome.adopt(left, found).tolist(), strict=True):
                if better:
                    names[column] = name


def _not_worse_than_start(
    eq: Equations, batch: Batch, outcome: Outcome, begin: Callable[[Tensor], State], tol: float
) -> None:
    """Put scenarios that ran away back to where they started."""
    left = (~(outcome.mismatch <= tol)).nonzero()[:, 0]
    if len(left):
        state = begin(left)
        mismatch = eq.mismatch(state, batch.select(left))
        worse = ~(outcome.mismatch[left] <= mismatch.abs().amax(0))
        iterations = outcome.iterations[left[worse]]
        outcome.write(left[worse], state.select(worse), mismatch[:, worse], 0)
        outcome.iterations[left[worse]] = iterations


def _unsolved(eq: Equations, state: State, batch: Batch, recorder: Recorder) -> Outcome:
    """A state as an outcome, with its mismatch."""
    mismatch = eq.mismatch(state, batch)
    everyone = torch.arange(mismatch.shape[1], device=mismatch.device)
    recorder(0, everyone, mismatch)
    outcome = Outcome(eq, state)
    outcome.write(everyone, state, mismatch, 0)
    return outcome


def _columns(start: Solution | tuple[Tensor, Tensor]) -> int:
    vm = start.vm if isinstance(start, Solution) else start[0]
    return 1 if vm.ndim == 1 else vm.shape[1]


def solution_of(eq: Equations, outcome: Outcome, names: list[str], tol: float, recorder: Recorder) -> Solution:
    """What a solver came to, in the order of the grid."""
    return Solution(
        vm=eq.in_grid_order(outcome.state.vm),
        va=eq.in_grid_order(outcome.state.va),
        converged=outcome.mismatch <= tol,
        iterations=outcome.iterations,
        max_mismatch=outcome.mismatch,
        worst_bus=eq.bus_of_row(outcome.worst_row),
        method=tuple(names),
        history=tuple(recorder.points),
        slack_power=outcome.state.share[0] if eq.distributed else None,
    )


def starting_state(eq: Equations, scenarios: Scenarios, start: Start, batch: Batch) -> State:
    """Voltages where scenarios start, with the set-points of slack and PV buses; see `Solver.solve`.

    Raises:
        ValueError: If the start is unknown or of the wrong shape.
    """
    if isinstance(start, str) and start == "auto":
        found = [starting_state(eq, scenarios, name, batch) for name in ("dc", "case")]
        sizes = [eq.mismatch(state, batch).square().sum(0) for state in found]
        return State(*(torch.where(sizes[1] < sizes[0], two, one) for one, two in zip(*found, strict=True)))
    grid, count = eq.grid, len(scenarios)
    share = grid.vm.new_zeros(int(eq.distributed), count)
    if isinstance(start, Solution):
        if eq.distributed and start.slack_power is not None:
            share = start.slack_power[None].expand(-1, count).clone()
        start = start.vm, start.va
    if isinstance(start, str):
        if start not in ("dc", "flat", "case"):
            raise ValueError(f"start={start!r}: choose 'auto', 'dc', 'flat', 'case', or give voltages")
        vm, va = grid.vm, grid.va
        if start != "case":
            vm, va = torch.ones_like(vm), va[grid.slack[0]].expand(len(va))
    else:
        vm, va = (value.detach() for value in start)
    vm, va = (value[:, None] if value.ndim == 1 else value for value in (vm, va))
    if vm.shape != va.shape or vm.shape[0] != grid.num_buses or vm.shape[1] not in (1, count):
        raise ValueError(
            f"start: voltages of shapes {tuple(vm.shape)} and {tuple(va.shape)} for {grid.num_buses} buses and "
            f"{count} scenarios; give [n], [n, 1] or [n, B]"
        )
    state = eq.state(vm.expand(-1, count), va.expand(-1, count), share)
    held = eq.order[: eq.first_pq]
    points = grid.vm[:, None] if scenarios.vm is None else scenarios.vm
    state.vm[: eq.first_pq] = points.detach()[held].to(eq.dtype)
    state.va[: eq.num_slack] = grid.va[held[: eq.num_slack], None]
    if isinstance(start, str) and start == "dc":
        status = scenarios.status if batch.changes is not None else None
        state = state._replace(va=dc_angles(eq, batch.p, state.va, status))
    return state
