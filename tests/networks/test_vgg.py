from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.vgg import NUM_PARAMETERS, VGG, final_size

SMALL = {"depth": 11, "width": 0.25, "pool_stride": 2, "image_size": 64}


def test_size_is_the_published_one():
    assert sum(p.numel() for p in VGG().parameters()) == NUM_PARAMETERS == 20_035_266
    assert sum(p.numel() for p in VGG(**SMALL).parameters()) == 578_466


def test_layers_are_those_of_the_published_code():
    layers: list[nn.Module] = []
    channels = 1
    for x in [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]:
        if x == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=3))
        else:
            layers += [nn.Conv2d(channels, x, kernel_size=3, padding=1), nn.BatchNorm2d(x), nn.ReLU(inplace=True)]
            channels = x
    features = nn.Sequential(*layers, nn.AvgPool2d(kernel_size=1, stride=2))
    net = VGG(image_size=150)
    assert net.features.state_dict().keys() == features.state_dict().keys()
    features.load_state_dict(net.features.state_dict())
    image = torch.rand(2, 1, 150, 150)
    net.eval(), features.eval()
    with torch.no_grad():
        assert torch.equal(net(image), net.classifier(features(image).flatten(1)))


def test_sizes_through_the_poolings():
    sizes, size = [224], 224
    for _ in range(5):
        size = nn.MaxPool2d(2, 3)(torch.zeros(1, 1, size, size)).shape[-1]
        sizes.append(size)
    assert sizes == [224, 75, 25, 8, 3, 1] and final_size(224, 3) == 1


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_final_size_is_what_the_layers_leave(stride):
    pools = nn.Sequential(*[nn.MaxPool2d(2, stride) for _ in range(5)], nn.AvgPool2d(1, 2))
    for size in (*range(1, 40), 64, 95, 96, 121, 122, 150, 224, 300):
        if final_size(size, stride) == 0:
            with pytest.raises(RuntimeError):
                pools(torch.zeros(1, 1, size, size))
        else:
            assert pools(torch.zeros(1, 1, size, size)).shape[-1] == final_size(size, stride), size


@pytest.mark.parametrize(
    ("size", "stride", "why"), [(121, 3, "too small"), (608, 3, "too large"), (31, 2, "too small")]
)
def test_sizes_that_do_not_fit_are_refused(size, stride, why):
    low, high = {3: (122, 607), 2: (32, 95)}[stride]
    with pytest.raises(
        ValueError, match=rf"model\.net\.image_size: images of {size} x {size} .*{why}.*{low} to {high}"
    ):
        VGG(11, width=0.25, pool_stride=stride, image_size=size)
    for fitting in (low, high):
        net = VGG(11, width=0.05, pool_stride=stride, image_size=fitting).eval()
        assert net(torch.zeros(1, 1, fitting, fitting)).shape == (1, 2)


def test_images_of_another_size_are_refused_with_a_clear_message():
    net = VGG(**SMALL).eval()
    assert net(torch.zeros(1, 1, 40, 90)).shape == (1, 2)  # fits all the same
    with pytest.raises(ValueError, match=r"data\.image_size: images of 20 x 64 pixels are too small"):
        net(torch.zeros(1, 1, 20, 64))


@pytest.mark.parametrize(("key", "value"), [("depth", 12), ("width", 0), ("pool_stride", 0), ("head", "x")])
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=rf"model\.net\.{key}='?{value}"):
        VGG(**SMALL | {key: value})


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_depth_is_the_name_of_the_original_with_its_three_linear_layers(depth):
    net = VGG(depth, width=0.05)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) + 3 == depth


def test_sizes_of_the_published_variants():
    with torch.device("meta"):
        original = {depth: VGG(depth, 1000, 3, pool_stride=2, head="original") for depth in (11, 13, 16, 19)}
        small = VGG(16, 10, 3, pool_stride=2, image_size=32)
    sizes = {depth: sum(p.numel() for p in net.parameters()) for depth, net in original.items()}
    assert sizes == {11: 132_868_840, 13: 133_053_736, 16: 138_365_992, 19: 143_678_248}
    assert sum(p.numel() for p in small.parameters()) == 14_728_266
    assert original[16].state_dict()["classifier.6.weight"].shape == (1000, 4096)


def test_the_original_head_takes_images_of_any_size():
    net = VGG(11, 10, 3, 0.05, 2, 64, "original").eval()
    for size in (32, 64, 100):
        assert net(torch.zeros(1, 3, size, size)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"images of 20 x 20 pixels are too small"):
        net(torch.zeros(1, 3, 20, 20))


def test_width_scales_every_layer():
    whole, half = (VGG(11, 10, 3, width, 2, 32) for width in (0.5, 0.25))
    for a, b in zip(whole.features, half.features, strict=True):
        if isinstance(a, nn.Conv2d):
            assert a.out_channels == 2 * b.out_channels
