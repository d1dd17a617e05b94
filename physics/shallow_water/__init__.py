"""Rotating shallow water on the sphere: spectral transform, equations, a circulation with mountains, trajectories."""

from physics.shallow_water.circulation import Relaxation, balanced_flow, mountains, two_jets
from physics.shallow_water.equations import GRAVITY_M_S2, OMEGA_PER_S, ShallowWaterEquations, State, stable_step
from physics.shallow_water.generator import FIELDS, SphericalShallowWater
from physics.shallow_water.legendre import gaussian_latitudes
from physics.shallow_water.transform import EARTH_RADIUS_M, SphericalTransform

__all__ = [
    "EARTH_RADIUS_M",
    "FIELDS",
    "GRAVITY_M_S2",
    "OMEGA_PER_S",
    "Relaxation",
    "ShallowWaterEquations",
    "SphericalShallowWater",
    "SphericalTransform",
    "State",
    "balanced_flow",
    "gaussian_latitudes",
    "mountains",
    "stable_step",
    "two_jets",
]
