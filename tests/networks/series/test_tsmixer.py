from __future__ import annotations

import pytest
import torch

from networks.series.tsmixer import MixerLayer, TSMixer, WindowBatchNorm


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_time_mixing_keeps_channels_and_channel_mixing_keeps_steps(norm: str) -> None:
    mixer = MixerLayer(20, 4, feed_forward=16, dropout=0.0, norm=norm).double().eval()
    if norm == "layer":  # its statistics span the window; only the maps behind it are looked at here
        mixer.time_mixing[0] = mixer.channel_mixing[0] = torch.nn.Identity()
    window = torch.randn(2, 20, 4, dtype=torch.float64)
    changed = window.clone()
    changed[:, 5, 1] += 1.0
    along_time = (mixer.time_mixing(changed) - mixer.time_mixing(window)).abs() > 0
    assert along_time[..., 1].any()
    assert not along_time[..., [0, 2, 3]].any()
    along_channels = (mixer.channel_mixing(changed) - mixer.channel_mixing(window)).abs() > 0
    assert along_channels[:, 5].all()
    assert not along_channels[:, [step for step in range(20) if step != 5]].any()


def test_without_mixing_it_is_the_head() -> None:
    net = TSMixer(20, 8, 4, instance_norm=False).double().eval()
    for mixer in net.mixers:
        for module in (mixer.time_mixing[1], mixer.channel_mixing[4]):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    history = torch.randn(2, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(net(history), net.head(history))


def test_window_batch_norm() -> None:
    norm = WindowBatchNorm(20 * 4).double()
    windows = 3 + 5 * torch.randn(64, 20, 4, dtype=torch.float64)
    normalized = norm(windows)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(20, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    running_mean = norm.running_mean.clone()
    single = norm(windows[:1])  # one window: as in evaluation, and the running statistics stay
    assert torch.equal(norm.running_mean, running_mean)
    assert torch.equal(single, norm.eval()(windows[:1]))


def test_forecast_moves_with_level_and_scale() -> None:
    net = TSMixer(20, 8, 4).double().eval()
    net.normalization.eps = 0.0
    history = torch.randn(2, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(net(7 * history - 100), 7 * net(history) - 100)
