from __future__ import annotations

import io
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks.recycle import (
    CycleCompressed,
    LinearSkip,
    PrimaryCycleCompression,
    RecentHistoricProfile,
    ReCycleTransformer,
    recent_historic_profile,
)

D, H, F = 24, 21, 7
TRAFFIC = Path(__file__).parents[2] / "datamodules" / "embedded" / "hourly_sf_traffic.csv"


@pytest.fixture
def series() -> tuple[Tensor, Tensor]:
    """Sixty days of three channels with 5 % missing values, and day types with holidays that differ per channel."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, D, 3, generator=generator, dtype=torch.float64).cumsum(0)
    values[torch.rand(values.shape, generator=generator) < 0.05] = torch.nan
    weekday = torch.arange(60).unsqueeze(1) % 7
    holiday = torch.rand(60, 3, generator=generator) < 0.08
    return values, torch.where(holiday | (weekday == 6), 2, (weekday == 5).long())


def brute_force(values, day_types, origin, day_type, step, *, depth, unit, by_day_type, channel) -> float:
    """The definition in words: walk back from the origin and average what qualifies."""
    found, latest = [], None
    for t in range(origin - 1, -1, -1):
        day = t // D
        if t % D != step or (by_day_type and day_types[day, channel] != day_type):
            continue
        value = values[day, step, channel].item()
        if math.isnan(value):
            continue
        latest = value if latest is None else latest
        if unit == "days_of_type" and len(found) == depth:
            break
        if unit == "weeks" and origin - t > 7 * depth * D:
            break
        found.append(value)
    if found:
        return sum(found) / len(found)
    return 0.0 if latest is None else latest


@pytest.mark.parametrize("unit", ["days_of_type", "weeks"])
@pytest.mark.parametrize(("depth", "by_day_type"), [(3, True), (1, True), (10, True), (1, False), (10, False)])
def test_profile_equals_double_loop_at_random_origins(series, unit, depth, by_day_type):
    values, day_types = series
    options = {"depth": depth, "unit": unit, "by_day_type": by_day_type}
    table = recent_historic_profile(values, day_types, **options)
    assert table.shape == (61, 3, D, 3)
    assert table.dtype == torch.float64
    draw = random.Random(1)
    for _ in range(200):
        origin, day_type, step, channel = (
            draw.randrange(60 * D),
            draw.randrange(3),
            draw.randrange(D),
            draw.randrange(3),
        )
        row = origin // D + (step < origin % D)
        expected = brute_force(values, day_types, origin, day_type, step, channel=channel, **options)
        assert table[row, day_type, step, channel].item() == pytest.approx(expected, abs=1e-6)


def test_profile_of_weeks_with_an_empty_window_keeps_the_latest_day():
    values = torch.arange(40, dtype=torch.float64).reshape(40, 1, 1)
    day_types = torch.zeros(40, 1, dtype=torch.int64)
    day_types[5] = 1  # the only Saturday
    table = recent_historic_profile(values, day_types, depth=1, unit="weeks")
    assert table[5, 1].item() == 0.0
    assert (table[6:, 1] == 5.0).all()


@pytest.mark.parametrize("history", ["last", "loose", "causal"])
@pytest.mark.parametrize("unit", ["days_of_type", "weeks"])
@pytest.mark.parametrize("origin", [30 * D, 30 * D + 7, 31 * D - 1])
def test_profiles_never_read_the_future(series, history, unit, origin):
    values, day_types = series
    changed = values.clone()
    changed.flatten(0, 1)[origin:] = 1e9
    rhp = RecentHistoricProfile(unit=unit, history=history)
    origins = torch.tensor([origin])
    results = []
    for data in (values, changed):
        table = rhp.table(data, day_types)
        results.append(
            (rhp.forecast(table, origins, day_types, 100), rhp.history_profile(table, origins, day_types, 300))
        )
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("history", ["last", "loose", "causal"])
def test_history_profile_follows_its_variant_at_any_origin(series, history):
    values, day_types = series
    rhp = RecentHistoricProfile(history=history)
    origins = torch.tensor([25 * D, 31 * D + 5, 48 * D + 23])
    got = rhp.history_profile(rhp.table(values, day_types), origins, day_types, 5 * D)
    draw = random.Random(2)
    for _ in range(100):
        window, lag, channel = draw.randrange(3), draw.randrange(5 * D), draw.randrange(3)
        t = int(origins[window]) - 5 * D + lag
        # The last moment that the variant may look at: the origin, the step itself, or the start of its day.
        seen = {"last": int(origins[window]), "loose": t + 1, "causal": t // D * D}[history]
        expected = brute_force(
            values, day_types, seen, day_types[t // D, channel], t % D,
            depth=3, unit="days_of_type", by_day_type=True, channel=channel,
        )  # fmt: skip
        assert got[window, lag, channel].item() == pytest.approx(expected, abs=1e-6)


def test_any_origin_at_midnight_is_bitwise_the_plain_method(series):
    values, day_types = series
    rhp = RecentHistoricProfile()
    table = rhp.table(values, day_types)
    days = torch.tensor([22, 40, 52])
    forecast = rhp.forecast(table, days * D, day_types, F * D)
    tokens = PrimaryCycleCompression(D).fold(forecast).unflatten(0, (3, 3))
    for window, day in enumerate(days.tolist()):
        for channel in range(3):
            types = day_types[day : day + F, channel]
            assert torch.equal(tokens[window, channel], table[day, types, :, channel])


def test_forecast_reaches_beyond_the_series_and_refuses_to_wrap_around(series):
    values, day_types = series
    rhp = RecentHistoricProfile(depth=1, by_day_type=False)
    table = rhp.table(values[:50].nan_to_num(), day_types[:50])
    origins = torch.tensor([50 * D])
    forecast = rhp.forecast(table, origins, day_types, F * D)
    assert torch.equal(forecast[0].reshape(F, D, 3), values[49].nan_to_num().expand(F, D, 3))
    with pytest.raises(AssertionError, match="before the series"):
        rhp.history_profile(table, origins, day_types, 50 * D + 1)
    with pytest.raises(AssertionError, match="day types end"):
        rhp.forecast(table, origins, day_types[:55], F * D)


@pytest.mark.parametrize("rhp", [RecentHistoricProfile(), RecentHistoricProfile(depth=10, by_day_type=False)])
@pytest.mark.parametrize("origin", [33 * D, 33 * D + 9, 33 * D + 21])
def test_shift_of_series_and_origin_by_five_hours_changes_nothing(series, rhp, origin):
    """Where the calendar does not tell days apart, the day may begin anywhere: bitwise the same forecast.

    (A calendar that does is shifted by ``day_start`` of the reader, which cuts the axis where the shifted day begins.)
    """
    values, _ = series
    padded = torch.cat([torch.full((5, 3), torch.nan), values.flatten(0, 1), torch.full((D - 5, 3), torch.nan)])
    results = []
    for data, start in ((values, origin), (padded.reshape(-1, D, 3), origin + 5)):
        day_types = torch.full((80, 3), 2)
        table, origins = rhp.table(data, day_types[: len(data)]), torch.tensor([start])
        history = rhp.history_profile(table, origins, day_types, H * D)
        results.append((rhp.forecast(table, origins, day_types, F * D), history))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(not TRAFFIC.exists(), reason="the embedded traffic series is not there")
def test_profile_agrees_with_the_authors_program_on_traffic():
    """Acceptance 2: raw MAE of the 97 windows that the authors' code evaluates, to seven digits."""
    holidays = pytest.importorskip("holidays")
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(TRAFFIC, parse_dates=["ts"])
    num_days = len(frame) // D
    values = torch.from_numpy(frame["y"].to_numpy()[: num_days * D].copy()).reshape(num_days, D, 1)
    calendar = holidays.country_holidays("US", years=range(2015, 2018))
    dates = frame["ts"].iloc[: num_days * D : D].dt.date
    rest = [2 if day.weekday() == 6 or day in calendar else int(day.weekday() == 5) for day in dates]
    day_types = torch.tensor(rest).unsqueeze(1)
    rhp = RecentHistoricProfile(depth=3)
    origins = torch.arange(627, 724) * D
    forecast = rhp.forecast(rhp.table(values, day_types), origins, day_types, F * D)
    target = values.reshape(-1, 1)[origins.unsqueeze(1) + torch.arange(F * D)]
    assert (forecast - target).abs().mean().item() == pytest.approx(0.016578434, abs=1e-7)


@pytest.mark.parametrize("options", [{"depth": 0}, {"unit": "days"}, {"history": "first"}])
def test_profile_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RecentHistoricProfile(**options)


@pytest.mark.parametrize("num_steps", [7 * D, 36, 1])
def test_fold_and_unfold_are_inverse_and_pad_the_last_cycle(num_steps):
    cycles = PrimaryCycleCompression(D)
    x = torch.randn(2, num_steps, 3)
    tokens = cycles.fold(x)
    assert tokens.shape == (6, math.ceil(num_steps / D), D)
    assert tokens[4, 0, 0] == x[1, 0, 1]
    assert torch.equal(cycles.unfold(tokens, num_steps, 3), x)
    assert tokens.flatten(1)[:, num_steps:].count_nonzero() == 0
    quantiles = cycles.unfold(torch.stack([tokens, tokens + 1], dim=-1), num_steps, 3)
    assert torch.equal(quantiles[..., 0], x)


def test_shared_covariates_fold_to_every_channel():
    cycles = PrimaryCycleCompression(4)
    covariates = torch.randn(2, 8, 3)
    tokens = cycles.fold_shared(covariates, channels=5)
    assert tokens.shape == (10, 2, 12)
    assert torch.equal(tokens[7, 1].reshape(3, 4), covariates[1, 4:].T)


def make_batch(batch=3, channels=2, horizon=F * D, cycle=D, days=H, past=0, known=0, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    forecast_days = -(-horizon // cycle)

    def calendar(first: int, count: int) -> Tensor:
        weekday = nn.functional.one_hot((torch.arange(count) + first) % 7, 7)
        flags = torch.rand(batch, count, channels, 2, generator=generator) < 0.1
        return torch.cat([weekday[None, :, None].expand(batch, count, channels, 7), flags], dim=-1).float()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "history": normal(batch, days * cycle, channels),
        "history_profile": normal(batch, days * cycle, channels),
        "forecast_profile": normal(batch, horizon, channels),
        "history_calendar": calendar(0, days),
        "forecast_calendar": calendar(days, forecast_days),
        "history_covariates": normal(batch, days * cycle, past + known),
        "forecast_covariates": normal(batch, horizon, known),
        "origin": torch.arange(batch) * cycle + 100 * cycle,
    }


class Recorder(nn.Module):
    """Backbone that mixes days and steps, and remembers what it was given."""

    def __init__(self, history_length: int = H, horizon: int = F, channels: int = D) -> None:
        super().__init__()
        self.time = nn.Linear(history_length, horizon)
        self.step = nn.Linear(channels + 9, channels)

    def forward(self, history, history_marks=None, forecast_marks=None, origin=None):
        self.seen = history, history_marks, forecast_marks, origin
        output = self.time(history.transpose(1, 2)).transpose(1, 2)
        return self.step(torch.cat([output, forecast_marks], dim=-1))


def transformer(horizon: int = F * D, **options) -> ReCycleTransformer:
    return ReCycleTransformer(H * D, horizon, D, **options)


EVERYTHING = {
    "positions": "learned",
    "window_scale": True,
    "linear_skip": True,
    "ridge": 0.1,
    "profile_bank": [1, 3, 10],
    "profile_level": False,
    "past_covariates": 1,
    "known_covariates": 2,
}
VARIANTS = [
    {},
    {"window_scale": True},
    {"linear_skip": True},
    {"linear_skip": True, "skip_rank": 3},
    {"quantiles": 5},
    {"quantiles": 5, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "calendar": False},
    {"d_model": D},  # the width at which the paper's code has no output map
    EVERYTHING,
    {**EVERYTHING, "quantiles": 9, "skip_rank": 2},
]


def batch_for(options: dict, **kwargs) -> dict[str, Tensor]:
    return make_batch(past=options.get("past_covariates", 0), known=options.get("known_covariates", 0), **kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", VARIANTS)
def test_untrained_network_is_exactly_the_profile(options, training):
    batch = batch_for(options)
    net = transformer(**options).train(training)
    forecast = net(batch)
    profile = batch["forecast_profile"]
    if options.get("quantiles", 1) > 1:
        profile = profile.unsqueeze(-1).expand(*profile.shape, options["quantiles"])
    assert torch.equal(forecast, profile)


def randomise(net: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, scale, generator=generator)
    return net


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_reach_every_parameter(options):
    batch = batch_for(options)
    net = randomise(transformer(**options))
    (net(batch) - 1.0).abs().mean().add(net.penalty()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0] == []


@pytest.mark.parametrize("options", VARIANTS)
def test_a_few_steps_lead_away_from_the_profile(options):
    batch = batch_for(options)
    net = transformer(**options)
    losses = []
    for _ in range(6):
        net.zero_grad()
        prediction = net(batch)
        target = batch["forecast_profile"] + 0.5
        loss = (prediction - (target.unsqueeze(-1) if prediction.ndim == 4 else target)).abs().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 1e-3 * parameter.grad.sign()
    assert losses[-1] < losses[0]


def test_quantiles_never_cross():
    for seed in range(5):
        net = randomise(transformer(quantiles=9, window_scale=True, linear_skip=True), seed)
        forecast = net(make_batch(seed=seed))
        assert forecast.shape == (3, F * D, 2, 9)
        assert (forecast.diff(dim=-1) >= 0).all()
        assert (forecast.diff(dim=-1) > 0).float().mean() > 0.9


def test_parameter_count_of_the_paper():
    assert sum(p.numel() for p in transformer().parameters()) == 28_632


def test_equals_the_equations_written_out():
    """One layer each, one head: the paper's equations without nn.Transformer."""
    net = randomise(transformer()).eval()
    batch = make_batch(batch=1, channels=1)
    weight = dict(net.named_parameters())

    def attention(name, query, memory):
        w = weight[f"transformer.{name}.in_proj_weight"].chunk(3)
        b = weight[f"transformer.{name}.in_proj_bias"].chunk(3)
        q, k, v = query @ w[0].T + b[0], memory @ w[1].T + b[1], memory @ w[2].T + b[2]
        mixed = (q @ k.T / math.sqrt(32)).softmax(-1) @ v
        return mixed @ weight[f"transformer.{name}.out_proj.weight"].T + weight[f"transformer.{name}.out_proj.bias"]

    def affine(name, x):
        return x @ weight[f"{name}.weight"].T + weight[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weight[f"transformer.{name}.weight"] + weight[f"transformer.{name}.bias"]

    def feed_forward(name, x):
        return affine(f"transformer.{name}.linear2", affine(f"transformer.{name}.linear1", x).relu())

    residual = (batch["history"] - batch["history_profile"]).reshape(H, D)
    profile = batch["forecast_profile"].reshape(F, D)
    e = affine("history_embedding.1", torch.cat([residual, batch["history_calendar"][0, :, 0]], -1))
    q = affine("forecast_embedding.1", torch.cat([profile, batch["forecast_calendar"][0, :, 0]], -1))
    enc, dec = "encoder.layers.0", "decoder.layers.0"
    e = norm(f"{enc}.norm1", e + attention(f"{enc}.self_attn", e, e))
    e = norm("encoder.norm", norm(f"{enc}.norm2", e + feed_forward(enc, e)))
    q = norm(f"{dec}.norm1", q + attention(f"{dec}.self_attn", q, q))
    q = norm(f"{dec}.norm2", q + attention(f"{dec}.multihead_attn", q, e))
    q = norm("decoder.norm", norm(f"{dec}.norm3", q + feed_forward(dec, q)))
    expected = (affine("head.projection", q) + profile).reshape(1, F * D, 1)
    torch.testing.assert_close(net(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, EVERYTHING])
@pytest.mark.parametrize("compressed", [False, True])
def test_channels_are_independent(options, compressed):
    batch = batch_for(options, channels=4)
    net = CycleCompressed(Recorder(), H * D, F * D, D) if compressed else transformer(**options)
    net = randomise(net).eval()
    order = torch.tensor([2, 0, 3, 1])
    shared = ("origin", "history_covariates", "forecast_covariates")
    permuted = {key: x if key in shared else x.index_select(2, order) for key, x in batch.items()}
    torch.testing.assert_close(net(permuted), net(batch)[:, :, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual_input", [True, False])
@pytest.mark.parametrize("residual_forecast", [True, False])
def test_ablations_switch_off_what_they_name(residual_input, residual_forecast):
    batch = make_batch()
    net = randomise(transformer(residual_input=residual_input, residual_forecast=residual_forecast)).eval()
    reference = net(batch)
    moved = dict(batch, history=batch["history"] + 1, history_profile=batch["history_profile"] + 1)
    assert torch.allclose(net(moved), reference, atol=1e-4) == residual_input
    plain = dict(batch, forecast_profile=torch.zeros_like(batch["forecast_profile"]))
    net.forecast_embedding[1].weight.data[:, :D] = 0  # the decoder no longer sees the profile: only the sum is left
    difference = net(batch) - net(plain)
    torch.testing.assert_close(difference, batch["forecast_profile"] * residual_forecast, rtol=1e-4, atol=1e-4)


def test_window_scale_makes_the_residual_forecast_equivariant():
    batch = make_batch()
    net = randomise(transformer(window_scale=True, linear_skip=True)).eval()
    residual = batch["history"] - batch["history_profile"]
    larger = dict(batch, history=batch["history_profile"] + 10 * residual)
    forecast, profile = net(batch), batch["forecast_profile"]
    torch.testing.assert_close(net(larger) - profile, 10 * (forecast - profile), rtol=1e-3, atol=1e-3)
    calm = dict(batch, history=batch["history_profile"])
    assert net(calm).isfinite().all()


@pytest.mark.parametrize("options", [{"calendar": False}, {"linear_skip": True}])
def test_calendar_is_used_only_when_wanted(options):
    batch = make_batch()
    net = randomise(transformer(**options)).eval()
    holiday = batch["forecast_calendar"].clone()
    holiday[..., 7] = 1 - holiday[..., 7]
    same = torch.equal(net(dict(batch, forecast_calendar=holiday)), net(batch))
    assert same == (options.get("calendar") is False)


def test_covariates_reach_the_forecast():
    options = {"past_covariates": 1, "known_covariates": 2}
    batch = batch_for(options)
    net = randomise(transformer(**options)).eval()
    for key in ("history_covariates", "forecast_covariates"):
        assert not torch.allclose(net(dict(batch, **{key: batch[key] + 1})), net(batch))


def test_without_profile_level_a_shift_of_the_series_shifts_the_forecast():
    batch = make_batch()
    moved = {key: x + 5 if key in ("history", "history_profile", "forecast_profile") else x for key, x in batch.items()}
    for level in (True, False):
        net = randomise(transformer(profile_level=level)).eval()
        assert torch.allclose(net(moved), net(batch) + 5, atol=1e-3) == (not level)


def test_positions_tell_equal_days_apart():
    batch = make_batch()
    day = batch["history"][:, :D].repeat(1, H, 1)
    flat = dict(batch, history=day, history_profile=torch.zeros_like(day))
    flat["history_calendar"] = batch["history_calendar"][:, :1].expand_as(batch["history_calendar"])
    flat["history"] = day.clone()
    flat["history"][:, :D] += 1.0  # the deviating day comes first
    last = dict(flat, history=flat["history"].roll(-D, dims=1))  # ... or last
    without, learned = randomise(transformer()).eval(), randomise(transformer(positions="learned")).eval()
    torch.testing.assert_close(without(flat), without(last), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(learned(flat), learned(last), rtol=1e-4, atol=1e-4)


def test_profile_bank_equals_the_recent_historic_profile():
    """Where the window holds all the days, the bank is the RHP of another depth, as deviation from the RHP used."""
    from networks.recycle.transformer import profile_bank

    values = torch.randn(H, D, 1, dtype=torch.float64)
    weekday = torch.arange(H + F) % 7
    day_types = torch.where(weekday == 6, 2, (weekday == 5).long()).unsqueeze(1)
    origins = torch.tensor([H * D])
    base = RecentHistoricProfile(depth=3)
    table = base.table(values, day_types[:H])
    calendar = torch.cat([nn.functional.one_hot(weekday, 7), torch.zeros(H + F, 2)], -1).double()[None, :, None]
    batch = {
        "history": values.reshape(1, -1, 1),
        "history_profile": base.history_profile(table, origins, day_types, H * D),
        "forecast_profile": base.forecast(table, origins, day_types, F * D),
        "history_calendar": calendar[:, :H],
        "forecast_calendar": calendar[:, H:],
    }
    bank = profile_bank(transformer()._tokens(batch), [1, 2]).reshape(F, 2, D)
    for i, depth in enumerate((1, 2)):
        rhp = RecentHistoricProfile(depth=depth)
        expected = rhp.forecast(rhp.table(values, day_types[:H]), origins, day_types, F * D)
        torch.testing.assert_close(bank[:, i] + batch["forecast_profile"].reshape(F, D), expected.reshape(F, D))


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_linear_skip_penalty_is_the_norm_of_the_whole_map(rank):
    skip = randomise(LinearSkip(5, 2, 4, rank))
    basis = torch.eye(20).reshape(20, 5, 4)
    whole = skip(basis) - skip.bias
    torch.testing.assert_close(skip.sum_of_squares(), whole.square().sum())


def test_penalty_scales_with_ridge_and_is_zero_without_skip():
    assert transformer().penalty() == 0
    net = randomise(transformer(linear_skip=True, ridge=0.5))
    torch.testing.assert_close(net.penalty(), 0.5 * net.skip.weight.square().sum())


@pytest.mark.parametrize("horizon", [36, 1])
@pytest.mark.parametrize("quantiles", [1, 3])
def test_horizon_need_not_be_whole_days(horizon, quantiles):
    batch = make_batch(horizon=horizon)
    forecast = randomise(transformer(horizon, quantiles=quantiles))(batch)
    assert forecast.shape == (3, horizon, 2) + ((quantiles,) if quantiles > 1 else ())


def test_other_cycle_lengths():
    batch = make_batch(cycle=48, horizon=2 * 48, days=3)
    assert ReCycleTransformer(3 * 48, 2 * 48, 48)(batch).shape == (3, 96, 2)


@pytest.mark.parametrize("quantiles", [1, 5])
def test_cycle_compressed_backbone_starts_at_the_profile_and_trains(quantiles):
    batch = make_batch()
    net = CycleCompressed(Recorder(), H * D, F * D, D, window_scale=True, quantiles=quantiles)
    profile = batch["forecast_profile"]
    expected = profile.unsqueeze(-1).expand(*profile.shape, quantiles) if quantiles > 1 else profile
    assert torch.equal(net(batch), expected)
    forecast = randomise(net)(batch)
    if quantiles > 1:
        assert (forecast.diff(dim=-1) >= 0).all()
    forecast.abs().mean().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in net.parameters())


def test_cycle_compressed_without_zero_init_is_profile_plus_backbone():
    batch = make_batch(batch=2, channels=3)
    backbone = Recorder()
    net = CycleCompressed(backbone, H * D, F * D, D, zero_init=False)
    forecast = net(batch)
    history, history_marks, forecast_marks, origin = backbone.seen
    residual = (batch["history"] - batch["history_profile"])[1, :, 2].reshape(H, D)
    assert torch.equal(history[5], residual)
    assert torch.equal(history_marks[5], batch["history_calendar"][1, :, 2])
    assert origin.tolist() == [100, 100, 100, 101, 101, 101]
    own = backbone(history, history_marks, forecast_marks, origin)[5].reshape(F * D)
    torch.testing.assert_close(forecast[1, :, 2], own + batch["forecast_profile"][1, :, 2])


def test_wrong_backbone_size_is_named():
    net = CycleCompressed(Recorder(horizon=F + 1), H * D, (F + 1) * D, D)
    net.forecast_cycles = F
    with pytest.raises(ValueError, match=r"net\.backbone"):
        net(make_batch(horizon=(F + 1) * D))


def test_model_file_is_small_and_no_warning_is_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = transformer()
        net.eval()(make_batch())
        net.train()(make_batch())
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    assert file.tell() <= 200_000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"history_length": 500}, "history_length=500"),
        ({"horizon": 0}, "horizon=0"),
        ({"quantiles": 0}, "quantiles=0"),
        ({"positions": "rotary"}, "positions='rotary'"),
        ({"profile_bank": [0]}, "profile_bank"),
        ({"profile_bank": [1], "calendar": False}, "calendar"),
        ({"ridge": -1.0}, "ridge"),
        ({"linear_skip": True, "skip_rank": 0}, "skip_rank"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        ReCycleTransformer(**{"history_length": H * D, "horizon": F * D, "cycle_length": D, **options})


def test_history_of_another_length_is_refused():
    with pytest.raises(ValueError, match="history_length"):
        transformer()(make_batch(days=H - 1))


def test_noise_free_series_of_day_types_is_forecast_exactly():
    """Generator without noise: once every type has been seen, the profile is the series."""
    rng = np.random.default_rng(0)
    shapes = torch.from_numpy(rng.uniform(1.0, 2.0, (3, D)))
    weekday = torch.arange(80) % 7
    day_types = torch.where((weekday == 6) | (torch.arange(80) % 11 == 3), 2, (weekday == 5).long()).unsqueeze(1)
    values = shapes[day_types[:, 0]].unsqueeze(-1)
    rhp = RecentHistoricProfile()
    origins = torch.arange(21, 73) * D
    forecast = rhp.forecast(rhp.table(values, day_types), origins, day_types, F * D)
    target = values.reshape(-1, 1)[origins.unsqueeze(1) + torch.arange(F * D)]
    assert (forecast - target).abs().max() <= 1e-6
