from __future__ import annotations

import pytest
import torch

from networks.series.patch_transformer import PatchTransformer


def build(**sizes: int) -> PatchTransformer:
    torch.manual_seed(0)
    return PatchTransformer(**{"history_length": 96, "horizon": 192, "channels": 7} | sizes)


def test_the_published_size() -> None:
    assert sum(p.numel() for p in build().parameters()) == 281_584


@pytest.mark.parametrize("training", [True, False])
def test_shape(training: bool) -> None:
    out = build(horizon=48).train(training)(torch.randn(3, 96, 7))
    assert out.shape == (3, 48, 7) and out.isfinite().all()


def test_a_level_is_passed_on() -> None:
    """The last value is subtracted and added again, channel by channel."""
    net = build().double().eval()
    history, level = torch.randn(2, 96, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(net(history + 10 * level), net(history) + 10 * level)


def test_steps_and_channels_keep_their_places() -> None:
    """With a head that copies, the forecast repeats the patches of a history of as many tokens."""
    net = build(history_length=32, horizon=32, d_model=56, heads=4).double().eval()
    with torch.no_grad():
        for layer in net.encoder:
            for parameter in (*layer.self_attn.out_proj.parameters(), *layer.linear2.parameters()):
                parameter.zero_()
        net.position.zero_()
        for linear in (net.embedding, net.ahead, net.head):
            torch.nn.init.eye_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
        history = torch.randn(2, 32, 7, dtype=torch.float64)
        tokens = (history - history[:, -1:]).reshape(2, 4, 56)
        for _ in range(5):  # the norms of two layers and the last one
            tokens = torch.nn.functional.layer_norm(tokens, (56,))
        expected = tokens.reshape(2, 32, 7) + history[:, -1:]
        torch.testing.assert_close(net(history), expected, rtol=0, atol=1e-6)


def test_gradient_reaches_every_parameter() -> None:
    net = build(horizon=48).train()
    net(torch.randn(3, 96, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"heads": 3}, "heads=3"), ({"patch_length": 7}, "history_length=96"), ({"horizon": 90}, "horizon=90")],
)
def test_sizes_that_do_not_fit_are_named(sizes, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(**sizes)
    with pytest.raises(ValueError, match="6 channels"):
        build()(torch.randn(1, 96, 6))
