"""Power flow under Lightning: the paper's descent, exact solvers, outages, identification of parameters."""

from lightning_modules.power_flow.descent import PowerFlowDescent
from lightning_modules.power_flow.identification import GridIdentification
from lightning_modules.power_flow.outages import OutageAnalysis
from lightning_modules.power_flow.solver import PowerFlowSolver

__all__ = ["GridIdentification", "OutageAnalysis", "PowerFlowDescent", "PowerFlowSolver"]
