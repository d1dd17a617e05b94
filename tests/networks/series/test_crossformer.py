from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch

from networks.series.crossformer import Crossformer, SegmentMerging, TwoStageAttention
from tests.networks.series.contract import SMALL, BackboneContract, inputs, real_numbers


class TestCrossformer(BackboneContract):
    network = Crossformer
    sizes: ClassVar[dict[str, Any]] = {**SMALL, "segment_length": 4, "routers": 3}
    uses_marks = False


def expected_parameters(
    history: int, horizon: int, channels: int, seg: int, d: int, f: int, levels: int, routers: int
) -> int:
    """Counted from the paper's description."""
    attention, norm = 4 * (d * d + d), 2 * d
    two_stage = 3 * attention + 4 * norm + 2 * (d * f + f + f * d + d)
    inputs, outputs = math.ceil(history / seg), math.ceil(horizon / seg)
    encoder = sum(two_stage + math.ceil(inputs / 2**level) * routers * d for level in range(levels))
    merging = (levels - 1) * (2 * 2 * d + 2 * d * d + d)
    decoder_layer = two_stage + outputs * routers * d + attention + 2 * norm + 2 * (d * d + d) + d * seg + seg
    embedding = seg * d + d + norm + channels * (inputs + outputs) * d
    return embedding + encoder + merging + (levels + 1) * decoder_layer


@pytest.mark.parametrize(("history", "segment"), [(168, 6), (720, 24), (96, 24)])
def test_parameters(history: int, segment: int) -> None:
    with torch.device("meta"):
        network = Crossformer(history, 96, 7, segment_length=segment)
    assert real_numbers(network) == expected_parameters(history, 96, 7, segment, 256, 512, 3, 10)


def test_levels_and_routers() -> None:
    network = Crossformer(84, 24, 7, segment_length=6, d_model=16, heads=2, feed_forward=32, encoder_layers=3)
    assert [layer.routers.shape for layer in network.encoder] == [(14, 10, 16), (7, 10, 16), (4, 10, 16)]
    assert [layer.self_attention.routers.shape for layer in network.decoder] == [(4, 10, 16)] * 4
    scales = network.encode(torch.randn(2, 84, 7))
    assert [scale.shape for scale in scales] == [(2, 7, n, 16) for n in (14, 14, 7, 4)]


def test_two_stage_attention_mixes_time_within_channels_and_channels_within_segments() -> None:
    """One input token reaches every output token; with a silent receiver it reaches its own channel only."""
    torch.manual_seed(0)
    layer = TwoStageAttention(5, routers=3, d_model=8, heads=2, feed_forward=16, dropout=0.0).double().eval()
    tokens = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    changed = tokens.clone()
    changed[0, 2, 3] += torch.randn(8, dtype=torch.float64)

    def moved() -> torch.Tensor:
        return (layer(changed) - layer(tokens)).abs().amax(-1)[0] > 1e-12

    assert moved().all()
    layer.receiver.out_projection.weight.data.zero_()
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[2] = True
    assert torch.equal(moved(), expected)


def test_two_stage_attention_follows_the_definition() -> None:
    """Channel by channel, then segment by segment, with the routers written out."""
    torch.manual_seed(0)
    layer = TwoStageAttention(5, routers=3, d_model=8, heads=2, feed_forward=16, dropout=0.0).double().eval()
    tokens = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    expected = torch.empty_like(tokens)
    for b in range(2):
        stage = torch.empty_like(tokens[b])
        for c in range(4):
            x = tokens[b, c].unsqueeze(0)
            x = layer.time_norm(x + layer.time_attention(x))
            stage[c] = layer.time_mlp_norm(x + layer.time_mlp(x))[0]
        for s in range(5):
            x = stage[:, s].unsqueeze(0)
            messages = layer.sender(layer.routers[s].unsqueeze(0), x)
            assert messages.shape == (1, 3, 8)
            x = layer.channel_norm(x + layer.receiver(x, messages))
            expected[b, :, s] = layer.channel_mlp_norm(x + layer.channel_mlp(x))[0]
    torch.testing.assert_close(layer(tokens), expected)


def test_channels_are_exchangeable_in_a_two_stage_layer() -> None:
    torch.manual_seed(0)
    layer = TwoStageAttention(5, routers=3, d_model=8, heads=2, feed_forward=16, dropout=0.0).double().eval()
    tokens, order = torch.randn(2, 6, 5, 8, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(layer(tokens[:, order]), layer(tokens)[:, order])


@pytest.mark.parametrize(("segments", "window", "merged"), [(6, 2, 3), (7, 2, 4), (1, 2, 1), (1, 4, 1), (5, 3, 2)])
def test_merging(segments: int, window: int, merged: int) -> None:
    merging = SegmentMerging(8, window)
    tokens = torch.randn(2, 3, segments, 8)
    out = merging(tokens)
    assert out.shape == (2, 3, merged, 8)
    first = torch.cat([tokens[:, :, min(i, segments - 1)] for i in range(window)], dim=-1)
    torch.testing.assert_close(out[:, :, 0], merging.merge(merging.norm(first)))


def test_incomplete_segments_are_filled_with_the_first_value() -> None:
    torch.manual_seed(0)
    network = Crossformer(22, 10, 5, segment_length=4, **SMALL).eval()
    whole = Crossformer(24, 12, 5, segment_length=4, **SMALL).eval()
    whole.load_state_dict(network.state_dict())
    history = inputs(history=22)[0]
    filled = torch.cat([history[:, :1], history[:, :1], history], dim=1)
    assert torch.equal(network(history), whole(filled)[:, :10])


@pytest.mark.parametrize("key", ["segment_length", "routers", "encoder_layers"])
def test_bad_arguments_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=0"):
        Crossformer(24, 12, 5, **SMALL, **{key: 0})
