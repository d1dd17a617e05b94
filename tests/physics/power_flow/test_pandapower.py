"""Nets of pandapower with everything that its own cases do not have; they need pandapower, so an older pandas."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from physics.power_flow import Grid, solve


@pytest.fixture(scope="module")
def pandapower() -> Any:
    before = dict(os.environ)
    found = pytest.importorskip("pandapower", reason="pandapower is not installed (it needs pandas < 3)")
    pytest.importorskip("pandapower.networks")
    for variable in set(os.environ) - set(before):  # its own imports set some
        del os.environ[variable]
    return found


def two_slacks(pp: Any) -> Any:
    net = pp.networks.case14()
    pp.create_ext_grid(net, 3, vm_pu=1.01)
    return net


def distributed_slack(pp: Any) -> Any:
    net = pp.networks.case14()
    net.gen["slack_weight"] = net.ext_grid["slack_weight"] = 1.0
    return net


def dc_line(pp: Any) -> Any:
    net = pp.networks.case14()
    pp.create_dcline(net, 3, 9, 10.0, 1.0, 1.0, 1.01, 1.02)
    return net


def open_line(pp: Any) -> Any:
    """Open at one end, so that it has a bus of its own there."""
    net = pp.networks.case14()
    pp.create_switch(net, net.line.from_bus[0], 0, "l", closed=False)
    return net


def out_of_service(pp: Any) -> Any:
    net = pp.networks.case14()
    net.line.loc[0, "in_service"] = net.gen.loc[0, "in_service"] = False
    return net


NETS: dict[str, Callable[[Any], Any]] = {
    # Three-winding transformers, phase shifts, switches, wards, impedances.
    "multivoltage": lambda pp: pp.networks.example_multivoltage(),
    "distribution": lambda pp: pp.networks.create_cigre_network_mv(with_der="all"),
    "two slacks": two_slacks,
    "distributed slack": distributed_slack,
    "dc line": dc_line,
    "open line": open_line,
    "out of service": out_of_service,
}


@pytest.mark.parametrize("name", NETS)
def test_solutions_are_pandapowers(name, pandapower):
    """From the DC approximation."""
    net = NETS[name](pandapower)
    options = {"distributed_slack": True} if name == "distributed slack" else {}
    pandapower.runpp(net, calculate_voltage_angles=True, tolerance_mva=1e-9, lightsim2grid=False, **options)
    grid = Grid.from_pandapower(net)
    solution = solve(grid, start="dc", tol=1e-10)
    assert bool(solution.converged) and int(solution.iterations) > 0
    assert abs(solution.v[:, 0].numpy() - net._ppc["internal"]["V"]).max() < 1e-8
    assert len(set(grid.branch_names)) == grid.num_branches and len(set(grid.bus_names)) == grid.num_buses
