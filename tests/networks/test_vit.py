from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.vit import Attention, ViT

MINI = {"image_size": 32, "patch_size": 8, "depth": 6, "heads": 6, "width": 768, "qkv_bias": False}
TINY = {"num_classes": 5, "num_channels": 2, "image_size": 12, "patch_size": 4, "width": 24, "depth": 2, "heads": 3}


def size(**kwargs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ViT(**kwargs).parameters())


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({}, 86_567_656),  # B/16
        ({"patch_size": 32}, 88_224_232),  # B/32
        ({"width": 384, "heads": 6}, 22_050_664),  # S/16
        ({"width": 1024, "depth": 24, "heads": 16}, 304_326_632),  # L/16
    ],
)
def test_sizes_are_the_published_ones(options, published):
    assert size(**options) == published


def test_size_of_the_small_one_in_closed_form():
    width, patches = 768, 16
    block = 3 * width**2 + (width**2 + width) + 2 * 4 * width**2 + 5 * width + 4 * width
    rest = 3 * 64 * width + width + width + (patches + 1) * width + 2 * width + 10 * width + 10
    assert size(**MINI, num_classes=10) == 6 * block + rest == 42_684_682


def test_layers_are_named_as_in_the_published_code():
    with torch.device("meta"):
        state = ViT().state_dict()
    assert len(state) == 152
    assert state["pos_embed"].shape == (1, 197, 768) and state["blocks.11.attn.qkv.weight"].shape == (2304, 768)
    assert {"cls_token", "patch_embed.proj.bias", "blocks.0.mlp.fc2.weight", "norm.bias", "head.bias"} <= set(state)
    with torch.device("meta"):
        assert "blocks.0.attn.qkv.bias" not in ViT(**MINI).state_dict()


def test_attention_is_that_of_torch():
    """The same weights in ``nn.MultiheadAttention``."""
    mine, theirs = Attention(24, 3, qkv_bias=True, dropout=0.0), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = mine.qkv.weight, mine.qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = mine.proj.weight, mine.proj.bias
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(mine(x), theirs(x, x, x)[0])


def test_blocks_are_those_of_torch():
    """With the same weights a pre-norm ``nn.TransformerEncoderLayer`` computes the same."""
    block = ViT(**TINY).blocks[0]
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear": "mlp.fc"}
    state = {}
    for name in theirs.state_dict():
        mine = name
        for old, new in names.items():
            mine = mine.replace(old, new)
        state[name] = block.state_dict()[mine]
    theirs.load_state_dict(state)
    x = torch.randn(2, 10, 24)
    torch.testing.assert_close(block(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_patches_are_read_row_by_row():
    net = ViT(**TINY)
    image = torch.randn(1, 2, 12, 12)
    tokens = net.patch_embed(image)
    assert tokens.shape == (1, 9, 24)
    for place, (row, column) in ((1, (0, 4)), (3, (4, 0)), (8, (8, 8))):
        patch = image[:, :, row : row + 4, column : column + 4]
        expected = net.patch_embed.proj.weight.flatten(1) @ patch.flatten() + net.patch_embed.proj.bias
        torch.testing.assert_close(tokens[0, place], expected)


def test_order_of_the_patches_counts_because_of_their_positions_alone():
    net = ViT(**TINY, pool="mean").eval()
    image = torch.randn(2, 2, 12, 12)
    moved = image.roll(4, -1)  # the same patches in another order
    assert not torch.allclose(net(image), net(moved), atol=1e-4)
    nn.init.zeros_(net.pos_embed)
    torch.testing.assert_close(net(image), net(moved), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_what_the_linear_layer_sees(pool):
    net = ViT(**TINY, pool=pool).eval()
    image = torch.randn(2, 2, 12, 12)
    tokens = net.features(image)
    assert tokens.shape == (2, 10, 24)
    torch.testing.assert_close(net(image), net.head(tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(1)))


def test_dropout_and_drop_path_are_for_training():
    net, image = ViT(**TINY, dropout=0.2, drop_path=0.5), torch.randn(8, 2, 12, 12)
    assert [block.drop_path.probability for block in net.blocks] == [0, 0.5]
    assert not torch.equal(net(image), net(image))
    net.eval()
    assert torch.equal(net(image), net(image))


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images of 8 x 12 pixels, but model\.net\.image_size=12"):
        ViT(**TINY)(torch.zeros(1, 2, 8, 12))


@pytest.mark.parametrize(("key", "value"), [("patch_size", 5), ("heads", 5), ("pool", "max"), ("drop_path", 1.0)])
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=rf"model\.net\.{key}="):
        ViT(**TINY | {key: value})
