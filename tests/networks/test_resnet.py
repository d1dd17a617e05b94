from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.resnet import ResNet, SqueezeExcitation
from tests.composing import composed


def size(*args, **kwargs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ResNet(*args, **kwargs).parameters())


@pytest.mark.parametrize(
    ("depth", "published"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)]
)
def test_sizes_are_the_published_ones(depth, published):
    assert size(depth) == published


def test_the_variant_for_small_images_has_its_published_size():
    assert size(18, 10, stem="cifar") == 11_173_962
    assert size(50, 10, stem="cifar") == 23_520_842


def test_the_small_preset_is_made_of_the_blocks_of_resnet_50():
    """At full width it has the 16.0 million parameters of timm.s resnet26."""
    assert size(26) == 15_995_176
    net = composed("data=digits", "model=image_resnet26_s").model.net
    assert (net.depth, net.width, net.stem) == (26, 0.5, "cifar")
    with torch.device("meta"):
        assert size(26, 10, 1, "cifar", 0.5) == 3_502_442
        assert isinstance(ResNet(26).layer1[0].conv3, nn.Conv2d)


@pytest.mark.parametrize(("depth", "millions"), [(50, 35.69), (101, 63.62), (152, 86.62)])
def test_resnet_rs_has_its_published_size(depth, millions):
    assert round(size(depth, stem="rs") / 1e6, 2) == millions


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def published_names(stages: tuple[int, ...], convolutions: int) -> list[str]:
    """Names of a state in torchvision's documented order: blocks of a stage, convolutions of a block."""
    names = ["conv1.weight", *(f"bn1.{entry}" for entry in NORM)]
    for stage, blocks in enumerate(stages, start=1):
        for block in range(blocks):
            for i in range(1, convolutions + 1):
                names += [f"layer{stage}.{block}.conv{i}.weight"]
                names += [f"layer{stage}.{block}.bn{i}.{entry}" for entry in NORM]
            # Where the shape changes: in the first block, but for the first stage of blocks that do not widen.
            if block == 0 and (stage > 1 or convolutions == 3):
                names += [f"layer{stage}.0.downsample.0.weight"]
                names += [f"layer{stage}.0.downsample.1.{entry}" for entry in NORM]
    return [*names, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("depth", "stages", "convolutions", "entries"),
    [(18, (2, 2, 2, 2), 2, 122), (34, (3, 4, 6, 3), 2, 218), (50, (3, 4, 6, 3), 3, 320), (101, (3, 4, 23, 3), 3, 626)],
)
def test_layers_are_named_as_in_the_published_code(depth, stages, convolutions, entries):
    with torch.device("meta"):
        state = ResNet(depth).state_dict()
    names = published_names(stages, convolutions)
    assert len(names) == entries
    assert list(state) == names
    assert state["conv1.weight"].shape == (64, 3, 7, 7) and state["layer2.0.downsample.0.weight"].shape[2:] == (1, 1)
    assert state["layer4.1.bn2.running_mean"].shape == (512,)
    assert state["fc.weight"].shape == (1000, 512 if depth < 50 else 2048)
    assert ("layer1.0.downsample.0.weight" in state) == (depth >= 50)


@pytest.mark.parametrize(("depth", "stem", "pixels"), [(18, "imagenet", 64), (50, "rs", 64), (18, "cifar", 32)])
def test_stages_halve_the_image(depth, stem, pixels):
    net = ResNet(depth, 7, 3, stem, width=0.25).eval()
    left = 4 if stem == "cifar" else 2
    expansion = 4 if depth == 50 else 1
    assert net.features(torch.zeros(2, 3, pixels, pixels)).shape == (2, 128 * expansion, left, left)
    assert net(torch.zeros(2, 3, pixels, pixels)).shape == (2, 7)


def test_every_layer_of_the_depth_is_on_the_way():
    """The name counts the convolutions of the blocks, the first one and the linear layer."""
    for depth in (18, 26, 34, 50, 101, 152):
        with torch.device("meta"):
            convolutions = [n for n, m in ResNet(depth).named_modules() if isinstance(m, nn.Conv2d)]
        assert len([n for n in convolutions if "downsample" not in n]) + 1 == depth


def test_a_block_by_hand():
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + bn(conv x)), with the stride in the first convolution."""
    net = ResNet(18, 10, 3, "cifar", width=0.25).double().eval()
    block = net.layer2[0]
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    f = nn.functional

    def norm(y, bn):
        return f.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    inner = norm(f.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).relu()
    branch = norm(f.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
    shortcut = norm(f.conv2d(x, block.downsample[0].weight, stride=2), block.downsample[1])
    torch.testing.assert_close(block(x), (branch + shortcut).relu())


def test_a_bottleneck_strides_in_its_middle():
    with torch.device("meta"):
        block = ResNet(50).layer3[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_branches_that_begin_at_zero_leave_the_shortcuts_alone():
    net = ResNet(18, 10, 3, "cifar", width=0.25, zero_init=True).eval()
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(net.layer1(x), x)
    assert not torch.equal(ResNet(18, 10, 3, "cifar", width=0.25).eval().layer1(x), x)


def test_dropped_branches_leave_the_shortcut():
    net = ResNet(18, 10, 3, "cifar", width=0.25, drop_path=0.99)
    assert net.layer1[0].drop_path.probability == 0 and net.layer4[1].drop_path.probability == 0.99
    x = torch.rand(30, 128, 2, 2)
    same = (net.layer4[1](x) == x).flatten(1).all(1)
    assert same.float().mean() > 0.8
    net.eval()
    assert not (net.layer4[1](x) == x).flatten(1).all(1).any()


def test_squeeze_and_excitation_scales_whole_channels():
    layer, x = SqueezeExcitation(8), torch.rand(3, 8, 5, 5) + 0.5
    scale = layer(x) / x
    torch.testing.assert_close(scale, scale[..., :1, :1].expand_as(scale))
    assert scale.min() > 0 and scale.max() < 1


def test_channels_last_computes_the_same():
    net, image = ResNet(18, 10, 3, "cifar", width=0.25).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = net(image)
        net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net(image.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(("key", "value"), [("depth", 20), ("stem", "wide"), ("width", 0)])
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=rf"model\.net\.{key}="):
        ResNet(**{key: value})
