from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from networks.bayes import bayesian_layers, to_bayesian
from networks.simple_vit import SimpleViT, sine_cosine_positions

TINY = {"num_classes": 5, "num_channels": 2, "image_size": 12, "patch_size": 4, "width": 24, "depth": 2, "heads": 3}


def test_the_default_has_the_size_of_the_paper():
    with torch.device("meta"):
        net = SimpleViT()
    assert sum(p.numel() for p in net.parameters()) == 2_676_778
    width, pixels = 192, 48
    block = 4 * width**2 + 2 * 4 * width**2 + 5 * width + 2 * 2 * width  # attention and projection without bias
    patch = 2 * pixels + pixels * width + width + 2 * width
    assert patch + 6 * block + 2 * width + 10 * width + 10 == 2_676_778


def test_all_but_the_normalisations_can_be_random():
    with torch.device("meta"):
        net = SimpleViT()
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    to_bayesian(net)
    assert sum(p.numel() for p in net.parameters()) == 2 * (2_676_778 - norms) + norms
    assert len(list(bayesian_layers(net))) == 1 + 6 * 4 + 1


def test_patches_are_read_row_by_row_channels_last():
    net, image = SimpleViT(**TINY), torch.randn(1, 2, 12, 12)
    seen = []
    net.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(image)
    assert seen[0].shape == (1, 9, 32)
    for place, (row, column) in ((0, (0, 0)), (1, (0, 4)), (3, (4, 0)), (8, (8, 8))):
        patch = image[0, :, row : row + 4, column : column + 4]
        assert torch.equal(seen[0][0, place], patch.permute(1, 2, 0).flatten())


def test_positions_are_sines_and_cosines_of_both_coordinates():
    code = sine_cosine_positions(3, 16)
    assert code.shape == (9, 16)
    for place in range(9):
        y, x = divmod(place, 3)
        for i in range(4):
            frequency = 10_000 ** -(i / 3)
            expected = [f(z * frequency) for z in (x, y) for f in (math.sin, math.cos)]
            assert code[place, i::4].tolist() == pytest.approx(expected, abs=1e-6)
    distances = torch.cdist(code, code) + 9 * torch.eye(9)
    assert distances.min() > 0.1  # no two places look alike


def test_the_forward_pass_is_the_sum_of_its_parts():
    """By torch's own pre-norm encoder layer without biases in the attention, and the mean of the tokens."""
    torch.manual_seed(0)
    net = SimpleViT(**TINY).eval()
    image = torch.randn(3, 2, 12, 12)
    patches = nn.functional.unfold(image, 4, stride=4).mT.unflatten(2, (2, 16)).mT.flatten(2)
    norm, linear, norm_after = net.patch_embed
    x = norm_after(linear(norm(patches))) + net.positions
    for block in net.blocks:
        theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-5, batch_first=True, norm_first=True).eval()
        nn.init.zeros_(theirs.self_attn.in_proj_bias)
        nn.init.zeros_(theirs.self_attn.out_proj.bias)
        theirs.self_attn.in_proj_weight.data = block.attn.qkv.weight
        theirs.self_attn.out_proj.weight.data = block.attn.proj.weight
        theirs.linear1, theirs.linear2 = block.mlp.fc1, block.mlp.fc2
        theirs.norm1, theirs.norm2 = block.norm1, block.norm2
        x = theirs(x)
    torch.testing.assert_close(net(image), net.head(net.norm(x).mean(1)), rtol=1e-4, atol=1e-5)


def test_images_may_move_by_whole_patches_but_for_the_positions():
    """The classes are read off the mean of the tokens: without positions the order of patches does not count."""
    net, image = SimpleViT(**TINY).eval(), torch.randn(2, 2, 12, 12)
    assert not torch.allclose(net(image), net(image.roll(4, 3)), atol=1e-4)
    net.positions.zero_()
    torch.testing.assert_close(net(image), net(image.roll(4, 3)))


def test_positions_are_no_part_of_the_state():
    net = SimpleViT(**TINY)
    assert "positions" not in net.state_dict() and net.double().positions.dtype == torch.float64
    assert not any("attn.qkv.bias" in name or "attn.proj.bias" in name for name in net.state_dict())


def test_dropout_acts_in_training_alone():
    net, image = SimpleViT(**TINY, dropout=0.5), torch.randn(2, 2, 12, 12)
    assert not torch.equal(net(image), net(image))
    assert torch.equal(net.eval()(image), net(image))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patch_size": 5}, r"model\.net\.patch_size=5 does not divide model\.net\.image_size=12"),
        ({"patch_size": 0}, r"model\.net\.patch_size=0"),
        ({"width": 30}, r"model\.net\.width=30: must be a multiple of 4 and of model\.net\.heads=3"),
        ({"heads": 5}, r"model\.net\.width=24: must be .* model\.net\.heads=5"),
        ({"width": 4, "heads": 1}, r"model\.net\.width=4: .* at least 8"),
    ],
)
def test_sizes_that_do_not_fit(options, text):
    with pytest.raises(ValueError, match=text):
        SimpleViT(**TINY | options)


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"images of 8 x 12 pixels, but model\.net\.image_size=12"):
        SimpleViT(**TINY)(torch.zeros(1, 2, 8, 12))
