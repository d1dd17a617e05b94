from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.metrics.calibration import (
    ConformalIntervals,
    ConformalScores,
    QuantileScores,
    RollingScores,
    central_intervals,
    conformal_quantile,
    pinball_loss,
    point_index,
    quantile_levels,
)

NINE = quantile_levels(9)


def normal_quantiles(levels: list[float], shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(levels, dtype=torch.float64))
    return values.float().expand(*shape, -1)


def test_quantile_sets():
    assert quantile_levels(3) == [0.25, 0.5, 0.75]
    assert quantile_levels(4, "upper") == [0.5, 0.625, 0.75, 0.875]
    assert quantile_levels(4, "lower") == [0.125, 0.25, 0.375, 0.5]
    assert quantile_levels([0.1, 0.5], "upper") == [0.1, 0.5]


@pytest.mark.parametrize("quantiles", [0, [], [0.5, 0.5], [0.9, 0.1], [0.0, 0.5], [0.5, 1.0]])
def test_bad_levels_are_refused(quantiles):
    with pytest.raises(ValueError, match=r"model\.quantiles"):
        quantile_levels(quantiles)


def test_unknown_quantile_set_is_refused():
    with pytest.raises(ValueError, match="equidistant, upper, lower"):
        quantile_levels(3, "both")


def test_point_forecast_is_the_level_next_to_the_median():
    assert point_index(quantile_levels(9)) == 4
    assert point_index(quantile_levels(4)) == 2  # Q // 2
    assert point_index(quantile_levels(4, "upper")) == 0
    assert point_index(quantile_levels(4, "lower")) == 3


def test_central_intervals_pair_the_levels():
    assert [(i.lower, i.upper, i.label) for i in central_intervals(NINE)] == [
        (0, 8, "80"),
        (1, 7, "60"),
        (2, 6, "40"),
        (3, 5, "20"),
    ]
    assert [i.label for i in central_intervals([0.0125, 0.4, 0.9875])] == ["97_5"]
    assert central_intervals(quantile_levels(4, "upper")) == []


def test_pinball_loss_is_minimal_at_the_quantile():
    y = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double()
    levels = torch.tensor(NINE, dtype=torch.float64)
    best = y.quantile(levels)

    def loss(shift: float) -> torch.Tensor:
        return pinball_loss((best + shift).expand(len(y), 9), y, levels).mean(0)

    assert (loss(0.0) <= loss(0.05)).all()
    assert (loss(0.0) <= loss(-0.05)).all()
    assert pinball_loss(torch.tensor([[1.0]]), torch.tensor([3.0]), torch.tensor([0.9])).item() == pytest.approx(1.8)
    assert pinball_loss(torch.tensor([[3.0]]), torch.tensor([1.0]), torch.tensor([0.9])).item() == pytest.approx(0.2)


def test_scores_of_a_perfect_normal_forecast():
    shape = (200, 50, 2)
    target = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    metric = QuantileScores(NINE, torch.tensor([2.0, 2.0]))
    metric.update(normal_quantiles(NINE, shape), target, torch.ones(200, 2, dtype=torch.bool))
    out = metric.compute()
    assert float(out["coverage_80"]) == pytest.approx(0.8, abs=0.01)
    assert float(out["coverage_20"]) == pytest.approx(0.2, abs=0.01)
    assert float(out["width_80_scaled"]) == pytest.approx(2 * 1.28155, rel=1e-4)
    assert float(out["width_80"]) == pytest.approx(4 * 1.28155, rel=1e-4)
    # CRPS of a standard normal forecast of itself is 1 / sqrt(pi); nine levels integrate it to 2 %.
    assert float(out["crps_scaled"]) == pytest.approx(1 / math.sqrt(math.pi), rel=0.025)
    assert float(out["crps"]) == pytest.approx(2 * float(out["crps_scaled"]))
    assert out["crossing_rate"] == 0


def test_crossings_and_invalid_windows_are_counted():
    metric = QuantileScores([0.25, 0.5, 0.75], torch.ones(1))
    prediction = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]]).view(2, 1, 1, 3)
    metric.update(prediction, torch.zeros(2, 1, 1), torch.tensor([[True], [False]]))
    out = metric.compute()
    assert out["crossing_rate"] == 0.5
    assert out["coverage_50"] == 1


def test_one_sided_sets_have_no_crps():
    metric = QuantileScores(quantile_levels(3, "upper"), torch.ones(1))
    metric.update(torch.zeros(2, 4, 1, 3), torch.zeros(2, 4, 1), torch.ones(2, 1, dtype=torch.bool))
    assert set(metric.compute()) == {"pinball", "pinball_scaled", "crossing_rate"}


def test_conformal_quantile_is_the_finite_sample_rank():
    scores = torch.arange(1, 10.0).view(9, 1).expand(9, 2)
    # ceil(10 * 0.8) = 8th of 9; ceil(10 * 0.95) = 10 > 9: the largest one
    assert conformal_quantile(scores, [0.8, 0.95]).tolist() == [8.0, 9.0]


def calibrated(prediction, target, valid=None, cycle=5):
    valid = torch.ones(target.shape[0], target.shape[2], dtype=torch.bool) if valid is None else valid
    scores = ConformalScores(NINE, cycle)
    scores.update(prediction, target, valid)
    intervals = ConformalIntervals(NINE)
    intervals.fit_offsets(scores.compute())
    return intervals


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_calibration_restores_the_coverage_of_every_lead_day(spread):
    generator = torch.Generator().manual_seed(0)
    # Truth that becomes wider with the lead, forecast of constant and wrong width.
    width = torch.tensor([1.0, 2.0]).repeat_interleave(5)[None, :, None]
    prediction = spread * normal_quantiles(NINE, (400, 10, 1))
    intervals = calibrated(prediction, width * torch.randn(400, 10, 1, generator=generator))
    delivered = intervals(prediction, 5)
    fresh = width * torch.randn(400, 10, 1, generator=generator)
    for lead_day in (slice(0, 5), slice(5, 10)):
        for interval in central_intervals(NINE):
            lower, upper = delivered[:, lead_day, :, interval.lower], delivered[:, lead_day, :, interval.upper]
            inside = ((lower <= fresh[:, lead_day]) & (fresh[:, lead_day] <= upper)).float().mean()
            assert float(inside) == pytest.approx(interval.coverage, abs=0.035)
    assert (delivered.diff(dim=-1) >= 0).all()
    assert torch.equal(delivered[..., 4], prediction[..., 4])  # the median is no interval


@pytest.mark.parametrize("levels", [NINE, quantile_levels(4), [0.1, 0.3, 0.5, 0.9]])
def test_calibrated_quantiles_never_cross_and_never_lose_coverage(levels):
    generator = torch.Generator().manual_seed(0)
    intervals = ConformalIntervals(levels)
    intervals.fit_offsets(torch.randn(2, len(intervals.intervals), generator=generator))
    prediction = torch.randn(50, 10, 2, len(levels), generator=generator).sort(-1).values
    delivered = intervals(prediction, 5)
    assert (delivered.diff(dim=-1) >= 0).all()
    day = torch.arange(10) // 5
    for k, interval in enumerate(intervals.intervals):
        offset = intervals.offsets[day, k][:, None]
        lower, upper = prediction[..., interval.lower] - offset, prediction[..., interval.upper] + offset
        proper = lower <= upper
        assert (delivered[..., interval.lower] <= lower + 1e-6)[proper].all()
        assert (delivered[..., interval.upper] >= upper - 1e-6)[proper].all()


def test_invalid_windows_do_not_calibrate():
    prediction = normal_quantiles(NINE, (20, 10, 2))
    target = torch.zeros(20, 10, 2)
    target[..., 1] = 1000.0
    valid = torch.tensor([True, False]).expand(20, 2)
    assert calibrated(prediction, target, valid).offsets.max() < 0


def test_unfitted_intervals_change_nothing_and_other_horizons_are_refused():
    prediction = normal_quantiles(NINE, (2, 10, 1))
    assert ConformalIntervals(NINE)(prediction, 5) is prediction
    with pytest.raises(ValueError, match=r"data\.horizon"):
        calibrated(prediction, torch.zeros(2, 10, 1))(prediction, 2)


def test_offsets_travel_in_the_state_dict():
    prediction = normal_quantiles(NINE, (20, 10, 1))
    fitted = calibrated(prediction, torch.randn(20, 10, 1))
    fresh = ConformalIntervals(NINE)
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(prediction, 5), fitted(prediction, 5))


def test_one_sided_levels_cannot_be_calibrated():
    with pytest.raises(ValueError, match="equidistant"):
        ConformalIntervals(quantile_levels(3, "upper"))


def test_nothing_to_calibrate_with_is_an_error():
    scores = ConformalScores(NINE, 5)
    scores.update(normal_quantiles(NINE, (0, 10, 1)), torch.zeros(0, 10, 1), torch.zeros(0, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="validation window"):
        scores.compute()


def test_rolling_offsets_use_the_latest_windows_known_at_the_origin():
    """Windows every 5 steps, horizon 10: at origin 40 the last one known began at 30."""
    rolling = RollingScores(NINE, cycle_length=5, num_windows=2)
    origins = torch.arange(0, 100, 5)
    prediction = torch.zeros(20, 10, 1, 9)
    target = (origins.float() + 1).view(20, 1, 1).expand(20, 10, 1)  # score of the window at p: p + 1
    for part in (slice(0, 7), slice(7, 20)):
        rolling.update(prediction[part], target[part], torch.ones(20, 1, dtype=torch.bool)[part], origins[part])
    offsets = rolling.offsets(torch.tensor([40, 41, 44, 45, 10]), 10)
    assert offsets.shape == (5, 2, 4)
    assert offsets[:, :, 0].tolist() == [[31.0] * 2, [31.0] * 2, [31.0] * 2, [36.0] * 2, [1.0] * 2]
    assert offsets[0, 0].tolist() == [31.0, 31.0, 26.0, 26.0]  # ranks 9, 7, 5, 3 of 10 scores, half of them 26


def test_rolling_offsets_do_not_know_the_future():
    generator = torch.Generator().manual_seed(0)
    prediction = normal_quantiles(NINE, (20, 10, 1))
    target, valid = torch.randn(20, 10, 1, generator=generator), torch.ones(20, 1, dtype=torch.bool)
    changed = target.clone()
    changed[12:] += 100  # origins from 60 on
    offsets = []
    for truth in (target, changed):
        rolling = RollingScores(NINE, 5, 6)
        rolling.update(prediction, truth, valid, torch.arange(0, 100, 5))
        offsets.append(rolling.offsets(torch.arange(10, 100), 10))
    known = torch.arange(10, 100) < 60 + 10
    assert torch.equal(offsets[0][known], offsets[1][known])
    assert (offsets[0][~known] != offsets[1][~known]).any(-1).any(-1).all()


def test_rolling_without_a_known_window_is_an_error():
    rolling = RollingScores(NINE, 5, 3)
    with pytest.raises(ValueError, match="no window yet"):
        rolling.offsets(torch.tensor([20]), 10)
    valid = torch.tensor([[True], [False], [False], [False]])
    rolling.update(normal_quantiles(NINE, (4, 10, 1)), torch.zeros(4, 10, 1), valid, torch.arange(0, 20, 5))
    assert rolling.offsets(torch.tensor([10, 20]), 10).shape == (2, 2, 4)
    with pytest.raises(ValueError, match="calibration_windows"):
        rolling.offsets(torch.tensor([25]), 10)
