"""Parameters as optimizers see them, and how measurements depend on them."""

from __future__ import annotations

import pytest
import torch

from datamodules.grid_sources import load_grid
from physics.power_flow import Scenarios, solve
from physics.power_flow.identification import (
    NormalEquations,
    Unknown,
    Unknowns,
    condition_number,
    damped_step,
    elements_of,
    normal_equations,
    sensitivity,
    standard_errors,
)
from physics.power_flow.measurements import QUANTITIES, simulate

F64 = torch.float64


def unknown(field: str = "x", start=(0.1, 0.2, -0.3), **options) -> Unknown:
    return Unknown(field, torch.arange(len(start)), torch.tensor(start, dtype=F64), **options)


FORMS = {
    "log": unknown(),
    "log with bounds": unknown(bounds=(0.01, 1.0)),
    "linear": unknown("tap", (0.98, 1.0, 1.02), form="linear"),
    "linear with bounds": unknown("tap", (0.98, 1.0, 1.02), form="linear", bounds=(0.9, 1.1)),
    "linear with zeros": unknown("shift", (0.0, 0.1, 0.2), form="linear"),
}


@pytest.mark.parametrize("name", FORMS)
def test_zero_is_the_start_and_gradients_are_right(name):
    part = FORMS[name]
    raw = torch.zeros(3, dtype=F64, requires_grad=True)
    torch.testing.assert_close(part.values(raw), part.start, rtol=1e-14, atol=0)
    point = torch.tensor([0.3, -0.2, 0.1], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(part.values, point)


@pytest.mark.parametrize("name", ["log with bounds", "linear with bounds"])
def test_no_step_leaves_the_bounds(name):
    part = FORMS[name]
    low, high = part.bounds
    for size in (-50.0, 50.0):
        values = part.values(torch.full((3,), size, dtype=F64)).abs()
        assert ((values >= low * (1 - 1e-12)) & (values <= high * (1 + 1e-12))).all()


def test_a_logarithm_keeps_the_sign():
    assert FORMS["log"].values(torch.tensor([1.0, 1.0, 1.0], dtype=F64))[2] == pytest.approx(-0.3 * torch.e)


def test_the_prior_counts_deviations_from_the_start():
    part = unknown(prior=0.5)
    torch.testing.assert_close(
        part.penalty(torch.tensor([0.5, 0.0, -1.0], dtype=F64)), torch.tensor([1.0, 0.0, -2.0], dtype=F64)
    )
    assert len(unknown().penalty(torch.zeros(3, dtype=F64))) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"field": "y"}, "parameter 'y' is unknown; choose from r, x"),
        ({"form": "cubic"}, "form 'cubic' of x is unknown"),
        ({"start": (0.1, 0.0)}, "x is 0 at the start at 1 elements"),
        ({"bounds": (1.0, 0.5)}, r"bounds \[1.0, 0.5\] of x: give the smaller one first"),
        ({"bounds": (-1.0, 0.5)}, "above 0 for log"),
        ({"bounds": (0.15, 0.5)}, "leave out the start of an element"),
        ({"prior": 0.0}, "prior 0.0 of x: the standard deviation must be above 0"),
    ],
)
def test_mistakes(options, text):
    with pytest.raises(ValueError, match=text):
        unknown(**options)


def test_fields_are_named_once():
    with pytest.raises(ValueError, match="parameter 'x' is named twice"):
        Unknowns([unknown(), unknown()])


def test_elements_by_name_and_all():
    grid = load_grid("case14")
    assert len(elements_of(grid, "x", None)) == 20
    assert elements_of(grid, "x", [grid.branch_names[3], grid.branch_names[1]]).tolist() == [3, 1]
    transformers = elements_of(grid, "tap", None)
    assert (grid.tap[transformers] != 1).all() and len(transformers) == 3
    assert (grid.r[elements_of(grid, "r", None)] != 0).all()
    assert elements_of(grid, "p_load_mw", ["Bus 3 HV"]).tolist() == [2]
    with pytest.raises(ValueError, match="case14 has no branch nowhere to identify x of"):
        elements_of(grid, "x", ["nowhere"])
    with pytest.raises(ValueError, match="parameter 'y' is unknown"):
        elements_of(grid, "y", None)


def test_names():
    grid = load_grid("case14")
    unknowns = Unknowns([unknown("x"), unknown("p_load_mw", (5.0,))])
    assert unknowns.names(grid)[2:] == [f"x {grid.branch_names[2]}", f"p_load_mw {grid.bus_names[0]}"]
    assert len(unknowns) == 4


@pytest.mark.parametrize("fields", [("x", "r"), ("b", "tap", "shift"), ("p_load_mw", "q_load_mvar", "b_shunt")])
def test_sensitivities_are_differences(fields):
    """All quantities, by central differences of the solved grid; branch parameters act on flows directly too."""
    grid = load_grid("case14")
    parts = []
    for field in fields:
        index = elements_of(grid, field, None) if field != "shift" else torch.tensor([4, 7])
        form = "linear" if field in ("tap", "shift") else "log"
        parts.append(Unknown(field, index, getattr(grid, field)[index], form))
    unknowns = Unknowns(parts)
    generator = torch.Generator().manual_seed(1)
    raw = 0.05 * torch.randn(len(unknowns), generator=generator, dtype=F64)
    s = grid.s_bus()[:, None] * (1 + 0.2 * torch.randn(14, 2, generator=generator, dtype=F64))

    def solved(at):
        changed, ds = unknowns.apply(grid, at)
        solution = solve(changed, Scenarios(s + ds[:, None]), "newton", tol=1e-12)
        return changed, solution

    _, solution = solved(raw)
    found = sensitivity(grid, unknowns, raw, Scenarios(s), solution.vm, solution.va, QUANTITIES)
    n = grid.num_buses
    for k in range(0, len(unknowns), max(1, len(unknowns) // 5)):
        step = torch.zeros_like(raw)
        step[k] = 1e-5
        ahead, behind = solved(raw + step), solved(raw - step)
        for name in QUANTITIES:
            one, other = (simulate(g, sol.vm, sol.va, [name])[name] for g, sol in (ahead, behind))
            expected = (one - other) / 2e-5
            torch.testing.assert_close(found.measurements[name][..., k], expected, rtol=1e-6, atol=1e-8)
        expected = (ahead[1].vm - behind[1].vm) / 2e-5
        torch.testing.assert_close(found.voltages[:n, :, k], expected, rtol=1e-6, atol=1e-8)


def test_damped_steps_solve_linear_problems():
    """Without damping one step is the least-squares solution; with much of it, a short step downhill."""
    generator = torch.Generator().manual_seed(2)
    slopes, target = torch.randn(30, 4, generator=generator, dtype=F64), torch.randn(30, generator=generator, dtype=F64)
    normal = normal_equations(-target, slopes)
    exact = torch.linalg.lstsq(slopes, target[:, None]).solution[:, 0]
    torch.testing.assert_close(damped_step(normal, 0.0), exact, rtol=1e-9, atol=1e-11)
    short = damped_step(normal, 1e6)
    assert short.norm() < 1e-5 * exact.norm() and float(short @ normal.gradient) < 0
    assert float(normal.cost) == pytest.approx(float(0.5 * target.square().sum()))
    summed = normal_equations(-target[:10], slopes[:10]) + normal_equations(-target[10:], slopes[10:])
    for one, other in zip(summed, normal, strict=True):
        torch.testing.assert_close(one, other)


def test_what_nothing_depends_on_does_not_move():
    slopes = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=F64)
    normal = normal_equations(torch.tensor([1.0, 1.0], dtype=F64), slopes)
    step = damped_step(normal, 1e-3)
    assert step[1] == 0 and step[0] < 0
    assert float(condition_number(normal)) >= 1e7
    errors = standard_errors(normal.matrix)
    assert errors[0] == pytest.approx(5**-0.5) and errors[1] == torch.inf


def test_standard_errors_are_those_of_the_inverse():
    slopes = torch.randn(50, 3, generator=torch.Generator().manual_seed(3), dtype=F64) * torch.tensor([1.0, 10.0, 0.1])
    normal = normal_equations(torch.zeros(50, dtype=F64), slopes)
    torch.testing.assert_close(standard_errors(normal.matrix), normal.matrix.inverse().diagonal().sqrt())
    values = torch.linalg.svdvals(slopes)
    assert float(condition_number(normal)) == pytest.approx(float(values[0] / values[-1]))
    assert isinstance(normal, NormalEquations)
