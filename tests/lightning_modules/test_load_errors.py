from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_modules.metrics.load import BASELINES, LoadErrors

RNG = np.random.default_rng(0)


def random_batch(n: int) -> dict[str, torch.Tensor]:
    names = ("prediction", "target", *BASELINES)
    batch = {name: torch.from_numpy(RNG.normal(0.5, 0.2, (n, 14, 1))).float() for name in names}
    return batch | {
        "location": torch.from_numpy(RNG.uniform(5, 50, n)).float(),
        "scale": torch.from_numpy(RNG.uniform(10, 40, n)).float(),
    }


def update(metric, batch, baselines=BASELINES):
    peers = {name: batch[name] for name in baselines}
    metric.update(batch["prediction"], batch["target"], batch["location"], batch["scale"], peers)


def test_values_by_hand():
    batch = random_batch(30)
    metric = LoadErrors()
    for rows in (slice(0, 7), slice(7, 8), slice(8, 30)):  # batches of any size
        update(metric, {key: value[rows] for key, value in batch.items()})
    values = {name: float(value) for name, value in metric.compute().items()}
    b = {key: value.double().numpy().reshape(30, -1) for key, value in batch.items()}
    actual = b["target"] * b["scale"] + b["location"]
    for name, key in (("", "prediction"), *((f"{name}_", name) for name in BASELINES)):
        error = np.abs(b[key] - b["target"])
        assert values[f"{name}mae_scaled"] == pytest.approx(error.mean(), rel=1e-6)
        assert values[f"{name}mae"] == pytest.approx((error * b["scale"]).mean(), rel=1e-6)
    forecast = b["prediction"] * b["scale"] + b["location"]
    assert values["mape_percent"] == pytest.approx(100 * np.abs(1 - forecast / actual).mean(), rel=1e-5)
    assert values["mase"] == pytest.approx(values["mae_scaled"] / values["previous_week_mae_scaled"], rel=1e-12)


def test_forecasting_last_week_has_a_mase_of_one():
    batch = random_batch(5)
    metric = LoadErrors()
    update(metric, batch | {"prediction": batch["previous_week"]}, ("previous_week",))
    values = metric.compute()
    assert values["mase"] == 1
    assert set(values) == {"mae", "mae_scaled", "mape_percent", "mase", "previous_week_mae", "previous_week_mae_scaled"}


def test_a_value_of_zero_has_no_percentage():
    metric = LoadErrors()
    scale, location = torch.tensor([200.0]), torch.tensor([-100.0])
    target = torch.tensor([[[0.5], [1.0]]])  # 0 and 100
    metric.update(torch.tensor([[[0.6], [0.9]]]), target, location, scale)
    assert float(metric.compute()["mape_percent"]) == pytest.approx(20, rel=1e-5)


def test_the_sums_are_exact():
    """A mean of 3,000 batches in float32 would be off in the sixth digit."""
    metric = LoadErrors()
    target = torch.full((64, 168, 1), 0.1)
    for _ in range(300):
        metric.update(target + 0.3, target, torch.full((64,), 1e4), torch.full((64,), 5e4))
    assert float(metric.compute()["mae"]) == pytest.approx(0.3 * 5e4, rel=1e-7)
