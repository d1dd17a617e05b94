"""What parallel training costs in energy and time, fitted to runs, and what a planned run will cost.

Huber et al., *Energy Consumption in Parallel Neural Network Training*, arXiv 2508.07706. Symbols as there and in
docs/experiments/energy_scaling.md: n devices on m nodes, wall time T, device hours H = n T, node hours M = m T,
S samples, U optimizer steps, E energy of all nodes (kWh, no overhead of the building), kappa = E / H (kW).
"""

from physics.energy_cost.configuration import Configuration, Record, gradient_updates, mean_over_seeds
from physics.energy_cost.fitting import CostFit, Proportional, fit_cost, fit_proportional, leave_one_out, nested_models
from physics.energy_cost.planning import Forecast, TimeFit, fit_time, forecast, knee, pareto_front

__all__ = [
    "Configuration",
    "CostFit",
    "Forecast",
    "Proportional",
    "Record",
    "TimeFit",
    "fit_cost",
    "fit_proportional",
    "fit_time",
    "forecast",
    "gradient_updates",
    "knee",
    "leave_one_out",
    "mean_over_seeds",
    "nested_models",
    "pareto_front",
]
