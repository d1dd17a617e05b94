from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.series.dlinear import DLinear, TimeLinear, moving_average


@pytest.mark.parametrize("kernel_size", [1, 3, 25])
def test_moving_average_against_its_definition(kernel_size: int) -> None:
    series = torch.randn(2, 21, 3, dtype=torch.float64)
    expected = torch.empty_like(series)
    for step in range(21):
        around = torch.arange(step - kernel_size // 2, step + kernel_size // 2 + 1).clamp(0, 20)
        expected[:, step] = series[:, around].mean(1)
    torch.testing.assert_close(moving_average(series, kernel_size), expected)


def test_moving_average_keeps_its_digits_at_a_high_level() -> None:
    series = torch.randn(2, 500, 1, dtype=torch.float64)
    level = 2.0**12  # a float32 sum of 500 such values resolves 0.25
    high = moving_average((series + level).float(), 25).double() - level
    torch.testing.assert_close(high, moving_average(series, 25), rtol=0, atol=2e-3)


def test_parts_add_up_to_the_window() -> None:
    history = torch.randn(2, 60, 3, dtype=torch.float64)
    seasonal, trend = DLinear(60, 60, 3).decompose(history)
    torch.testing.assert_close(seasonal + trend, history)
    straight = torch.arange(60, dtype=torch.float64).reshape(1, 60, 1)
    seasonal, _ = DLinear(60, 60, 1).decompose(straight)
    torch.testing.assert_close(seasonal[:, 12:-12], torch.zeros(1, 36, 1, dtype=torch.float64))


@pytest.mark.parametrize("individual", [False, True])
def test_crafted_weights_return_the_decomposition(individual: bool) -> None:
    history = torch.randn(2, 60, 3, dtype=torch.float64)
    net = DLinear(60, 60, 3, individual=individual).double()
    with torch.no_grad():
        for part in (net.seasonal, net.trend):
            part.weight.copy_(torch.eye(60))
            part.bias.zero_()
        torch.testing.assert_close(net(history), history)
        net.seasonal.weight.zero_()
        torch.testing.assert_close(net(history), moving_average(history, 25))


def test_individual_maps_act_on_their_own_channel() -> None:
    history = torch.randn(4, 20, 3, dtype=torch.float64)
    net = TimeLinear(20, 8, 3, individual=True).double()
    for channel in range(3):
        expected = history[..., channel] @ net.weight[channel].T + net.bias[channel]
        torch.testing.assert_close(net(history)[..., channel], expected)


def test_shared_map_is_a_linear_layer() -> None:
    history = torch.randn(4, 20, 3)
    net, linear = TimeLinear(20, 8, 3), nn.Linear(20, 8)
    linear.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(history), linear(history.mT).mT)


def test_it_learns_a_season_with_a_trend() -> None:
    """The parts that the network is made of are fitted to the last digit by gradient descent."""
    torch.manual_seed(0)
    steps = torch.arange(400.0)
    signal = (0.01 * steps + torch.sin(2 * torch.pi * steps / 24)).reshape(-1, 1)
    windows = signal.unfold(0, 96, 1).mT
    net = DLinear(72, 24, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(300):
        loss = (net(windows[:200, :72]) - windows[:200, 72:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (net(windows[250:, :72]) - windows[250:, 72:]).square().mean()
    assert error < 1e-2 * windows[250:, 72:].var()
