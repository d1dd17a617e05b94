from __future__ import annotations

import torch

from networks.series.itransformer import ITransformer


def test_channels_may_come_in_any_order() -> None:
    net = ITransformer(48, 12, d_model=32, feed_forward=32).double().eval()
    history = torch.randn(2, 48, 5, dtype=torch.float64)
    marks = torch.randn(2, 48, 4, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(net(history[..., order], marks), net(history, marks)[..., order])


def test_channels_attend_to_each_other_and_to_the_marks() -> None:
    net = ITransformer(48, 12, d_model=32, feed_forward=32).double().eval()
    history = torch.randn(2, 48, 3, dtype=torch.float64)
    marks = torch.randn(2, 48, 4, dtype=torch.float64)
    forecast = net(history, marks)
    changed = history.clone()
    changed[..., 2] += torch.randn(2, 48, dtype=torch.float64)
    assert not torch.allclose(net(changed, marks)[..., 0], forecast[..., 0])
    assert not torch.allclose(net(history, marks + torch.randn_like(marks)), forecast)
    net.use_marks = False
    assert torch.equal(net(history, marks), net(history))


def test_forecast_moves_with_level_and_scale() -> None:
    net = ITransformer(48, 12, d_model=32, feed_forward=32).double().eval()
    net.normalization.eps = 0.0
    history = torch.randn(2, 48, 3, dtype=torch.float64)
    torch.testing.assert_close(net(7 * history - 100), 7 * net(history) - 100)
