from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_modules.forecast_baselines import UntrainedForecaster
from lightning_modules.forecasting import Forecaster, repeat_last
from networks.ensemble import Ensemble
from tests.lightning_modules.tiny_series import WEEK, LinearNet, ProfileNet, TinySeries, quiet_trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def fit(module: pl.LightningModule, data: TinySeries | None = None, **kwargs) -> pl.Trainer:
    trainer = quiet_trainer(**({"max_epochs": 1} | kwargs))
    trainer.fit(module, datamodule=data or TinySeries())
    return trainer


def a_batch(data: TinySeries, part: str = "train", num: int = 6) -> dict[str, Tensor]:
    windows = [data.window(origin, True) for origin in data.origins(part)[:num]]
    return {key: torch.stack([w[key] for w in windows]) for key in windows[0]}


class Collect(pl.Callback):
    def __init__(self) -> None:
        self.outputs: list[dict[str, Tensor]] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.outputs.append(outputs)


def test_training_lowers_the_loss():
    module = Forecaster(LinearNet(), ADAM)
    data = TinySeries()
    before = quiet_trainer().validate(module, datamodule=data, verbose=False)[0]["val/loss"]
    trainer = fit(module, data, max_epochs=20)
    assert trainer.callback_metrics["val/loss"] < 0.7 * before
    assert trainer.callback_metrics["val/loss"] == pytest.approx(
        float(trainer.callback_metrics["val/mae_scaled"]), rel=1e-6
    )


@pytest.mark.parametrize("loss", ["l1", "mse", "huber"])
def test_training_loss_is_the_mean_over_valid_values(loss):
    data = TinySeries()
    data.setup()
    batch = a_batch(data)
    assert 0 < batch["valid"].float().mean() < 1
    module = Forecaster(LinearNet(), loss=loss)
    prediction = module(batch)
    elementwise = {"l1": nn.L1Loss, "mse": nn.MSELoss, "huber": nn.HuberLoss}[loss](reduction="none")
    mask = batch["valid"][:, None, :].expand_as(prediction)
    sums = elementwise(prediction, batch["target"])[mask].sum() / mask.numel()
    assert module.training_step(batch, 0)["loss"].item() == pytest.approx(sums.item(), rel=1e-5)


def test_invalid_windows_have_no_gradient():
    data = TinySeries()
    data.setup()
    batch = a_batch(data)

    def gradient(batch: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        module = Forecaster(LinearNet())
        module.training_step(batch, 0)["loss"].backward()
        return module.net.map.weight.grad

    spoilt = batch | {"target": torch.where(batch["valid"][:, None, :], batch["target"], 1e6)}
    assert torch.equal(gradient(batch), gradient(spoilt))
    assert not torch.equal(gradient(batch), gradient(batch | {"target": batch["target"] + 1e6}))


def test_penalty_of_the_network_joins_the_training_loss_only():
    class Penalised(LinearNet):
        def penalty(self) -> Tensor:
            return 7.0 + 0 * self.map.bias.sum()

    data = TinySeries()
    data.setup()
    batch = a_batch(data)
    torch.manual_seed(0)
    plain = Forecaster(LinearNet()).training_step(batch, 0)["loss"]
    torch.manual_seed(0)
    assert Forecaster(Penalised()).training_step(batch, 0)["loss"].item() == pytest.approx(plain.item() + 7)
    trainer = fit(Forecaster(Penalised(), ADAM))
    assert trainer.callback_metrics["train/loss"] < 7
    assert trainer.callback_metrics["val/loss"] < 7


def test_steps_return_the_contract_in_the_units_of_the_data():
    data, seen = TinySeries(), Collect()
    module = Forecaster(LinearNet(quantiles=3), ADAM, quantiles=3)
    fit(module, data)
    quiet_trainer(callbacks=[seen]).test(module, datamodule=data, verbose=False)
    out = seen.outputs[0]
    assert {
        "loss",
        "prediction",
        "target",
        "profile",
        "valid",
        "origin",
        "target_day_type",
        "target_holiday",
        "quantiles",
    } == set(out)
    assert out["prediction"].shape == (4, 10, 2, 3)
    assert out["quantiles"].tolist() == [0.25, 0.5, 0.75]
    origin = int(out["origin"][1])
    truth = data.values[origin : origin + 10].float()
    torch.testing.assert_close(out["target"][1], truth, rtol=1e-5, atol=1e-4)
    batch = next(iter(data.test_dataloader()))
    scaled = module.forecast(batch).detach()
    location, scale = data.target_scale
    torch.testing.assert_close(out["prediction"], scaled * scale[:, None] + location[:, None])
    assert not any(value.requires_grad for value in out.values())


def test_predict_gives_forecasts_beyond_the_end():
    data = TinySeries()
    module = Forecaster(LinearNet())
    out = quiet_trainer().predict(module, datamodule=data)
    assert {"loss", "target"}.isdisjoint(out[0])
    assert out[-1]["origin"][-1] == data.num_days * 4
    assert out[-1]["prediction"].shape[1:] == (10, 2)
    assert not out[-1]["prediction"].requires_grad


def test_point_forecast_of_a_quantile_model_is_its_median():
    module = Forecaster(LinearNet(quantiles=3), quantiles=[0.1, 0.4, 0.95])
    assert module.point(torch.arange(3.0).expand(1, 10, 2, 3)).unique().item() == 1.0


def test_forecast_is_sorted_and_training_sees_the_raw_output():
    data = TinySeries()
    data.setup()
    batch = a_batch(data)
    torch.manual_seed(0)
    module = Forecaster(LinearNet(quantiles=5), quantiles=5)
    raw, delivered = module(batch), module.forecast(batch)
    assert (raw.diff(dim=-1) < 0).any()
    assert (delivered.diff(dim=-1) >= 0).all()
    assert torch.equal(raw.sort(-1).values, delivered)


def test_conformal_calibration_acts_in_test_but_not_in_validation():
    data = TinySeries(num_days=120)
    module = Forecaster(narrow_net(), quantiles=9, calibrate="conformal")
    raw = quiet_trainer().test(module, datamodule=data, verbose=False)[0]
    before = quiet_trainer().validate(module, datamodule=data, verbose=False)[0]
    assert module.intervals.fitted
    calibrated = quiet_trainer().test(module, datamodule=data, verbose=False)[0]
    assert quiet_trainer().validate(module, datamodule=data, verbose=False)[0] == before
    assert raw["test/coverage_80"] < 0.2
    assert calibrated["test/coverage_80"] == pytest.approx(0.8, abs=0.06)
    assert calibrated["test/coverage_40"] == pytest.approx(0.4, abs=0.06)
    assert calibrated["test/mae"] == raw["test/mae"]
    assert calibrated["test/pinball"] < raw["test/pinball"]
    assert calibrated["test/crossing_rate"] == 0
    delivered = quiet_trainer().predict(module, datamodule=data)[0]["prediction"]
    raw_width = 0.04 * data.target_scale[1]
    assert ((delivered[..., 8] - delivered[..., 0]) > 2 * raw_width).all()


def narrow_net() -> LinearNet:
    """The profile as median, intervals far too narrow."""
    net = LinearNet(quantiles=9, zero=True)
    with torch.no_grad():
        net.map.bias.copy_(torch.linspace(-0.02, 0.02, 9).repeat(10))
    return net


def test_rolling_calibration_needs_no_validation_and_is_the_same_for_any_batches():
    data = TinySeries(num_days=120)
    raw = quiet_trainer().test(Forecaster(narrow_net(), quantiles=9), datamodule=data, verbose=False)[0]
    module = Forecaster(narrow_net(), quantiles=9, calibrate="rolling", calibration_windows=30)
    rolling = quiet_trainer().test(module, datamodule=data, verbose=False)[0]
    assert raw["test/coverage_80"] < 0.2
    assert rolling["test/coverage_80"] == pytest.approx(0.8, abs=0.06)
    assert rolling["test/mae"] == raw["test/mae"]
    assert rolling["test/pinball"] < raw["test/pinball"]
    other = TinySeries(num_days=120, batch_size=7)
    assert quiet_trainer().test(module, datamodule=other, verbose=False)[0] == pytest.approx(rolling, rel=1e-6)


def test_rolling_calibration_follows_a_series_that_becomes_wilder():
    class Wilder(TinySeries):
        def setup(self, stage: str | None = None) -> None:
            super().setup(stage)
            noise = torch.randn(self.scaled.shape, generator=torch.Generator().manual_seed(1))
            noise[: 44 * 4] = 0  # the test part begins on day 44
            self.scaled = self.scaled + 0.5 * noise

    data = Wilder(num_days=120)
    once = Forecaster(narrow_net(), quantiles=9, calibrate="conformal")
    quiet_trainer().validate(once, datamodule=data, verbose=False)
    rolling = Forecaster(narrow_net(), quantiles=9, calibrate="rolling", calibration_windows=14)
    coverage = [
        quiet_trainer().test(module, datamodule=data, verbose=False)[0]["test/coverage_80"]
        for module in (once, rolling)
    ]
    assert coverage[0] < 0.6
    assert coverage[1] == pytest.approx(0.8, abs=0.09)


def test_rolling_forecasts_after_the_end_take_the_latest_windows():
    data = TinySeries(num_days=120)
    module = Forecaster(narrow_net(), quantiles=9, calibrate="rolling", calibration_windows=5)
    batch = quiet_trainer().predict(module, datamodule=data)[0]
    known = [o for o in (*data.origins("val"), *data.origins("test")) if o + data.horizon <= int(batch["origin"][0])]
    windows = [data.window(origin, True) for origin in known[-5:]]
    past = {key: torch.stack([w[key] for w in windows]) for key in windows[0]}
    with torch.no_grad():
        raw = module.forecast(past, calibrated=False)
    lower, upper = raw[..., 0], raw[..., 8]
    scores = torch.maximum(lower - past["target"], past["target"] - upper).transpose(1, 2)[past["valid"]][:, :4]
    rank = math.ceil((scores.numel() + 1) * 0.8 - 1e-9)
    offset = scores.flatten().sort().values[rank - 1]
    width = (batch["prediction"][0, 0, :, 8] - batch["prediction"][0, 0, :, 0]) / data.target_scale[1]
    assert width == pytest.approx(0.04 + 2 * float(offset), rel=1e-4)


def test_rolling_needs_a_datamodule_that_gives_the_past():
    class WithoutPast(TinySeries):
        calibration_dataloader = property()

    module = Forecaster(LinearNet(quantiles=5), quantiles=5, calibrate="rolling")
    with pytest.raises(ValueError, match="calibration_dataloader"):
        quiet_trainer().test(module, datamodule=WithoutPast(), verbose=False)


def test_an_ensemble_trains_as_its_members_do_alone():
    torch.manual_seed(0)
    net = Ensemble(LinearNet, [{}, {}])
    alone = [copy.deepcopy(member) for member in net.members]
    together = Forecaster(net, ADAM)
    trainer = fit(together, max_epochs=3)
    losses = []
    for member, trained in zip(alone, net.members, strict=True):
        single = fit(Forecaster(member, ADAM), max_epochs=3)
        losses.append(float(single.callback_metrics["train/loss"]))
        for one, other in zip(member.parameters(), trained.parameters(), strict=True):
            assert torch.equal(one, other)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_offsets_are_in_the_checkpoint_of_the_same_epoch(tmp_path: Path):
    data = TinySeries()
    module = Forecaster(LinearNet(quantiles=5), ADAM, quantiles=5, calibrate="conformal")
    fit(module, data, enable_checkpointing=True, default_root_dir=tmp_path,
        callbacks=[ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")])  # fmt: skip
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    offsets = checkpoint["state_dict"]["intervals.offsets"]
    assert torch.equal(offsets, module.intervals.offsets)
    assert offsets.shape == (3, 2)
    assert offsets.abs().max() > 0
    assert bool(checkpoint["state_dict"]["intervals.fitted"])


def test_testing_uncalibrated_weights_warns():
    module = Forecaster(LinearNet(quantiles=5), quantiles=5, calibrate="conformal")
    with pytest.warns(UserWarning, match="never validated"):
        quiet_trainer().test(module, datamodule=TinySeries(), verbose=False)


def test_sanity_check_does_not_calibrate():
    class Stop(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module) -> None:
            assert not pl_module.intervals.fitted
            seen.append(True)

    seen: list[bool] = []
    fit(
        Forecaster(LinearNet(quantiles=5), ADAM, quantiles=5, calibrate="conformal"),
        num_sanity_val_steps=1,
        callbacks=[Stop()],
    )
    assert seen == [True]


def test_checkpoint_is_self_contained_and_plain(tmp_path: Path):
    data = TinySeries()
    module = Forecaster(LinearNet(), ADAM, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    trainer = fit(module, data, enable_checkpointing=True, default_root_dir=tmp_path)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["hyper_parameters"]) == {
        "loss", "quantiles", "quantile_set", "sort_quantiles", "calibrate", "calibration_windows", "scheduler_monitor",
        "scheduler_interval", "log_steps", "log_channels",
    }  # fmt: skip
    loaded = Forecaster.load_from_checkpoint(path, net=LinearNet(), weights_only=True)
    batch = a_batch(data, "test")
    torch.testing.assert_close(
        loaded.units(loaded.forecast(batch)), module.units(module.forecast(batch)), rtol=0, atol=0
    )
    expected = trainer.test(module, datamodule=data, verbose=False)
    assert quiet_trainer().test(Forecaster(LinearNet()), datamodule=data, ckpt_path=path, verbose=False) == expected


def test_units_of_the_data_at_hand_win_over_those_of_the_checkpoint(tmp_path: Path):
    trainer = fit(Forecaster(LinearNet(), ADAM), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = TinySeries(seed=5)
    module = Forecaster(LinearNet())
    quiet_trainer().test(module, datamodule=other, ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert torch.equal(module.units.scale, other.target_scale[1])


def test_optimizer_and_scheduler_come_from_the_partials():
    assert Forecaster(LinearNet()).configure_optimizers() is None
    assert isinstance(Forecaster(LinearNet(), ADAM).configure_optimizers(), torch.optim.Adam)
    step = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = Forecaster(LinearNet(), ADAM, step, scheduler_interval="step")
    fit(module, max_steps=3, max_epochs=-1)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**3)


def test_plateau_scheduler_watches_the_validation_loss():
    plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1)
    module = Forecaster(LinearNet(), functools.partial(torch.optim.SGD, lr=0.0), plateau)
    fit(module, max_epochs=3)
    assert module.lr_schedulers().best == pytest.approx(float(module.trainer.callback_metrics["val/loss"]))
    assert module.lr_schedulers().num_bad_epochs == 0
    assert module.lr_schedulers().last_epoch == 3


def test_frozen_parameters_are_not_given_to_the_optimizer():
    net = LinearNet()
    net.map.bias.requires_grad_(False)
    optimizer = Forecaster(net, ADAM).configure_optimizers()
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [net.map.weight.shape]


def test_single_steps_are_logged_on_request():
    names = set(fit(Forecaster(LinearNet(), ADAM)).callback_metrics)
    assert "train/loss_step" not in names
    assert set(fit(Forecaster(LinearNet(), ADAM, log_steps=True)).callback_metrics) == names | {"train/loss_step"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "mape"}, r"model\.loss='mape'"),
        ({"loss": "mse", "quantiles": 3}, r"model\.loss='mse' has no quantiles"),
        ({"calibrate": "conformal"}, "set model.quantiles"),
        ({"calibrate": "platt", "quantiles": 3}, "none, conformal, rolling"),
        ({"calibrate": "rolling", "quantiles": 3, "calibration_windows": 0}, "calibration_windows=0"),
        ({"calibrate": "conformal", "quantiles": 3, "quantile_set": "upper"}, "equidistant"),
        ({"scheduler_interval": "hour"}, "epoch or step"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        Forecaster(LinearNet(), **arguments)


def test_a_network_of_the_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"expected \(4, 10, 2, 5\).*model\.quantiles"):
        fit(Forecaster(LinearNet(quantiles=3), ADAM, quantiles=5))


def test_loaders_without_a_datamodule_are_refused():
    with pytest.raises(ValueError, match="needs a DataModule with channel_names"):
        quiet_trainer().test(Forecaster(LinearNet()), dataloaders=[{}], verbose=False)


def test_repeat_last_season():
    history = torch.arange(WEEK + 3.0).view(1, -1, 1)
    out = repeat_last(history, WEEK, 2 * WEEK - 5)
    assert out.shape == (1, 2 * WEEK - 5, 1)
    assert out[0, :2, 0].tolist() == [3.0, 4.0]
    assert out[0, WEEK, 0] == 3.0
    assert repeat_last(history[:, 4:], WEEK, 10) is None


def test_last_week_is_the_value_of_the_week_before():
    data = TinySeries(gaps=False)
    result = quiet_trainer().test(Forecaster(LinearNet()), datamodule=data, verbose=False)[0]
    steps = torch.tensor(data.origins("test"))[:, None] + torch.arange(10)
    expected = (data.scaled[steps] - data.scaled[steps - WEEK]).double().abs().mean()
    assert result["test/last_week_mae_scaled"] == pytest.approx(float(expected), rel=1e-6)


def test_untrained_forecaster_passes_through_all_loops():
    module, data = UntrainedForecaster(ProfileNet(), ADAM), TinySeries()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `None`, this fit will run with no optimizer")
        trainer = fit(module, data)
    assert trainer.callback_metrics["val/loss"] > 0
    result = quiet_trainer().test(module, datamodule=data, verbose=False)[0]
    assert result["test/skill_rhp_percent"] == 0
    assert result["test/mae"] == result["test/rhp_mae"]
    out = quiet_trainer().predict(module, datamodule=data)
    assert torch.equal(out[0]["prediction"], out[0]["profile"])


def test_untrained_forecaster_refuses_what_can_be_trained():
    with pytest.raises(ValueError, match=r"trainable parameters \(map\.weight"):
        UntrainedForecaster(LinearNet())


def test_trained_module_can_be_pickled():
    module = Forecaster(LinearNet(), ADAM)
    fit(module)
    module.trainer = None
    assert torch.equal(pickle.loads(pickle.dumps(module)).net.map.weight, module.net.map.weight)


@pytest.mark.parametrize("kind", [Forecaster, UntrainedForecaster])
def test_batch_keys_are_what_the_data_give(kind):
    assert set(kind.batch_keys) == set(TinySeries.batch_keys)
