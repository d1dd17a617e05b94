"""Forecasts with uncertainty: likelihoods and scores by hand, objectives, intervals, precision, restarts, mistakes."""

from __future__ import annotations

import functools
import math

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from callbacks.predictions import PredictionWriter
from datamodules.series import SeriesDataModule
from lightning_modules.bayes import BayesRegressor
from lightning_modules.metrics.uncertainty import fair_crps, sample_quantile
from networks.bayes import Init, MCDropout, bayesian_layers, kl_divergence
from networks.recycle import ReCycleTransformer
from networks.series.direct import Direct
from networks.series.mlp import MLP
from runner.signatures import signature
from tests.datamodules.files import hourly_values, write_wide
from tests.lightning_modules.tiny_series import WEEK, ConstantNet, LinearNet, TinySeries, quiet_trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
STILL = functools.partial(torch.optim.SGD, lr=0.0)
WIDE = Init(sigma_scale=1.0, mu="keep")


@pytest.fixture(autouse=True)
def seeded():
    pl.seed_everything(0, verbose=False)


class Dropping(nn.Module):
    """The profile plus a perceptron with dropout; (batch, time, channel), or mean and log-variance of each."""

    def __init__(self, horizon: int = 10, outputs: int = 1, dropout: float = 0.2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WEEK, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, horizon * outputs))
        self.outputs = outputs

    def forward(self, batch):
        out = self.body(batch["history"].mT)
        profile = batch["forecast_profile"]
        if self.outputs == 1:
            return profile + out.mT
        out = out.unflatten(2, (-1, self.outputs)).transpose(1, 2)
        return torch.stack([profile + out[..., 0], out[..., 1]], -1)


def make(net=None, optimizer=ADAM, **kwargs):
    settings = {"num_samples": 4, "num_eval_samples": 6, "init": WIDE}
    return BayesRegressor(net or Dropping(), optimizer, **settings | kwargs)


def run(module, data, *stages, **kwargs):
    """Metrics of all stages."""
    trainer = quiet_trainer(**{"max_epochs": 1} | kwargs)
    values = {}
    for stage in stages:
        getattr(trainer, stage)(module, datamodule=data, **({} if stage == "fit" else {"verbose": False}))
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return values


def trained(epochs=1, trainer=None, **kwargs):
    """The module after a training in float64 that begins with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        kwargs["net"] = kwargs.get("net", Dropping)()
        module = make(**kwargs)
    run(module, TinySeries(), "fit", max_epochs=epochs, precision="64-true", **(trainer or {}))
    return module


def state(module):
    return torch.cat([value.double().flatten() for value in module.state_dict().values()])


def whole(data, part="test"):
    """All windows of a part as one batch."""
    data.setup()
    windows = [data.window(origin, True) for origin in data.origins(part)]
    return {key: torch.stack([window[key] for window in windows]) for key in windows[0]}


def outputs(module, data, part="test"):
    """Batch of a part, and mean and log-variance (S, B, T, C) of the evaluation samples, float64."""
    batch = whole(data, part)
    with torch.no_grad():
        return batch, *(x.double() for x in module.eval().sample_outputs(batch))


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("objective", ["elbo", "predictive", "moments"])
@pytest.mark.parametrize("observation", ["learned", "predicted"])
def test_what_is_logged_is_what_the_samples_say(objective, observation):
    net = Dropping(outputs=2 if observation == "predicted" else 1)
    data, module = TinySeries(), make(net, objective=objective, observation=observation)
    found = run(module, data, "fit", "test", max_epochs=3)
    batch, mean, log_variance = outputs(module, data)
    target, valid = batch["target"].double(), batch["valid"][:, None].expand_as(batch["target"])
    assert 0.6 < valid.double().mean() < 1
    if objective == "moments":
        density = Normal(mean.mean(0), (mean.var(0) + log_variance.exp().mean(0)).sqrt()).log_prob(target)
    else:
        density = Normal(mean, (0.5 * log_variance).exp()).log_prob(target).exp().mean(0).log()
    with torch.no_grad():
        forecast = module.sampled_forecast(batch)
    samples, scale = forecast.samples, data.target_scale[1].double()
    assert samples.shape == (6, *target.shape)
    ordered = samples.sort(0).values
    lower, upper = (sample_quantile(ordered, q) for q in (0.05, 0.95))
    crps = fair_crps(samples, target)
    expected = {
        "loss": -density[valid].mean(),
        "nll_scaled": -density[valid].mean(),
        "crps_scaled": crps[valid].mean(),
        "crps": (crps * scale)[valid].mean(),
        "coverage_90": ((lower <= target) & (target <= upper))[valid].double().mean(),
        "width_90_scaled": (upper - lower)[valid].mean(),
        "mae_scaled": (mean.mean(0) - target)[valid].abs().mean(),
    }
    for name, value in expected.items():
        assert found[f"test/{name}"] == pytest.approx(value.item(), rel=2e-5), name
    assert {"val/loss", "val/crps_scaled", "val/nll_scaled", "val/coverage_90", "val/mae_scaled"} <= found.keys()
    assert {"test/coverage_50", "test/width_50", "test/rmse", "test/rhp_mae_scaled"} <= found.keys()


@pytest.mark.parametrize("objective", ["elbo", "predictive", "moments"])
@pytest.mark.parametrize("observation", ["learned", "fixed", "predicted"])
def test_what_training_minimises(objective, observation):
    """Per value of all windows; T KL / (N T C) beside it. Windows with a gap count with zero."""
    net = Dropping(outputs=2 if observation == "predicted" else 1)
    module = make(net, STILL, objective=objective, observation=observation, temperature=0.3, observation_sigma=0.5)
    data = TinySeries(batch_size=28)
    seen = []
    original = module.sample_outputs
    module.sample_outputs = lambda batch: seen.append((batch, *original(batch))) or seen[-1][1:]
    found = run(module, data, "fit", limit_val_batches=0)
    batch, mean, log_variance = seen[0]
    assert mean.shape == (4, 28, 10, 2)
    if observation != "predicted":
        torch.testing.assert_close(log_variance, torch.full_like(log_variance, 2 * math.log(0.5)))
        assert found["train/sigma_y"] == pytest.approx(0.5)
    target, valid = batch["target"], batch["valid"][:, None]
    density = Normal(mean, (0.5 * log_variance).exp()).log_prob(target)
    of_window = (density * valid).sum((2, 3))
    if objective == "elbo":
        term = -of_window.mean() / 20
    elif objective == "predictive":
        term = -of_window.exp().mean(0).log().mean() / 20
    else:
        spread = (mean.var(0) + log_variance.exp().mean(0)).sqrt()
        term = -(Normal(mean.mean(0), spread).log_prob(target) * valid).mean()
    kl = kl_divergence(module.net).item()
    assert found["train/data_term"] == pytest.approx(term.item(), rel=1e-4)
    assert found["train/kl"] == pytest.approx(kl, rel=1e-5)
    assert found["train/kl_per_item"] == pytest.approx(kl / (28 * 20), rel=1e-5)
    assert found["train/loss"] == pytest.approx(term.item() + 0.3 * kl / (28 * 20), rel=1e-4)


def test_windows_with_gaps_count_in_no_loss():
    data = TinySeries()
    module = make(objective="moments")
    for objective in ("elbo", "predictive", "moments"):
        module.objective = objective
        module.trainer = quiet_trainer()
        batch = whole(data, "train")
        module.train()
        mean, log_variance = module.sample_outputs(batch)
        before = module._data_term(batch, mean, log_variance)
        batch["target"] = torch.where(batch["valid"][:, None], batch["target"], 1e6)
        after = module._data_term(batch, mean, log_variance)
        torch.testing.assert_close(after, before)
        (gradient,) = torch.autograd.grad(after, mean)
        assert gradient.isfinite().all() and (gradient.movedim(2, 3)[:, ~batch["valid"]] == 0).all()


def test_noise_of_observations_has_its_deviation():
    module, data = make(num_eval_samples=400, observation_sigma=0.7, observation="fixed"), TinySeries()
    run(module, data, "test")
    batch, mean, _ = outputs(module, data)
    with torch.no_grad():
        forecast = module.sampled_forecast(batch)
    noise = (forecast.samples - mean) / 0.7
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 0.01
    torch.testing.assert_close(forecast.mean, mean.mean(0))
    # The same, whatever the other windows of the batch are.
    some = {key: value[3:5] for key, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(
            module.sampled_forecast(some).samples, forecast.samples[:, 3:5], rtol=1e-4, atol=1e-5
        )


def test_outputs_in_units_of_the_data():
    data, module = TinySeries(), make(num_eval_samples=50)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    batches = trainer.predict(module, datamodule=data)
    out = {
        key: torch.cat([b[key] for b in batches]) for key in ("prediction", "std", "lower_90", "upper_90", "lower_50")
    }
    assert out["std"].shape == (2, 10, 2) and not {"loss", "target"} & batches[0].keys()
    assert (out["lower_90"] < out["lower_50"]).all() and (out["lower_50"] < out["prediction"]).all()
    assert (out["prediction"] < out["upper_90"]).all()
    scale = data.target_scale[1]
    ratio = (out["std"] / scale).mean((0, 1))
    assert 0.5 < (ratio[0] / ratio[1]).item() < 2  # of channels of different size
    width = (out["upper_90"] - out["lower_90"]) / out["std"]
    assert 2.7 < width.mean() < 4.0  # 3.29 for a Gaussian
    module.eval()
    with torch.no_grad():
        tested = module.test_step(whole(data), 0)
    assert {"loss", "target", "origin", "valid", "profile", "upper_50", "std"} <= tested.keys()


def test_tables_of_forecasts(tmp_path):
    path = write_wide(tmp_path / "s.csv", hourly_values(60, 2))
    data = SeriesDataModule(
        str(path), targets=["y0", "y1"], history_length=168, horizon=24, cycle_length=24, batch_size=8
    )
    net = Direct(MLP(168, 24, 1, 0, d_model=1, hidden_layers=0, dropout=0.1), channel_independent=True)
    module = make(net, posterior="dropout")
    trainer = quiet_trainer(max_epochs=1, callbacks=[PredictionWriter(tmp_path, "p.csv")])
    trainer.fit(module, datamodule=data)
    (out,) = trainer.predict(module, datamodule=data)
    table = pd.read_csv(tmp_path / "p.csv")
    spread = ["std", "lower_50", "upper_50", "lower_90", "upper_90"]
    assert list(table) == ["series", "origin", "timestamp", "forecast", "rhp", *spread]
    for i, series in enumerate(("y0", "y1")):
        rows = table[table.series == series]
        for name, key in {"forecast": "prediction"}.items() | {name: name for name in spread}.items():
            assert rows[name].tolist() == pytest.approx(out[key][0, :, i].tolist(), rel=1e-5), name


# ------------------------------------------------------------------------------------------------ objectives, networks


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"posterior": "dropout"}, {"objective": "elbo"}, {"objective": "moments"}, {"observation": "predicted"}],
    ids=str,
)
def test_it_learns_forecast_and_uncertainty(kwargs):
    """The noise of the series is 0.16 on the scaled axis: sigma_y comes near it, intervals hold what they promise."""
    net = Dropping(outputs=2 if "observation" in kwargs else 1, dropout=0.05)
    small = Init(sigma_scale=0.05, mu="keep")
    module, options = make(net, init=small, num_eval_samples=30, **kwargs), {"max_epochs": 15, "limit_val_batches": 0}
    found = run(module, TinySeries(), "fit", "test", **options)
    assert found["test/rmse_scaled"] < 0.23 and found["test/crps_scaled"] < 0.13  # 0.085 with all known
    assert found["test/nll_scaled"] < -0.05
    assert 0.82 < found["test/coverage_90"] < 0.96 and 0.42 < found["test/coverage_50"] < 0.58
    assert 0.14 < found["train/sigma_y"] < 0.22


def test_masks_of_dropout_are_samples():
    module = trained(posterior="dropout")
    assert not list(bayesian_layers(module.net)) and any(isinstance(m, MCDropout) for m in module.net.modules())
    _, mean, _ = outputs(module.float(), TinySeries())
    assert (mean.std(0) > 0).double().mean() > 0.7


@pytest.mark.parametrize("objective", ["elbo", "predictive", "moments"])
def test_samples_in_chunks_train_the_same_network(objective):
    expected = state(trained(objective=objective))
    for chunk in (1, 3):
        found = state(trained(objective=objective, sample_chunk=chunk))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:MultiheadAttention")
@pytest.mark.parametrize("posterior", ["gaussian", "dropout"])
def test_the_transformer_of_recycle(tmp_path, posterior):
    """Built of torch's Transformers; its ridge penalty enters the loss as in `Forecaster`."""
    path = write_wide(tmp_path / "s.csv", hourly_values(60))
    data = SeriesDataModule(str(path), targets=["y"], history_length=168, horizon=24, cycle_length=24, batch_size=8)
    net = ReCycleTransformer(168, 24, 24, d_model=8, feed_forward=8, dropout=0.2, linear_skip=True, ridge=0.5,
                             zero_init=False)  # fmt: skip
    module = make(net, posterior=posterior)
    losses = []
    step = module.training_step
    module.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
    found = run(module, data, "fit", "test", max_epochs=2)
    assert math.isfinite(found["test/nll_scaled"]) and found["test/crps_scaled"] > 0
    with torch.no_grad():
        net.skip.weight.fill_(0.1)
        batch = next(iter(data.train_dataloader()))
        module.train()
        for layer in net.modules():
            if isinstance(layer, nn.MultiheadAttention):
                layer.dropout = 0.0  # belongs to no sample
        with_penalty = module.training_step(batch, 0)["loss"]
        penalty, net.ridge = net.penalty(), 0.0
        torch.testing.assert_close(with_penalty - module.training_step(batch, 0)["loss"], penalty)
        assert penalty > 1
    # In evaluation, too, no two samples say the same: torch's fused encoder would skip masks.
    net.ridge = 0.0
    for block in (net.history_embedding, net.forecast_embedding, net.head):
        for layer in block.modules():
            if isinstance(layer, MCDropout):
                layer.p = 0.0
    net.skip.dropout = nn.Identity()
    with torch.no_grad():
        mean, _ = module.eval().sample_outputs(next(iter(data.test_dataloader())))
    assert (mean[0] - mean[1]).abs().max() > 1e-4


def test_sigma_y_has_no_decay_and_may_be_fixed():
    learned = make(optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1))
    groups = learned.configure_optimizers().param_groups
    (own,) = (g for g in groups if any(p is learned.log_sigma_y for p in g["params"]))
    assert own["weight_decay"] == 0 and len(own["params"]) == 1
    assert sum(len(g["params"]) for g in groups) == len(list(learned.parameters()))
    for observation in ("fixed", "predicted"):
        module = make(Dropping(outputs=1 + (observation == "predicted")), observation=observation)
        assert all(p is not module.log_sigma_y for g in module.configure_optimizers().param_groups for p in g["params"])
        before = module.log_sigma_y.item()
        run(module, TinySeries(), "fit")
        assert module.log_sigma_y.item() == before
    run(learned, TinySeries(), "fit")
    assert learned.log_sigma_y.item() != pytest.approx(math.log(0.3), abs=1e-6)


# ---------------------------------------------------------------------------------------------- precision and restarts


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("objective", ["predictive", "moments"])
def test_precision(precision, objective):
    module, seen = make(objective=objective), []
    original = module._objective
    module._objective = lambda *args: seen.append(original(*args)) or seen[-1]
    found = run(module, TinySeries(), "fit", "test", max_epochs=2, precision=precision)
    assert all(math.isfinite(value) for value in found.values()), found
    assert {loss.dtype for loss in seen} == {torch.float64 if precision == "64-true" else torch.float32}
    assert module.units.scale.dtype == torch.float32
    exact = run(make(objective=objective), TinySeries(), "test")
    assert found["test/rhp_mae_scaled"] == pytest.approx(exact["test/rhp_mae_scaled"], rel=0.02)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    def fit(epochs, checkpoint=None):
        pl.seed_everything(0, verbose=False)
        module = make(kl_anneal_epochs=2.5, posterior="gaussian")
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(module, datamodule=TinySeries(), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return state(module), float(trainer.callback_metrics["train/loss"])

    expected = fit(3)
    fit(2)
    found = fit(3, tmp_path / "2.ckpt")
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
    stored = torch.load(tmp_path / "2.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["observation"] == "learned" and stored["num_samples"] == 4
    assert not {"net", "optimizer", "init", "prior"} & stored.keys()


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"observation": "none"}, r"model\.observation='none' is unknown; choose learned, fixed or predicted"),
        ({"observation_sigma": 0.0}, r"model\.observation_sigma=0\.0: must be above 0"),
        ({"num_eval_samples": 1}, r"model\.num_eval_samples=1: intervals need 2 samples or more"),
        ({"objective": "moments", "num_samples": 1}, r"model\.num_samples=1: model\.objective=moments needs 2 samples"),
        ({"objective": "l1"}, r"model\.objective='l1' is unknown; choose one of elbo, predictive, moments"),
        ({"posterior": "dropout", "net": LinearNet()}, r"model\.posterior=dropout: the network has no dropout"),
        ({"net": ConstantNet(0.0)}, r"model\.net: no linear or convolutional layer"),
    ],
)
def test_wrong_arguments_are_named(kwargs, text):
    """Acceptance 16."""
    with pytest.raises(ValueError, match=text):
        make(**kwargs)


class Shaped(nn.Module):
    """Returns forecasts of some shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.layer = shape, nn.Linear(1, 1)

    def forward(self, batch):
        return self.layer(batch["history"].new_zeros(len(batch["history"]), *self.shape, 1))[..., 0]


@pytest.mark.parametrize(
    ("shape", "observation", "text"),
    [
        ((9, 2), "learned", r"returned shape \(4, 9, 2\) for a sample, expected \(4, 10, 2\) \(batch, time, channel\)"),
        ((10, 2, 2), "fixed", r"\(4, 10, 2, 2\) for a sample, .* check the sizes .* model\.observation=fixed"),
        ((10, 2), "predicted", r"expected \(4, 10, 2, 2\) \(batch, time, channel, mean and log-variance\)"),
    ],
)
def test_networks_that_do_not_fit_are_named(shape, observation, text):
    with pytest.raises(ValueError, match=text):
        run(make(Shaped(*shape), observation=observation), TinySeries(), "fit")


def test_a_loss_that_is_not_finite_names_the_step():
    module = make()
    with torch.no_grad():
        module.net.body[3].weight_log_sigma += 200.0
    with pytest.raises(
        FloatingPointError, match=r"the loss is \w+ at step 0; the largest deviation is inf in layer body\.3"
    ):
        run(module, TinySeries(), "fit")


def test_configurations_know_what_it_needs():
    known = signature("lightning_modules.bayes.BayesRegressor")
    assert "forecast_profile" in known.literals["batch_keys"]
