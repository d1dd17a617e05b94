"""Grids from tables: what becomes what, what is dropped, and what errors say."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from physics.power_flow import BusType, Grid, Scenarios
from physics.power_flow.grid import numbered
from tests.physics.power_flow.grids import F64, embedded, table, tiny_case


def changed(key: str, row: int, column: int, value: float) -> dict:
    case = tiny_case()
    case[key] = case[key].copy()
    case[key][row, column] = value
    return case


def test_columns_become_fields():
    grid = Grid.from_matpower(tiny_case())
    assert grid.bus_names == ("10", "20", "30") and grid.branch_names == ("10-20", "20-30", "10-30")
    assert grid.gen_names == ("gen at bus 10", "gen at bus 20")
    assert grid.bus_type.tolist() == [3, 2, 1]
    assert grid.slack.tolist() == [0] and grid.pv.tolist() == [1] and grid.pq.tolist() == [2]
    assert grid.vm.tolist() == [1.02, 1.01, 1.0]
    assert grid.from_bus.tolist() == [0, 1, 0] and grid.to_bus.tolist() == [1, 2, 2]
    assert grid.tap.tolist() == [1.0, 0.98, 1.0]
    assert grid.shift.tolist() == pytest.approx([0, 0, math.radians(5)])
    assert grid.rate_mva.tolist() == [200, 120, math.inf]
    assert grid.b_shunt.tolist() == [0, 0, 0.1] and grid.g_shunt.tolist() == [0, 0, 0.02]
    assert torch.allclose(grid.s_bus(), torch.tensor([0, 0.3 - 0.05j, -0.9 - 0.3j], dtype=torch.complex128))
    assert all(value.dtype == F64 for value in (grid.vm, grid.x, grid.status, grid.gen_p_mw))


def test_names_of_the_file_and_of_parallel_branches():
    case = tiny_case(bus_names=["a", "b", "c"])
    case["branch"] = np.concatenate([case["branch"], case["branch"][:1]])
    case["gen"] = np.concatenate([case["gen"], case["gen"][1:]])
    grid = Grid.from_matpower(case)
    assert grid.branch_names == ("a-b", "b-c", "a-c", "a-b (2)")
    assert grid.gen_names[1:] == ("gen at bus b", "gen at bus b (2)")
    assert grid.branch_index("a-b (2)") == 3 and grid.bus_index("c") == 2
    with pytest.raises(ValueError, match=r"no bus 'd'; there are a, b, c"):
        grid.bus_index("d")
    assert numbered(["x", "y", "x", "x"]) == ("x", "y", "x (2)", "x (3)")


def test_out_of_service_stays_with_status_zero():
    grid = Grid.from_matpower(changed("branch", 1, 10, 0))
    assert grid.status.tolist() == [1, 0, 1] and grid.num_branches == 3


def test_a_pv_bus_without_generator_in_service_is_pq():
    grid = Grid.from_matpower(changed("gen", 1, 7, 0))
    assert grid.bus_type.tolist() == [3, 1, 1] and grid.gen_status.tolist() == [1, 0]
    assert float(grid.s_bus()[1].real) == pytest.approx(-0.2)


def test_several_generators_of_a_bus_share_one_set_point():
    case = tiny_case()
    case["gen"] = np.concatenate([case["gen"], case["gen"][1:]])
    assert float(Grid.from_matpower(case).s_bus()[1].real) == pytest.approx(0.8)
    case["gen"][2, 5] = 1.04
    with pytest.raises(ValueError, match=r"gen at bus 20 holds 1.01 .* gen at bus 20 \(2\) 1.04"):
        Grid.from_matpower(case)
    case["gen"][2, 7] = 0  # out of service it does not matter
    Grid.from_matpower(case)


def test_no_slack():
    with pytest.raises(ValueError, match="tiny: no slack bus; give one bus the type 3"):
        Grid.from_matpower(changed("bus", 0, 1, 2))


def isolated() -> dict:
    """The triangle with a fourth and a fifth bus that nothing connects to it."""
    case = tiny_case()
    bus = case["bus"][[2, 2]].copy()
    bus[:, 0] = 40, 50
    case["bus"] = np.concatenate([case["bus"], bus])
    tie = case["branch"][:1].copy()
    tie[0, :2] = 40, 50
    case["branch"] = np.concatenate([tie, case["branch"]])
    case["gen"] = np.concatenate([case["gen"], table({"0": [50], "5": [1.0]}, 1, 10, {7: 1.0})])
    return case


def test_isolated_buses_are_refused_or_dropped(caplog):
    with pytest.raises(ValueError, match=r"connects bus 40, 50 to a slack bus; connect them, or drop them"):
        Grid.from_matpower(isolated())
    with caplog.at_level(logging.WARNING):
        grid = Grid.from_matpower(isolated(), isolated="drop")
    assert "bus 40, 50 is isolated and left out" in caplog.text
    whole = Grid.from_matpower(tiny_case())
    assert grid.bus_names == whole.bus_names and grid.branch_names == whole.branch_names
    assert torch.equal(grid.from_bus, whole.from_bus) and torch.equal(grid.gen_bus, whole.gen_bus)
    with pytest.raises(ValueError, match="choose 'drop' or 'refuse'"):
        Grid.from_matpower(tiny_case(), isolated="keep")


def test_buses_of_type_4_go_with_what_hangs_on_them(caplog):
    case = isolated()
    case["bus"][3:, 1] = 4
    grid = Grid.from_matpower(case)
    assert grid.num_buses == 3 and grid.num_branches == 3 and len(grid.gen_names) == 2
    assert "isolated" in caplog.text


def test_a_branch_out_of_service_isolates():
    case = tiny_case()
    case["branch"][:2, 10] = 0
    with pytest.raises(ValueError, match="connects bus 20 to a slack"):
        Grid.from_matpower(case)


def test_zero_impedance():
    case = tiny_case()
    case["branch"][1, 2:4] = 0
    with pytest.raises(ValueError, match=r"branch 20-30 has no impedance .* small reactance"):
        Grid.from_matpower(case)
    case["branch"][1, 10] = 0  # out of service it does not matter
    Grid.from_matpower(case)


@pytest.mark.parametrize(
    ("key", "row", "column", "message"),
    [
        ("bus", 2, 2, "p_load_mw is not a finite number at bus 30"),
        ("branch", 1, 3, "x is not a finite number at branch 20-30"),
        ("gen", 1, 1, "gen_p_mw is not a finite number at generator gen at bus 20"),
    ],
)
def test_nan_is_named(key, row, column, message):
    with pytest.raises(ValueError, match=message):
        Grid.from_matpower(changed(key, row, column, math.nan))


def test_unknown_and_repeated_bus_numbers():
    with pytest.raises(ValueError, match="a branch is at bus 99, which is not among the buses"):
        Grid.from_matpower(changed("branch", 0, 0, 99))
    with pytest.raises(ValueError, match="bus number 10 is given twice"):
        Grid.from_matpower(changed("bus", 1, 0, 10))


def test_unusual_set_points_warn(caplog):
    Grid.from_matpower(changed("gen", 1, 5, 1.6))
    assert "set-points outside 0.5-1.5 per unit at bus 20 (1.6)" in caplog.text


def test_moving_and_replacing():
    grid = embedded("case14")
    half = grid.to(dtype=torch.float32)
    assert half.x.dtype == torch.float32 and half.from_bus.dtype == torch.int64 and half.bus_names == grid.bus_names
    assert grid.replace(x=2 * grid.x).x[0] == 2 * grid.x[0]
    assert len(grid.slack) == 1 and grid.bus_type[grid.slack[0]] == BusType.SLACK


def test_power_of_scenarios():
    grid = embedded("case14")
    base = Scenarios.from_power(grid, grid.p_load_mw[:, None], grid.q_load_mvar[:, None])
    assert torch.allclose(base.s[:, 0], grid.s_bus())
    more = Scenarios.from_power(grid, grid.p_load_mw[:, None], grid.q_load_mvar[:, None], 2 * grid.gen_p_mw[:, None])
    assert torch.allclose((more.s - base.s).real.sum() * grid.base_mva, grid.gen_p_mw.sum())


def test_nan_of_scenarios_is_named():
    grid = embedded("case14")
    load = grid.p_load_mw[:, None].repeat(1, 3)
    load[4, 1] = math.nan
    with pytest.raises(ValueError, match=r"active power \(MW\) is not a finite number: load at Bus 5 HV in scenario 1"):
        Scenarios.from_power(grid, load, grid.q_load_mvar[:, None].repeat(1, 3))
    s = grid.s_bus()[:, None].repeat(1, 2)
    s[3, 1] = math.inf
    with pytest.raises(ValueError, match="injection is not a finite number: Bus 4 HV in b"):
        Scenarios(s, names=("a", "b")).check(grid)
    points = grid.vm[:, None].repeat(1, 2)
    points[grid.pq[0]] = math.nan  # not read
    s = grid.s_bus()[:, None].repeat(1, 2)
    Scenarios(s, points).check(grid)
    points[grid.pv[0], 1] = math.nan
    with pytest.raises(ValueError, match="voltage set-point is not a finite number: Bus 2 HV in scenario 1"):
        Scenarios(s, points).check(grid)


def test_wrong_shapes_of_scenarios():
    grid = embedded("case14")
    s = grid.s_bus()[:, None]
    with pytest.raises(ValueError, match=r"s has shape \(13, 1\), not \(14, 1\)"):
        Scenarios(s[:13]).check(grid)
    with pytest.raises(ValueError, match=r"status has shape \(1, 20\), not \(20, 1\)"):
        Scenarios(s, status=grid.status[None]).check(grid)


def test_selection_of_scenarios():
    grid = embedded("case14")
    s = grid.s_bus()[:, None] * torch.arange(4)
    some = Scenarios(s, s.real, names=tuple("abcd")).select([2, 0])
    assert some.names == ("c", "a") and torch.equal(some.s, s[:, [2, 0]]) and torch.equal(some.vm, s.real[:, [2, 0]])
    assert Scenarios(s).select(slice(1, 3)).names == ("scenario 1", "scenario 2")
    assert Scenarios(s).select(torch.tensor([True, False, False, True])).names == ("scenario 0", "scenario 3")
