from __future__ import annotations

import pytest
import torch

from networks.series.patchtst import EncoderLayer, FeatureBatchNorm, PatchTST


def test_channels_do_not_see_each_other() -> None:
    net = PatchTST(96, 24).double().eval()
    history = torch.randn(2, 96, 5, dtype=torch.float64)
    forecast = net(history)
    changed = history.clone()
    changed[..., 2] += torch.randn(2, 96, dtype=torch.float64)
    others = [0, 1, 3, 4]
    assert torch.equal(net(changed)[..., others], forecast[..., others])
    assert not torch.allclose(net(changed)[..., 2], forecast[..., 2])
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(net(history[..., order]), forecast[..., order])


@pytest.mark.parametrize(
    ("history_length", "patch_length", "stride"), [(21, 16, 8), (96, 16, 8), (100, 16, 7), (9, 9, 1)]
)
def test_every_step_is_in_a_patch(history_length: int, patch_length: int, stride: int) -> None:
    net = PatchTST(history_length, 5, patch_length, stride, instance_norm=False).double().eval()
    history = torch.randn(2, history_length, 1, dtype=torch.float64, requires_grad=True)
    net(history).square().sum().backward()
    assert (history.grad.abs().sum(dim=(0, 2)) > 0).all()


def test_order_of_the_patches_matters() -> None:
    net = PatchTST(64, 8, patch_length=16, stride=16, instance_norm=False).double().eval()
    history = torch.randn(1, 64, 1, dtype=torch.float64)
    swapped = torch.cat([history[:, 16:32], history[:, :16], history[:, 32:]], dim=1)
    assert not torch.allclose(net(history), net(swapped))


def test_encoder_layer_equals_the_one_of_pytorch() -> None:
    torch.manual_seed(0)
    ours = EncoderLayer(32, heads=4, feed_forward=48, dropout=0.1, norm="layer").double().eval()
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 48, 0.1, activation="gelu", batch_first=True).double().eval()
    theirs.self_attn.in_proj_weight = ours.query_key_value.weight
    theirs.self_attn.in_proj_bias = ours.query_key_value.bias
    theirs.self_attn.out_proj = ours.output
    theirs.linear1, theirs.linear2 = ours.feed_forward[0], ours.feed_forward[3]
    theirs.norm1, theirs.norm2 = ours.attention_norm, ours.feed_forward_norm
    for norm in (ours.attention_norm, ours.feed_forward_norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    tokens = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


def test_feature_batch_norm_takes_batch_and_tokens_together() -> None:
    normalized = FeatureBatchNorm(6).double()(3 + 5 * torch.randn(8, 11, 6, dtype=torch.float64))
    torch.testing.assert_close(normalized.mean((0, 1)), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        normalized.var((0, 1), correction=0), torch.ones(6, dtype=torch.float64), rtol=1e-5, atol=0
    )
