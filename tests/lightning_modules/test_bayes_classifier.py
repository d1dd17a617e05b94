"""The Bayesian classifier as a Trainer runs it: scores by hand, samples, views, precision, restarts, mistakes."""

from __future__ import annotations

import copy
import functools
import json
import math

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from callbacks.predictions import PredictionWriter
from datamodules.images import Images
from lightning_modules.bayes import BayesClassifier
from lightning_modules.schedules import WarmupCosine
from networks.bayes import BayesLinear, Init, MCDropout, Prior, Stream, bayesian_layers, kl_divergence
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.simple_vit import SimpleViT
from runner import job
from runner.signatures import signature
from tests.composing import composed, plain
from tests.lightning_modules.tiny_series import quiet_trainer

ADAM = functools.partial(torch.optim.Adam, lr=3e-3)
SGD = functools.partial(torch.optim.SGD, lr=0.05)
FEW = {
    "test_size": 151, "test_from": "random", "normalize": "none", "max_train": 200, "batch_size": 20,
    "eval_batch_size": 40, "seed": 1,
}  # fmt: skip
WIDE = Init(sigma_scale=1.0)
LEAN = ("logger=none", "~callbacks.energy", "~callbacks.communication", "num_threads=1", "trainer=cpu", "strategy=auto")
# Without what they draw: figures would be most of the time.
SAMPLING = (
    "experiment=sampling_parallelism",
    "~callbacks.figures",
    "callbacks.posterior.figures=[]",
    "callbacks.training_history.figures=[]",
)


@pytest.fixture(autouse=True)
def seeded():
    pl.seed_everything(0, verbose=False)


def make(net=None, optimizer=ADAM, **kwargs):
    settings = {"num_samples": 4, "num_eval_samples": 6, "init": WIDE}
    return BayesClassifier(net or MLP(hidden=[16]), optimizer, **settings | kwargs)


def run(module, data, *stages, **kwargs):
    """Metrics of all stages."""
    trainer = quiet_trainer(**{"max_epochs": 1} | kwargs)
    values = {}
    for stage in stages:
        getattr(trainer, stage)(module, datamodule=data, **({} if stage == "fit" else {"verbose": False}))
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return values


def trained(*, double=True, data=None, epochs=1, trainer=None, **kwargs):
    """The module after a training that begins with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = make(**kwargs)
    precision = {"precision": "64-true"} if double else {}
    run(module, Images(**FEW | (data or {})), "fit", max_epochs=epochs, **precision, **(trainer or {}))
    return module


def state(module):
    return torch.cat([value.double().flatten() for value in module.net.state_dict().values()])


def predicted(module, data, **kwargs):
    """Outputs of predict, joined."""
    outputs = quiet_trainer(**kwargs).predict(module, datamodule=data)
    return {name: torch.cat([out[name] for out in outputs]) for name in outputs[0]}


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_what_is_logged_is_what_the_samples_say(objective):
    module, data = make(objective=objective, predict_samples=True), Images(**FEW)
    found = run(module, data, "fit", "validate", "test")
    for part, stage in (("val", "val"), ("test", "test")):
        data.predict_part = part
        out = predicted(module, data)
        p, label, mean = out["sample_probability"], out["target"], out["probability"]
        assert p.shape == (len(label), 6, 10)  # (batch, sample, class)
        torch.testing.assert_close(p.mean(1), mean)
        torch.testing.assert_close(p.sum(2), torch.ones(len(label), 6, dtype=torch.float64))
        truth = p[torch.arange(len(label)), :, label]
        prediction = mean.argmax(1)
        assert torch.equal(out["prediction"], prediction)
        total = -(mean * mean.log()).sum(1)
        information = total - -(p * p.log()).sum(2).mean(1)
        torch.testing.assert_close(out["entropy"], total)
        torch.testing.assert_close(out["mutual_information"], information)
        nll = -truth.mean(1).log().mean()
        expected = {
            "loss": nll if objective == "predictive" else -truth.log().mean(),
            "nll": nll,
            "accuracy": (prediction == label).double().mean(),
            "brier": (mean - F.one_hot(label, 10)).square().sum(1).mean(),
            "entropy": total.mean(),
            "mutual_information": information.mean(),
        }
        for name, value in expected.items():
            assert found[f"{stage}/{name}"] == pytest.approx(value.item(), rel=1e-6), (stage, name)
        assert 0 < found[f"{stage}/mutual_information"] < found[f"{stage}/entropy"]
        names = {name.split("/")[1] for name in found if name.startswith(stage)}
        assert names == {*expected, "top5_accuracy", "ece", "f1_macro", "mace"}


def test_what_training_reports():
    module, data = make(optimizer=functools.partial(torch.optim.SGD, lr=0.0), temperature=0.3), Images(**FEW)
    found = run(module, data, "fit")
    kl = kl_divergence(module.net).item()
    assert found["train/kl"] == pytest.approx(kl, rel=1e-5)
    assert found["train/kl_per_item"] == pytest.approx(kl / 180, rel=1e-5)  # a tenth of 200 is for validation
    assert found["train/loss"] == pytest.approx(found["train/data_term"] + 0.3 * kl / 180, rel=1e-6)
    assert 1.5 < found["train/data_term"] < 3.5 and 0 <= found["train/accuracy"] < 0.4
    for name, layer in bayesian_layers(module.net):
        assert found[f"train/sigma_{name}"] == pytest.approx(1 / math.sqrt(3 * layer.fan_in), rel=1e-5)
        ratio = (layer.weight_mu.abs() / layer.weight_sigma()).mean().item()
        assert found[f"train/snr_{name}"] == pytest.approx(ratio, rel=1e-4)
    assert {n.split("_")[0] for n in found if "sigma_" in n} == {"train/sigma"}


def test_deviations_of_pruned_weights_are_not_averaged():
    module = make()
    layer = module.net.layers[0]
    layer.weight_mask = torch.zeros_like(layer.weight_mu, dtype=torch.bool)
    assert "train/sigma_layers.0" not in module.posterior_summary()
    layer.weight_mask[0, :5] = True
    with torch.no_grad():
        layer.weight_log_sigma[0, :5] = 0.0
    assert module.posterior_summary()["train/sigma_layers.0"] == 1.0


def test_a_loss_of_one_sample_without_noise_is_that_of_the_ordinary_network():
    net = MLP(hidden=[16])
    data = Images(**FEW)
    data.setup("fit")
    batch = data.normalized(next(iter(data.train_dataloader())))
    expected = F.cross_entropy(net(batch["image"]), batch["label"], label_smoothing=0.1)
    module = make(net, num_samples=1, init=Init(1e-12, "keep"), label_smoothing=0.1, temperature=0.0)
    module.trainer = quiet_trainer()
    for objective in ("elbo", "predictive"):
        module.objective = objective
        torch.testing.assert_close(module.training_step(batch, 0)["loss"], expected)


def test_outputs_of_the_steps():
    data, module = Images(**FEW), make().eval()
    data.setup("fit")
    batch = data.normalized(next(iter(data.val_dataloader())))
    with torch.no_grad():
        out, found = module.test_step(batch, 0), module.predict_step(batch, 0)
    names = {"prediction", "target", "probability", "index", "entropy", "mutual_information"}
    assert found.keys() == names and out.keys() == names | {"loss"}
    assert found["probability"].dtype == torch.float64 and found["entropy"].shape == (len(batch["label"]),)
    del batch["label"]
    assert "target" not in module.predict_step(batch, 0)


# ------------------------------------------------------------------------------------------------------------- samples


def test_every_batch_of_an_evaluation_sees_the_same_functions():
    module = make()
    whole = predicted(module, Images(**FEW))
    parts = predicted(module, Images(**FEW | {"eval_batch_size": 7}))
    torch.testing.assert_close(parts["probability"], whole["probability"], rtol=1e-5, atol=1e-7)
    assert torch.equal(predicted(module, Images(**FEW))["probability"], whole["probability"])
    for change in ({"evaluation_seed": 1}, {"seed": 1}):
        for name, value in change.items():
            setattr(module, name, value)
        assert (predicted(module, Images(**FEW))["probability"] - whole["probability"]).abs().max() > 1e-3
        module.evaluation_seed = module.seed = 0


def test_samples_of_training_change_from_step_to_step_and_not_with_the_part_of_a_step(monkeypatch):
    contexts = []
    module = make()
    original = module._context
    monkeypatch.setattr(module, "_context", lambda *args: contexts.append(original(*args)) or contexts[-1])
    run(module, Images(**FEW), "fit", accumulate_grad_batches=2, num_sanity_val_steps=1)
    training = [(c.step, c.part, len(c.ids)) for c in contexts if c.stream == Stream.WEIGHTS]
    assert training[:5] == [(0, 0, 4), (0, 1, 4), (1, 0, 4), (1, 1, 4), (2, 0, 4)]
    evaluation = {(c.step, c.part, c.stream, c.estimator) for c in contexts if c.stream != Stream.WEIGHTS}
    assert evaluation == {(0, 0, Stream.EVALUATION, "weight")}
    # No more at once than training has memory for.
    assert {len(c.ids) for c in contexts if c.stream == Stream.EVALUATION} == {4, 2}


@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_samples_in_chunks_train_the_same_network(objective, chunk):
    """Acceptance 5, through a whole training."""
    expected = trained(objective=objective)
    found = trained(objective=objective, sample_chunk=chunk)
    torch.testing.assert_close(state(found), state(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["flipout", "lrt"])
def test_other_estimators_train_in_chunks_and_evaluate_by_weights(estimator):
    expected = trained(estimator=estimator)
    torch.testing.assert_close(state(trained(estimator=estimator, sample_chunk=3)), state(expected), rtol=0, atol=1e-12)
    assert (state(expected) - state(trained())).abs().max() > 1e-4


@pytest.mark.parametrize("kwargs", [{"antithetic": True}, {"noise": "rank"}, {"posterior": "dropout"}], ids=str)
def test_other_samples_learn_too(kwargs):
    net = MLP(hidden=[32], dropout=0.2)
    found = run(make(net, init=Init(), **kwargs), Images(**FEW), "fit", max_epochs=15)
    assert found["train/accuracy"] > 0.8
    assert (found["train/kl"] == 0) == ("posterior" in kwargs)


def test_the_prior_of_dropout_is_a_weight_decay():
    """With plain gradient descent T / (N s0^2), float64."""
    options = {"posterior": "dropout", "temperature": 0.5, "prior": Prior(std=0.3)}
    net = MLP(hidden=[16], dropout=0.2)
    found = trained(net=copy.deepcopy(net), optimizer=SGD, kl="l2", **options)
    decay = 0.5 / (found._num_train * 0.3**2)
    decayed = functools.partial(SGD, weight_decay=decay)
    expected = trained(net=net, optimizer=decayed, **options)
    torch.testing.assert_close(state(found), state(expected), rtol=0, atol=1e-12)
    assert decay > 0.02
    ensemble = {"posterior": "ensemble", "objective": "elbo", "num_eval_samples": 4}
    for kwargs in ({"kl": "l2"}, {"kl": "l2"} | ensemble, {"kl": "none", "posterior": "dropout"}):
        with pytest.raises(ValueError, match=r"model\.kl='\w+' with .*: choose auto, or l2 with .*dropout"):
            make(**kwargs)


@pytest.mark.parametrize("posterior", ["gaussian", "ensemble"])
def test_dropout_of_other_posteriors_is_ordinary_but_for_its_numbers(posterior):
    """A mask for every item, off in evaluation; not torch's generator, so that chunks and layouts change nothing."""
    ensemble = {"objective": "elbo", "num_eval_samples": 4} if posterior == "ensemble" else {}
    options = {"posterior": posterior, **ensemble}

    def net(dropout):
        torch.manual_seed(7)
        return MLP(hidden=[16], dropout=dropout)

    expected = trained(net=net(0.3), **options)
    mask = expected.net.dropout
    assert (mask.per_item, mask.in_evaluation) == (True, False)
    torch.manual_seed(99)
    found = state(trained(net=net(0.3), sample_chunk=1, **options))
    torch.testing.assert_close(found, state(expected), rtol=0, atol=1e-12)
    assert (state(trained(net=net(0.0), **options)) - found).abs().max() > 1e-3
    one, other = (predicted(make(net(dropout), **options), Images(**FEW)) for dropout in (0.3, 0.0))
    assert torch.equal(one["probability"], other["probability"])


def test_dropout_masks_of_items():
    module = make(MLP(hidden=[16], dropout=0.3), posterior="dropout", dropout_per_item=True)
    assert [m.per_item for m in module.net.modules() if isinstance(m, MCDropout)] == [True]
    assert not list(bayesian_layers(module.net)) and not module.posterior_summary()
    assert trained(net=MLP(hidden=[16], dropout=0.3), posterior="dropout", dropout_per_item=True).dropout_per_item


# ---------------------------------------------------------------------------------------------- optimizer, divergence


def test_weights_get_no_decay():
    net = ResNet(18, num_channels=1, num_classes=10, stem="cifar", width=0.0625)
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    module = make(net, adamw, exclude=["fc"], lr_scale_lambda=5.0)
    ordinary, mu, log_sigma = module.configure_optimizers().param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    assert {names[id(p)].rsplit("_", 1)[-1] for p in mu["params"]} == {"mu"}
    assert {names[id(p)].rsplit("_", 1)[-1] for p in log_sigma["params"]} == {"sigma"}
    assert {"net.fc.weight", "net.fc.bias"} <= {names[id(p)] for p in ordinary["params"]}
    assert (ordinary["weight_decay"], mu["weight_decay"], log_sigma["weight_decay"]) == (0.1, 0.0, 0.0)
    assert (ordinary["lr"], mu["lr"], log_sigma["lr"]) == (1e-3, 1e-3, 5e-3)
    groups = (ordinary, mu, log_sigma)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_decay_would_have_driven_the_deviations():
    """A decay of log sigma pulls sigma to 1: here it stays where it is (specification, 2.2)."""
    optimizer = functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)
    module = trained(optimizer=optimizer, temperature=0.0, init=Init(1e-6))
    before = make(init=Init(1e-6))
    for (_, layer), (_, other) in zip(bayesian_layers(module.net), bayesian_layers(before.net), strict=True):
        torch.testing.assert_close(layer.weight_log_sigma.float(), other.weight_log_sigma, rtol=0, atol=1e-3)


def test_the_rate_of_deviations_follows_the_schedule():
    schedule = functools.partial(WarmupCosine, total_epochs=4, warmup=1)
    module = make(lr_scale_lambda=10.0, scheduler=schedule)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=Images(**FEW))
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert len(rates) == 2 and 0 < rates[0] < 3e-3 and rates[1] == pytest.approx(10 * rates[0])
    assert make(optimizer=torch.optim.Adam, lr_scale_lambda=2.0).configure_optimizers().param_groups[1]["lr"] == 2e-3


def test_the_divergence_may_grow_in():
    module, factors = make(kl_anneal_epochs=1.5, temperature=0.4), []
    original = module.kl_factor
    module.kl_factor = lambda batch_idx: factors.append(original(batch_idx)) or factors[-1]
    run(module, Images(**FEW), "fit", max_epochs=3)
    steps = 9
    expected = [0.4 * min(1.0, i / (1.5 * steps)) for i in range(3 * steps)]
    assert factors == pytest.approx(expected)


def test_the_posterior_of_nothing_is_the_prior():
    """Without data term the deviations go to that of the prior and the means to zero."""
    module = make(optimizer=functools.partial(torch.optim.Adam, lr=0.05), temperature=1e4)
    run(module, Images(**FEW), "fit", max_epochs=20)
    weight = next(module.net.layers[0].random_tensors())
    assert abs(weight.log_sigma.exp().mean() - 1) < 0.05 and weight.mu.abs().mean() < 0.1


# --------------------------------------------------------------------------------------------- networks of other kinds


class Normed(nn.Sequential):
    """64-16-10 with batch normalisation."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def test_batch_norm_sees_samples_times_items_and_moves_once_a_step():
    module, data = make(Normed(), optimizer=functools.partial(torch.optim.SGD, lr=0.0)), Images(**FEW)
    inputs = []
    norm = module.net[2]
    norm.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach()) if m.training else None)
    run(module, data, "fit", limit_train_batches=3, limit_val_batches=0)
    assert [len(x) for x in inputs] == [80, 80, 80] and norm.num_batches_tracked == 3
    mean, variance = torch.zeros(16), torch.ones(16)
    for x in inputs:
        mean, variance = 0.9 * mean + 0.1 * x.mean(0), 0.9 * variance + 0.1 * x.var(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert run(make(Normed(), init=Init()), data, "fit", max_epochs=10)["train/accuracy"] > 0.8


class Branch(nn.Module):
    """The first random layer is beside a shortcut."""

    def __init__(self, size=64):
        super().__init__()
        self.branch, self.head = nn.Linear(size, size), nn.Linear(size, 10)

    def forward(self, image):
        x = image.flatten(1)
        return self.head(x + self.branch(x).relu())


def test_a_network_that_begins_with_a_branch_gets_its_input_repeated():
    data = Images(**FEW)
    text = r"first random layer is in a branch, whose 4 samples of 20 items meet 20 .* set model\.expand_input=true"
    with pytest.raises(ValueError, match=text):
        run(make(Branch()), data, "fit")
    module = make(Branch(), expand_input=True, predict_samples=True)
    run(module, data, "fit")
    out = predicted(module, data)["sample_probability"]
    assert out.shape == (151, 6, 10) and (out[:, 0] - out[:, 1]).abs().max() > 1e-3


def test_repeating_the_input_changes_nothing_else():
    expected = state(trained())
    torch.testing.assert_close(state(trained(expand_input=True)), expected, rtol=0, atol=1e-12)


class Fixed(nn.Module):
    """Has a Bayesian layer and does not use it."""

    def __init__(self):
        super().__init__()
        self.unused, self.weight = BayesLinear(4, 4), nn.Parameter(torch.zeros(10, 64))

    def forward(self, image):
        return image.flatten(1) @ self.weight.mT


def test_a_network_without_samples_is_named():
    with pytest.raises(ValueError, match=r"model\.net returned 20 rows for 4 samples of 20 items: no layer of it is"):
        run(make(Fixed()), Images(**FEW), "fit")


def test_a_vision_transformer_learns():
    net = SimpleViT(10, 1, 8, 4, width=32, depth=1, heads=2)
    found = run(make(net, init=Init()), Images(**FEW | {"normalize": "dataset"}), "fit", max_epochs=15)
    assert found["train/accuracy"] > 0.8


# ---------------------------------------------------------------------------------------------------- views of samples


def views(scope, samples=4, **data):
    """Images of one training batch as the network gets them, (view, item, ...), and what streams they had."""
    module, seen = make(MLP(hidden=[4]), num_samples=samples, augment_scope=scope), []
    module.net.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()) if m.training else None)
    run(
        module,
        Images(**FEW | {"augment": True, "padding": 2} | data),
        "fit",
        limit_train_batches=1,
        limit_val_batches=0,
    )
    return seen[0].unflatten(0, (-1, 20)), module.view_streams()


def test_samples_may_see_views_of_their_own():
    """Acceptance 11, the property: a random view for all, for each sample, or for a number of groups of them."""
    shared, _ = views("shared")
    assert len(shared) == 1
    by_sample, streams = views("sample")
    assert streams == [0, 1, 2, 3] and len(by_sample) == 4
    assert torch.equal(by_sample[0], shared[0])
    assert all((by_sample[i] != by_sample[j]).any() for i in range(4) for j in range(i))
    two, streams = views(2)
    assert streams == [0, 0, 1, 1]
    assert torch.equal(two, by_sample[[0, 0, 1, 1]])
    assert torch.equal(views("rank")[0], shared) and torch.equal(views(1)[0], shared)
    assert torch.equal(views("sample", augment=False)[0], views("shared", augment=False)[0])


def test_views_meet_their_samples_in_chunks_and_repeated_inputs():
    kwargs = {"augment_scope": "sample", "data": {"augment": True, "padding": 2}}
    expected = state(trained(**kwargs))
    for more in ({"sample_chunk": 3}, {"expand_input": True}, {"sample_chunk": 1, "expand_input": True}):
        torch.testing.assert_close(state(trained(**kwargs, **more)), expected, rtol=0, atol=1e-12)
    assert (state(trained(**kwargs | {"augment_scope": "shared"})) - expected).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------- as the program runs it


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precision(tmp_path, precision):
    options = (*LEAN, *SAMPLING, "trainer.max_epochs=2", "data.max_train=400", "validate=true")
    result = job.run(plain(composed(*options, f"trainer.precision={precision}", run_dir=tmp_path)))
    assert result["status"] == "completed", result
    found = result["metrics"]
    assert all(math.isfinite(value) for value in found.values()), found
    assert found["test/accuracy"] > 0.6
    table = pd.read_csv(tmp_path / "predictions" / "predictions.csv")
    assert list(table) == ["image", "prediction", "probability", "entropy", "mutual_information", "label", "origin"]
    assert len(table) == 360 and (table.prediction == table.label).mean() == pytest.approx(found["test/accuracy"])
    assert table.entropy.mean() == pytest.approx(found["test/entropy"], rel=1e-3)
    assert table.mutual_information.mean() == pytest.approx(found["test/mutual_information"], abs=1e-4)


def test_reductions_are_not_in_16_bits():
    """The divergence of all weights and the loss are float32 where the network is bfloat16."""
    module, seen = make(), []
    original = module._objective
    module._objective = lambda *args: seen.append(original(*args)) or seen[-1]
    found = run(module, Images(**FEW), "fit", precision="bf16-true")
    assert {loss.dtype for loss in seen} == {torch.float32}
    exact = kl_divergence(module.double().net).item()
    assert found["train/kl"] == pytest.approx(exact, rel=0.02)


def test_a_run_that_stops_and_resumes_is_the_uninterrupted_one(tmp_path):
    """Acceptance 12 on one process, bit for bit: two epochs and one are three."""
    options = (
        *LEAN, *SAMPLING, "data.max_train=400", "predict=false", "model.num_samples=4",
        "model.kl_anneal_epochs=2.5", "model.augment_scope=sample", "data.augment=true", "data.padding=1",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = job.run(plain(composed(*options, "trainer.max_epochs=3", run_dir=whole)))
    job.run(plain(composed(*options, "trainer.max_epochs=2", run_dir=cut)))
    again = job.run(plain(composed(*options, "trainer.max_epochs=3", "ckpt_path=last", run_dir=cut)))
    assert first["status"] == again["status"] == "completed"
    one, other = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (whole, cut))
    assert one["global_step"] == other["global_step"] and one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    same = {name: value for name, value in first["metrics"].items() if name.startswith(("train/", "val/", "test/"))}
    assert same == {name: again["metrics"][name] for name in same} and "test/accuracy" in same
    assert json.loads((cut / "results.json").read_text())["status"] == "completed"


def test_digits_that_it_cannot_know(tmp_path):
    options = (
        *LEAN,
        "experiment=classification/ood",
        "model=bayes_mlp",
        "model.init.sigma_scale=1.0",
        "model.top_k=null",
    )
    small = ("trainer.max_epochs=8", "model.num_eval_samples=16")
    result = job.run(plain(composed(*options, *small, run_dir=tmp_path)))
    assert result["status"] == "completed", result
    found = result["metrics"]
    for name in ("entropy", "mutual_information"):
        assert 0.8 < found[f"test/ood_auroc_{name}"] < 1
    assert found["test/accuracy"] > 0.9


def test_tables_of_predictions(tmp_path):
    module, data = make(predict_samples=True), Images(**FEW)
    out = predicted(module, data, callbacks=[PredictionWriter(tmp_path, "p.csv")])
    table = pd.read_csv(tmp_path / "p.csv")
    assert table.entropy.tolist() == pytest.approx(out["entropy"].tolist(), abs=1e-6)
    assert table.mutual_information.tolist() == pytest.approx(out["mutual_information"].tolist(), abs=1e-6)
    ordinary = {name: out[name] for name in ("prediction", "probability", "index")}
    assert list(data.prediction_table(ordinary)) == ["image", "prediction", "probability", "origin"]


def test_checkpoints_hold_plain_settings(tmp_path):
    module = make(include=["layers.0"])
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=Images(**FEW))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["num_samples"] == 4 and stored["augment_scope"] == "shared" and stored["include"] == ["layers.0"]
    assert not {"net", "optimizer", "init", "prior"} & stored.keys()
    again = BayesClassifier.load_from_checkpoint(
        tmp_path / "x.ckpt", net=MLP(hidden=[16]), optimizer=ADAM, weights_only=True
    )
    assert torch.equal(state(again), state(module)) and again.num_eval_samples == 6


def test_configurations_know_what_it_needs():
    known = signature("lightning_modules.bayes.BayesClassifier")
    assert known.literals["batch_keys"] == ("image", "label", "index")


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_a_loss_that_is_not_finite_names_step_and_layer(objective):
    """Acceptance 16."""
    module = make(objective=objective)
    with torch.no_grad():
        module.net.layers[1].weight_log_sigma += 800.0
    text = (
        r"the loss is (nan|inf) at step 0; the largest deviation is inf in layer layers\.1: lower model\.optimizer\.lr"
    )
    with pytest.raises(FloatingPointError, match=text):
        run(module, Images(**FEW), "fit")
    module = make()
    with torch.no_grad():
        module.net.layers[0].weight_log_sigma[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"deviation is nan in layer layers\.0"):
        run(module, Images(**FEW), "fit")
    module = make(MLP(hidden=[4], dropout=0.1), posterior="dropout")
    with torch.no_grad():
        module.net.layers[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0; lower the learning rate"):
        run(module, Images(**FEW), "fit")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"posterior": "laplace"}, r"model\.posterior='laplace' is unknown"),
        ({"objective": "moments"}, r"model\.objective='moments' is unknown; choose one of elbo, predictive"),
        ({"sync": "none"}, r"model\.sync='none' is unknown"),
        ({"num_samples": 0}, r"model\.num_samples=0: at least 1 sample"),
        ({"num_eval_samples": 0}, r"model\.num_eval_samples=0"),
        ({"num_samples": 3, "antithetic": True}, r"model\.num_samples=3: antithetic samples come in pairs"),
        ({"sample_chunk": 3, "antithetic": True}, r"model\.sample_chunk=3: at least 1, and even if antithetic"),
        ({"sample_chunk": 0}, r"model\.sample_chunk=0"),
        ({"temperature": -1.0}, r"model\.temperature=-1\.0: must not be negative"),
        ({"kl_anneal_epochs": -1}, r"model\.kl_anneal_epochs=-1"),
        ({"lr_scale_lambda": 0.0}, r"model\.lr_scale_lambda=0\.0: must be above 0"),
        ({"estimator": "exact"}, r"model\.estimator='exact'"),
        ({"noise": "none"}, r"model\.noise='none'"),
        ({"augment_scope": "all"}, r"model\.augment_scope='all': choose shared, rank, sample, or a number of views"),
        ({"augment_scope": 5}, r"model\.augment_scope=5: .* from 1 to model\.num_samples=4"),
        ({"mace_bins": 0}, r"model\.mace_bins=0"),
        ({"num_classes": 1}, r"model\.num_classes=1"),
        ({"include": ["fc"]}, r"model\.include: 'fc' fits none of the layers"),
        ({"posterior": "dropout"}, r"model\.posterior=dropout: the network has no dropout"),
        ({"net": Normed(), "sample_chunk": 2}, r"model\.sample_chunk=2: .* statistics over samples x items"),
    ],
)
def test_wrong_arguments_are_named(kwargs, text):
    """Acceptance 16."""
    with pytest.raises(ValueError, match=text):
        make(**kwargs)


def test_mistakes_that_show_when_training_starts():
    """Acceptance 16."""
    data = Images(**FEW)
    net = SimpleViT(10, 1, 8, 4, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"model\.estimator=lrt: BayesLinear uses its weights at several places"):
        run(make(net, estimator="lrt"), data, "fit")
    run(make(net, estimator="lrt", allow_shared_lrt=True), data, "fit", limit_train_batches=1)
    with pytest.raises(ValueError, match=r"model\.lr_scale_lambda=2\.0 needs an optimizer with a learning rate"):
        run(make(optimizer=lambda params: torch.optim.SGD(params, 0.1), lr_scale_lambda=2.0), data, "fit")
    with pytest.raises(RuntimeError, match="was called in training without weight samples"):
        make().train()(torch.zeros(1, 1, 8, 8))
