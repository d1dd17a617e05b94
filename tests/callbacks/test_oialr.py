"""OIALR inside Lightning: schedule, optimizers, distribution, checkpoints, resumption, export, logs, mistakes."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from callbacks.dlrt import DLRT
from callbacks.low_rank import parse_time
from callbacks.oialr import OIALR, parse_delay
from callbacks.post_hoc_svd import PostHocSVD
from callbacks.rng_state import RngState
from networks.low_rank import LayerChoice, factored_weights, fractions, parameter_names
from networks.tall_view import to_tall
from strategies.ddp import DDP
from tests.callbacks.digits_mlp import DigitsData, DigitsMLP
from tests.lightning_modules.tiny_series import quiet_trainer

# 192 images in batches of 32: an epoch has six steps.
SMALL = functools.partial(DigitsData, batch_size=32, limit=192)
WIDTHS = (48, 48, 48)


def mlp(**options: Any) -> DigitsMLP:
    torch.manual_seed(0)
    return DigitsMLP(**{"widths": WIDTHS} | options)


class Events(pl.Callback):
    """Ranks after every step, as a callback behind OIALR sees them."""

    def __init__(self) -> None:
        self.ranks: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ranks.append({w.label: w.rank for w in factored_weights(pl_module)})


def fit(*callbacks: pl.Callback, module: DigitsMLP | None = None, data: Any = None, ckpt: Any = None, **options: Any):
    module = module or mlp()
    keeps = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = quiet_trainer(callbacks=list(callbacks), enable_checkpointing=keeps, **{"max_epochs": 3} | options)
    trainer.fit(module, datamodule=data or SMALL(), ckpt_path=ckpt)
    return module, trainer


# ------------------------------------------------------------------------------------------------------------- schedule


def test_conversion_and_updates_come_when_they_are_due():
    """Delay 5, then every 4 steps; nothing is cut at the conversion, and at most half in an update."""
    events = Events()
    fit(OIALR(delay=5, frequency=4, beta=0.9, progressive=1), events, max_epochs=3)
    assert events.ranks[:4] == [{}] * 4
    full = {"net.0": 48, "net.2": 48, "net.4": 48}
    assert events.ranks[4:8] == [full] * 4
    assert events.ranks[8:12] == [dict.fromkeys(full, 24)] * 4
    assert events.ranks[12:16] == [dict.fromkeys(full, 12)] * 4
    assert events.ranks[16:] == [dict.fromkeys(full, 6)] * 2


@pytest.mark.parametrize(
    ("order", "treated"),
    [
        ("last_first", [{"net.4"}, {"net.2", "net.4"}, {"net.0", "net.2", "net.4"}]),
        ("first_first", [{"net.0"}, {"net.0", "net.2"}, {"net.0", "net.2", "net.4"}]),
        ("all", [{"net.0", "net.2", "net.4"}] * 3),
    ],
)
def test_progressive_layers(order, treated):
    events = Events()
    fit(OIALR(delay=2, frequency=3, beta=0.99, progressive=0.3, order=order), events, max_epochs=2)
    changed = [
        {name for name in now if now[name] < before[name]}
        for before, now in zip(events.ranks[1:], events.ranks[2:], strict=False)
    ]
    assert [c for c in changed if c] == treated


def test_delay_in_epochs_and_zero():
    for delay, first in (("1 epochs", 5), ("2 epochs", 11), (0, 0)):
        events = Events()
        fit(OIALR(delay=delay, frequency=100), events)
        assert [bool(ranks) for ranks in events.ranks].index(True) == first


def test_optimizer_steps_count_not_batches():
    """Of accumulated gradients only the last batch steps; a second forward pass changes nothing."""
    events = Events()
    fit(OIALR(delay=2, frequency=1, beta=0.9, progressive=1), events, accumulate_grad_batches=3, max_epochs=2)
    assert [ranks.get("net.0", 0) for ranks in events.ranks] == [0] * 5 + [48] * 3 + [24] * 3 + [12]


def test_stability_converts_each_layer_when_its_basis_stands_still():
    """With a learning rate of zero for one layer its basis is the first to be still; another never is."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        weights = [p for p in parameters if p.ndim == 2]
        return torch.optim.SGD([{"params": weights[:1], "lr": 0.0}, {"params": weights[1:], "lr": 0.8}], lr=0.8)

    events, module = Events(), mlp(optimizer=optimizer)
    callback = OIALR(delay="stability:0.999999", frequency=3, beta=0.0, stability_gap=1)
    fit(callback, events, module=module, max_epochs=3)
    # Steps 3, 6, 9 are looked at; at 9 the basis of step 3 is an epoch old.
    assert events.ranks[7] == {} and events.ranks[8] == {"net.0": 48}
    assert events.ranks[-1] == {"net.0": 48}
    assert callback._first_event == 9
    assert 1 <= len(callback._bases) <= 5  # memory is bounded
    compared = {name for entry in callback._bases for name in entry["factors"]}
    assert "net.2.weight" in compared and "net.0.weight" not in compared  # which is never looked at again


def test_stability_is_what_it_says():
    """Every layer converts once all are still, and the values that were logged explain when."""
    logger, callback = Recorder(), OIALR(delay="stability:0.9", frequency=3, beta=0.0, stability_gap=1)
    module = mlp(optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    fit(callback, module=module, logger=logger, max_epochs=2)
    values = [row for row in logger.rows if "oialr/stability/net.0" in row]
    assert len(values) == 1 and all(v > 0.9 for k, v in values[0].items() if "stability" in k)
    assert all(w.converted for w in callback.weights)
    assert callback.state_dict()["bases"] == []  # nor in checkpoints


def test_learning_rate_rises_again_after_the_conversion():
    """With plain gradient descent the first step after the conversion is a quarter of what it would be."""
    moved = {}
    for steps in (0, 3):

        class Step(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                self.before = pl_module.net[0].bias.detach().clone()

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, steps: int = steps) -> None:
                moved.setdefault(steps, []).append((pl_module.net[0].bias.detach() - self.before).norm())
                assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05

        module = mlp(optimizer=functools.partial(torch.optim.SGD, lr=0.05))
        fit(OIALR(delay=2, frequency=100, warm_rebound_steps=steps), Step(), module=module, max_epochs=1)
    assert moved[3][:2] == moved[0][:2]
    assert float(moved[3][2] / moved[0][2]) == pytest.approx(0.25, rel=1e-3)


# --------------------------------------------------------------------------------------------------- training (5, 6, 7)


def test_biases_keep_training():
    """Acceptance 5. In the published program the biases of converted layers stand still."""
    before: list[torch.Tensor] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                before.extend(layer.bias.detach().clone() for layer in pl_module.net[::2])

    module, _ = fit(OIALR(delay=3, frequency=100), Note())
    assert len(list(factored_weights(module))) == 3
    for layer, old in zip(module.net[::2], before, strict=True):
        assert ((layer.bias - old).abs() > 0).all(dim=0).any() and (layer.bias - old).abs().max() > 1e-4


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.05),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        functools.partial(torch.optim.Adam, lr=1e-3),
        functools.partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    ],
    ids=["sgd", "momentum", "adam", "amsgrad"],
)
def test_every_optimizer_with_groups_and_a_scheduler(optimizer):
    """Acceptance 6."""

    def groups(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        decayed, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
        return optimizer([{"params": decayed, "weight_decay": 0.01}, {"params": others, "lr": 0.002}])

    scheduler = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = mlp(optimizer=groups, scheduler=scheduler)
    _, trainer = fit(OIALR(delay=4, frequency=3, beta=0.3, progressive=1), module=module)
    (used,) = trainer.optimizers
    held = [id(p) for group in used.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == 8
    assert set(held) == {id(p) for p in module.parameters() if p.requires_grad}
    assert set(map(id, used.state)) <= set(held)
    assert [group["weight_decay"] for group in used.param_groups] == [0.01, used.defaults["weight_decay"]]
    lr = optimizer.keywords["lr"]
    assert [group["lr"] for group in used.param_groups] == pytest.approx([lr / 8, 0.002 / 8])
    assert module.losses[-1] < module.losses[0]
    names = parameter_names(module, [used])[0]
    assert names[0] == ["net.0.sigma", "net.2.sigma", "net.4.sigma", "net.6.weight"]


def test_full_rank_training_is_dense_training():
    """Acceptance 3 through the callback: square layers, plain gradient descent, fifty steps, events on the way."""
    data = functools.partial(DigitsData, batch_size=32, limit=320, double=True)
    options = {"widths": (64, 64, 64), "optimizer": functools.partial(torch.optim.SGD, lr=0.05)}
    dense, ours = mlp(**options).double(), mlp(**options).double()
    fit(module=dense, data=data(), max_steps=50, max_epochs=-1)
    fit(OIALR(delay=7, frequency=9, beta=0.0), module=ours, data=data(), max_steps=50, max_epochs=-1)
    assert [w.rank for w in factored_weights(ours)] == [64, 64, 64]
    for mine, theirs in zip(ours.net[::2], dense.net[::2], strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(mine.bias, theirs.bias, rtol=0, atol=1e-9)
    assert dense.losses == pytest.approx(ours.losses, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- distribution (11)


class Counting(DDP):
    """What the ledger books in every step; a group is counted on its first rank."""

    def after_step(self, last: bool) -> None:
        sent = self.ledger.entries[("all_reduce", "intra_node")].payload_bytes if self.global_rank == 0 else 0.0
        before = sum(getattr(self, "counted", []))
        self.counted = [*getattr(self, "counted", []), sent - before]


class Equal(DDPStrategy):
    """A strategy that offers to make replicas equal, and remembers when it was asked to."""

    def synchronize(self) -> None:
        self.asked = [*getattr(self, "asked", []), self.lightning_module.global_step]


SCHEDULE = {"delay": 5, "frequency": 4, "beta": 0.5, "progressive": 0.4}


def run_ranks(strategy_name: str) -> dict[str, Any]:
    """Twelve optimizer steps and more: the conversion and three updates."""
    module = mlp().double()
    strategy: Any = {"counting": Counting, "equal": Equal}.get(strategy_name, lambda **_: "auto")(
        **({} if strategy_name == "single" else {"process_group_backend": "gloo"})
    )
    devices = 1 if strategy_name == "single" else 2
    events = Events()
    data = SMALL(double=True)
    _, trainer = fit(OIALR(**SCHEDULE), events, module=module, data=data, devices=devices, strategy=strategy)
    return {
        "state": {k: v.detach().clone() for k, v in module.state_dict().items()},
        "ranks": events.ranks,
        "counted": getattr(strategy, "counted", None),
        "asked": getattr(strategy, "asked", None),
        "trainable": sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad),
        "moments": [
            {key: float(v.double().sum()) for key, v in state.items()}
            for state in trainer.optimizers[0].state_dict()["state"].values()
        ],
    }


def test_two_processes_are_one_with_the_joint_batch(ranks2):
    """Acceptance 11: weights and ranks through conversion and three updates; traffic is the trainable part."""
    alone = run_ranks("single")
    together = ranks2(run_ranks, "counting")
    assert alone["ranks"][-1]["net.4"] < 48 and alone["ranks"][-1]["net.0"] < 48
    for rank in together:
        assert rank["ranks"] == alone["ranks"]
        for key, value in alone["state"].items():
            torch.testing.assert_close(rank["state"][key].abs(), value.abs(), rtol=0, atol=1e-5)
    counted = together[0]["counted"]
    assert counted[0] == 8 * sum(p.numel() for p in mlp().parameters())
    assert counted[-1] == together[0]["trainable"] < counted[0] / 4
    for key in together[0]["state"]:
        assert torch.equal(together[0]["state"][key], together[1]["state"][key])
    assert together[0]["moments"] == together[1]["moments"]


def test_a_strategy_with_different_replicas_is_asked_to_make_them_equal(ranks2):
    asked = ranks2(run_ranks, "equal")
    assert [rank["asked"] for rank in asked] == [[5, 9, 13, 17]] * 2


def decompose_shared() -> list[int]:
    from callbacks import low_rank

    counted: list[int] = []
    decompose = low_rank.decompose
    low_rank.decompose = lambda matrix, dtype: (counted.append(len(matrix)), decompose(matrix, dtype))[1]
    try:
        matrices = [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in (8, 9, 10, 11, 12)]
        found = OIALR()._decomposed(matrices)
    finally:
        low_rank.decompose = decompose
    for matrix, (u, s, v) in zip(matrices, found, strict=True):
        torch.testing.assert_close((u * s) @ v.mT, matrix, rtol=0, atol=1e-5)
    return counted


def test_ranks_take_turns(ranks2):
    assert ranks2(decompose_shared) == [[8, 10, 12], [9, 11]]


# -------------------------------------------------------------------------------------- checkpoints and resumption (12)


class Save(pl.Callback):
    """Saves after a step, as `Interrupt` does; at the end of an epoch after its validation, as checkpoints are."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


RESUMABLE: dict[str, Any] = {
    "oialr": functools.partial(OIALR, delay=5, frequency=4, beta=0.5, progressive=0.4),
    "stability": functools.partial(OIALR, delay="stability:0.9", frequency=3, beta=0.5, stability_gap=1),
    "post_hoc_svd": functools.partial(PostHocSVD, at=5, stored_fraction=0.6),
    "dlrt": functools.partial(DLRT, delay=5, stored_fraction=0.6),
}


class AttentionNet(nn.Module):
    """Rows of an image as tokens; its parameters come in another order once attention is factored."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.encoder(image.unflatten(1, (8, 8))).flatten(1))))


def small_net(kind: str) -> DigitsMLP:
    torch.manual_seed(0)
    scheduler = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    return DigitsMLP(net=AttentionNet() if kind == "attention" else None, widths=WIDTHS, scheduler=scheduler)


def everything(module: DigitsMLP, trainer: pl.Trainer, callback: Any) -> dict[str, Any]:
    state = {"rng": torch.get_rng_state(), "history": callback.history, "metrics": dict(trainer.callback_metrics)}
    optimizers = [o.state_dict() for o in trainer.optimizers]
    return state | {"weights": module.state_dict(), "optimizers": optimizers}


STEPS = ("3", "before 5", "5", "7", "before 9", "9", "12", "16")


@pytest.fixture(
    scope="module",
    params=[
        ("oialr", "mlp"),
        ("oialr", "attention"),
        ("stability", "mlp"),
        ("post_hoc_svd", "attention"),
        ("dlrt", "mlp"),
    ],
    ids="-".join,
)
def uninterrupted(request, tmp_path_factory):
    """(method, network, folder, all that is left of a run that saved there at every one of the steps)."""
    method, net = request.param
    folder, whole = tmp_path_factory.mktemp("whole"), RESUMABLE[method]()
    before, after = (
        [Save(int(step.split()[-1]), folder / f"{step}.ckpt") for step in STEPS if step.startswith("before") == early]
        for early in (True, False)
    )
    module, trainer = fit(RngState(), *before, whole, *after, module=small_net(net))
    return method, net, folder, everything(module, trainer, whole)


@pytest.mark.parametrize("step", STEPS)
def test_a_resumed_run_is_bit_identical(uninterrupted, step):
    """Acceptance 12: before, at, between and after events, at and within epochs, with dropout and a scheduler."""
    method, net, folder, expected = uninterrupted
    path = folder / f"{step}.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == int(step.split()[-1])

    torch.manual_seed(77)
    resumed = RESUMABLE[method]()
    module, trainer = fit(RngState(), resumed, module=small_net(net), ckpt=path)
    assert differing(everything(module, trainer, resumed), expected) == []


def differing(found: Any, expected: Any, key: str = "") -> list[str]:
    """Where two nested structures differ, to the last bit."""
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return [f"{key}: keys {sorted(map(str, found.keys() ^ expected.keys()))}"]
        return [line for k in expected for line in differing(found[k], expected[k], f"{key}.{k}")]
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return [f"{key}: length {len(found)}, not {len(expected)}"]
        pairs = zip(found, expected, strict=True)
        return [line for i, (f, e) in enumerate(pairs) for line in differing(f, e, f"{key}[{i}]")]
    same = torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    return [] if same else [f"{key}: {found} is not {expected}"]


def test_evaluation_loads_any_structure(tmp_path):
    """The network in memory has smaller ranks than its best checkpoint, or is dense, or was never trained."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    module, trainer = fit(OIALR(delay=5, frequency=4, beta=0.9, progressive=1), keep)
    results = {}
    for step in (3, 6, 9, 15):
        path = tmp_path / f"step={step}.ckpt"
        (results[step],) = trainer.test(module, datamodule=SMALL(), ckpt_path=path, verbose=False)
        fresh = quiet_trainer(callbacks=[OIALR()])
        assert fresh.test(mlp(), datamodule=SMALL(), ckpt_path=path, verbose=False) == [results[step]]
    assert results[3]["test/stored_fraction"] == 1
    for name in ("test/stored_fraction", "test/trainable_fraction"):
        assert results[6][name] > results[9][name] > results[15][name]


@pytest.mark.parametrize("form", ["dense", "folded", "factored", "none"])
def test_exports(form, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="best")
    module, trainer = fit(OIALR(delay=5, frequency=4, beta=0.5, progressive=1, export=form), keep)
    path = tmp_path / f"best_{form}.ckpt"
    assert path.exists() == (form != "none")
    expected = torch.cat(trainer.predict(module, datamodule=SMALL(), ckpt_path=tmp_path / "best.ckpt"))
    if form == "none":
        return
    content = torch.load(path, weights_only=True)
    assert "optimizer_states" not in content and "callbacks" not in content
    if form == "dense":
        untouched = mlp()
        untouched.load_state_dict(content["state_dict"], strict=True)
        found = torch.cat(quiet_trainer().predict(mlp(), datamodule=SMALL(), ckpt_path=path))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    elif form == "factored":
        found = quiet_trainer(callbacks=[OIALR()]).predict(mlp(), datamodule=SMALL(), ckpt_path=path)
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=0)
    else:
        assert "net.2.down.weight" in content["state_dict"]


def test_a_second_fit_goes_on_with_the_factors():
    module, _ = fit(OIALR(delay=3, frequency=3, beta=0.5, progressive=1))
    ranks = [w.rank for w in factored_weights(module)]
    _, trainer = fit(OIALR(delay=100, frequency=3), module=module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert [w.rank for w in factored_weights(module)] == ranks


def test_nothing_is_left_on_the_module():
    module, _ = fit(OIALR(delay=3, warm_rebound_steps=2))
    assert "on_load_checkpoint" not in module.__dict__
    module.on_load_checkpoint = own = lambda checkpoint: None
    fit(OIALR(delay=3), module=module)
    assert module.on_load_checkpoint is own
    assert not any(m._forward_pre_hooks for m in module.modules())

    class Fails(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("boom")

    module = mlp()
    with pytest.raises(RuntimeError, match="boom"):
        fit(OIALR(delay=3), Fails(), module=module)
    assert "on_load_checkpoint" not in module.__dict__
    assert not any(m._forward_pre_hooks for m in module.modules())


# ----------------------------------------------------------------------------------------------------- logs and figures


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def test_what_is_logged():
    recorder = Recorder()
    module = mlp()
    _, trainer = fit(
        OIALR(delay=5, frequency=12, beta=0.5, progressive=1),
        module=module,
        data=DigitsData(batch_size=32, limit=640),
        logger=recorder,
        log_every_n_steps=1,
    )
    trainable, stored = fractions(module)
    metrics = trainer.callback_metrics
    assert float(metrics["oialr/trainable_fraction"]) == pytest.approx(trainable)
    assert float(metrics["oialr/stored_fraction"]) == pytest.approx(stored)
    ranks = {w.label: w.rank for w in factored_weights(module)}
    assert {name: int(metrics[f"oialr/rank/{name}"]) for name in ranks} == ranks
    assert float(metrics["oialr/rank_fraction"]) == pytest.approx(sum(ranks.values()) / (3 * 48))
    assert len(recorder.values("oialr/svd_s")) == 5 and min(recorder.values("oialr/svd_s")) > 0
    for name in ranks:
        dropped = recorder.values(f"oialr/discarded/{name}")
        assert len(dropped) == 4 and all(0 <= value < 1 for value in dropped) and dropped[0] > 0
    assert "oialr/svd_s" not in metrics  # times differ between equal runs
    jumps = recorder.values("oialr/loss_jump")  # ten steps after an event; the last one was less long ago
    assert len(jumps) == 4 and min(jumps) > 0.9 and max(jumps) < 1.1
    memory = recorder.values("oialr/optimizer_mib")
    assert memory[-1] < memory[0]


def test_discarded_energy_is_that_of_the_dropped_values():
    recorder, kept = Recorder(), {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:  # converted; the next step is undone by a learning rate of zero
                kept["s"] = torch.linalg.svdvals(pl_module.net[2].weight.detach())

    module = mlp(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    fit(OIALR(delay=3, frequency=3, beta=0.4, progressive=1), Look(), module=module, logger=recorder, max_epochs=1)
    s = kept["s"].double().square()
    rank = next(w.rank for w in factored_weights(module) if w.label == "net.2")
    expected = float(s[rank:].sum() / s.sum())
    assert recorder.values("oialr/discarded/net.2") == [pytest.approx(expected, rel=1e-3)]


def test_figures_are_written_and_a_broken_one_is_reported(tmp_path):
    names = ["ranks", "metric_and_parameters", "spectra"]
    options = {"delay": 5, "frequency": 4, "figures_dir": str(tmp_path / "figures"), "metric": "val/accuracy"}
    fit(OIALR(**options))
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == set(names)
    assert all(p.stat().st_size > 4000 for p in (tmp_path / "figures").iterdir())
    with pytest.warns(UserWarning, match="figure 'pie' was not drawn"):
        fit(OIALR(**options, figures=["pie"]), max_epochs=1)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, r"callbacks\.oialr\.beta=1\.0 must lie in \[0, 1\)"),
        ({"beta": -0.1}, r"callbacks\.oialr\.beta=-0\.1"),
        ({"max_drop": 1.0}, r"callbacks\.oialr\.max_drop"),
        ({"min_rank_fraction": 1.5}, r"callbacks\.oialr\.min_rank_fraction"),
        ({"progressive": 0}, r"callbacks\.oialr\.progressive=0 never"),
        ({"frequency": 0}, r"callbacks\.oialr\.frequency=0"),
        ({"criterion": "largest"}, r"callbacks\.oialr\.criterion='largest'.*relative, energy"),
        ({"order": "random"}, r"callbacks\.oialr\.order='random'"),
        ({"opt_state": "keep"}, r"callbacks\.oialr\.opt_state='keep'.*rotate, reset, zero"),
        ({"export": "onnx"}, r"callbacks\.oialr\.export='onnx'"),
        ({"svd_dtype": "float16"}, r"callbacks\.oialr\.svd_dtype='float16'"),
        ({"warm_rebound_steps": -1}, r"callbacks\.oialr\.warm_rebound_steps=-1"),
        ({"stability_gap": 0}, r"callbacks\.oialr\.stability_gap=0"),
        ({"delay": "soon"}, r"callbacks\.oialr\.delay='soon' is unknown.*stability:0\.95"),
        ({"delay": -3}, r"callbacks\.oialr\.delay=-3"),
        ({"delay": "stability:1.2"}, r"callbacks\.oialr\.delay='stability:1\.2'.*between 0 and 1"),
        ({"delay": "stability:high"}, "between 0 and 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OIALR(**options)


def test_moments():
    assert parse_delay(2500) == ("steps", 2500) and parse_delay("20 epochs") == ("epochs", 20)
    assert parse_delay("1 epoch") == ("epochs", 1) and parse_delay("30") == ("steps", 30)
    assert parse_delay("stability:0.95") == ("stability", 0.95)
    with pytest.raises(ValueError, match=r"a\.b='5 miles'"):
        parse_time("a.b", "5 miles")


def test_no_layer_is_an_error_before_the_first_step():
    with pytest.raises(ValueError, match=r"callbacks\.oialr\.layers: no weight is left"):
        fit(OIALR(layers=LayerChoice(min_ratio=0.99, include=["net.6"])))


def test_a_run_that_ends_before_the_delay_says_so():
    with pytest.warns(UserWarning, match="delay='18': this run ends after 18 steps"):
        fit(OIALR(delay=18))
    with pytest.warns(UserWarning, match="delay='3 epochs': this run ends"):
        fit(OIALR(delay="3 epochs"))
    with pytest.warns(UserWarning, match="no layer became low-rank"):
        fit(OIALR(delay="stability:0.999999", frequency=2))


def test_two_methods_at_once_are_refused():
    with pytest.raises(ValueError, match=r"callbacks\.oialr: callbacks\.dlrt changes the form of weights as well"):
        fit(OIALR(), DLRT())


class Sharding(pl.Callback):
    """Gives the strategy the name of Lightning's FSDP, which itself needs a GPU."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})


def test_sharded_strategies_are_refused():
    with pytest.raises(ValueError, match=r"callbacks\.oialr: FSDPStrategy does not keep whole weights.*strategy=auto"):
        fit(OIALR(), Sharding())


class Replacing(pl.Callback):
    """Marks the strategy as AB-training is marked, which factorises on one device as well."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.strategy.replaces_weights = True


def test_strategies_that_replace_weights_are_refused_on_one_device_too():
    with pytest.raises(ValueError, match=r"callbacks\.oialr: \w+ replaces weights itself.*strategy=auto"):
        fit(Replacing(), OIALR(delay=2))


def test_zero_optimizers_are_refused():
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer keeps the state"):
        fit(OIALR(), module=mlp(optimizer=functools.partial(ZeroRedundancyOptimizer, lr=0.1)))


def test_a_sigma_that_is_not_finite_is_named_and_left_alone():
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                pl_module.net[2].sigma.data[0, 0] = math.nan

    with pytest.warns(UserWarning, match=r"the Sigma of net\.2 is not finite"):
        module, _ = fit(Poison(), OIALR(delay=3, frequency=2, beta=0.9, progressive=1), max_epochs=1)
    ranks = {w.label: w.rank for w in factored_weights(module)}
    assert ranks["net.2"] == 48
    assert all(w.u.isfinite().all() and w.v.isfinite().all() for w in factored_weights(module))


# ---------------------------------------------------------------------------------------------------------- competitors


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_post_hoc_svd_carries_moments_into_its_balanced_bases(name):
    """dL/dSigma = u^T (dL/dW) v with the bases that hold the roots of the singular values."""
    moments: dict[str, torch.Tensor] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            weight, optimizer = module.net[0], trainer.optimizers[0]
            parameter = weight.sigma if hasattr(weight, "sigma") else weight.weight
            key = "momentum_buffer" if name == "SGD" else "exp_avg"
            if trainer.global_step == 5:
                moments["after" if hasattr(weight, "sigma") else "before"] = optimizer.state[parameter][key].clone()

    make = {"SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "AdamW": lambda p: torch.optim.AdamW(p, 1e-3)}[name]
    module, _ = fit(
        Look(),
        PostHocSVD(at=5, stored_fraction=0.6),
        Look(),
        module=mlp(optimizer=make),
        max_epochs=1,
        limit_train_batches=5,
    )
    layer = module.net[0]
    matrix, _ = to_tall(moments["before"])
    expected = layer.u.detach().mT @ matrix @ layer.v.detach()
    torch.testing.assert_close(moments["after"], expected, rtol=1e-4, atol=1e-6)


def test_post_hoc_svd_is_the_best_approximation_at_its_moment():
    """The weights right after the cut are the truncated SVDs of those right before; all three factors train."""
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                seen[f"weight {len(seen)}"] = pl_module.net[2].weight.detach().clone()

    module, _ = fit(Look(), PostHocSVD(at=5, stored_fraction=0.6), Look(), max_epochs=2)
    before, after = seen.values()
    (weight,) = [w for w in factored_weights(module) if w.label == "net.2"]
    u, s, vh = torch.linalg.svd(before)
    torch.testing.assert_close(after, (u[:, : weight.rank] * s[: weight.rank]) @ vh[: weight.rank], rtol=0, atol=1e-5)
    assert weight.trains_bases and fractions(module)[0] == fractions(module)[1] <= 0.6
    assert not torch.allclose(weight.u.mT @ weight.u, weight.v.mT @ weight.v)


def test_dlrt_with_full_rank_is_gradient_descent():
    """The augmented bases contain those of the gradient, so that nothing of a step is lost."""
    data = functools.partial(DigitsData, batch_size=32, limit=192, double=True)
    options = {"optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.0)}
    dense, ours = mlp(**options).double(), mlp(**options).double()
    fit(module=dense, data=data())
    fit(DLRT(delay=4, stored_fraction=None, tolerance=0.0), module=ours, data=data())
    assert [w.rank for w in factored_weights(ours)] == [48, 48, 48]
    for mine, theirs in zip(ours.net[::2], dense.net[::2], strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=1e-9)


def test_dlrt_steps_are_projected_gradient_steps():
    """With rank r: W1 before the truncation is W0 minus the gradient in the augmented bases, closer than in the old."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 16, bias=False).double()
    network = nn.Sequential(layer)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    from networks.low_rank import convert, decompose

    (weight,) = LayerChoice(keep_last=False)(network)
    convert(weight, decompose(weight.matrix()), [optimizer], rank=3)
    gradient = torch.randn(16, 12, dtype=torch.float64)
    start, u, v = weight.matrix().detach().clone(), weight.u.detach(), weight.v.detach()
    DLRT._augment(weight, gradient, optimizer)
    torch.testing.assert_close(weight.matrix(), start)
    optimizer.step()
    large_u = torch.linalg.qr(torch.cat([u, gradient @ v], 1)).Q
    large_v = torch.linalg.qr(torch.cat([v, gradient.mT @ u], 1)).Q
    projected = large_u @ (large_u.mT @ gradient @ large_v) @ large_v.mT
    torch.testing.assert_close(weight.matrix(), start - 0.1 * projected)
    inside = u @ (u.mT @ gradient @ v) @ v.mT
    assert (projected - gradient).norm() < (inside - gradient).norm()


@pytest.mark.parametrize("share", [0.7, 1.4])
def test_dlrt_keeps_its_share_and_learns(share):
    """Also where the augmented bases of a layer have different sizes, since twice the rank exceeds its short side."""
    module = mlp(optimizer=functools.partial(torch.optim.Adam, lr=1e-2))
    fit(DLRT(stored_fraction=share), module=module, data=SMALL(), max_epochs=10)
    assert 0.9 * share < fractions(module)[1] <= share
    assert module.losses[-1] < 0.5 * module.losses[0]
    assert all(w.module.observe is None for w in factored_weights(module))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DLRT(stored_fraction=None), "give one"),
        (lambda: DLRT(stored_fraction=0.5, tolerance=0.1), "give one"),
        (lambda: DLRT(stored_fraction=None, tolerance=1.0), "tolerance=1"),
        (lambda: PostHocSVD(stored_fraction=0), "stored_fraction=0"),
        (lambda: PostHocSVD(at="later"), r"callbacks\.post_hoc_svd\.at='later'"),
    ],
)
def test_options_of_the_competitors_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_impossible_share_is_named():
    with pytest.raises(ValueError, match=r"callbacks\.post_hoc_svd\.stored_fraction=0\.01 is below"):
        fit(PostHocSVD(at=0, stored_fraction=0.01))
