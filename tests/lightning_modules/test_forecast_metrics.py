from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from torch import Tensor

from lightning_modules.forecasting import Forecaster
from lightning_modules.metrics.forecast import ForecastErrors, SumRatio
from tests.lightning_modules.tiny_series import DAY, LinearNet, TinySeries, quiet_trainer

LOCATION, SCALE, MASE_SCALE = torch.tensor([10.0, -2.0]), torch.tensor([4.0, 0.5]), torch.tensor([2.0, 0.25])


def random_windows(num: int = 23, horizon: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (num, horizon, 2)
    return {
        "prediction": torch.randn(shape, generator=generator),
        "target": torch.randn(shape, generator=generator),
        "rhp": torch.randn(shape, generator=generator),
        "last_week": torch.randn(shape, generator=generator),
        "valid": torch.rand(num, 2, generator=generator) > 0.3,
        "day_type": torch.randint(0, 3, shape, generator=generator),
        "holiday": torch.rand(shape, generator=generator) > 0.8,
    }


def errors(**kwargs) -> ForecastErrors:
    return ForecastErrors(LOCATION, SCALE, MASE_SCALE, 10, DAY, **kwargs)


def update(metric: ForecastErrors, windows: dict[str, Tensor], rows: slice = slice(None)) -> None:
    part = {key: value[rows] for key, value in windows.items()}
    peers = {name: part.pop(name) for name in ("rhp", "last_week")}
    metric.update(part["prediction"], part["target"], part["valid"], peers=peers, day_type=part["day_type"],
                  holiday=part["holiday"])  # fmt: skip


def test_values_are_those_of_the_definitions():
    w = random_windows()
    metric = errors(channel_names=["a", "b"])
    update(metric, w)
    out = metric.compute()
    keep = w["valid"][:, None, :].expand_as(w["target"])

    def mean(x: Tensor, mask: Tensor = keep) -> float:
        return float(x.double()[mask].mean())

    scaled = w["target"].double() - w["prediction"].double()
    physical = (w["target"].double() * SCALE + LOCATION) - (w["prediction"].double() * SCALE + LOCATION)
    truth = w["target"].double() * SCALE + LOCATION
    expected = {
        "mae": mean(physical.abs()),
        "mse": mean(physical**2),
        "rmse": math.sqrt(mean(physical**2)),
        "bias": mean(physical),
        "mae_scaled": mean(scaled.abs()),
        "mse_scaled": mean(scaled**2),
        "rmse_scaled": math.sqrt(mean(scaled**2)),
        "bias_scaled": mean(scaled),
        "mase": mean(physical.abs() / MASE_SCALE),
        "wape": mean(physical.abs()) / mean(truth.abs()),
        "rhp_mae_scaled": mean((w["target"] - w["rhp"]).abs()),
        "rhp_mae": mean((w["target"] - w["rhp"]).double().abs() * SCALE),
        "last_week_mae_scaled": mean((w["target"] - w["last_week"]).abs()),
        "mae_holiday": mean(physical.abs(), keep & w["holiday"]),
        "mae_working_day": mean(physical.abs(), keep & (w["day_type"] == 0)),
        "mae_saturday": mean(physical.abs(), keep & (w["day_type"] == 1)),
        "mae_sunday": mean(physical.abs(), keep & (w["day_type"] == 2)),
        "mae_channel_b": mean(physical.abs()[..., 1], keep[..., 1]),
    }
    lead = torch.arange(10)[None, :, None] // DAY
    for day in range(3):
        expected[f"mae_day_{day + 1}"] = mean(physical.abs(), keep & (lead == day))
    expected["skill_rhp_percent"] = 100 * (1 - expected["mae_scaled"] / expected["rhp_mae_scaled"])
    for name, value in expected.items():
        assert float(out[name]) == pytest.approx(value, rel=1e-6), name
    assert {"mae_day_4", "mae_channel_c"}.isdisjoint(out)


def test_batch_size_changes_only_the_last_digits():
    w = random_windows()
    whole, parts = errors(), errors()
    update(whole, w)
    for start in range(0, 23, 5):
        update(parts, w, slice(start, start + 5))
    a, b = whole.compute(), parts.compute()
    assert a.keys() == b.keys()
    for name in a:
        assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-13), name


def test_perfect_forecast_has_full_skill_and_no_error():
    w = random_windows()
    w["prediction"] = w["target"]
    metric = errors()
    update(metric, w)
    out = metric.compute()
    assert out["mae"] == out["rmse_scaled"] == out["mase"] == out["bias"] == 0
    assert out["skill_rhp_percent"] == out["skill_last_week_percent"] == 100


def test_non_finite_values_of_invalid_windows_do_not_count():
    w = random_windows()
    metric, spoilt = errors(), errors()
    update(metric, w)
    for key in ("prediction", "target", "rhp", "last_week"):
        w[key] = torch.where(w["valid"][:, None, :], w[key], torch.nan)
    update(spoilt, w)
    for name, value in metric.compute().items():
        assert value == spoilt.compute()[name], name


def test_a_non_finite_valid_forecast_is_not_hidden():
    w = random_windows()
    w["valid"][3, 0] = True
    w["prediction"][3, 2, 0] = torch.nan
    metric = errors()
    update(metric, w)
    assert metric.compute()["mae"].isnan()


def test_constant_channels_have_no_mase_and_missing_peers_no_entries():
    w = random_windows()
    metric = ForecastErrors(LOCATION, SCALE, torch.tensor([2.0, 0.0]), 10, DAY, breakdown=False)
    metric.update(w["prediction"], w["target"], w["valid"], peers={"rhp": w["rhp"], "last_week": None})
    out = metric.compute()
    error = (w["target"] - w["prediction"]).double().abs()[..., 0][w["valid"][:, 0]].mean() * 4 / 2
    assert float(out["mase"]) == pytest.approx(float(error), rel=1e-6)
    assert "rhp_mae" in out
    assert not any("last_week" in name or "day" in name for name in out)


def test_sum_ratio_averages_over_seen_entries():
    ratio = SumRatio((3,))
    ratio.update(torch.tensor([1.0, 0.0, 6.0]), torch.tensor([2.0, 0.0, 3.0]))
    ratio.update(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 1.0]))
    assert float(ratio.compute()) == pytest.approx((0.5 + 1.5) / 2)
    empty = SumRatio()
    empty.update(torch.zeros(()), torch.zeros(()))
    assert empty.compute().isnan()


def _evaluate(num_devices: int, batch_size: int, quantiles: int) -> tuple[dict[str, float], list[str], list]:
    """Validate and test a network with known weights; 13 test windows cannot be shared evenly by two ranks."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    torch.manual_seed(3)
    net = LinearNet(quantiles=quantiles)
    module = Forecaster(net, functools.partial(torch.optim.SGD, lr=0.0), quantiles=quantiles or None,
                        calibrate="conformal" if quantiles else "none", log_channels=True)  # fmt: skip
    strategy = DDPStrategy(process_group_backend="gloo") if num_devices > 1 else "auto"
    trainer = quiet_trainer(max_epochs=1, devices=num_devices, strategy=strategy)
    assert isinstance(trainer, pl.Trainer)
    data = TinySeries(num_days=59, batch_size=batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data)
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.test(module, datamodule=data, verbose=False)
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    offsets = module.intervals.offsets.tolist() if quantiles else []
    return values, [str(w.message) for w in caught if "sync_dist" in str(w.message)], offsets


@pytest.mark.parametrize("quantiles", [0, 5])
def test_two_ranks_report_what_one_process_reports(ranks2, quantiles):
    alone, _, offsets = _evaluate(1, 4, quantiles)
    first, second = ranks2(_evaluate, 2, 4, quantiles)
    assert {
        "val/loss",
        "val/mae_scaled",
        "test/mae",
        "test/mae_holiday",
        "test/mae_day_3",
        "train/loss",
    } <= alone.keys()
    assert first[0] == second[0]
    assert first[0].keys() == alone.keys()
    for name, value in alone.items():
        assert first[0][name] == pytest.approx(value, rel=2e-6, abs=1e-9), name
    assert first[1] == second[1] == []
    assert first[2] == second[2]
    assert torch.tensor(first[2]) == pytest.approx(torch.tensor(offsets), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_change_the_report(batch_size):
    reference, other = _evaluate(1, 4, 5)[0], _evaluate(1, batch_size, 5)[0]
    assert reference.keys() == other.keys()
    for name, value in reference.items():
        assert other[name] == pytest.approx(value, rel=2e-6, abs=1e-9), name
