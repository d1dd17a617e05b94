from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.cnn import CNN


@pytest.mark.parametrize(("channels", "convolutions"), [(1, 1), (3, 2)])
def test_size_in_closed_form(channels, convolutions):
    widths = (32, 64, 128)
    expected, inputs = 128 * 10 + 10, channels
    for width in widths:
        for _ in range(convolutions):
            expected += 9 * inputs * width + 2 * width
            inputs = width
    net = CNN(10, channels, widths, convolutions)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 3 * convolutions


def test_sizes_that_are_stated():
    assert sum(p.numel() for p in CNN(10, 1).parameters()) == 94_186
    assert sum(p.numel() for p in CNN(10, 3).parameters()) == 94_762


@pytest.mark.parametrize("size", [4, 8, 28, 33])
def test_images_of_every_size_from_the_smallest(size):
    net = CNN(10, 1, (4, 8, 16)).eval()
    assert net(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert net.features(torch.zeros(2, 1, size, size)).shape[-1] == size // 4
    with pytest.raises(ValueError, match=r"data\.image_size: images of 3 x 8 pixels are too small for 3 stages"):
        net(torch.zeros(1, 1, 3, 8))


@pytest.mark.parametrize(("key", "value"), [("widths", []), ("widths", [8, 0]), ("convolutions", 0)])
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=rf"model\.net\.{key}="):
        CNN(**{key: value})
