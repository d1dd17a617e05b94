"""One entry for all solvers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from physics.power_flow.grid import Grid
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import Solution

METHODS = ("newton", "chord", "fdlf_xb", "fdlf_bx", "lm", "lbfgs", "adam", "rmsprop", "dc")

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
    settings: Any = None,
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
            slack and PV buses always come from scenarios and grid.
        fallback: Whether scenarios that ``chord`` and ``fdlf`` leave unsolved go to Newton's method with line search
            and then to Levenberg-Marquardt.
        record: Whether to keep the history of ``max|F|`` against seconds.
        settings: Of the first-order methods (`AdamSettings`, `RMSpropSettings`); None: by the grid's name.

    Raises:
        ValueError: Unknown method or start, scenarios that do not fit the grid.
    """
    raise NotImplementedError
