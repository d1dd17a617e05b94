"""Local refinement of thicknesses by gradients through the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from physics.thin_film.surroundings import Surroundings


@dataclass(frozen=True)
class Refined:
    """Refined candidates, in the order in which they came.

    Attributes:
        material: ``(N, L)`` int64, rows of the index table; -1 where there is no layer. Layers first, then -1.
        thickness_nm: ``(N, L)`` float64, 0 where there is no layer.
        spectrum: R, A, T ``(N, 3, W)`` float64.
        mae: Weighted mean absolute error, ``(N,)``; inf where the simulation failed.
        start_mae: The same before refinement, ``(N,)``.
    """

    material: Tensor
    thickness_nm: Tensor
    spectrum: Tensor
    mae: Tensor
    start_mae: Tensor


class Refiner:
    """Continuous thicknesses that bring spectra closer to their targets.

    Args:
        index: n + ik of the materials, ``(M, W)`` complex128.
        wavelength_nm: ``(W,)``.
        surroundings: None: air on both sides, normal incidence.
        method: ``adam`` (all candidates at once) or ``lbfgs`` (one by one, with bounds).
        steps: Steps of Adam, or iterations of L-BFGS-B at most.
        lr_nm: Step of Adam in nm at the start; decays to 0.
        bounds_nm: Least and largest thickness.
        grid_nm: Round the result to multiples of this; None: continuous.
        drop_below_nm: Layers thinner than this are dropped and equal neighbours merged.
    """

    def __init__(
        self,
        index: Tensor,
        wavelength_nm: Tensor,
        surroundings: Surroundings | None = None,
        method: Literal["adam", "lbfgs"] = "adam",
        steps: int = 150,
        lr_nm: float = 6.0,
        bounds_nm: tuple[float, float] = (0.0, 500.0),
        grid_nm: float | None = None,
        drop_below_nm: float = 1.0,
    ) -> None:
        raise NotImplementedError

    def __call__(self, material: Tensor, thickness_nm: Tensor, target: Tensor, weight: Tensor | None = None) -> Refined:
        """Refine candidates.

        Args:
            material: ``(N, L)`` int64, -1 for no layer.
            thickness_nm: ``(N, L)``.
            target: ``(N, 3, W)`` or ``(3, W)``.
            weight: ``(N, 3, W)`` or ``(3, W)``; None: all ones.
        """
        raise NotImplementedError

    def simulate(self, material: Tensor, thickness_nm: Tensor) -> Tensor:
        """R, A, T ``(N, 3, W)``; differentiable in the thickness."""
        raise NotImplementedError

    def robustness(
        self,
        material: Tensor,
        thickness_nm: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        relative: float = 0.01,
        draws: int = 100,
        seed: int = 0,
    ) -> Tensor:
        """Errors ``(N, draws)`` under independent Gaussian errors of the thicknesses, relative deviation given."""
        raise NotImplementedError
