"""Where a lottery run begins (dense, ticket, control, transplant), what a test goes through, mistakes."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from callbacks.iterative_pruning import IterativePruning
from datamodules.images import Images
from lightning_modules.lottery import Lottery
from networks.bayes import Init, SampleContext
from networks.bayes.noise import Stream
from networks.lottery import compact
from networks.lottery.sparse_layers import SparseBayesLinear, SparseLinear
from networks.lottery.tickets import Ticket, load_ticket, save_ticket, ticket_path
from networks.masks import PruneChoice, masked_weights, masks_of
from networks.mlp import MLP
from tests.lightning_modules.tiny_series import quiet_trainer

FEW = functools.partial(Images, test_size=100, test_from="random", max_train=160, batch_size=32)


def module(**options: Any) -> Lottery:
    torch.manual_seed(options.pop("torch_seed", 0))
    settings = {"init": Init(0.1, "keep"), "num_samples": 2, "num_eval_samples": 4, "evaluation_seeds": 2}
    hidden = options.pop("hidden", (24, 16))
    return Lottery(MLP(hidden=hidden), functools.partial(torch.optim.Adam, lr=3e-3), **settings | options)


def fit(
    one: Lottery, folder: Path, levels: int = 0, *more: pl.Callback, data: Any = None, **options: Any
) -> IterativePruning:
    callback = IterativePruning(levels, **{"epochs_per_level": 1, "dirpath": str(folder)} | options)
    quiet_trainer(callbacks=[callback, *more], max_epochs=-1).fit(one, datamodule=FEW(**data or {}))
    return callback


def begun(one: Lottery) -> dict[str, torch.Tensor]:
    """Weights after the set-up of a fit."""
    trainer = quiet_trainer(max_epochs=0)
    trainer.fit(one, datamodule=FEW())
    return {name: value.clone() for name, value in one.net.state_dict().items()}


@pytest.fixture(scope="module")
def searches(tmp_path_factory) -> dict[bool, Path]:
    """Three levels of both kinds of networks, by whether they are Bayesian."""
    folder = tmp_path_factory.mktemp("searches")
    for bayesian in (True, False):
        fit(module(bayesian=bayesian), folder / str(bayesian) / "tickets", levels=2, rate=0.5)
    return {bayesian: folder / str(bayesian) for bayesian in (True, False)}


# ------------------------------------------------------------------------------------------------------- the beginning


def test_both_kinds_begin_with_the_same_weights():
    bayes, plain = module().net.layers[0], module(bayesian=False).net.layers[0]
    assert torch.equal(bayes.weight_mu, plain.weight) and torch.equal(bayes.bias_mu, plain.bias)
    bound = 1 / 8  # 64 inputs
    assert plain.weight.abs().max() <= bound and plain.weight.abs().max() > 0.95 * bound
    drawn = module(start="normal", bayesian=False).net.layers[0].weight.detach()
    assert float(drawn.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    torch.manual_seed(0)
    kept = MLP(hidden=(24, 16)).layers[0].weight.detach()
    assert torch.equal(module(start="keep").net.layers[0].weight_mu, kept)


@pytest.mark.parametrize("source", ["init", "trained"])
@pytest.mark.parametrize(("of", "to"), [(True, True), (False, False), (False, True), (True, False)])
def test_it_begins_with_a_ticket(searches, source, of, to):
    """Mask and weights; deviations stay what they are where an ordinary ticket has none."""
    ticket = load_ticket(searches[of] / "tickets/level_01.pt")
    untouched = {name: value.clone() for name, value in module(bayesian=to, torch_seed=5).net.state_dict().items()}
    state = begun(module(ticket=str(searches[of]), level=1, source=source, bayesian=to, torch_seed=5))
    stored = ticket.initial if source == "init" else ticket.trained
    for i, layer in enumerate(("layers.0", "layers.1", "layers.2")):
        weight = state[f"{layer}.weight_mu" if to else f"{layer}.weight"]
        assert torch.equal(weight, stored[f"{layer}.weight_mu" if of else f"{layer}.weight"])
        if i < 2:
            assert torch.equal(state[f"{layer}.weight_mask"], ticket.masks[f"{layer}.weight"])
        if to:
            sigma = stored if of else untouched
            assert torch.equal(state[f"{layer}.weight_log_sigma"], sigma[f"{layer}.weight_log_sigma"])


def test_controls_exchange_weights_or_masks(searches):
    ticket = load_ticket(searches[True] / "tickets/level_02.pt")
    for control in ("reinit", "shuffle_layerwise", "shuffle_even", "shuffle_global"):
        state, other = (
            begun(module(ticket=str(searches[True]), control=control, control_seed=seed)) for seed in (0, 1)
        )
        again = begun(module(ticket=str(searches[True]), control=control, torch_seed=9))
        assert all(torch.equal(again[name], value) for name, value in state.items()), "control_seed decides"
        changed, kept = ("weight_mu", "weight_mask") if control == "reinit" else ("weight_mask", "weight_mu")
        stored = {"weight_mask": ticket.masks["layers.0.weight"], "weight_mu": ticket.initial["layers.0.weight_mu"]}
        assert torch.equal(state[f"layers.0.{kept}"], stored[kept])
        assert not torch.equal(state[f"layers.0.{changed}"], stored[changed])
        assert not torch.equal(state[f"layers.0.{changed}"], other[f"layers.0.{changed}"])


def test_a_control_that_empties_a_layer_is_a_warning(tmp_path):
    one = module(hidden=(24, 2))
    masks = {name: torch.zeros_like(mask) for name, mask in masks_of(masked_weights(one.net)).items()}
    masks["layers.0.weight"][0, 0] = True
    save_ticket(ticket_path(tmp_path, 9), Ticket(masks, one.net.state_dict(), about={"level": 9}))
    with pytest.warns(UserWarning, match="model.control=shuffle_global: nothing is left of layers"):
        begun(module(hidden=(24, 2), ticket=str(tmp_path), control="shuffle_global"))


def test_a_ticket_is_pruned_further(searches, tmp_path):
    """Levels go on counting, and so do the seconds."""
    callback = fit(module(ticket=str(searches[False]), level=1, bayesian=False), tmp_path, levels=1, rate=0.5)
    assert [row["level"] for row in callback.history] == [1, 2]
    assert [row["remaining"] for row in callback.history] == pytest.approx([0.5, 0.25], abs=1e-3)
    searched = load_ticket(searches[False] / "tickets/level_01.pt").about["seconds_by_level"]
    own = [row["seconds"] for row in callback.history]
    about = load_ticket(tmp_path / "level_02.pt").about
    assert about["seconds_by_level"] == [searched[0], *own]
    assert about["cost_s"] == pytest.approx(searched[0] + sum(own))


@pytest.mark.parametrize("source", ["init", "trained"])
def test_the_cost_of_a_transplant(searches, tmp_path, source):
    """Levels before the ticket's; its own too where its trained weights are taken; one Bayesian training."""
    options = {"compare": str(searches[True])}
    callback = fit(module(ticket=str(searches[False]), source=source), tmp_path, **options)
    searched, full = (load_ticket(searches[kind] / "tickets/level_02.pt").about for kind in (False, True))
    once = callback.history[0]["seconds"]
    cost = sum(searched["seconds_by_level"][: 3 if source == "trained" else 2]) + once
    assert load_ticket(tmp_path / "level_02.pt").about["cost_s"] == pytest.approx(cost)
    assert callback.history[0]["cost_saved"] == pytest.approx(1 - cost / full["cost_s"])


def test_a_run_that_began_with_a_ticket_goes_on_without_it(searches, tmp_path):
    """Its level and its cost are in the checkpoint, with mask and weights."""
    moved = tmp_path / "moved"
    shutil.copytree(searches[True], moved)
    options = {"ticket": str(moved), "level": 1, "control": "reinit"}
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)

    def run(levels: int, ckpt: Path | None) -> IterativePruning:
        callback = IterativePruning(levels, epochs_per_level=1, dirpath=str(tmp_path / "own"))
        trainer = quiet_trainer(callbacks=[callback, keep], max_epochs=-1, enable_checkpointing=True)
        trainer.fit(module(**options), datamodule=FEW(), ckpt_path=ckpt)
        return callback

    run(0, None)
    shutil.rmtree(moved)
    callback = run(1, tmp_path / "last.ckpt")
    assert [row["level"] for row in callback.history] == [1, 2]
    assert len(load_ticket(tmp_path / "own/level_02.pt").about["seconds_by_level"]) == 3


# -------------------------------------------------------------------------------------------------------------- a test


@torch.no_grad()
def expected(ticket: Ticket, which: str, seed: int) -> tuple[float, float]:
    """Accuracy and NLL of a ticket by hand."""
    data = FEW()
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    image, label = (torch.cat([data.normalized(b)[key] for b in batches]) for key in ("image", "label"))
    net = module().net.eval()
    net.load_state_dict(ticket.state(which) | {f"{name}_mask": mask for name, mask in ticket.masks.items()})
    with SampleContext(range(4), 4, batch=len(label), step=seed, stream=Stream.EVALUATION):
        logits = net(image)
    p = logits.double().softmax(1).unflatten(0, (4, len(label))).mean(0)
    right = (p.argmax(1) == label).double().mean()
    return float(right), float(-p.gather(1, label[:, None]).log().mean())


@pytest.mark.parametrize("evaluate", ["trained", "best"])
def test_a_test_goes_through_the_tickets(searches, evaluate):
    one = module(tickets=str(searches[True]), test_levels=[0, 2], evaluate=evaluate)
    before = {name: value.clone() for name, value in one.net.state_dict().items()}
    (metrics,) = quiet_trainer().test(one, datamodule=FEW(), verbose=False)
    assert all(torch.equal(one.net.state_dict()[name], value) for name, value in before.items())
    for level in (0, 2):
        ticket = load_ticket(searches[True] / f"tickets/level_{level:02d}.pt")
        accuracy, nll = zip(*(expected(ticket, evaluate, seed) for seed in range(2)), strict=True)
        where = f"test/level_{level:02d}"
        assert metrics[f"{where}/accuracy"] == pytest.approx(sum(accuracy) / 2)
        assert metrics[f"{where}/nll"] == pytest.approx(sum(nll) / 2, rel=1e-6)
        assert (
            metrics[f"{where}/nll_std"] == pytest.approx(abs(nll[0] - nll[1]) / 2**0.5, rel=1e-4) and nll[0] != nll[1]
        )
        assert metrics[f"{where}/remaining"] == ticket.about["remaining"]
    assert "test/level_01/nll" not in metrics and metrics["test/remaining"] == 1


def test_own_tickets_are_those_of_the_callback(searches, tmp_path):
    """By default a test goes through what this run has written, and through nothing where nothing was."""
    for folder, levels in ((searches[True] / "tickets", {0, 1, 2}), (tmp_path / "none", set())):
        trainer = quiet_trainer(callbacks=[IterativePruning(dirpath=str(folder))])
        (metrics,) = trainer.test(module(evaluation_seeds=1), datamodule=FEW(), verbose=False)
        assert {int(name.split("/")[1][6:]) for name in metrics if "/level_" in name} == levels


@pytest.mark.parametrize("how", ["sparse", "compact"])
@pytest.mark.parametrize("bayesian", [True, False])
def test_tickets_are_run_as_sparse_networks(searches, bayesian, how, monkeypatch):
    """With the noise of the dense layers: the scores of the masked networks, of tickets and of the module itself."""
    monkeypatch.setattr(compact, "MAX_DENSITY", 0.6)
    folder, few = str(searches[bayesian]), {"test_levels": [1, 2], "evaluation_seeds": 1, "bayesian": bayesian}
    found, used = [], []
    for execution in ("masked", how):
        one = module(ticket=folder, tickets=folder, execution=execution, execution_noise="dense", **few)
        before = [name for name, _ in one.named_parameters()]
        trainer = quiet_trainer()
        (metrics,) = trainer.test(one, datamodule=FEW(), verbose=False)
        outputs = trainer.predict(one, datamodule=FEW())
        found.append((metrics, torch.cat([out["probability"] for out in outputs])))
        used.append(one._executed)
        assert [name for name, _ in one.named_parameters()] == before
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-6)
    assert used[0] == {} and set(used[1]) == {None}, "a prediction is of the module alone"
    assert isinstance(used[1][None].layers[1], SparseBayesLinear if bayesian else SparseLinear)
    one.train()
    assert one.is_masked, "training is"


def test_noise_of_the_weights_alive_is_another_sample(searches, monkeypatch):
    monkeypatch.setattr(compact, "MAX_DENSITY", 0.6)
    one = module(ticket=str(searches[True]), execution="compact", num_eval_samples=64, tickets=None)
    other = module(ticket=str(searches[True]), num_eval_samples=64, tickets=None)
    (mine,), (theirs,) = (quiet_trainer().test(m, datamodule=FEW(), verbose=False) for m in (one, other))
    assert mine["test/nll"] != theirs["test/nll"] and mine["test/nll"] == pytest.approx(theirs["test/nll"], rel=0.02)


def test_a_ticket_is_evaluated_without_training(searches):
    """What test, validation and prediction see where nothing was trained and no checkpoint is given."""
    ticket = load_ticket(searches[True] / "tickets/level_02.pt")
    trainer = quiet_trainer()
    (metrics,) = trainer.test(module(ticket=str(searches[True])), datamodule=FEW(), verbose=False)
    assert (metrics["test/accuracy"], metrics["test/nll"]) == pytest.approx(expected(ticket, "trained", 0))
    assert metrics["test/remaining"] == pytest.approx(0.25, abs=1e-3)
    outputs = trainer.predict(module(ticket=str(searches[True]), level=1), datamodule=FEW())
    assert {"probability", "entropy", "mutual_information"} <= outputs[0].keys()
    assert (outputs[0]["mutual_information"] > 0).all()


@pytest.mark.parametrize("val_fraction", [0.0, 0.1])
def test_published_numbers_are_maxima_on_test_images(tmp_path, val_fraction):
    """Of every epoch, with and without images for validation; the report changes nothing else."""
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["paper/accuracy"]))
            assert pl_module.training

    one, data = module(report="paper"), {"val_fraction": val_fraction}
    callback = fit(one, tmp_path, 1, Watch(), data=data, epochs_per_level=3)
    assert [row["paper_accuracy"] for row in callback.history] == [max(seen[:3]), max(seen[3:])] and min(seen) > 0
    assert [row["metrics"]["paper/accuracy"] for row in callback.history] == [seen[2], seen[5]]
    accuracy, _ = expected(load_ticket(tmp_path / "level_01.pt"), "trained", 0)
    assert seen[5] == pytest.approx(accuracy)
    other = module()
    fit(other, tmp_path / "other", 1, data=data, epochs_per_level=3)
    assert all(torch.equal(value, other.net.state_dict()[name]) for name, value in one.net.state_dict().items())
    assert "paper_accuracy" not in fit(module(), tmp_path / "other").history[0]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "zeros"}, r"model\.start='zeros' is unknown; choose one of uniform, normal, keep"),
        ({"control": "shuffle"}, r"model\.control='shuffle' is unknown; .* shuffle_layerwise"),
        ({"source": "final"}, r"model\.source='final' is unknown; choose one of init, trained"),
        ({"evaluate": "last"}, r"model\.evaluate='last'"),
        ({"report": "all"}, r"model\.report='all'"),
        ({"execution": "fast"}, r"model\.execution='fast' is unknown; choose one of masked, sparse, compact"),
        ({"execution_noise": "no"}, r"model\.execution_noise='no' is unknown; choose one of alive, dense"),
        ({"level": -1}, r"model\.level=-1"),
        ({"level": 3}, r"model\.level=3: needs model\.ticket"),
        ({"control": "reinit"}, r"model\.control=reinit: is a control of a ticket; needs model\.ticket"),
        ({"evaluation_seeds": 0}, r"model\.evaluation_seeds=0"),
        ({"init": Init()}, r"model\.init\.mu=init: must be keep"),
        ({"prunable": PruneChoice(include=["layer.*"])}, r"model\.prunable\.include: 'layer\.\*' matches no layer"),
        ({"prunable": PruneChoice(exclude=["layers.*"])}, "no layer is left to prune"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_mistakes_with_tickets(searches, tmp_path):
    folder = str(searches[True])
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"model\.ticket=.*no tickets in .*nowhere: give a run that pruned"):
        begun(module(ticket=nowhere))
    with pytest.raises(FileNotFoundError, match=r"model\.tickets=.*nowhere: no tickets in .*nowhere: give a run"):
        quiet_trainer().test(module(tickets=nowhere), datamodule=FEW(), verbose=False)
    with pytest.raises(ValueError, match=r"model\.level=7: .* has the levels 0, 1, 2"):
        begun(module(ticket=folder, level=7))
    with pytest.raises(
        ValueError, match=r"model\.ticket=.*layers\.0\.weight has shape \[30, 64\], in the ticket \[24, 64"
    ):
        begun(module(ticket=folder, hidden=(30, 16)))
    with pytest.raises(ValueError, match=r"model\.tickets=.*, level 0: .*layers\.2\.weight may be pruned here"):
        quiet_trainer().test(module(tickets=folder, prunable=PruneChoice(keep_last=False), hidden=(24,) * 4), FEW())
    with pytest.raises(ValueError, match=r"model\.test_levels: 5 is not in model\.tickets=.* there are \[0, 1, 2\]"):
        quiet_trainer().test(module(tickets=folder, test_levels=[5]), datamodule=FEW())
    save_ticket(ticket_path(tmp_path, 0), Ticket({}, {}, about={"level": 0}))
    with pytest.raises(ValueError, match="the ticket has no mask for it"):
        begun(module(ticket=str(tmp_path)))
    (tmp_path / "level_01.pt").write_bytes(b"")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "level_01.pt")
    with pytest.raises(ValueError, match=r"is no ticket of format 1; tickets are the files tickets/level_NN\.pt"):
        begun(module(ticket=str(tmp_path / "level_01.pt"), level=1))
