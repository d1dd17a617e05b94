"""The residual network of 16, 32 and 64 channels: published sizes, shapes, mistakes."""

from __future__ import annotations

import pytest
import torch

from networks.cifar_resnet import CifarResNet


@pytest.mark.parametrize(("depth", "parameters"), [(20, 272_474), (110, 1_730_714)])
def test_sizes(depth, parameters):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


def test_shapes():
    net = CifarResNet(8, num_classes=7, num_channels=1, width=0.5).eval()
    image = torch.randn(2, 1, 32, 32)
    assert net(image).shape == (2, 7)
    assert net.features(image).shape == (2, 32, 8, 8)
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 8


@pytest.mark.parametrize(("options", "message"), [({"depth": 18}, "must be 6 n"), ({"width": 0.01}, "no channels")])
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        CifarResNet(**options)
