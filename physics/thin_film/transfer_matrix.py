"""Reflectance, absorptance and transmittance of stacks of thin films: a batched, differentiable transfer-matrix method."""

from __future__ import annotations

from torch import Tensor

from physics.thin_film.surroundings import Surroundings


def transfer_matrix(
    index: Tensor, thickness_nm: Tensor, wavelength_nm: Tensor, surroundings: Surroundings | None = None
) -> Tensor:
    """Spectra of stacks.

    Args:
        index: Refractive index n + ik (k >= 0 absorbs) of the layers from the light side on, complex128 or complex64,
            ``(..., L, W)``.
        thickness_nm: ``(..., L)``, broadcast against ``index``; a layer of thickness 0 is not there.
        wavelength_nm: In vacuum, ``(W,)``.
        surroundings: None: air on both sides, normal incidence.

    Returns:
        R, A and T, ``(..., 3, W)`` in the real type of ``index``; differentiable in ``index`` and ``thickness_nm``.
    """
    raise NotImplementedError
