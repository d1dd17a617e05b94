"""Jigsaw: models whose weights, activations and inputs are cut into blocks over a grid of ranks.

Source: Kieckhefen et al. (SC25, arXiv 2507.05753), in a balanced and exact form. Networks made of these layers are
`networks.weather_mixer`; `strategies.jigsaw` places the ranks.
"""

from parallel.sharding.grid import JigsawGrid, grid_of, make_grid
from parallel.sharding.linear import Plan, sharded_linear
from parallel.sharding.norm import NormPlan, sharded_layer_norm
from parallel.sharding.parameters import clip_grad_norm_, grad_norm, make_parameter
from parallel.sharding.traffic import Traffic

__all__ = [
    "JigsawGrid",
    "NormPlan",
    "Plan",
    "Traffic",
    "clip_grad_norm_",
    "grad_norm",
    "grid_of",
    "make_grid",
    "make_parameter",
    "sharded_layer_norm",
    "sharded_linear",
]
