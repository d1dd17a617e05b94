"""Classical algorithms on arrays that are split over all processes, as Lightning modules.

A training step is one iteration over the rows that each process holds, and an epoch is one pass over the data. So
callbacks, loggers, checkpoints and resumed runs work as for networks, and a checkpoint fits any number of processes.
"""

from lightning_modules.arrays.base import ClassicalModule
from lightning_modules.arrays.classification import GaussianNBModule, KNNModule
from lightning_modules.arrays.clustering import KMeansModule, SpectralModule
from lightning_modules.arrays.components import DMDModule, PCAModule
from lightning_modules.arrays.regression import LassoModule, RidgeModule
from lightning_modules.arrays.statistics import MomentsModule, PairwiseModule

__all__ = [
    "ClassicalModule",
    "DMDModule",
    "GaussianNBModule",
    "KMeansModule",
    "KNNModule",
    "LassoModule",
    "MomentsModule",
    "PCAModule",
    "PairwiseModule",
    "RidgeModule",
    "SpectralModule",
]
