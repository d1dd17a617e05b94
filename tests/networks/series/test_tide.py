from __future__ import annotations

import torch

from networks.series.tide import ResidualBlock, TiDE


def small(marks: int = 4) -> TiDE:
    return TiDE(48, 12, marks, d_model=16, temporal_hidden=8).double().eval()


def test_channels_share_the_network_and_do_not_see_each_other() -> None:
    net = small()
    history = torch.randn(2, 48, 3, dtype=torch.float64)
    marks = torch.randn(2, 48, 4, dtype=torch.float64), torch.randn(2, 12, 4, dtype=torch.float64)
    forecast = net(history, *marks)
    for channel in range(3):
        alone = net(history[..., channel : channel + 1], *marks)
        torch.testing.assert_close(forecast[..., channel : channel + 1], alone)


def test_marks_of_past_and_future_are_read() -> None:
    net = small()
    history = torch.randn(2, 48, 3, dtype=torch.float64)
    past, future = torch.randn(2, 48, 4, dtype=torch.float64), torch.randn(2, 12, 4, dtype=torch.float64)
    forecast = net(history, past, future)
    assert not torch.allclose(net(history, past + torch.randn_like(past), future), forecast)
    assert not torch.allclose(net(history, past, future + torch.randn_like(future)), forecast)


def test_temporal_decoder_sees_the_marks_of_its_own_step() -> None:
    """With the coder's output held at zero only the direct way of the marks is left."""
    net = small()
    for parameter in net.coder.parameters():
        torch.nn.init.zeros_(parameter)
    history = torch.randn(1, 48, 2, dtype=torch.float64)
    past, future = torch.randn(1, 48, 4, dtype=torch.float64), torch.randn(1, 12, 4, dtype=torch.float64)
    changed = future.clone()
    changed[:, 7] += torch.randn(4, dtype=torch.float64)
    moved = (net(history, past, changed) - net(history, past, future)).abs() > 0
    assert moved[:, 7].all()
    assert not moved[:, [step for step in range(12) if step != 7]].any()


def test_linear_model_is_contained() -> None:
    net = TiDE(48, 12, 0, d_model=16, temporal_hidden=8, instance_norm=False).double().eval()
    for parameter in net.temporal_decoder.parameters():
        torch.nn.init.zeros_(parameter)
    history = torch.randn(2, 48, 3, dtype=torch.float64)
    torch.testing.assert_close(net(history), net.skip(history.mT).mT)


def test_residual_block_without_hidden_layer_is_its_skip() -> None:
    block = ResidualBlock(6, 8, 4, dropout=0.0, layer_norm=False).double()
    torch.nn.init.zeros_(block.dense[2].weight)
    torch.nn.init.zeros_(block.dense[2].bias)
    features = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(block(features), block.skip(features))
