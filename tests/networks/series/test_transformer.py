from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from networks.series.attention import AttentionLayer, FullAttention, attend_with_dropout
from networks.series.embedding import TokenEmbedding, last_steps, sinusoidal_positions
from networks.series.transformer import Transformer
from tests.networks.series.contract import SMALL, BackboneContract, inputs, real_numbers


class TestTransformer(BackboneContract):
    network = Transformer
    sizes: ClassVar[dict[str, Any]] = SMALL


def test_parameters_of_the_study() -> None:
    with torch.device("meta"):
        network = Transformer(history_length=96, horizon=96, channels=7, label_length=48)
    assert real_numbers(network) == 10_540_039


@pytest.mark.parametrize(("width", "expected"), [((256, 1024), 2_648_583), ((128, 512), 668_935)])
def test_parameters_of_the_study_at_smaller_widths(width: tuple[int, int], expected: int) -> None:
    with torch.device("meta"):
        network = Transformer(96, 96, 7, d_model=width[0], feed_forward=width[1])
    assert real_numbers(network) == expected


@pytest.mark.parametrize("causal", [True, False])
def test_full_attention_follows_the_definition(causal: bool) -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 6, 2, 4, dtype=torch.float64)
    attended = FullAttention(4, causal=causal)(queries, keys, values)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(6)).tolist():
        last = i + 1 if causal else 6
        weights = (keys[b, :last, h] @ queries[b, i, h] / 2).softmax(0)
        torch.testing.assert_close(attended[b, i, h], weights @ values[b, :last, h])


def test_shared_queries_broadcast_over_the_batch() -> None:
    torch.manual_seed(0)
    attention = FullAttention(4)
    queries, keys, values = torch.randn(1, 3, 2, 2, 4), torch.randn(5, 3, 6, 2, 4), torch.randn(5, 3, 6, 2, 4)
    torch.testing.assert_close(attention(queries, keys, values), attention(queries.repeat(5, 1, 1, 1, 1), keys, values))


def test_decoder_is_causal() -> None:
    network = Transformer(24, 12, 5, **SMALL).double().eval()
    tokens, memory = torch.randn(1, 24, 16, dtype=torch.float64), torch.randn(1, 24, 16, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 10:] += 1
    before, after = network.decoder(tokens, memory), network.decoder(changed, memory)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_forecast_uses_the_label_steps_only_through_the_decoder_input() -> None:
    """The decoder sees the last label_length steps: with a silent encoder nothing else can matter."""
    network = Transformer(24, 12, 5, marks=0, label_length=6, **SMALL).eval()
    network.encoder.norm.weight.data.zero_()
    history = inputs()[0]
    older, recent = history.clone(), history.clone()
    older[:, :18] += 1
    recent[:, 18:] += 1
    assert torch.equal(network(older), network(history))
    assert not torch.allclose(network(recent), network(history))


def test_narrow_heads_keep_the_trained_scale() -> None:
    """Removing head channels whose weights are zero changes nothing."""
    torch.manual_seed(0)
    layer = AttentionLayer(FullAttention(4), 16, 4).double()
    keep = torch.tensor([0, 2])
    rows = (torch.arange(4).unsqueeze(1) * 4 + keep).flatten()
    narrow = AttentionLayer(FullAttention(4), 16, 4, width=2).double()
    mask = torch.zeros(16, dtype=torch.float64).index_fill(0, rows, 1)
    for name in ("query_projection", "key_projection", "value_projection"):
        wide = getattr(layer, name)
        wide.weight.data *= mask.unsqueeze(1)
        wide.bias.data *= mask
        getattr(narrow, name).weight.data = wide.weight.data[rows]
        getattr(narrow, name).bias.data = wide.bias.data[rows]
    narrow.out_projection.weight.data = layer.out_projection.weight.data[:, rows]
    narrow.out_projection.bias.data = layer.out_projection.bias.data
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(narrow(tokens), layer(tokens))


@pytest.mark.parametrize("d_model", [6, 7])
def test_positions(d_model: int) -> None:
    table = sinusoidal_positions(9, d_model)
    for column in range(d_model):
        angle = 5 / 10_000 ** ((column - column % 2) / d_model)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[5, column].item() == pytest.approx(expected, abs=1e-5)


def test_embedding_is_a_sum_and_circular() -> None:
    torch.manual_seed(0)
    embedding = TokenEmbedding(8, 2, 6, marks=3, dropout=0.0)
    values, marks = torch.randn(1, 8, 2), torch.randn(1, 8, 3)
    taps = embedding.value.weight
    for t in (0, 3, 7):
        expected = sum(taps[:, :, k] @ values[0, (t + k - 1) % 8] for k in range(3))
        expected = expected + embedding.calendar.weight @ marks[0, t] + embedding.position[t]
        torch.testing.assert_close(embedding(values, marks)[0, t], expected)


def test_label_length() -> None:
    assert Transformer(21, 7, 24, **SMALL).label_length == 10
    assert Transformer(24, 12, 5, marks=0, label_length=0, **SMALL)(inputs()[0]).shape == (3, 12, 5)
    assert last_steps(torch.ones(1, 4, 1), 0).shape == (1, 0, 1)
    with pytest.raises(ValueError, match="label_length=48"):
        Transformer(24, 12, 5, label_length=48, **SMALL)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_of_attention_weights(causal: bool) -> None:
    """With the identity as values the output is the weights: dropped ones are zero, the others grow by 1 / (1 - p)."""
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 50, 4, 30, 8, dtype=torch.float64)
    values = torch.eye(30, dtype=torch.float64).expand(50, 4, 30, 30)
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, scale=0.3)
    found = attend_with_dropout(queries, keys, values, 0.2, causal=causal, scale=0.3)
    possible, kept = expected > 0, found > 0
    assert not (kept & ~possible).any()
    share = float(kept.sum() / possible.sum())
    assert share == pytest.approx(0.8, abs=5 * (0.16 / int(possible.sum())) ** 0.5)
    torch.testing.assert_close(found[kept], expected[kept] / (1 - round(0.2 * 2**16) / 2**16))
    # No mask of a weight tells that of another: of neighbours 0.64 are both kept.
    both = float((kept[..., 1:, 0] & kept[..., :-1, 0]).double().mean())
    assert both == pytest.approx(0.64, abs=0.03)
