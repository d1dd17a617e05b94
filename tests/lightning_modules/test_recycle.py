from __future__ import annotations

import math
import warnings

import pytest
import torch

from lightning_modules.recycle import ReCycle
from networks.recycle import ReCycleTransformer
from tests.lightning_modules.tiny_series import DAY, WEEK, ConstantNet, LinearNet, TinySeries, quiet_trainer


def test_zero_output_is_the_profile_bit_for_bit():
    data = TinySeries()
    trainer = quiet_trainer()
    result = trainer.test(ReCycle(LinearNet(zero=True)), datamodule=data, verbose=False)[0]
    assert result["test/mae_scaled"] == result["test/rhp_mae_scaled"]
    assert result["test/residual_ratio"] == 0
    out = quiet_trainer().predict(ReCycle(LinearNet(zero=True)), datamodule=data)[0]
    assert torch.equal(out["prediction"], out["profile"])


def test_untrained_recycle_network_is_the_profile_bit_for_bit():
    net = ReCycleTransformer(WEEK, 3 * DAY, DAY, d_model=8)
    data = TinySeries(horizon=3 * DAY)
    data.setup()
    batch = {key: torch.stack([data.window(o, True)[key] for o in (160, 164)]) for key in data.window(160, True)}
    batch["history_profile"] = torch.zeros_like(batch["history"])
    batch |= {"history_calendar": torch.zeros(2, 7, 2, 9), "forecast_calendar": torch.zeros(2, 3, 2, 9)}
    assert torch.equal(ReCycle(net).eval().forecast(batch), batch["forecast_profile"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_output_falls_back_on_the_profile(value):
    with pytest.warns(UserWarning, match="test: the network was not finite for 28 windows") as caught:
        result = quiet_trainer().test(ReCycle(ConstantNet(value)), datamodule=TinySeries(), verbose=False)[0]
    assert sum("not finite" in str(w.message) for w in caught) == 1
    assert result["test/fallback_windows"] == 28  # 14 origins, two series
    assert result["test/mae_scaled"] == result["test/rhp_mae_scaled"]
    with pytest.warns(UserWarning, match="predict: the network was not finite"):
        out = quiet_trainer().predict(ReCycle(ConstantNet(value)), datamodule=TinySeries())[0]
    assert torch.equal(out["prediction"], out["profile"])


def test_only_the_broken_windows_fall_back():
    data = TinySeries()
    data.setup()
    batch = {key: torch.stack([data.window(o, True)[key] for o in (160, 164)]) for key in data.window(160, True)}
    out = ReCycle(ConstantNet(1.0)).eval().forecast(batch)
    assert torch.equal(out, batch["forecast_profile"] + 1)

    class OneValue(LinearNet):
        def forward(self, batch):
            out = super().forward(batch).clone()
            out[1, 3, 0] = torch.nan
            return out

    module = ReCycle(OneValue()).eval()
    out, raw = module.forecast(batch), module.net(batch)
    assert torch.equal(out[1, :, 0], batch["forecast_profile"][1, :, 0])
    assert torch.equal(out[0], raw[0])
    assert torch.equal(out[1, :, 1], raw[1, :, 1])


def test_quantiles_fall_back_as_a_whole():
    class OneQuantile(LinearNet):
        def forward(self, batch):
            out = super().forward(batch).clone()
            out[1, 3, 0, 2] = torch.inf
            return out

    data = TinySeries()
    data.setup()
    batch = {key: torch.stack([data.window(o, True)[key] for o in (160, 164)]) for key in data.window(160, True)}
    out = ReCycle(OneQuantile(quantiles=3), quantiles=3).eval().forecast(batch)
    assert torch.equal(out[1, :, 0], batch["forecast_profile"][1, :, 0, None].expand(-1, 3))
    assert out.isfinite().all()


def test_without_fallback_and_in_training_non_finite_output_is_seen():
    result = quiet_trainer().test(
        ReCycle(ConstantNet(math.nan), fallback_on_nan=False), datamodule=TinySeries(), verbose=False
    )[0]
    assert math.isnan(result["test/mae"])
    data = TinySeries()
    data.setup()
    batch = {key: value.unsqueeze(0) for key, value in data.window(160, True).items()}
    assert ReCycle(ConstantNet(math.nan)).training_step(batch, 0)["loss"].isnan()


def test_residual_ratio_follows_the_definition():
    data = TinySeries(gaps=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*num_workers|.*does not have many workers")
        result = quiet_trainer().test(ReCycle(ConstantNet(0.5)), datamodule=data, verbose=False)[0]
    location, scale = data.target_scale
    profile = torch.stack([data.window(o, True)["forecast_profile"] for o in data.origins("test")]) * scale + location
    expected = (0.5 * scale / profile.abs().mean((0, 1))).mean()
    assert result["test/residual_ratio"] == pytest.approx(float(expected), rel=1e-4)


def _fallbacks() -> float:
    from lightning.pytorch.strategies import DDPStrategy

    trainer = quiet_trainer(devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = ReCycle(ConstantNet(math.nan, windows_from=50 * 4))
        return trainer.test(module, datamodule=TinySeries(num_days=59), verbose=False)[0]["test/fallback_windows"]


def test_fallbacks_are_counted_over_ranks(ranks2):
    # test origins: days 44..56; seven of them from day 50 on, two series each
    assert ranks2(_fallbacks) == [14.0, 14.0]
