"""One entry for all solvers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from physics.power_flow.chord import chord
from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.factorization import Factorization, SingularMatrix, factorize
from physics.power_flow.first_order import RMSpropSettings, Settings, adam_settings, first_order
from physics.power_flow.grid import Grid
from physics.power_flow.lbfgs import lbfgs
from physics.power_flow.linear import dc_angles, fast_decoupled
from physics.power_flow.newton import NewtonSteps, levenberg_marquardt, newton
from physics.power_flow.outcome import Outcome, Recorder
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import Solution

# Most iterations where nothing else is asked for.
ITERATIONS = {
    "newton": 20, "chord": 60, "fdlf_xb": 100, "fdlf_bx": 100, "lm": 100, "lbfgs": 1000, "adam": 1000, "rmsprop": 1000,
    "dc": 0,
}  # fmt: skip
METHODS = tuple(ITERATIONS)
# Of the fallback: Newton's method with line search, Levenberg-Marquardt.
_SEARCHED_ITERATIONS, _DAMPED_ITERATIONS = 40, 60
# Columns that the chord iterations take at once: about what fits a cache of the second level, in elements.
CHUNK_ELEMENTS = 60_000

Start = str | Solution | tuple[Tensor, Tensor]


def solve(
    grid: Grid,
    scenarios: Scenarios | None = None,
    method: str = "chord",
    *,
    tol: float = 1e-8,
    max_iter: int | None = None,
    start: Start = "dc",
    fallback: bool = True,
    record: bool = False,
    settings: Settings | None = None,
    dense: bool = False,
) -> Solution:
    """Solve the power flow of every scenario.

    Args:
        grid: The grid.
        scenarios: The scenarios; None: the grid's own injections.
        method: One of `METHODS`. ``dc`` is the linear approximation, which never converges.
        tol: Bound on ``max|F|`` of every scenario, per unit.
        max_iter: Most iterations of the method; None: its default.
        start: ``dc``, ``flat`` (angles of the slack, magnitudes 1 at PQ buses), ``case`` (the grid's ``vm``, ``va``),
            or a warm start: a `Solution`, or ``(vm, va)`` of shape ``[n]``, ``[n, 1]`` or ``[n, B]``. Set-points of
            slack and PV buses always come from scenarios and grid. ``chord`` solves the mean scenario from there and
            starts all others at its solution, except for a warm start of ``B`` columns.
        fallback: Whether scenarios that the method leaves unsolved go to Newton's method, then with line search, then
            to Levenberg-Marquardt; first-order methods and ``dc`` have none.
        record: Whether to keep the history of ``max|F|`` against seconds.
        settings: Of ``adam`` and ``rmsprop``; None: the paper's for the grid's name.
        dense: Multiply by a dense admittance matrix, as the paper does with small grids.

    Raises:
        ValueError: Unknown method or start, scenarios that do not fit the grid.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    with torch.no_grad():
        scenarios = (Scenarios.base(grid) if scenarios is None else scenarios).check(grid)
        eq = Equations(grid, dense=dense)
        batch = eq.batch(scenarios)
        recorder = Recorder(eq, batch, record)
        solver = _Solver(eq, scenarios, batch, tol, recorder, settings)
        outcome, names = solver.run(method, start, ITERATIONS[method] if max_iter is None else max_iter, fallback)
        return solution_of(eq, outcome, names, tol, recorder)


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
    """Voltages where scenarios start, with the set-points of slack and PV buses.

    Raises:
        ValueError: If the start is unknown or of the wrong shape.
    """
    grid, count = eq.grid, len(scenarios)
    share = grid.vm.new_zeros(int(eq.distributed), count)
    if isinstance(start, Solution):
        if eq.distributed and start.slack_power is not None:
            share = start.slack_power[None].expand(-1, count).clone()
        start = start.vm, start.va
    if isinstance(start, str):
        if start not in ("dc", "flat", "case"):
            raise ValueError(f"start={start!r}: choose 'dc', 'flat', 'case', or give voltages")
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
    vm, va = vm.expand(-1, count).contiguous(), va.expand(-1, count).contiguous()
    state = eq.state(vm, va, share)
    held = eq.order[: eq.first_pq]
    points = grid.vm[:, None] if scenarios.vm is None else scenarios.vm
    state.vm[: eq.first_pq] = points.detach()[held].to(eq.dtype)
    state.va[: eq.num_slack] = grid.va[held[: eq.num_slack], None]
    if isinstance(start, str) and start == "dc":
        status = scenarios.status if batch.changes is not None else None
        state = state._replace(va=dc_angles(eq, batch.p, state.va, status))
    return state


class _Solver:
    """One call of `solve`."""

    def __init__(
        self,
        eq: Equations,
        scenarios: Scenarios,
        batch: Batch,
        tol: float,
        recorder: Recorder,
        settings: Settings | None,
    ) -> None:
        self.eq, self.scenarios, self.batch, self.tol, self.recorder = eq, scenarios, batch, tol, recorder
        self.settings = settings
        self.steps = NewtonSteps(eq)

    def run(self, method: str, start: Start, max_iter: int, fallback: bool) -> tuple[Outcome, list[str]]:
        """Solve; also the name of the method that brought each scenario to its end."""
        eq, tol, recorder = self.eq, self.tol, self.recorder
        if method == "chord":
            outcome, begin = self._chord(start, max_iter)
        else:
            state = starting_state(eq, self.scenarios, start, self.batch)
            begin = state.clone()
            args = eq, self.batch, state
            if method == "newton":
                outcome = newton(*args, tol, max_iter, recorder, steps=self.steps)
            elif method in ("fdlf_xb", "fdlf_bx"):
                outcome = fast_decoupled(*args, method[-2:], tol, max_iter, recorder)
            elif method == "lm":
                outcome = levenberg_marquardt(*args, tol, max_iter, recorder)
            elif method == "lbfgs":
                outcome = lbfgs(*args, tol, max_iter, recorder)
            elif method == "dc":
                outcome = self._dc(start)
            else:
                settings = self.settings or (adam_settings(eq.grid.name) if method == "adam" else RMSpropSettings())
                outcome = first_order(*args, settings, tol, max_iter, recorder)
        names = [method] * len(self.scenarios)
        if fallback and method in ("chord", "newton", "fdlf_xb", "fdlf_bx"):
            self._fall_back(outcome, names, begin)
        return outcome, names

    def _dc(self, start: Start) -> Outcome:
        state = starting_state(self.eq, self.scenarios, "dc", self.batch)
        outcome = Outcome(self.eq, state)
        mismatch = self.eq.mismatch(state, self.batch)
        everyone = torch.arange(len(self.scenarios), device=mismatch.device)
        self.recorder(0, everyone, mismatch)
        outcome.write(everyone, state, mismatch, 0)
        return outcome

    def _chord(self, start: Start, max_iter: int) -> tuple[Outcome, State]:
        """Chord iterations around the mean scenario; also where they started."""
        eq, count = self.eq, len(self.scenarios)
        base, factors = self._base(start)
        warm = not isinstance(start, str) and not isinstance(start, Solution) and start[0].ndim == 2
        warm = warm or isinstance(start, Solution)
        if warm and count > 1 and _columns(start) == count:
            begin = starting_state(eq, self.scenarios, start, self.batch)
        else:
            vm, va = (eq.in_grid_order(value) for value in (base.vm, base.va))
            begin = starting_state(eq, self.scenarios, (vm, va), self.batch)
            begin.share.copy_(base.share.expand(-1, count))
        outcome = Outcome(eq, begin)
        if factors is None:
            return outcome, begin
        width = count if eq.device.type != "cpu" else max(16, CHUNK_ELEMENTS // eq.num_buses)
        for first in range(0, count, width):
            part = torch.arange(first, min(first + width, count), device=eq.device)
            self.recorder.restrict(part)
            found = chord(eq, self.batch.select(part), begin.select(part), factors, self.tol, max_iter, self.recorder)
            for mine, theirs in zip(outcome.state, found.state, strict=True):
                mine[:, part] = theirs
            outcome.mismatch[part], outcome.worst_row[part] = found.mismatch, found.worst_row
            outcome.iterations[part] = found.iterations
        self.recorder.restrict(None)
        return outcome, begin

    def _base(self, start: Start) -> tuple[State, Factorization | None]:
        """Solution and factorised Jacobian of the mean of the scenarios."""
        eq, scenarios = self.eq, self.scenarios
        s = scenarios.s.mean(1, keepdim=True)
        vm = None if scenarios.vm is None else scenarios.vm.mean(1, keepdim=True)
        mean = Scenarios(s, vm, names=("mean",))
        if not isinstance(start, str):
            parts = (start.vm, start.va) if isinstance(start, Solution) else start
            start = tuple(value if value.ndim == 1 else value.mean(1) for value in parts)
        batch = eq.batch(mean)
        state = starting_state(eq, mean, start, batch)
        silent = Recorder(eq, batch, False)
        found = newton(eq, batch, state, self.tol, ITERATIONS["newton"], silent, steps=self.steps)
        if not float(found.mismatch) <= self.tol:
            state = starting_state(eq, mean, start, batch)
            found = newton(eq, batch, state, self.tol, _SEARCHED_ITERATIONS, silent, True, self.steps)
        try:
            return found.state, factorize(eq.jacobian(found.state), eq.device)
        except SingularMatrix:
            return found.state, None

    def _fall_back(self, outcome: Outcome, names: list[str], begin: State) -> None:
        """Newton's method, with line search, and Levenberg-Marquardt for what is left, from the same start."""
        eq, tol = self.eq, self.tol
        attempts: list[tuple[str, Callable[..., Outcome]]] = [
            ("newton", lambda b, s: newton(eq, b, s, tol, ITERATIONS["newton"], self.recorder, steps=self.steps)),
            (
                "newton_search",
                lambda b, s: newton(eq, b, s, tol, _SEARCHED_ITERATIONS, self.recorder, True, self.steps),
            ),
            ("lm", lambda b, s: levenberg_marquardt(eq, b, s, tol, _DAMPED_ITERATIONS, self.recorder)),
        ]
        if names and names[0] == "newton":
            attempts = attempts[1:]
        for name, attempt in attempts:
            left = (~(outcome.mismatch <= tol)).nonzero()[:, 0]
            if not len(left):
                return
            self.recorder.restrict(left)
            found = attempt(self.batch.select(left), begin.select(left))
            self.recorder.restrict(None)
            for column, better in zip(left.tolist(), outcome.adopt(left, found).tolist(), strict=True):
                if better:
                    names[column] = name


def _columns(start: Start) -> int:
    vm = start.vm if isinstance(start, Solution) else start[0]
    return 1 if vm.ndim == 1 else vm.shape[1]
