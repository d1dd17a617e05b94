from __future__ import annotations

import pytest
import torch

from networks.series.nlinear import NLinear


@pytest.mark.parametrize("individual", [False, True])
def test_forecast_moves_with_the_level(individual: bool) -> None:
    history = torch.randn(3, 40, 2, dtype=torch.float64)
    shift = torch.tensor([5.0, -200.0], dtype=torch.float64)
    net = NLinear(40, 10, 2, individual).double()
    torch.testing.assert_close(net(history + shift), net(history) + shift)


def test_zero_map_is_persistence() -> None:
    net = NLinear(40, 10, 2)
    torch.nn.init.zeros_(net.map.weight)
    torch.nn.init.zeros_(net.map.bias)
    history = torch.randn(3, 40, 2)
    assert torch.equal(net(history), history[:, -1:].expand(-1, 10, -1))
