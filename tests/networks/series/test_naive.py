from __future__ import annotations

import inspect

import pytest
import torch

from networks.series.naive import ProfileForecast, ProfileLinear, SeasonalNaive


@pytest.mark.parametrize("num_seasons", [1, 7])
@pytest.mark.parametrize("horizon", [5, 24, 100, 168, 400])
@pytest.mark.parametrize("history_length", [168, 175])
def test_seasonal_naive_is_exact_on_a_periodic_signal(num_seasons: int, horizon: int, history_length: int) -> None:
    period = 24 * num_seasons
    cycle = torch.randn(period, 3)
    steps = torch.arange(history_length + horizon)
    signal = cycle[steps % period].expand(2, -1, -1)
    net = SeasonalNaive(24, horizon, num_seasons)
    assert torch.equal(net({"history": signal[:, :history_length]}), signal[:, history_length:])


def test_seasonal_naive_repeats_the_last_block_only() -> None:
    history = torch.arange(10.0).reshape(1, 10, 1)
    assert SeasonalNaive(3, 7)({"history": history}).flatten().tolist() == [7, 8, 9, 7, 8, 9, 7]


def test_seasonal_naive_names_a_short_history() -> None:
    with pytest.raises(ValueError, match="history_length=100"):
        SeasonalNaive(24, 24, num_seasons=7)({"history": torch.zeros(1, 100, 1)})
    with pytest.raises(ValueError, match="season_length=0"):
        SeasonalNaive(0, 24)


def test_profile_forecast_is_the_profile() -> None:
    profile = torch.randn(2, 24, 3)
    assert torch.equal(ProfileForecast()({"forecast_profile": profile}), profile)
    assert not list(ProfileForecast().parameters())
    assert not inspect.signature(ProfileForecast).parameters  # a misspelt configuration key must be found


def profile_batch(size: int = 4, history_length: int = 48, horizon: int = 24, channels: int = 3) -> dict:
    return {
        "history": torch.randn(size, history_length, channels, dtype=torch.float64),
        "history_profile": torch.randn(size, history_length, channels, dtype=torch.float64),
        "forecast_profile": torch.randn(size, horizon, channels, dtype=torch.float64),
    }


def test_profile_linear_starts_as_the_profile_and_learns() -> None:
    batch = profile_batch()
    net = ProfileLinear(48, 24).double()
    forecast = net(batch)
    assert torch.equal(forecast, batch["forecast_profile"])
    forecast.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())
    assert sum(parameter.numel() for parameter in ProfileLinear(504, 168).parameters()) == 84_840


def test_profile_linear_adds_the_mapped_residual() -> None:
    batch = profile_batch()
    net = ProfileLinear(48, 24).double()
    with torch.no_grad():
        net.map.weight.copy_(torch.eye(48)[-24:])  # the last day's deviation again
        net.map.bias.fill_(0.5)
    residual = batch["history"] - batch["history_profile"]
    torch.testing.assert_close(net(batch), batch["forecast_profile"] + residual[:, -24:] + 0.5)
