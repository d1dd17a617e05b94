"""Joined grids: copies that do not know of each other, ties, feeders behind transformers."""

from __future__ import annotations

import pytest
import torch

from physics.power_flow import BusType, solve
from physics.power_flow.synthetic import attach, copies, join, rebased
from physics.power_flow.topology import components
from tests.physics.power_flow.grids import embedded


def parts(grid) -> int:
    return len(set(components(grid.num_buses, grid.from_bus.numpy(), grid.to_bus.numpy()).tolist()))


def test_copies_without_connections():
    grid = embedded("case57")
    three = copies(grid, 3, "no_connections").check()
    assert three.num_buses == 171 and parts(three) == 3 and len(three.slack) == 3
    assert three.bus_names[57] == "copy 2: " + grid.bus_names[0] and len(set(three.bus_names)) == 171
    solution, one = solve(three, tol=1e-10), solve(grid, tol=1e-10)
    assert float((solution.v - one.v.repeat(3, 1)).abs().max()) < 1e-8
    assert torch.allclose(three.s_bus(), grid.s_bus().repeat(3))


@pytest.mark.parametrize(("ties", "count"), [("total_random", 80), ("linear_random", 9), ("pairwise_random", 18)])
@pytest.mark.parametrize("admittance", ["realistic", "paper"])
def test_ties(ties, count, admittance):
    grid = embedded("case57")
    joined = copies(grid, 4, ties, admittance, seed=1).check()
    assert joined.num_branches == 4 * grid.num_branches + count and parts(joined) == 1
    size = 1 / torch.hypot(joined.r, joined.x)[-count:]
    if admittance == "paper":
        assert float(size.min()) == pytest.approx(1.515e-5) and bool((joined.x[-count:] == 0).all())
    else:
        assert float(size.min()) >= 1 and float(size.max()) <= 10
    assert bool(solve(joined).converged)
    again, other = copies(grid, 4, ties, admittance, seed=1), copies(grid, 4, ties, admittance, seed=2)
    assert torch.equal(again.from_bus, joined.from_bus) and torch.equal(again.x, joined.x)
    assert not torch.equal(other.from_bus, joined.from_bus)
    ends = joined.from_bus[-count:] // 57, joined.to_bus[-count:] // 57
    if ties == "linear_random":
        assert bool((ends[1] - ends[0] == 1).all())


def test_wrong_ties():
    grid = embedded("case14")
    with pytest.raises(ValueError, match="ties='ring': choose 'no_connections'"):
        copies(grid, 2, "ring")
    with pytest.raises(ValueError, match="choose 'realistic' or 'paper'"):
        copies(grid, 2, admittance="large")
    with pytest.raises(ValueError, match="count=0: give at least one copy"):
        copies(grid, 0)
    with pytest.raises(ValueError, match="bring the grids to one with `rebased`"):
        join([grid, grid.replace(base_mva=1.0)], ["a", "b"], "both")


def test_another_base_changes_no_voltage():
    grid = embedded("case33bw")
    other = rebased(grid, 7.0)
    assert float((solve(other, tol=1e-11).v - solve(grid, tol=1e-11).v).abs().max()) < 1e-9
    assert other.base_mva == 7.0 and torch.equal(other.p_load_mw, grid.p_load_mw)


def test_feeders():
    grid, feeder = embedded("case118"), rebased(embedded("case33bw"), 10.0)
    buses = [grid.bus_names[i] for i in grid.pq[:3].tolist()]
    joint = attach(grid, [(feeder, bus) for bus in buses], share=2.0).check()
    assert joint.num_buses == 118 + 99 and len(joint.slack) == 1 and joint.base_mva == grid.base_mva
    assert joint.bus_type[118] == BusType.PQ and joint.branch_names[-1] == "transformer of feeder 3"
    assert joint.from_bus[-1] == grid.pq[2] and joint.to_bus[-1] == 118 + 66
    solution = solve(joint, tol=1e-10)
    assert bool(solution.converged)
    # A feeder alone, with its source at the voltage that it has in the whole, is the feeder in the whole.
    source = slice(118, 151)
    vm, va = feeder.vm.clone(), feeder.va.clone()
    vm[feeder.slack[0]], va[feeder.slack[0]] = solution.vm[118, 0], solution.va[118, 0]
    loads = {"p_load_mw": 2 * feeder.p_load_mw, "q_load_mvar": 2 * feeder.q_load_mvar}
    alone = solve(feeder.replace(vm=vm, va=va, **loads), tol=1e-10)
    assert float((alone.v - solution.v[source]).abs().max()) < 1e-8
    with pytest.raises(ValueError, match=f"bus '{grid.bus_names[int(grid.pv[0])]}' is not a PQ bus"):
        attach(grid, [(feeder, grid.bus_names[int(grid.pv[0])])])
    with pytest.raises(ValueError, match="there is no bus 'nowhere'"):
        attach(grid, [(feeder, "nowhere")])
    with pytest.raises(ValueError, match="a feeder needs exactly one slack bus, it has 2"):
        attach(grid, [(copies(feeder, 2, "no_connections"), buses[0])])
