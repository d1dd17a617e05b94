from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch

from networks.series.autoformer import AutoCorrelation, Autoformer, delay_aggregation
from networks.series.decomposition import SeasonalNorm, SeriesDecomposition
from tests.networks.series.contract import SMALL, BackboneContract, inputs, real_numbers


class TestAutoformer(BackboneContract):
    network = Autoformer
    sizes: ClassVar[dict[str, Any]] = {**SMALL, "moving_average": (5, 8)}
    # the norm subtracts its mean over time, and with it its bias;
    # a constant added to queries or keys moves the correlation of all lags, which the softmax ignores
    zero_gradient = ("query_projection.bias", "key_projection.bias", "encoder.norm.norm.bias", "decoder.norm.norm.bias")


def test_parameters_of_the_study() -> None:
    with torch.device("meta"):
        network = Autoformer(history_length=96, horizon=96, channels=7, label_length=48)
    assert real_numbers(network) == 10_535_957


@pytest.mark.parametrize("length", [12, 13])
def test_correlation_equals_the_sum_over_all_lags(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, length, 2, 4, generator=generator, dtype=torch.float64)
    expected = torch.zeros(3, length, dtype=torch.float64)
    for lag in range(length):
        for t in range(length):
            expected[:, lag] += (queries[:, (t + lag) % length] * keys[:, t]).mean((1, 2))
    torch.testing.assert_close(AutoCorrelation(8).correlation(queries, keys), expected)


def test_delay_aggregation_equals_rolls() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 11, 2, 4, dtype=torch.float64)
    lags = torch.stack([torch.randperm(11)[:4] for _ in range(3)])
    weights = torch.rand(3, 4, dtype=torch.float64)
    for b in range(3):
        expected = sum(w * values[b].roll(-lag, 0) for w, lag in zip(weights[b], lags[b].tolist(), strict=True))
        torch.testing.assert_close(delay_aggregation(values, lags, weights)[b], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory", [24, 15, 40])
def test_auto_correlation_follows_the_definition(memory: int, training: bool) -> None:
    torch.manual_seed(0)
    queries = torch.randn(3, 24, 2, 4, dtype=torch.float64)
    keys, values = torch.randn(2, 3, memory, 2, 4, dtype=torch.float64)
    layer = AutoCorrelation(8, factor=2).train(training)
    actual = layer(queries, keys, values)
    fitted = []
    for x in (keys, values):
        out = torch.zeros_like(queries)
        out[:, : min(memory, 24)] = x[:, :24]
        fitted.append(out)
    correlation = layer.correlation(queries, fitted[0])
    num_lags = int(2 * math.log(24))
    for b in range(3):
        ranking = correlation.mean(0) if training else correlation[b]
        lags = ranking.argsort(descending=True)[:num_lags]
        weights = correlation[b, lags].softmax(0)
        expected = sum(w * fitted[1][b].roll(-int(lag), 0) for w, lag in zip(weights, lags, strict=True))
        torch.testing.assert_close(actual[b], expected)


def test_the_period_of_a_periodic_series_is_found() -> None:
    time = torch.arange(96, dtype=torch.float64)
    series = torch.sin(2 * math.pi * time / 24).reshape(1, 96, 1, 1)
    lags = AutoCorrelation(1).correlation(series, series).topk(4).indices
    assert set(lags.flatten().tolist()) == {0, 24, 48, 72}


@pytest.mark.parametrize("window", [1, 4, 5, 24, 25, 60])
def test_moving_average_repeats_the_edges(window: int) -> None:
    """To the last digits in double precision too, although the network is built in single."""
    series = torch.randn(30, dtype=torch.float64)
    average = SeriesDecomposition(30, window).double()(series.reshape(1, 30, 1))[1].flatten()
    for t in (0, 3, 15, 29):
        steps = range(t - window // 2, t - window // 2 + window)
        expected = sum(series[min(max(s, 0), 29)] for s in steps) / window
        torch.testing.assert_close(average[t], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("windows", [24, (24,), (4, 25)])
def test_decomposition_sums_to_the_series(windows: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    series = torch.randn(2, 40, 3, dtype=torch.float64)
    seasonal, trend = SeriesDecomposition(40, windows).double()(series)
    torch.testing.assert_close(seasonal + trend, series)
    constant = torch.full_like(series, 3.0)
    torch.testing.assert_close(SeriesDecomposition(40, windows).double()(constant)[1], constant, rtol=1e-13, atol=0)


def test_mixture_weighs_the_windows_per_step() -> None:
    torch.manual_seed(0)
    series = torch.randn(2, 20, 3)
    mixture = SeriesDecomposition(20, (4, 9))
    weights = mixture.gate(series.unsqueeze(-1)).softmax(-1)
    expected = sum(weights[..., k] * SeriesDecomposition(20, w)(series)[1] for k, w in enumerate((4, 9)))
    torch.testing.assert_close(mixture(series)[1], expected)


def test_gate_of_one_window_is_inert() -> None:
    single, plain = SeriesDecomposition(20, (5,)), SeriesDecomposition(20, 5)
    assert real_numbers(single) == 2
    assert not any(p.requires_grad for p in single.parameters())
    series = torch.randn(2, 20, 3)
    assert torch.equal(single(series)[1], plain(series)[1])


def test_seasonal_norm_has_no_mean_over_time() -> None:
    norm = SeasonalNorm(6)
    torch.nn.init.normal_(norm.norm.bias)
    torch.testing.assert_close(norm(torch.randn(2, 15, 6)).mean(1), torch.zeros(2, 6), rtol=0, atol=1e-6)


def test_forecast_starts_as_the_mean_of_the_history() -> None:
    """Silenced projections leave the trend input: the mean of the history over the whole horizon."""
    network = Autoformer(24, 12, 5, **SMALL).eval()
    network.projection.weight.data.zero_()
    network.projection.bias.data.zero_()
    network.decoder.layers[0].trend_projection.weight.data.zero_()
    history, *marks = inputs()
    torch.testing.assert_close(network(history, *marks), history.mean(1, keepdim=True).expand(-1, 12, -1))


def test_narrow_heads_keep_the_trained_average() -> None:
    """Zero channels of queries and keys may be removed: the divisor of the average is the trained width."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 24, 2, 4, dtype=torch.float64)
    queries[..., 2:] = keys[..., 2:] = 0
    layer = AutoCorrelation(8).eval()
    torch.testing.assert_close(layer(queries, keys, values), layer(queries[..., :2], keys[..., :2], values))


@pytest.mark.parametrize(("key", "value"), [("moving_average", ()), ("moving_average", 0), ("factor", 0)])
def test_bad_arguments_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}="):
        Autoformer(24, 12, 5, **SMALL, **{key: value})
