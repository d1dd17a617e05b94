from __future__ import annotations

import pytest
import torch

from networks.series.cyclenet import CycleNet


@pytest.mark.parametrize("origin", [48, 55, 71, 24 * 300 + 13, 10])
def test_known_cycle_is_forecast_exactly_at_any_phase(origin: int) -> None:
    """With Q the cycle itself the residual is zero, and a map without bias keeps it zero."""
    cycle = torch.randn(24, 3, dtype=torch.float64)
    net = CycleNet(48, 100, 3, cycle_length=24, instance_norm=False).double()
    with torch.no_grad():
        net.cycle.copy_(cycle)
        net.map.bias.zero_()
    signal = cycle[torch.arange(origin - 48, origin + 100) % 24][None]
    assert torch.equal(net(signal[:, :48], origin=torch.tensor([origin])), signal[:, 48:])


def test_known_cycle_with_normalisation_follows_level_and_scale() -> None:
    cycle = torch.randn(24, 2, dtype=torch.float64)
    cycle = (cycle - cycle.mean(0)) / cycle.std(0, correction=0)
    net = CycleNet(48, 30, 2, cycle_length=24).double()
    with torch.no_grad():
        net.cycle.copy_(cycle)
        net.map.bias.zero_()
    signal = 900.0 + 150.0 * cycle[torch.arange(7, 7 + 78) % 24][None]
    forecast = net(signal[:, :48], origin=torch.tensor([7 + 48]))
    torch.testing.assert_close(forecast, signal[:, 48:], rtol=1e-6, atol=0)


def test_phase_is_taken_per_window() -> None:
    net = CycleNet(48, 24, 2, cycle_length=24).double()
    torch.nn.init.normal_(net.cycle)
    history = torch.randn(3, 48, 2, dtype=torch.float64)
    origin = torch.tensor([100, 107, 124])
    together = net(history, origin=origin)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], net(history[i : i + 1], origin=origin[i : i + 1]))
    same = history[:1].expand(3, -1, -1)
    forecast = net(same, origin=origin)
    torch.testing.assert_close(forecast[0], forecast[2])  # a whole cycle later
    assert not torch.allclose(forecast[0], forecast[1])


@pytest.mark.parametrize("map", ["linear", "mlp"])
def test_cycle_is_learned_from_data(map: str) -> None:
    """Windows far shorter than the cycle: only Q can know what comes next."""
    torch.manual_seed(0)
    cycle = torch.randn(24, 1)
    origin = torch.arange(100, 300)
    signal = cycle[torch.arange(400) % 24]
    net = CycleNet(2, 12, 1, cycle_length=24, map=map, d_model=8, instance_norm=False)
    assert not net.cycle.any()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    history = torch.stack([signal[o - 2 : o] for o in origin])
    target = torch.stack([signal[o : o + 12] for o in origin])
    for _ in range(400):
        loss = (net(history, origin=origin) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * target.var()
