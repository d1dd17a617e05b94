"""The module that trains block by block: what its switch does, when it steps, what it refuses and what it reports."""

from __future__ import annotations

import functools
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datamodules.images import Images
from lightning_modules.feedback import FeedbackClassifier
from networks.feedback import FeedbackWeights, Perceptron
from networks.vit import ViT
from tests.lightning_modules import feedback_runs as runs
from tests.lightning_modules.tiny_series import quiet_trainer

ALGORITHMS = ("bp", "llo", "fa", "dfa", "drtp", "f3", "delayed_loss_softmax")


def digits(**options) -> Images:
    settings = {"test_size": 60, "max_train": 200, "batch_size": 20, "num_classes": 10, "num_channels": 1} | options
    return Images("digits", **settings)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_the_digits(algorithm):
    torch.manual_seed(0)
    net = Perceptron((1, 8, 8), 10, 1, 100)
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    module = FeedbackClassifier(net, adam, algorithm=algorithm)
    trainer = quiet_trainer(max_epochs=10)
    data = digits()
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    assert found["test/accuracy"] > 0.6 and found["test/auroc"] > 0.9
    assert found["test/error"] == pytest.approx(100 * (1 - found["test/accuracy"]))
    assert trainer.global_step == 10 * len(data.train_dataloader())
    # AUROC against its definition.
    outputs = trainer.predict(module, datamodule=data)
    probability = torch.cat([o["probability"] for o in outputs])
    label = torch.cat([o["target"] for o in outputs])
    torch.testing.assert_close(probability.sum(1), torch.ones(60))
    areas = []
    for c in range(10):
        for_class = probability[:, c]
        pairs = for_class[label == c][:, None] - for_class[label != c]
        areas.append(float((pairs > 0).double().mean()))
    assert found["test/auroc"] == pytest.approx(sum(areas) / 10, abs=2e-3)


def test_frozen_blocks_stay_with_llo_and_the_others_move():
    for algorithm, moves in (("llo", False), ("f3", True), ("fa", True)):
        module = runs.module(algorithm)
        before = module.net[1].weight.detach().clone()
        last = module.net[-1].weight.detach().clone()
        runs.fit(module, epochs=1)
        assert torch.equal(module.net[1].weight, before) != moves
        assert not torch.equal(module.net[-1].weight, last)


def test_a_transformer_learns_without_a_backward_pass_through_it():
    torch.manual_seed(0)
    net = ViT(10, 1, 8, 4, 16, 2, 2, pool="mean")
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    module = FeedbackClassifier(net, adam, algorithm="f3", objective="softmax_nll")
    assert module.error_info == "delayed_error_softmax" and len(module.feedback_weights) == 2
    trainer = quiet_trainer(max_epochs=4, limit_val_batches=0)
    trainer.fit(module, datamodule=digits())
    losses = trainer.callback_metrics["train/loss"]
    assert losses < 2.2 < math.log(10)


class TestStore:
    def test_it_has_the_errors_of_the_last_visit(self):
        """With a learning rate of zero the errors are those of the initial network."""
        module = runs.module("delayed_error", functools.partial(torch.optim.SGD, lr=0.0), grad_scale="batch")
        runs.fit(module, epochs=1)
        rows = runs.Numbers().rows
        wanted = rows.target - module.net(rows.features).sigmoid()
        torch.testing.assert_close(module.errors.rows, wanted.detach())
        assert module.errors.visited.all()

    def test_rows_that_a_training_leaves_out_are_targets_still(self):
        module = runs.module("delayed_error")
        runs.fit(module, epochs=1, limit_train_batches=2)
        assert int(module.errors.visited.sum()) == 16
        target, left = runs.Numbers().rows.target, ~module.errors.visited
        assert torch.equal(module.errors.read(torch.arange(48), target)[left], target[left])

    def test_its_size_can_be_given(self):
        module = runs.module("f3", num_train=1000)
        runs.fit(module, epochs=1)
        assert len(module.errors) == 1000
        with pytest.raises(ValueError, match="the error store has 20 rows"):
            runs.fit(runs.module("f3", num_train=20), epochs=1)


class TestSteps:
    def test_accumulated_batches_are_one_large_batch(self):
        """Also of hidden blocks, whose gradients are sums; errors are stored with every batch."""
        small, large = (
            runs.module("drtp", runs.SGD, runs.network(torch.float64), accumulate_batches=k) for k in (3, 1)
        )
        runs.fit(small, epochs=2)
        runs.fit(large, epochs=2, data=runs.Numbers(torch.float64, 3 * runs.BATCH))
        torch.testing.assert_close(runs.weights(small), runs.weights(large), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("algorithm", ["bp", "dfa", "f3"])
    def test_the_last_step_of_an_epoch_takes_what_there_is(self, algorithm):
        module = runs.module(algorithm, accumulate_batches=4)
        assert runs.fit(module, epochs=2).global_step == 4  # six batches: four and two

    def test_clipping_is_by_block(self):
        module = runs.module("f3", functools.partial(torch.optim.SGD, lr=1.0), clip_norm=0.01)
        before = [[p.detach().clone() for p in group] for group in module.chain.parameters]
        runs.fit(module, epochs=1, limit_train_batches=1)
        for old, new in zip(before, module.chain.parameters, strict=True):
            moved = torch.cat([(a - b).flatten() for a, b in zip(old, new, strict=True)])
            assert float(moved.detach().norm()) == pytest.approx(0.01, rel=1e-3)

    def test_scale(self):
        """Divided by N C, hidden gradients are those of `none` over that."""
        for scale, divisor in (("batch", 8), ("batch_outputs", 24)):
            found = []
            for s in ("none", scale):
                module, mine = runs.module("drtp", grad_scale=s), {}
                module.gradients(_batch(), mine.__setitem__)
                found.append(mine)
            for block in (0, 1):
                torch.testing.assert_close(found[0][block][0] / divisor, found[1][block][0])
            assert torch.equal(found[0][2][0], found[1][2][0])

    def test_sign(self):
        found = []
        for sign in (1, -1):
            mine = {}
            runs.module("drtp", error_sign=sign).gradients(_batch(), mine.__setitem__)
            found.append(mine)
        assert torch.equal(found[0][0][0], -found[1][0][0]) and torch.equal(found[0][2][0], found[1][2][0])

    @pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.25), ("step", 0.5**12)])
    def test_schedulers_are_stepped(self, interval, expected):
        halve = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        module = runs.module(
            "f3", functools.partial(torch.optim.Adam, lr=1.0), scheduler=halve, scheduler_interval=interval
        )
        trainer = runs.fit(module, epochs=2)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)

    def test_plateaus_are_seen(self):
        plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, mode="max")
        adam = functools.partial(torch.optim.Adam, lr=1e-3)
        module = runs.module("bp", adam, scheduler=plateau, scheduler_monitor="val/loss")
        trainer = runs.fit(module, epochs=3, limit_val_batches=2)  # a loss that falls is no new maximum
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25e-3)

    def test_learning_rates_by_algorithm(self):
        rates = {"llo": 0.5, "f3": 0.25}
        for algorithm, expected in (("llo", 0.5), ("f3", 0.25), ("delayed_loss", 0.25), ("bp", 1e-2)):
            trainer = runs.fit(runs.module(algorithm, learning_rates=rates), epochs=1)
            assert trainer.optimizers[0].param_groups[0]["lr"] == expected


def _batch() -> dict[str, torch.Tensor]:
    rows = runs.Numbers().rows
    return {"features": rows.features[:8], "target": rows.target[:8], "index": torch.arange(8)}


def test_half_precision_of_a_wide_range():
    module = runs.module("f3")
    runs.fit(module, epochs=2, precision="bf16-mixed")
    assert runs.weights(module).isfinite().all() and module.errors.rows.dtype == torch.float32


class Probes(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            module.probe(batch)


@pytest.mark.parametrize("algorithm", ["f3", "dfa", "fa", "bp", "llo"])
def test_a_probe_changes_nothing(algorithm):
    def run(callbacks):
        torch.manual_seed(0)
        module = runs.module(algorithm, net=runs.network(dropout=0.3))
        trainer = runs.fit(module, callbacks=callbacks)
        return runs.states(module, trainer)

    for one, other in zip(run(()), run((Probes(),)), strict=True):
        assert torch.equal(one, other)


def test_what_a_probe_finds():
    exact = runs.module("bp").probe(_batch())
    assert list(exact["cosine"].values()) == pytest.approx([1, 1, 1]) and "alignment" not in exact
    assert runs.module("llo").probe(_batch())["cosine"] == {2: pytest.approx(1)}
    module = runs.module("delayed_error")
    module.errors = type(module.errors)(48, 3)
    found = module.probe(_batch())
    assert -1 <= found["cosine"][0] <= 1 and found["cosine"][2] == pytest.approx(1)
    assert set(found["alignment"]) == {0, 1} and found["staleness"] > 0
    batch = _batch()
    module.errors.write(batch["index"], batch["target"] - module.net(batch["features"]).sigmoid().detach())
    assert module.probe(batch)["staleness"] == pytest.approx(0, abs=1e-6)
    # B = -W^T of the last layer is backpropagation, but for a factor; feedback says target minus output.
    module.feedback_weights[1].entries.copy_(-module.net[-1].weight.detach())
    assert module.probe(batch)["cosine"][1] == pytest.approx(1, abs=1e-6)
    assert module.probe(batch)["alignment"][1] == pytest.approx(1, abs=1e-6)


class TestRegression:
    def test_metrics(self):
        module = runs.module("bp", objective="mse")
        trainer = quiet_trainer()
        data = runs.Numbers()
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
        with torch.no_grad():
            raw, target = module.net(data.rows.features), data.rows.target
        assert found["val/mse"] == pytest.approx(float(F.mse_loss(raw, target)), rel=1e-6)
        assert found["val/mae"] == pytest.approx(float(F.l1_loss(raw, target)), rel=1e-6)
        ones = target == 1
        assert found["val/mape"] == pytest.approx(float(100 * (raw[ones] - 1).abs().mean()), rel=1e-5)

    def test_targets_of_another_shape_are_refused(self):
        with pytest.raises(ValueError, match=r"model\.num_outputs=3 wants \(batch, 3\)"):
            runs.module("bp").sample(_batch() | {"target": torch.zeros(8)})


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"algorithm": "ff"}, r"model\.algorithm='ff' is unknown; choose one of bp, llo, fa"),
            ({"error_info": "current_loss"}, r"model\.error_info='current_loss' is unknown"),
            ({"algorithm": "delayed_loss", "error_info": "zeros"}, r"contradict each other"),
            ({"schedule": "later"}, r"model\.schedule='later'"),
            ({"grad_scale": "mean"}, r"model\.grad_scale='mean'"),
            ({"error_sign": 0}, r"model\.error_sign=0"),
            ({"accumulate_batches": 0}, r"model\.accumulate_batches=0"),
            ({"num_train": 0}, r"model\.num_train=0"),
            ({"clip_norm": 0.0}, r"model\.clip_norm=0\.0"),
            ({"learning_rates": {"sgd": 1.0}}, r"model\.learning_rates\.sgd"),
            ({"input_shape": (5,)}, r"model\.input_shape=\[5\] does not fit the network"),
            ({"boundaries": []}, r"the network is one block"),
            ({"feedback": FeedbackWeights("identity_repeat"), "net": nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3))},
             "a block of 2 features would hear nothing of 1 of the 3 outputs"),
        ],
    )  # fmt: skip
    def test_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            runs.module(**options)

    def test_batches_without_numbers(self):
        batch = _batch()
        del batch["index"]
        module = runs.module("f3")
        with pytest.raises(ValueError, match="F3 needs batches with 'index'"):
            module.gradients(batch, lambda *_: None)

    def test_sgd_without_a_scale_warns(self):
        with pytest.warns(UserWarning, match=r"use model\.grad_scale=batch_outputs, or Adam"):
            runs.module("f3", runs.SGD)

    def test_unknown_length(self):
        loader = runs.Numbers()
        loader.trainer = None
        with pytest.raises(ValueError, match=r"set model\.num_train"):
            quiet_trainer(max_epochs=1).fit(runs.module("f3"), loader.train_dataloader())
        quiet_trainer(max_epochs=1, limit_val_batches=0).fit(runs.module("f3", num_train=48), loader.train_dataloader())

    def test_classes_of_the_data(self):
        module = FeedbackClassifier(Perceptron((1, 8, 8), 4), num_classes=4, top_k=None)
        with pytest.raises(ValueError, match=r"model\.num_classes=4, but the data have 10"):
            quiet_trainer().test(module, datamodule=digits(), verbose=False)
