"""Inverse design of thin films: networks that write stacks, beside the baselines that they must beat."""

from __future__ import annotations

from lightning_modules.thin_film.candidates import Limits, Refinement
from lightning_modules.thin_film.design import InverseDesign

__all__ = ["InverseDesign", "Limits", "Refinement"]
