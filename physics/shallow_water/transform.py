"""Spherical harmonic transform on a Gaussian grid, and the vector calculus that shallow water needs of it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from physics.shallow_water.legendre import gaussian_latitudes, legendre_functions

EARTH_RADIUS_M = 6.37122e6


class SphericalTransform:
    """Fields on a Gaussian grid as triangularly truncated series of spherical harmonics, and back.

    A field (..., lat, lon), latitudes from north to south, is ``f = sum_m sum_l f_lm P_lm(mu) e^(i m lon)`` with
    ``f_l(-m) = conj(f_lm)``; its coefficients are complex, (..., m, l) with both indices from 0 to T, zero for l < m.
    Winds are handled as images ``U = u cos(lat)``, ``V = v cos(lat)``, whose transform has no pole problem.

    Args:
        height: Latitudes J.
        width: Longitudes K, from 0 eastward.
        truncation: T. Products of two fields are exact where ``3 T + 1 <= min(K, 2 J)``.
        radius_m: Of the sphere.
        device: Where the tables lie.

    Raises:
        ValueError: If the grid cannot hold the truncation.
    """

    def __init__(
        self,
        height: int,
        width: int,
        truncation: int,
        radius_m: float = EARTH_RADIUS_M,
        device: torch.device | str = "cpu",
    ) -> None:
        limit = min((width - 1) // 2, height - 1)
        if not 1 <= truncation <= limit:
            raise ValueError(
                f"truncation={truncation}: a grid of {height} x {width} holds degrees from 1 to {limit} "
                f"(products of fields without aliasing: {min(width - 1, 2 * height - 1) // 3})"
            )
        self.height, self.width, self.truncation, self.radius_m = height, width, truncation, radius_m
        mu, weights = gaussian_latitudes(height)
        p, h = legendre_functions(truncation, mu)
        t = truncation + 1

        def make(array: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(array, dtype=np.float64), device=device)

        self.mu, self.weights = make(mu), make(weights)
        self.latitude = torch.asin(self.mu)  # rad
        self.longitude = torch.arange(width, dtype=torch.float64, device=device) * (2 * math.pi / width)
        self.cos_latitude = make(np.sqrt(1 - mu**2))
        # Tables of products over one zonal wavenumber: synthesis (m, lat, l), analysis (m, l, lat).
        self._p, self._h = make(p.transpose(0, 2, 1)), make(h.transpose(0, 2, 1))
        self._pw = make(p * weights)
        self._pw_cos = make(p * (weights / (1 - mu**2)))  # with the 1 / cos^2 of divergences
        self._hw_cos = make(h * (weights / (1 - mu**2)))
        self.order = torch.arange(t, dtype=torch.float64, device=device)[:, None].expand(t, t)
        degree = torch.arange(t, dtype=torch.float64, device=device)[None].expand(t, t)
        self.degree = degree
        self.valid = (degree >= self.order).double()
        self.laplacian_eigenvalues = -degree * (degree + 1) / radius_m**2  # (m, l), 1 / m^2
        inverse = torch.zeros_like(degree)
        inverse[:, 1:] = 1 / self.laplacian_eigenvalues[:, 1:]
        self.inverse_laplacian_eigenvalues = inverse * self.valid
        self._im = 1j * self.order

    # ----------------------------------------------------------------------------------------------- the transform

    def _to_orders(self, field: Tensor) -> Tensor:
        """Fourier coefficients (m, lat, 2 F) of fields (F, lat, lon): real parts, then imaginary ones."""
        spectrum = torch.fft.rfft(field, dim=-1)[..., : self.truncation + 1] / self.width
        ordered = spectrum.permute(2, 1, 0)
        return torch.cat([ordered.real, ordered.imag], -1)

    def _from_orders(self, orders: Tensor) -> Tensor:
        """Fields (F, lat, lon) of Fourier coefficients (m, lat, 2 F)."""
        real, imaginary = orders.chunk(2, -1)
        spectrum = torch.complex(real, imaginary).permute(2, 1, 0)
        return torch.fft.irfft(spectrum * self.width, n=self.width, dim=-1)

    @staticmethod
    def _stack(coefficients: Tensor) -> Tensor:
        """(F, m, l) complex as (m, l, 2 F) real."""
        ordered = coefficients.permute(1, 2, 0)
        return torch.cat([ordered.real, ordered.imag], -1)

    @staticmethod
    def _unstack(stacked: Tensor) -> Tensor:
        real, imaginary = stacked.chunk(2, -1)
        return torch.complex(real, imaginary).permute(2, 0, 1)

    def analysis(self, field: Tensor) -> Tensor:
        """Coefficients (..., m, l) of a field (..., lat, lon)."""
        flat = field.reshape(-1, self.height, self.width)
        out = self._unstack(torch.bmm(self._pw, self._to_orders(flat)))
        return out.reshape(*field.shape[:-2], *out.shape[-2:])

    def synthesis(self, coefficients: Tensor) -> Tensor:
        """Field (..., lat, lon) of coefficients (..., m, l)."""
        flat = coefficients.reshape(-1, *coefficients.shape[-2:])
        out = self._from_orders(torch.bmm(self._p, self._stack(flat)))
        return out.reshape(*coefficients.shape[:-2], self.height, self.width)

    def laplacian(self, coefficients: Tensor) -> Tensor:
        """Coefficients of the Laplacian, 1 / m^2 times the unit of the field."""
        return coefficients * self.laplacian_eigenvalues

    def inverse_laplacian(self, coefficients: Tensor) -> Tensor:
        """Coefficients of the field without mean whose Laplacian this is."""
        return coefficients * self.inverse_laplacian_eigenvalues

    def mean(self, field: Tensor) -> Tensor:
        """Mean over the sphere of a field (..., lat, lon)."""
        return (field.mean(-1) * self.weights).sum(-1) / 2

    # --------------------------------------------------------------------------------------------- vector calculus

    def winds(self, vorticity: Tensor, divergence: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``U, V`` on the grid, m/s, of coefficients of vorticity and divergence, 1/s.

        ``U = (i m chi P - psi H) / a`` and ``V = (i m psi P + chi H) / a`` with the stream function psi and the
        velocity potential chi.
        """
        none = vorticity.new_zeros(0, *vorticity.shape[-2:])
        return self.synthesis_with_winds(vorticity, divergence, none)[0]

    def synthesis_with_winds(
        self, vorticity: Tensor, divergence: Tensor, scalars: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Images of winds, and fields of scalars, in one inverse transform.

        Args:
            vorticity: Coefficients (..., m, l), 1/s.
            divergence: The same shape, 1/s.
            scalars: Coefficients (..., m, l) of any leading shape.

        Returns:
            ``(U, V)`` of the leading shape of ``vorticity``, and fields of the leading shape of ``scalars``.
        """
        lead, t = vorticity.shape[:-2], self.truncation + 1
        psi = self._stack(self.inverse_laplacian(vorticity).reshape(-1, t, t) / self.radius_m)
        chi = self._stack(self.inverse_laplacian(divergence).reshape(-1, t, t) / self.radius_m)
        plain = self._stack(scalars.reshape(-1, t, t))
        count = psi.shape[-1]
        by_p = torch.bmm(self._p, torch.cat([psi, chi, plain], -1))
        by_h = torch.bmm(self._h, torch.cat([psi, chi], -1))
        m = self.order[:, :1, None]
        u = m * _times_i(by_p[..., count : 2 * count]) - by_h[..., :count]
        v = m * _times_i(by_p[..., :count]) + by_h[..., count:]
        parts = [u.chunk(2, -1), v.chunk(2, -1), by_p[..., 2 * count :].chunk(2, -1)]
        orders = torch.cat([part[0] for part in parts] + [part[1] for part in parts], -1)
        fields = self._from_orders(orders)
        number = count // 2
        shape = (*lead, self.height, self.width)
        image = fields[:number].reshape(shape), fields[number : 2 * number].reshape(shape)
        return image, fields[2 * number :].reshape(*scalars.shape[:-2], self.height, self.width)

    def divergence_and_curl(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the divergence and of the curl of a vector with images ``(a, b)`` (..., lat, lon).

        After an integration by parts, ``div_lm = sum_j w_j (i m A_m P - B_m H) / (a (1 - mu^2))`` and
        ``curl_lm = sum_j w_j (i m B_m P + A_m H) / (a (1 - mu^2))``.
        """
        lead = a.shape[:-2]
        flat_a, flat_b = (x.reshape(-1, self.height, self.width) for x in (a, b))
        orders = self._to_orders(torch.cat([flat_a, flat_b]))
        by_p, by_h = torch.bmm(self._pw_cos, orders), torch.bmm(self._hw_cos, orders)
        p_a, p_b = _halves(by_p)
        h_a, h_b = _halves(by_h)
        m = self.order[:, :1, None]
        divergence = self._unstack((m * _times_i(p_a) - h_b) / self.radius_m)
        curl = self._unstack((m * _times_i(p_b) + h_a) / self.radius_m)
        shape = (*lead, self.truncation + 1, self.truncation + 1)
        return divergence.reshape(shape), curl.reshape(shape)


def _times_i(stacked: Tensor) -> Tensor:
    """Return i times numbers given as (..., 2 F): real parts, then imaginary ones."""
    real, imaginary = stacked.chunk(2, -1)
    return torch.cat([-imaginary, real], -1)


def _halves(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second half of the F numbers of (..., 2 F)."""
    parts = stacked.unflatten(-1, (2, 2, -1))
    return parts[..., 0, :].flatten(-2), parts[..., 1, :].flatten(-2)
