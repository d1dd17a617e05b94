"""Scores of weather forecasts: area-weighted errors, anomaly correlation, zonal spectra; exact over blocks of a field.

A rank that holds a band of longitudes and some of the channels brings sums over its block. Errors are sums, so metrics
add them over all ranks; correlations and spectra are not, so their sums are completed over the bands of a sample first
(``JigsawGrid.sum_over_tokens``) and counted by one of its ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.sums import Sums


def area_mean(values: Tensor, weight: Tensor, width: int) -> Tensor:
    """This band's share of the mean over the sphere.

    Args:
        values: (..., H, W, V), W columns of ``width``.
        weight: ``a(phi)``, mean 1, (H,).
        width: Columns of the whole circle.

    Returns:
        (..., V), float64.
    """
    by_row = values.double().sum(-2)
    return torch.einsum("...hv,h->...v", by_row, weight.to(by_row)) / (len(weight) * width)


def products(forecast: Tensor, truth: Tensor, climatology: Tensor, weight: Tensor, width: int) -> Tensor:
    """This band's share of everything that scores are made of.

    Args:
        forecast: (B, L, H, W, V).
        truth: The same shape.
        climatology: The same shape, or one that broadcasts.
        weight: ``a(phi)``, (H,).
        width: Columns of the whole circle.

    Returns:
        (4, B, L, V), float64: means of ``(f - o)^2``, ``f' o'``, ``f'^2``, ``o'^2``, anomalies from the climatology.
    """
    f, o = forecast.double() - climatology, truth.double() - climatology
    parts = [(f - o).square(), f * o, f.square(), o.square()]
    return torch.stack([area_mean(part, weight, width) for part in parts])


def anomaly_correlation(sums: Tensor) -> Tensor:
    """ACC of every sample, (B, L, V), from the complete sums (4, B, L, V); 0 where there is no anomaly."""
    _, cross, forecast, truth = sums
    size = (forecast * truth).sqrt()
    return torch.where(size > 0, cross / size.clamp(min=1e-300), 0.0)


def zonal_coefficients(field: Tensor, width: int, first: int = 0) -> Tensor:
    """This band's share of the Fourier coefficients along circles of latitude.

    Args:
        field: (..., H, W, V).
        width: Columns K of the whole circle.
        first: Number of the first column here.

    Returns:
        (..., H, V, M), complex128, M = K // 2 + 1; the sum over all bands has ``|c_0|`` equal to the zonal mean.
    """
    rows = field.double().movedim(-2, -1)
    if rows.shape[-1] == width:
        return torch.fft.rfft(rows) / width
    columns = torch.arange(first, first + rows.shape[-1], dtype=torch.float64, device=field.device)
    orders = torch.arange(width // 2 + 1, dtype=torch.float64, device=field.device)
    wave = torch.polar(torch.ones_like(columns)[:, None], -2 * math.pi / width * columns[:, None] * orders)
    return rows.to(wave.dtype) @ wave / width


def zonal_power(coefficients: Tensor, weight: Tensor, width: int) -> Tensor:
    """Power by zonal wavenumber, averaged over the sphere.

    Args:
        coefficients: Complete ones, (..., H, V, M).
        weight: ``a(phi)``, (H,).
        width: Columns of the whole circle.

    Returns:
        (..., V, M), float64; its sum over M is the mean square.
    """
    power = coefficients.real.square() + coefficients.imag.square()
    sides = torch.full((power.shape[-1],), 2.0, dtype=power.dtype, device=power.device)
    sides[0] = 1.0
    if width % 2 == 0:
        sides[-1] = 1.0
    return torch.einsum("...hvm,h->...vm", power, weight.to(power)) / len(weight) * sides


class WeatherScores(Sums):
    """RMSE by lead and channel, ``sqrt(mean over samples and sphere of (f - o)^2)``, and the mean of the samples' ACC.

    Args:
        leads: L.
        channels: V, of the whole field.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    squared: Tensor
    correlation: Tensor
    samples: Tensor

    def __init__(self, leads: int, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("squared", "correlation"):
            self.add_state(name, torch.zeros(leads, channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, squared: Tensor, correlation: Tensor, own: slice, counts_band: bool, counts_samples: bool) -> None:
        """Add samples.

        Args:
            squared: This band's share of the mean squared errors, (B, L, own channels).
            correlation: ACC of the samples, (B, L, own channels).
            own: Which channels this rank has.
            counts_band: Whether this rank is the one of its bands that counts correlations.
            counts_samples: Whether it is the one of its instance that counts samples.
        """
        self.squared[:, own] += squared.sum(0)
        if counts_band:
            self.correlation[:, own] += correlation.sum(0)
        if counts_samples:
            self.samples += len(squared)

    @override
    def compute(self) -> dict[str, Tensor]:
        """``rmse`` and ``acc``, (L, V) each, in the units of the fields."""
        return {"rmse": (self.squared / self.samples).sqrt(), "acc": self.correlation / self.samples}


class ZonalSpectrum(Sums):
    """Mean power of forecast and truth by lead, channel and zonal wavenumber.

    Args:
        leads: L.
        channels: V, of the whole field.
        orders: M, zonal wavenumbers with 0.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    power: Tensor

    def __init__(self, leads: int, channels: int, orders: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("power", torch.zeros(2, leads, channels, orders, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, forecast: Tensor, truth: Tensor, own: slice, counts_band: bool = True) -> None:
        """Add samples.

        Args:
            forecast: Its power, (B, L, own channels, M).
            truth: The same of the truth.
            own: Which channels this rank has.
            counts_band: Whether this rank is the one of its bands that counts them.
        """
        if counts_band:
            self.power[:, :, own] += torch.stack([forecast.sum(0), truth.sum(0)])

    @override
    def compute(self) -> Tensor:
        """Power of the forecast over that of the truth in small scales, (L, V): below 1 is blurred, above 1 is noise.

        These are waves of 3 to 8 grid lengths; shorter ones a spectral model of the atmosphere does not resolve.
        """
        width = 2 * (self.power.shape[-1] - 1)
        short = self.power[..., width // 8 : width // 3 + 1].sum(-1)
        return short[0] / short[1]
