"""Iterative pruning inside Lightning: levels, rewinding, restarts of optimizer and trackers, tickets, resumption."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from callbacks.energy.callback import EnergyCallback
from callbacks.iterative_pruning import IterativePruning, weights_of
from callbacks.rng_state import RngState
from lightning_modules.schedules import WarmupCosine
from networks.bayes import Init, Prior, to_bayesian
from networks.lottery.tickets import find_tickets, load_ticket
from networks.masks import MASK, density, install_masks, jaccard, masked_weights, masks_of
from strategies.ddp import DDP
from tests.callbacks.digits_mlp import DigitsData, DigitsMLP
from tests.callbacks.recorder import Recorder
from tests.lightning_modules.tiny_series import quiet_trainer

# 192 images in batches of 32: an epoch has six steps. 64-48-32-10.
SMALL = functools.partial(DigitsData, batch_size=32, limit=192)
ADAM = functools.partial(torch.optim.Adam, lr=3e-3)
STEP = functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 2], gamma=0.1)


def mlp(**options: Any) -> DigitsMLP:
    torch.manual_seed(0)
    return DigitsMLP(**{"widths": (48, 32), "optimizer": ADAM, "scheduler": STEP} | options)


class NormMLP(DigitsMLP):
    """With a batch normalisation, whose running statistics are to be rewound as well."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))
        super().__init__(**{"optimizer": ADAM, "scheduler": STEP, "net": net} | options)


class Starts(pl.Callback):
    """The state at the start of every epoch, as a callback behind IterativePruning sees it."""

    def __init__(self, pruning: IterativePruning) -> None:
        self.pruning, self.seen = pruning, []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(
            {
                "level": self.pruning.level,
                "weights": weights_of(pl_module),
                "masks": masks_of(masked_weights(pl_module)),
                "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
                "schedule": [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
            }
        )


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch):
    """Tickets that no test looks at are written into a folder of its own."""
    monkeypatch.chdir(tmp_path_factory.mktemp("run"))


def pruning(folder: Path | str = "tickets", **options: Any) -> IterativePruning:
    return IterativePruning(**{"levels": 2, "epochs_per_level": 3, "dirpath": str(folder)} | options)


def fit(callback: IterativePruning, *more: pl.Callback, module: Any = None, data: Any = None, ckpt: Any = None, **opts):
    module = module or mlp()
    starts = Starts(callback)
    keeps = any(isinstance(c, ModelCheckpoint) for c in more)
    before = [c for c in more if isinstance(c, EarlyStopping)]
    after = [c for c in more if c not in before]
    callbacks = [*before, callback, starts, *after]
    trainer = quiet_trainer(callbacks=callbacks, enable_checkpointing=keeps, **{"max_epochs": -1} | opts)
    trainer.fit(module, datamodule=data or SMALL(), ckpt_path=ckpt)
    return module, trainer, starts.seen


# --------------------------------------------------------------------------------------------------------------- levels


def test_levels_masks_and_tickets(tmp_path):
    """Density 0.8^n within one weight a level, nested masks, the last layer dense, a ticket for each level."""
    callback = pruning(tmp_path, levels=3, epochs_per_level=2)
    module, trainer, seen = fit(callback)
    assert trainer.current_epoch == 8 and [s["level"] for s in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    total = 64 * 48 + 48 * 32
    for before, now in itertools.pairwise(seen):
        assert all((now["masks"][n] <= before["masks"][n]).all() for n in now["masks"])
    for one in seen:
        assert density(one["masks"]) == pytest.approx(0.8 ** one["level"], abs=one["level"] / total)
        assert set(one["masks"]) == {"net.0.weight", "net.2.weight"}
    assert not hasattr(module.net[4], MASK) and type(module.net[4]) is nn.Linear
    tickets = find_tickets(tmp_path)
    assert list(tickets) == [0, 1, 2, 3]
    for level, path in tickets.items():
        ticket = load_ticket(path)
        about = ticket.about
        assert (
            about["level"] == level and about["cumulative_epochs"] == 2 * (level + 1) and about["score"] == "magnitude"
        )
        assert about["remaining"] == density(ticket.masks) and not about["bayesian"]
        assert {f"net.{name}": mask for name, mask in ticket.masks.items()}.keys() == seen[0]["masks"].keys()
        for name, value in ticket.initial.items():
            assert torch.equal(value, seen[0]["weights"][f"net.{name}"])
        assert ticket.trained["0.weight"].shape == (48, 64) and ticket.best is not None
        assert about["metrics"]["val/loss"] > 0 and about["config"] is None
        assert "in_features=64, out_features=48" in about["architecture"] and about["split_seed"] is None
    assert torch.equal(load_ticket(tickets[3]).trained["4.weight"], module.net[4].weight.detach())


@pytest.mark.parametrize("make", [mlp, NormMLP])
def test_rewinding_is_bitwise(make):
    """At the start of every level all weights and statistics are theta_0, the optimizer is empty, the rate is back."""
    _, _, seen = fit(pruning(), module=make())
    first = seen[0]
    for start in seen[::3]:
        assert all(torch.equal(start["weights"][name], value) for name, value in first["weights"].items())
        assert start["optimizer"]["state"] == {}
        assert start["optimizer"]["param_groups"] == first["optimizer"]["param_groups"]
        assert start["schedule"] == first["schedule"]
    assert seen[1]["optimizer"]["state"] and seen[2]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(3e-5)
    assert not torch.equal(seen[2]["weights"]["net.0.weight"], first["weights"]["net.0.weight"])


def test_level_zero_twice_gives_the_same_bits(tmp_path):
    for name in ("a", "b"):
        fit(pruning(tmp_path / name, levels=0))
    one, other = (load_ticket(tmp_path / name / "level_00.pt") for name in ("a", "b"))
    assert all(torch.equal(one.trained[name], other.trained[name]) for name in one.trained)


def test_learning_rate_rewinding_keeps_the_weights():
    _, _, seen = fit(pruning(rewind="lr_only"))
    level_1 = seen[3]
    assert level_1["optimizer"]["state"] == {} and level_1["optimizer"]["param_groups"][0]["lr"] == 3e-3
    assert not torch.equal(level_1["weights"]["net.0.weight"], seen[0]["weights"]["net.0.weight"])
    assert seen[3]["schedule"] == seen[0]["schedule"]


def test_late_rewinding():
    """Later levels start where level 0 was after an epoch, with optimizer and schedule of then, and are shorter."""
    callback = pruning(rewind="epoch_1")
    _, trainer, seen = fit(callback)
    assert trainer.current_epoch == 3 + 2 + 2 and [s["level"] for s in seen] == [0, 0, 0, 1, 1, 2, 2]
    for start in (seen[3], seen[5]):
        assert all(torch.equal(start["weights"][name], value) for name, value in seen[1]["weights"].items())
        assert start["schedule"] == seen[1]["schedule"]
        mine, then = start["optimizer"]["state"], seen[1]["optimizer"]["state"]
        assert mine.keys() == then.keys() and mine
        assert all(torch.equal(mine[i][key], then[i][key]) for i in then for key in then[i])


def test_kl_gain_knows_the_prior_of_the_layer():
    """Priors that are scaled by the fan-in are other numbers in every layer: the score is log p(0) - log q(0)."""
    net = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))
    to_bayesian(net, init=Init(0.5), prior=Prior(0.1, 2.0, rescale=True))
    weights = install_masks(net)
    found = pruning(score="kl_gain")._scores(SimpleNamespace(optimizers=[]), weights, "kl_gain")
    for weight in weights:
        factor = 1 / (3 * weight.fan_in) ** 0.5
        prior = torch.distributions.Normal(0.1 * factor, 2.0 * factor)
        mu, sigma = weight.mu.double(), weight.log_sigma.double().exp()
        expected = prior.log_prob(torch.zeros(())) - torch.distributions.Normal(mu, sigma).log_prob(torch.zeros(()))
        torch.testing.assert_close(found[weight.name], expected.detach(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- lengths of schedules


COSINE = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3)


def test_a_level_is_one_training():
    """``epochs_per_level: null`` is ``trainer.max_epochs``, of which the fit has as many as levels; cosines fit."""
    callback = pruning(epochs_per_level=None)
    _, trainer, seen = fit(callback, module=mlp(scheduler=COSINE), max_epochs=3)
    assert trainer.current_epoch == 9 and [s["level"] for s in seen] == [0] * 3 + [1] * 3 + [2] * 3
    rates = [s["optimizer"]["param_groups"][0]["lr"] for s in seen]
    assert rates == pytest.approx([3e-3, 2.25e-3, 0.75e-3] * 3)
    with pytest.raises(ValueError, match=r"epochs_per_level=null takes trainer\.max_epochs, which is -1"):
        fit(pruning(epochs_per_level=None), max_epochs=-1)
    with pytest.raises(ValueError, match=r"rewind=epoch_3: level 0 has 3 epochs"):
        fit(pruning(epochs_per_level=None, rewind="epoch_3"), max_epochs=3)


@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=-1), "CosineAnnealingLR is made for -1"),
        (functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=9), "CosineAnnealingLR is made for 9"),
        (functools.partial(WarmupCosine, total_epochs=9), "WarmupCosine is made for 9"),
    ],
)
def test_schedules_of_another_length_are_refused(schedule, found):
    message = rf"{found} epochs \(\w+\), a level .* has 3 \(3 epochs\): set trainer\.max_epochs=3"
    with pytest.raises(ValueError, match=message):
        fit(pruning(), module=mlp(scheduler=schedule))
    fit(pruning(levels=1), module=mlp(scheduler=functools.partial(WarmupCosine, total_epochs=3)))


def test_the_best_epoch_is_by_accuracy_or_by_loss(tmp_path):
    """A network without an accuracy keeps the weights of its lowest loss; a metric that is not there is a warning."""

    class LossAlone(DigitsMLP):
        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            # Worse from epoch to epoch: the first one is the best.
            self.log("val/loss", torch.tensor(1.0 + self.current_epoch), batch_size=len(batch["label"]))

    callback = pruning(tmp_path, levels=0)
    fit(callback, module=LossAlone(widths=(48, 32), optimizer=ADAM))
    losses = callback.history[0]["metrics"]["val/loss"], callback.history[0]["best_metrics"]["val/loss"]
    assert losses == (3, 1)
    ticket = load_ticket(tmp_path / "level_00.pt")
    assert not torch.equal(ticket.best["0.weight"], ticket.trained["0.weight"])
    with pytest.warns(UserWarning, match=r"monitor=val/f1: validation has not logged val/f1.* it logs val/accuracy, "):
        fit(pruning(tmp_path / "b", levels=0, monitor="val/f1"))
    assert load_ticket(tmp_path / "b" / "level_00.pt").best is None


@pytest.mark.parametrize(("k", "later"), [(2, 3), (8, 2)])
def test_late_rewinding_by_steps(k, later):
    """Six steps an epoch: later levels begin with the state after k steps, and are shorter by the whole epochs in k."""

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == k:
                self.weights = weights_of(pl_module)
                self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    watch = Watch()
    _, trainer, seen = fit(pruning(rewind=f"step_{k}"), watch)
    assert trainer.current_epoch == 3 + 2 * later and [s["level"] for s in seen] == [0] * 3 + [1] * later + [2] * later
    for start in (seen[3], seen[3 + later]):
        assert all(torch.equal(start["weights"][name], value) for name, value in watch.weights.items())
        assert all(float(state["step"]) == k for state in start["optimizer"]["state"].values())
        assert start["optimizer"]["param_groups"][0]["lr"] == watch.rate
    with pytest.raises(ValueError, match=r"rewind=step_18: level 0 has 18 steps \(3 epochs of 6\)"):
        fit(pruning(rewind="step_18"))


def test_pruned_weights_do_not_move_again():
    module, _, seen = fit(pruning(levels=1))
    last = weights_of(module)
    for name, mask in seen[-1]["masks"].items():
        assert torch.equal(last[name][~mask], seen[0]["weights"][name][~mask])
        assert not torch.equal(last[name][mask], seen[0]["weights"][name][mask])


def test_it_ends_where_too_little_would_be_left():
    callback = pruning(levels=9, epochs_per_level=1, stop_at=0.6)
    _, trainer, seen = fit(callback)
    assert [s["level"] for s in seen] == [0, 1, 2] and trainer.current_epoch == 3
    assert callback.history[-1]["remaining"] == pytest.approx(0.64, abs=1e-3)


def test_a_run_that_ended_for_lack_of_weights_stays_ended(tmp_path):
    options = {"levels": 9, "epochs_per_level": 1}
    fit(pruning(tmp_path, **options, stop_at=0.7), last(tmp_path))
    _, _, seen = fit(pruning(tmp_path, **options, stop_at=0.7), last(tmp_path), ckpt=tmp_path / "last.ckpt")
    assert not seen
    _, _, seen = fit(pruning(tmp_path, **options, stop_at=0.6), last(tmp_path), ckpt=tmp_path / "last.ckpt")
    assert [s["level"] for s in seen] == [2]


def test_random_score_and_accumulated_gradients():
    """Any score of the registry, another optimizer step per epoch."""
    for score in ("random", "mu_scaled", "loss_change"):
        callback = pruning(levels=1, epochs_per_level=1, score=score)
        _, _, seen = fit(callback, accumulate_grad_batches=2)
        assert density(seen[-1]["masks"]) == pytest.approx(0.8, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- trackers


def test_trackers_begin_anew(tmp_path):
    """The best of a level is compared within the level; early stopping ends a level and not the run."""
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val/loss", enable_version_counter=False)
    stopping = EarlyStopping("val/loss", patience=1, min_delta=10.0, check_on_train_epoch_end=False)
    callback = pruning(levels=2, epochs_per_level=5)
    _, trainer, seen = fit(callback, best, stopping)
    # The second epoch of each level brings no improvement of 10.
    assert [s["level"] for s in seen] == [0, 0, 1, 1, 2, 2] and trainer.current_epoch == 6
    assert [row["epochs"] for row in callback.history] == [2, 2, 2]
    last = [row["best_metrics"]["val/loss"] for row in callback.history][-1]
    assert float(best.best_model_score) == pytest.approx(min(last, float(callback.history[-1]["metrics"]["val/loss"])))
    stored = torch.load(best.best_model_path, weights_only=True)
    assert stored["epoch"] in (4, 5)


class Replacing(pl.Callback):
    """Marks the strategy as AB-training is marked."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.replaces_weights = True


def test_strategies_that_replace_weights_are_refused():
    """Whatever the network: names of weights, their masks and their optimizer state would be gone at a level's end."""
    trainer = quiet_trainer(callbacks=[Replacing(), pruning()], max_epochs=2, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"callbacks\.iterative_pruning: \w+ replaces weights itself"):
        trainer.fit(mlp(), datamodule=SMALL())


def test_early_stopping_must_come_first():
    callback = pruning()
    trainer = quiet_trainer(callbacks=[callback, EarlyStopping("val/loss")], max_epochs=-1, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"must stand behind callbacks\.early_stopping"):
        trainer.fit(mlp(), datamodule=SMALL())
    with pytest.raises(ValueError, match="check_on_train_epoch_end: must be false"):
        fit(pruning(), EarlyStopping("val/loss"))


# ---------------------------------------------------------------------------------------------------------------- logs


def test_what_is_logged(tmp_path):
    fit(pruning(tmp_path / "det", levels=1, epochs_per_level=2, score="random"))
    logger = Recorder()
    callback = pruning(tmp_path / "own", levels=1, epochs_per_level=2, compare=str(tmp_path / "det"))
    fit(callback, logger=logger)
    rows = [row for row in logger.rows if "lottery/level" in row]
    assert [row["lottery/level"] for row in rows] == [0, 0, 1, 1]
    assert [row["lottery/cumulative_epochs"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["lottery/remaining"] == pytest.approx(0.8, abs=1e-3)
    sizes = {"lottery/density/0": 64 * 48, "lottery/density/2": 48 * 32}
    mean = sum(rows[-1][key] * size for key, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(rows[-1]["lottery/remaining"])
    ends = [row for row in logger.rows if "lottery/seconds" in row]
    assert len(ends) == 2
    for row in ends:
        assert row["lottery/rank_correlation/mu"] == pytest.approx(1) and row["lottery/overlap/mu"] == 1
        assert 0 < row["lottery/rank_correlation/mu_scaled"] < 1 and 0.5 < row["lottery/overlap/mu_scaled"] < 1
        assert 0.5 < row["lottery/sign_agreement"] <= 1 and row["lottery/seconds"] > 0
    assert "lottery/overlap/previous" not in ends[0]
    assert ends[1]["lottery/overlap/previous"] == pytest.approx(0.8, abs=1e-3)
    own, other = (load_ticket(tmp_path / name / "level_01.pt").masks for name in ("own", "det"))
    assert ends[1]["lottery/overlap/compared"] == jaccard(own, other) < 0.9 and ends[0]["lottery/overlap/compared"] == 1


def test_figures_are_drawn(tmp_path):
    callback = pruning(tmp_path / "t", levels=1, epochs_per_level=1, figures_dir=str(tmp_path / "figures"))
    fit(callback)
    # The frontier of means and deviations is for Bayesian networks.
    expected = {f"{name}.png" for name in callback.figures if name != "pruning_frontier"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == expected


def test_energy_of_every_level(tmp_path):
    """The last one too, which no other level follows."""
    energy = EnergyCallback(str(tmp_path / "energy"), meters="estimates", codecarbon=False, figures=[])
    energy.begin_run()
    logger, callback = Recorder(), pruning(tmp_path / "tickets", levels=1, epochs_per_level=2)
    trainer = quiet_trainer(callbacks=[energy, callback], max_epochs=-1, logger=logger)
    trainer.fit(mlp(), datamodule=SMALL())
    energy.end_run("completed")
    logged = [row["lottery/energy_j"] for row in logger.rows if "lottery/energy_j" in row]
    assert logged == [row["energy_j"] for row in callback.history] and len(logged) == 2
    by_epoch = [3.6e6 * row["it_kwh"] for row in energy.epochs]
    assert logged == pytest.approx([sum(by_epoch[:2]), sum(by_epoch[2:])]) and min(logged) > 0


# ------------------------------------------------------------------------------------------------------------ resuming


class Killed(Exception):
    pass


class Killer(pl.Callback):
    """Raises after a number of steps, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def last(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="last", **{"enable_version_counter": False} | options)


@pytest.mark.parametrize(
    ("rewind", "step", "every"),
    [
        *(("init", 50, "epoch"), ("lr_only", 50, "epoch"), ("epoch_1", 50, "epoch"), ("init", 44, 1), ("init", 36, 1)),
        *(pytest.param(r, s, 1, marks=pytest.mark.slow) for r in ("lr_only", "epoch_1") for s in (18, 36, 43, 44)),
    ],
)
def test_a_killed_run_goes_on_exactly(tmp_path, rewind, step, every):
    """Killed within a level or at its border, resumed: masks, weights, history as without (float64, to the bit).

    Only where a checkpoint of the last batch of a level is all there is, the metrics of its validation are missing.
    """
    options = {"every_n_train_steps": 1} if every == 1 else {}

    def run(folder: Path, *more: pl.Callback, ckpt: Any = None) -> tuple[Any, IterativePruning]:
        callback = pruning(folder / "tickets", levels=3, epochs_per_level=3, rewind=rewind)
        data = SMALL(double=True)
        module = mlp(noise=0.1).double()
        fit(callback, last(folder, **options), RngState(), *more, module=module, data=data, ckpt=ckpt)
        return module, callback

    whole, callback = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "part", Killer(step))
    resumed, other = run(tmp_path / "part", ckpt=tmp_path / "part" / "last.ckpt")
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    at_border = (rewind, step) == ("epoch_1", 43)
    strip = {"seconds", "cost_s"} | ({"metrics", "best_metrics"} if at_border else set())
    assert [{k: v for k, v in r.items() if k not in strip} for r in other.history] == [
        {k: v for k, v in r.items() if k not in strip} for r in callback.history
    ]
    for level, path in find_tickets(tmp_path / "whole").items():
        one, two = load_ticket(path), load_ticket(tmp_path / "part" / "tickets" / f"level_{level:02d}.pt")
        for kind in ("masks", "initial", "trained", *(() if at_border else ("best",))):
            mine, theirs = getattr(one, kind), getattr(two, kind)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_finished_run_does_nothing_more(tmp_path):
    module, _, _ = fit(pruning(levels=1, epochs_per_level=2), last(tmp_path))
    again, callback = mlp(), pruning(levels=1, epochs_per_level=2)
    _, _, seen = fit(callback, last(tmp_path), module=again, ckpt=tmp_path / "last.ckpt")
    assert not seen and torch.equal(again.net[0].weight, module.net[0].weight)


def test_more_levels_can_be_added(tmp_path):
    fit(pruning(levels=1, epochs_per_level=2), last(tmp_path))
    callback = pruning(levels=2, epochs_per_level=2)
    _, _, seen = fit(callback, last(tmp_path), ckpt=tmp_path / "last.ckpt")
    assert [s["level"] for s in seen] == [2, 2] and [row["level"] for row in callback.history] == [0, 1, 2]


@pytest.mark.parametrize("changed", [{"rate": 0.3}, {"score": "mu_scaled"}, {"rewind": "lr_only"}])
def test_another_search_cannot_go_on(tmp_path, changed):
    fit(pruning(levels=1, epochs_per_level=2), last(tmp_path))
    with pytest.raises(ValueError, match=f"callbacks.iterative_pruning.{next(iter(changed))}=.* go on with that"):
        fit(pruning(levels=1, epochs_per_level=2, **changed), last(tmp_path), ckpt=tmp_path / "last.ckpt")


# ------------------------------------------------------------------------------------------------------- several ranks


def _on_ranks(folder: str, double: bool) -> dict[str, Any]:
    callback = pruning(folder, levels=2, epochs_per_level=2)
    module = mlp().double() if double else mlp()
    strategy = DDP()
    trainer = quiet_trainer(
        callbacks=[callback], enable_checkpointing=False, max_epochs=-1, strategy=strategy, devices=2
    )
    trainer.fit(module, datamodule=SMALL(double=double))
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_two_ranks_agree_with_one(ranks2, tmp_path):
    both = ranks2(_on_ranks, str(tmp_path), True)
    alone, _, _ = fit(pruning(levels=2, epochs_per_level=2), module=mlp().double(), data=SMALL(double=True))
    for name, value in alone.state_dict().items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name].to(value.dtype), value, rtol=0, atol=1e-12)
    assert list(find_tickets(tmp_path)) == [0, 1, 2]


def _diverging_ranks(folder: str) -> str:
    class Disturb(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            with torch.no_grad():
                pl_module.net[0].weight.mul_(1 + trainer.global_rank)

    trainer = quiet_trainer(
        callbacks=[Disturb(), pruning(folder, levels=1, epochs_per_level=1)],
        **{"enable_checkpointing": False, "max_epochs": -1, "strategy": DDP(), "devices": 2},
    )
    try:
        trainer.fit(mlp(), datamodule=SMALL())
    except RuntimeError as error:
        return str(error)
    return ""


def test_different_masks_on_two_ranks_are_an_error(ranks2, tmp_path):
    assert all("masks of rank 1 differ" in message for message in ranks2(_diverging_ranks, str(tmp_path)))


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, r"rate=1\.0: must lie between 0 and 1"),
        ({"levels": -1}, "levels=-1"),
        ({"epochs_per_level": 0}, "epochs_per_level=0"),
        ({"score": "size"}, "score='size' is unknown; choose one of magnitude"),
        ({"rewind": "epoch_3"}, r"rewind=epoch_3: level 0 has 3 epochs .* the latest is epoch_2"),
        ({"rewind": "late"}, "rewind='late' is unknown"),
        ({"stop_at": 2.0}, r"stop_at=2\.0"),
        ({"mode": "best"}, "mode='best' is unknown"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        pruning(**options)


def test_a_score_that_needs_sigma():
    with pytest.raises(ValueError, match="score='snr' needs standard deviations, but the network is deterministic"):
        fit(pruning(score="snr"))


def test_an_empty_layer_is_a_warning():
    module = mlp()
    with torch.no_grad():
        module.net[2].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match="layer 2 is empty from level 1 on"):
        fit(pruning(levels=1, epochs_per_level=1, rate=0.5), module=module, limit_train_batches=1)
    assert module.net[4].weight.isfinite().all()
