from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.metrics.weather import (
    WeatherScores,
    ZonalSpectrum,
    anomaly_correlation,
    area_mean,
    products,
    zonal_coefficients,
    zonal_power,
)

H, W, V = 6, 12, 3


def latitude_weight() -> torch.Tensor:
    cos = torch.cos(torch.deg2rad(torch.linspace(75, -75, H, dtype=torch.float64)))
    return cos * H / cos.sum()


def fields(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, H, W, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_area_mean_of_known_fields():
    weight = latitude_weight()
    assert torch.allclose(area_mean(torch.ones(H, W, V), weight, W), torch.ones(V, dtype=torch.float64))
    row = torch.zeros(H, W, 1)
    row[0] = 2.0
    assert float(area_mean(row, weight, W)) == pytest.approx(2 * float(weight[0]) / H)


def test_scores_by_the_definitions():
    weight = latitude_weight()
    truth, forecast, climatology = fields(2, 4), fields(2, 4).flip(0), fields(1, 1)
    sums = products(forecast, truth, climatology, weight, W)
    scores = WeatherScores(4, V)
    scores.update(sums[0], anomaly_correlation(sums), slice(0, V), True, True)
    found = scores.compute()
    a = weight[:, None, None]
    mse = (a * (forecast - truth) ** 2).mean((2, 3)).mean(0)
    assert torch.allclose(found["rmse"], mse.sqrt(), rtol=1e-12)
    f, o = forecast - climatology, truth - climatology
    acc = (a * f * o).sum((2, 3)) / ((a * f * f).sum((2, 3)) * (a * o * o).sum((2, 3))).sqrt()
    assert torch.allclose(found["acc"], acc.mean(0), rtol=1e-12)


def test_perfect_opposite_and_missing_anomalies():
    weight, truth, zero = latitude_weight(), fields(1, 1), torch.zeros(1, 1, H, W, V, dtype=torch.float64)
    for forecast, expected in ((truth, 1.0), (-truth, -1.0), (zero, 0.0)):
        acc = anomaly_correlation(products(forecast, truth, zero, weight, W))
        assert torch.allclose(acc, torch.full_like(acc, expected), atol=1e-12)


def test_bands_and_channels_add_up():
    """What four blocks bring is what the whole field gives."""
    weight = latitude_weight()
    truth, forecast, climatology = fields(3, 2), fields(3, 2).roll(1, -2), fields(1, 1)
    whole = WeatherScores(2, V)
    sums = products(forecast, truth, climatology, weight, W)
    whole.update(sums[0], anomaly_correlation(sums), slice(0, V), True, True)
    parts = []
    for own in (slice(0, 2), slice(2, 3)):
        bands = [
            products(*(x[..., columns, own] for x in (forecast, truth, climatology)), weight, W)
            for columns in (slice(0, 4), slice(4, 12))
        ]
        for number, band in enumerate(bands):
            metric = WeatherScores(2, V)
            first = number == 0 and own.start == 0
            metric.update(band[0], anomaly_correlation(sum(bands)), own, number == 0, first)
            parts.append(metric)
    total = WeatherScores(2, V)
    for metric in parts:
        total.squared += metric.squared
        total.correlation += metric.correlation
        total.samples += metric.samples
    for name, value in whole.compute().items():
        assert torch.allclose(total.compute()[name], value, rtol=1e-12), name


def test_batches_do_not_matter():
    weight = latitude_weight()
    sums = products(fields(5, 2), fields(5, 2).flip(0), torch.zeros(1, 1, H, W, V, dtype=torch.float64), weight, W)
    once, twice = WeatherScores(2, V), WeatherScores(2, V)
    once.update(sums[0], anomaly_correlation(sums), slice(0, V), True, True)
    for part in (sums[:, :2], sums[:, 2:]):
        twice.update(part[0], anomaly_correlation(part), slice(0, V), True, True)
    for name, value in once.compute().items():
        assert torch.allclose(twice.compute()[name], value, rtol=1e-12)


def test_power_of_a_wave_and_parseval():
    weight = latitude_weight()
    lon = 2 * math.pi * torch.arange(W, dtype=torch.float64) / W
    field = (3.0 + 2.0 * torch.cos(2 * lon))[None, :, None].expand(H, W, 1)
    power = zonal_power(zonal_coefficients(field, W), weight, W)[0]
    expected = torch.zeros(W // 2 + 1, dtype=torch.float64)
    expected[0], expected[2] = 9.0, 2.0
    assert torch.allclose(power, expected, atol=1e-12)
    random = fields()
    total = zonal_power(zonal_coefficients(random, W), weight, W).sum(-1)
    assert torch.allclose(total, area_mean(random**2, weight, W), rtol=1e-12)


@pytest.mark.parametrize("width", [12, 11])
def test_spectrum_from_bands(width):
    field = torch.randn(H, width, V, generator=torch.Generator().manual_seed(0))
    whole = zonal_coefficients(field, width)
    bands = zonal_coefficients(field[:, :4], width) + zonal_coefficients(field[:, 4:], width, first=4)
    assert torch.allclose(bands, whole, atol=1e-12)


def test_small_scales_tell_blurring():
    power = torch.ones(2, 1, V, 9)  # of 16 points: waves 2 to 5
    power[..., 6:] = 0
    blurred = power.clone()
    blurred[..., 2:] *= 0.25
    blurred[..., 6:] = 1e3  # what the truth does not have does not count
    spectrum = ZonalSpectrum(1, V, 9)
    spectrum.update(blurred, power, slice(0, V))
    assert torch.allclose(spectrum.compute(), torch.full((1, V), 0.25, dtype=torch.float64))
