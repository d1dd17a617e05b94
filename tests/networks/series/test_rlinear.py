from __future__ import annotations

import pytest
import torch

from networks.series.rlinear import RLinear


@pytest.mark.parametrize("affine", [False, True])
def test_forecast_moves_with_level_and_scale(affine: bool) -> None:
    history = torch.randn(3, 40, 2, dtype=torch.float64)
    net = RLinear(40, 10, 2, affine=affine, eps=0.0).double()
    if affine:
        torch.nn.init.uniform_(net.normalization.weight, 0.5, 2.0)
        torch.nn.init.normal_(net.normalization.bias)
    shift = torch.tensor([5.0, -200.0], dtype=torch.float64)
    scale = torch.tensor([0.01, 30.0], dtype=torch.float64)
    torch.testing.assert_close(net(history * scale + shift), net(history) * scale + shift)


def test_zero_map_is_the_mean_of_the_window() -> None:
    net = RLinear(40, 10, 2).double()
    torch.nn.init.zeros_(net.map.weight)
    torch.nn.init.zeros_(net.map.bias)
    history = torch.randn(3, 40, 2, dtype=torch.float64)
    torch.testing.assert_close(net(history), history.mean(1, keepdim=True).expand(-1, 10, -1))
