"""AC power flow: grids, solvers for batches of scenarios, implicit differentiation, contingencies."""

from physics.power_flow.admittance import BranchAdmittances, admittances, ybus, ybus_sparse
from physics.power_flow.contingency import Contingencies, Screening, contingencies, screen, solve_contingencies
from physics.power_flow.equations import Equations, residual
from physics.power_flow.first_order import (
    ADAM_SETTINGS,
    AdamSettings,
    DescentState,
    RMSpropSettings,
    descend,
    follow,
    start_descent,
)
from physics.power_flow.flows import BranchFlows, branch_flows, currents_ka, loadings
from physics.power_flow.grid import BRANCH_PARAMETERS, BusType, Grid
from physics.power_flow.implicit import PowerFlow, PowerFlowLayer, power_flow
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import HistoryPoint, NotConverged, Solution
from physics.power_flow.solver import METHODS, Solver, solve

__all__ = [
    "ADAM_SETTINGS",
    "BRANCH_PARAMETERS",
    "METHODS",
    "AdamSettings",
    "BranchAdmittances",
    "BranchFlows",
    "BusType",
    "Contingencies",
    "DescentState",
    "Equations",
    "Grid",
    "HistoryPoint",
    "NotConverged",
    "PowerFlow",
    "PowerFlowLayer",
    "RMSpropSettings",
    "Scenarios",
    "Screening",
    "Solution",
    "Solver",
    "admittances",
    "branch_flows",
    "contingencies",
    "currents_ka",
    "descend",
    "follow",
    "loadings",
    "power_flow",
    "residual",
    "screen",
    "solve",
    "solve_contingencies",
    "start_descent",
    "ybus",
    "ybus_sparse",
]
