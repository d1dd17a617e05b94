from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.calendar import day_calendar
from datamodules.series import SeriesDataModule
from datamodules.synthetic_series import SyntheticSeriesDataModule, day_profiles, synthetic_series

SMALL = {"history_length": 168, "horizon": 48, "batch_size": 4}


def test_without_noise_the_profile_forecast_is_exact():
    data = SyntheticSeriesDataModule(["a", "b"], num_days=150, noise=0.0, country="DE", **SMALL)
    data.setup()
    scale = data.target_scale[1]
    batches = list(data.test_dataloader())
    error = torch.cat([(b["forecast_profile"] - b["target"]) * scale for b in batches])
    holidays = torch.cat([b["target_holiday"] for b in batches])
    assert error.abs().max() <= 1e-6 * 100.0  # relative to the level
    assert holidays.any(), "the test part shall contain a holiday"


def test_noise_has_the_stated_size_and_memory():
    clean = synthetic_series(400, noise=0.0).values[:, 0]
    noise = synthetic_series(400, noise=0.05, noise_memory=0.8, seed=3).values[:, 0] - clean
    assert noise.std() == pytest.approx(5.0, rel=0.1)
    assert np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(0.8, abs=0.03)


def test_every_day_has_the_shape_of_its_type():
    series = synthetic_series(14, noise=0.0, countries=["DE"], start="2024-04-29")  # with 1 May, a Wednesday
    types = day_calendar(series.timestamps[0], 14, ["DE"]).day_type[:, 0]
    assert types[2] == 2
    np.testing.assert_allclose(series.values.reshape(14, 24), 100 * day_profiles(24)[types])


def test_season_temperature_regime_walk_and_gaps():
    flat = synthetic_series(365, noise=0.0)
    season = synthetic_series(365, noise=0.0, annual_amplitude=0.2)
    ratio = season.values / flat.values
    assert ratio.max() == pytest.approx(1.2, abs=1e-3) and ratio.min() == pytest.approx(0.8, abs=1e-3)

    warm = synthetic_series(365, noise=0.0, cooling=0.1)
    expected = 100 * 0.1 * np.maximum(warm.temperature - 18, 0)
    np.testing.assert_allclose((warm.values - flat.values)[:, 0], expected, atol=1e-9)
    assert expected.max() > 0

    regime = synthetic_series(100, noise=0.0, regime_change=0.5, regime_factor=0.7).values / flat.values[:2400]
    np.testing.assert_allclose(regime[:1200], 1)
    np.testing.assert_allclose(regime[1200:], 0.7)

    walk = synthetic_series(365, noise=0.0, level_walk=0.01).values / flat.values
    steps = np.diff(walk.reshape(365, 24)[:, 0])
    assert steps.std() == pytest.approx(0.01, rel=0.2)

    gaps = np.isnan(synthetic_series(100, missing_blocks=3, missing_length=5).values)
    assert 5 <= gaps.sum() <= 15


def test_same_seed_same_series_and_half_hours():
    a, b, c = (synthetic_series(10, 2, cycle_length=48, seed=seed).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (480, 2) and not np.array_equal(a, c)


def test_temperature_is_known_for_the_next_horizon():
    data = SyntheticSeriesDataModule(num_days=60, cooling=0.1, known_covariates=["temperature"], **SMALL)
    data.setup()
    assert len(data.timestamps) == 60 * 24
    batch = next(iter(data.predict_dataloader()))
    assert batch["forecast_covariates"].shape == (1, 48, 1) and batch["history_covariates"].shape == (1, 168, 1)
    assert batch["forecast_covariates"].std() > 0 and "target" not in batch


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no covariate 'rain'"):
        SyntheticSeriesDataModule(known_covariates=["rain"])
    with pytest.raises(ValueError, match=r"data\.num_days=0"):
        SyntheticSeriesDataModule(num_days=0)


def test_batch_keys_are_those_of_files():
    assert SyntheticSeriesDataModule.batch_keys == SeriesDataModule.batch_keys
