"""The pruning study inside Lightning: segments, masks and smaller networks, checkpoints, the table."""

from __future__ import annotations

import copy
import csv
import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks.figures import pruning as figures
from callbacks.pruning import Pruning
from callbacks.pruning_study import averaged, draw_sweep, read_study
from callbacks.pruning_table import LINEAR, NAIVE, Table, verdicts, write_table
from callbacks.rng_state import RngState
from lightning_modules.forecasting import Forecaster
from networks.pruning.variants import load_variant, rebuild
from networks.pruning.weights import density, masks_in, num_real, prunable_weights
from networks.series.direct import Direct
from networks.series.dlinear import DLinear, least_squares
from networks.series.fedformer import FEDformer
from networks.series.transformer import Transformer
from tests.lightning_modules.tiny_series import WEEK, TinySeries, quiet_trainer

ADAM = functools.partial(torch.optim.Adam, lr=3e-3, weight_decay=1e-3)
HALVED = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
QUICK = {"latency_batches": [1], "latency_repeats": 1, "energy_s": 0.0, "figures": []}


def forecaster(seed: int = 0, network: type = Transformer, **sizes: Any) -> Forecaster:
    torch.manual_seed(seed)
    sizes = {"marks": 0, "d_model": 16, "heads": 2, "feed_forward": 24, "encoder_layers": 1} | sizes
    return Forecaster(Direct(network(WEEK, 10, 2, **sizes)), ADAM, HALVED, loss="mse")


def study(tmp_path: Path, **options: Any) -> Pruning:
    settings = {"densities": [1.0, 0.5, 0.2], "finetune_epochs": 2, "finetune_lr": 0.5} | QUICK
    return Pruning(**settings | {"dirpath": str(tmp_path / "pruned")} | options)


def trainer(tmp_path: Path, pruning: Pruning, *more: pl.Callback, epochs: int = 2, **options: Any) -> pl.Trainer:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", "best", save_top_k=1, enable_version_counter=False)
    return quiet_trainer(
        max_epochs=epochs,
        callbacks=[RngState(), *more, pruning, checkpoint],
        enable_checkpointing=True,
        **options,
    )


class Epochs(pl.Callback):
    """What every epoch trains."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        net = pl_module.net
        masks = masks_in(net)
        for name, mask in masks.items():
            assert not net.state_dict()[name][~mask].any(), "a masked weight came back"
        left = density(net, prunable_weights(net, 2)).prunable
        self.seen.append((round(left, 2), num_real(net), trainer.optimizers[0].param_groups[0]["lr"]))


def test_segments(tmp_path: Path) -> None:
    """Dense, control, a segment per density: with masks, a new optimizer and its own rate; then the deployed one."""
    module, pruning, epochs = forecaster(), study(tmp_path), Epochs()
    fit = trainer(tmp_path, pruning, epochs)
    fit.fit(module, datamodule=TinySeries())
    assert [left for left, *_ in epochs.seen] == [1, 1, 1, 1, 0.5, 0.5, 0.2, 0.2]
    assert [rate for *_, rate in epochs.seen] == pytest.approx(
        [1.5e-3, 7.5e-4, *[7.5e-4, 3.75e-4] * 3]
    )  # after the schedule's step
    names = {path.stem for path in (tmp_path / "pruned").iterdir()}
    assert names == {"dense", "control", "l1_0.5", "l1_0.5_tuned", "l1_0.2", "l1_0.2_tuned"}
    dense, pruned = (load_variant(tmp_path / "pruned" / f"{name}.pt") for name in ("dense", "l1_0.5"))
    for name, value in dense.state.items():
        if f"{name}_mask" in pruned.state:
            assert torch.equal(pruned.state[name], value * pruned.state[f"{name}_mask"])
    stored = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    deployed = load_variant(tmp_path / "pruned" / f"{pruning._deployed}.pt")
    for name, value in deployed.state.items():
        assert torch.equal(stored["state_dict"][f"net.{name}"], value)
    fresh = forecaster(seed=4)
    rebuild(fresh, stored["pruning"], stored["state_dict"])
    fresh.load_state_dict(stored["state_dict"])
    assert density(fresh.net, prunable_weights(fresh.net, 2)).prunable < 1


def test_the_dense_training_is_the_ordinary_one(tmp_path: Path) -> None:
    plain = forecaster()
    quiet_trainer(max_epochs=2).fit(plain, datamodule=TinySeries())
    quiet = forecaster()
    trainer(tmp_path, study(tmp_path, control=False, densities=[0.5])).fit(quiet, datamodule=TinySeries())
    dense = load_variant(tmp_path / "pruned" / "dense.pt")
    found = copy.deepcopy(plain.net)
    found.load_state_dict(dense.state)
    # The best epoch is kept; here it is the last one.
    for name, value in plain.net.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0)


class Validations(pl.Callback):
    """Loss and network of every validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, dict[str, torch.Tensor]]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        self.seen.append((loss, copy.deepcopy(pl_module.net.state_dict())))


def test_a_training_ends_with_its_best_weights(tmp_path: Path) -> None:
    """The rate grows, so that they are not the last ones; where it only harms they are those that it began with."""
    module, validations = forecaster(), Validations()
    module.make_scheduler = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=20)
    pruning = study(tmp_path, densities=[0.5], finetune_epochs=1, finetune_lr=1e3)
    trainer(tmp_path, validations, pruning, epochs=5).fit(module, datamodule=TinySeries())
    losses = [loss for loss, _ in validations.seen]
    best = losses.index(min(losses[:5]))
    assert best < 4 and min(losses[5:]) > 2 * losses[best]
    found = {name: load_variant(tmp_path / "pruned" / f"{name}.pt") for name in ("dense", "control", "l1_0.5")}
    assert found["dense"].about["val_loss"] == losses[best] and found["dense"].about["best_epoch"] == best + 1
    for name, value in validations.seen[best][1].items():
        assert torch.equal(found["dense"].state[name], value)
        assert torch.equal(found["control"].state[name], value)
    assert found["control"].about["best_epoch"] == 0 and found["control"].about["epochs"] == 1
    assert found["control"].about["val_loss"] == pytest.approx(losses[best], rel=1e-5)
    tuned = load_variant(tmp_path / "pruned" / "l1_0.5_tuned.pt")
    assert tuned.about["best_epoch"] == 0
    for name, value in found["l1_0.5"].state.items():
        assert torch.equal(tuned.state[name], value)


@pytest.mark.parametrize("method", ["l1", "structured"])
def test_a_stopped_study_goes_on_exactly(tmp_path: Path, method: str) -> None:
    """Section 8, line 2: masks, and smaller networks, survive a checkpoint; what follows is the same bit for bit."""
    whole, every = forecaster(), ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1, mode="max")
    run = trainer(tmp_path, study(tmp_path, method=method))
    run.callbacks.append(every)
    run.fit(whole, datamodule=TinySeries())
    # Within the segment of the first density; at the end of the dense segment, or of that density's.
    for epoch in (4, 1 if method == "structured" else 5):
        again = forecaster(seed=9)
        path = str(tmp_path / "all" / f"epoch={epoch}.ckpt")
        trainer(tmp_path, study(tmp_path, method=method)).fit(
            again, datamodule=TinySeries(), ckpt_path=path, weights_only=True
        )
        assert whole.net.state_dict().keys() == again.net.state_dict().keys()
        for name, value in whole.net.state_dict().items():
            assert torch.equal(again.net.state_dict()[name], value), name
    other = study(tmp_path, method=method, densities=[0.7])
    with pytest.raises(ValueError, match="study with densities"):
        trainer(tmp_path, other).fit(forecaster(), datamodule=TinySeries(), ckpt_path=path, weights_only=True)


def test_structured_segments_train_smaller_networks(tmp_path: Path) -> None:
    module, epochs = forecaster(), Epochs()
    pruning = study(tmp_path, method="structured", densities=[0.5, 0.25])
    trainer(tmp_path, pruning, epochs).fit(module, datamodule=TinySeries())
    sizes = [size for _, size, _ in epochs.seen]
    whole = num_real(forecaster().net)
    assert sizes[:4] == [whole] * 4
    assert sizes[4] / whole == pytest.approx(0.5, abs=0.08) and sizes[6] / whole == pytest.approx(0.25, abs=0.08)
    small = load_variant(tmp_path / "pruned" / "structured_0.25_tuned.pt")
    assert num_real(small.build(forecaster().net)) == sizes[6]
    assert num_real(module.net) in sizes[4:]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "taylor"},
        {"method": "wanda", "scope": "row"},
        {"method": "random", "scope": "layer"},
        {"method": "lottery"},
        {"schedule": "iterative"},
        {"schedule": "cubic", "finetune_epochs": 2},
        {"rewind": "early"},
        {"scope": "2:4", "densities": [0.5]},
        {"method": "structured", "schedule": "iterative", "granularity": ["ff", "heads"], "densities": [0.8]},
        {"method": "structured", "budget": "macs", "allocation": "global", "rewind": "init"},
    ],
    ids=str,
)
def test_every_way_to_prune(tmp_path: Path, options: dict[str, Any]) -> None:
    module = forecaster()
    pruning = study(tmp_path, **{"densities": [0.6, 0.4], "control": False, "finetune_epochs": 1} | options)
    epochs = Epochs()
    trainer(tmp_path, pruning, epochs, epochs=1).fit(module, datamodule=TinySeries())
    tuned = [v for path in (tmp_path / "pruned").glob("*_tuned.pt") if (v := load_variant(path))]
    assert len(tuned) == len(pruning.densities)
    for variant in tuned:
        network = variant.build(forecaster().net)
        if not variant.cuts:
            found = density(network, prunable_weights(network, 2)).prunable
            assert found == pytest.approx(variant.density, abs=0.03)  # rows are short
    if options.get("schedule") == "cubic":
        assert any(0.6 < left < 1 for left, *_ in epochs.seen) or len(epochs.seen) == 5
    if pruning.rewind == "init":
        start = load_variant(tmp_path / "pruned" / "dense.pt").about["init"]
        assert start.keys() == forecaster().net.state_dict().keys()


def test_the_control_of_an_iterative_schedule(tmp_path: Path) -> None:
    """The network of the lowest density was trained on at every density above it; so long is its control."""
    epochs, pruning = Epochs(), study(tmp_path, schedule="iterative", finetune_epochs=1, finetune_lr=0.1)
    validations = Validations()
    trainer(tmp_path, validations, pruning, epochs, epochs=1).fit(forecaster(), datamodule=TinySeries())
    assert [left for left, *_ in epochs.seen] == [1, 1, 1, 0.5, 0.2]
    losses = [loss for loss, _ in validations.seen]
    control = load_variant(tmp_path / "pruned" / "control.pt")
    assert losses[2] < losses[1] < losses[0] and control.about["val_loss"] == losses[2]


def test_early_stopping_ends_a_segment_not_the_study(tmp_path: Path) -> None:
    module = forecaster()
    stop = EarlyStopping("val/loss", min_delta=100.0, patience=1, check_on_train_epoch_end=False)
    pruning, epochs = study(tmp_path, finetune_epochs=6), Epochs()
    trainer(tmp_path, pruning, stop, epochs, epochs=6).fit(module, datamodule=TinySeries())
    assert [left for left, *_ in epochs.seen] == [1, 1, 1, 1, 0.5, 0.5, 0.2, 0.2]


def test_the_dense_network_of_another_run(tmp_path: Path) -> None:
    trainer(tmp_path / "a", study(tmp_path / "a")).fit(forecaster(), datamodule=TinySeries())
    epochs = Epochs()
    pruning = study(tmp_path / "b", dense=str(tmp_path / "a"), densities=[0.3])
    trainer(tmp_path / "b", pruning, epochs).fit(forecaster(), datamodule=TinySeries())
    assert [left for left, *_ in epochs.seen] == [1, 1, 0.3, 0.3]
    assert [rate for *_, rate in epochs.seen] == pytest.approx([7.5e-4, 3.75e-4] * 2)
    one, other = (load_variant(tmp_path / run / "pruned" / "control.pt") for run in ("a", "b"))
    assert one.state.keys() == other.state.keys()
    with pytest.raises(ValueError, match="other sizes"):
        pruning = study(tmp_path / "c", dense=str(tmp_path / "a"))
        trainer(tmp_path / "c", pruning).fit(forecaster(d_model=8), datamodule=TinySeries())
    with pytest.raises(ValueError, match="there is no"):
        pruning = study(tmp_path / "c", dense=str(tmp_path / "nowhere"))
        trainer(tmp_path / "c", pruning).fit(forecaster(), datamodule=TinySeries())


def test_table(tmp_path: Path) -> None:
    """Section 8, line 7: rows of every network, of repeat-last-day and DLinear, and words about them."""
    module, data = forecaster(), TinySeries()
    pruning = study(tmp_path, figures_dir=str(tmp_path / "figures"))
    runner = trainer(tmp_path, pruning)
    runner.fit(module, datamodule=data)
    before = copy.deepcopy(module.net.state_dict())
    runner.test(module, datamodule=data, verbose=False)
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, before[name])
    table = pruning.table
    rows = {row["name"]: row for row in table.rows}
    assert list(rows) == ["dense", "control", "l1_0.5", "l1_0.5_tuned", "l1_0.2", "l1_0.2_tuned", NAIVE, LINEAR]
    deployed = rows[pruning._deployed]
    assert float(runner.callback_metrics["test/mse_scaled"]) == pytest.approx(deployed["mse"], rel=1e-5)
    assert float(runner.callback_metrics["test/mae_scaled"]) == pytest.approx(deployed["mae"], rel=1e-5)
    assert float(runner.callback_metrics["test/dense/mse"]) == pytest.approx(rows["dense"]["mse"])
    for row in table.rows:
        assert row["mse"] > 0 and row["macs"] >= 0 and row["latency_1_ms"] > 0 and row["dense_bytes"] > 0
    assert rows["l1_0.2"]["sparse_bytes"] <= rows["l1_0.5"]["sparse_bytes"] <= rows["dense"]["sparse_bytes"]
    assert rows["l1_0.2"]["density_model"] > rows["l1_0.2"]["density_prunable"] == pytest.approx(0.2, abs=1e-3)
    assert rows["dense"]["int8_bytes"] > 0 and rows["dense"]["int8_mse"] > 0  # eight bits pay for larger networks
    words = " ".join(table.verdicts)
    for what in ("the dense one", "as many more epochs", "repeating the last day", "a linear model (DLinear)"):
        assert what in words
    assert (tmp_path / "pruning.csv").is_file() and NAIVE in (tmp_path / "pruning.md").read_text()
    for name in ("error_against_density", "error_against_cost", "layer_densities", "parameters"):
        assert getattr(figures, name)(table.rows) is not None
        assert getattr(figures, name)([]) is None


def test_words_say_when_pruning_does_not_pay() -> None:
    rows = [
        {"name": "dense", "stage": "dense", "mse": 1.0, "macs": 10, "latency_8_ms": 4.0},
        {"name": "l1_0.5", "stage": "pruned", "mse": 0.9, "macs": 10, "latency_8_ms": 4.0},
        {"name": NAIVE, "stage": "reference", "mse": 0.5},
        {"name": LINEAR, "stage": "reference", "mse": 0.4},
    ]
    words = verdicts(rows)
    assert "10.0 % better than the dense one" in words[0]
    assert "80.0 % worse than repeating the last day" in words[1] and "125.0 % worse than a linear" in words[2]
    assert len(words) == 3, "a masked network has the multiplications of the dense one: its time is no gain"
    rows[0]["sparse_bytes"], rows[1]["sparse_bytes"] = 30, 10
    assert "3.0 times smaller" in verdicts(rows)[-1] and "save no time" in verdicts(rows)[-1]
    rows[1] |= {"macs": 5, "latency_8_ms": 2.5}
    assert "2.0 times fewer" in verdicts(rows)[-1] and "1.6 times faster" in verdicts(rows)[-1]
    assert Table(rows).named("dense")["mse"] == 1.0


def test_an_untrained_study_is_a_curve_of_one_shot_prunings(tmp_path: Path) -> None:
    pruning = study(tmp_path, finetune_epochs=0, references=False, quantize=False)
    trainer(tmp_path, pruning).test(forecaster(), datamodule=TinySeries(), verbose=False)
    assert [row["name"] for row in pruning.table.rows] == ["dense", "l1_0.5", "l1_0.2"]


def test_complex_kernels_are_named_where_they_stay_whole(tmp_path: Path) -> None:
    """Section 8, line 12."""
    options = {"finetune_epochs": 1, "control": False, "densities": [0.3]}
    with pytest.warns(UserWarning, match=r"leaves \d\d\.\d% of the parameters uncovered"):
        run = trainer(tmp_path, study(tmp_path, **options), epochs=1)
        run.fit(forecaster(network=FEDformer, modes=5), datamodule=TinySeries())
    options |= {"include_complex": True, "density_of": "model"}
    module = forecaster(network=FEDformer, modes=5)
    trainer(tmp_path, study(tmp_path, **options), epochs=1).fit(module, datamodule=TinySeries())
    found = density(module.net, prunable_weights(module.net, 2, include_complex=True))
    assert found.model == pytest.approx(0.3, abs=1e-4)


def test_least_squares_is_the_best_dlinear() -> None:
    data = TinySeries(gaps=False)
    data.setup()
    loader = list(data.train_dataloader())
    (best,) = least_squares(loader, WEEK, 10, 2, [0.0])

    def loss(network: torch.nn.Module) -> torch.Tensor:
        return torch.cat([(network(b["history"]) - b["target"]).flatten() for b in loader]).square().mean()

    reached = loss(best)
    reached.backward()
    assert all(p.grad.abs().max() < 1e-4 for p in best.parameters())
    torch.manual_seed(0)
    assert reached < loss(DLinear(WEEK, 10, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "obd"}, "method='obd'"),
        ({"densities": [0.0]}, "densities=0.0"),
        ({"densities": [1.2]}, "densities=1.2"),
        ({"densities": []}, "densities is empty"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"scope": "2:4"}, "sparsity=0.5"),
        ({"finetune_epochs": -1}, "finetune_epochs=-1"),
        ({"finetune_epochs": 0, "schedule": "cubic"}, "schedule='cubic'"),
        ({"method": "structured", "schedule": "cubic"}, "single weights"),
        ({"method": "structured", "granularity": []}, "granularity is empty"),
        ({"finetune_epochs": 0, "rewind": "init"}, "rewind='init'"),
        ({"finetune_lr": 0.0}, "finetune_lr=0.0"),
        ({"budget": "bytes"}, "budget='bytes'"),
    ],
    ids=str,
)
def test_wrong_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pruning(**{"finetune_epochs": 1} | options)


def test_wrong_surroundings(tmp_path: Path) -> None:
    linear = Forecaster(Direct(DLinear(WEEK, 10, 2)), ADAM)
    with pytest.raises(ValueError, match="declares no groups"):
        trainer(tmp_path, study(tmp_path, method="structured")).fit(linear, datamodule=TinySeries())
    late = EarlyStopping("val/loss", check_on_train_epoch_end=False)
    runner = trainer(tmp_path, study(tmp_path))
    runner.callbacks.append(late)
    with pytest.raises(ValueError, match="must stand behind"):
        runner.fit(forecaster(), datamodule=TinySeries())


def test_sparsity_is_the_other_way_to_say_density() -> None:
    assert Pruning(sparsity=0.8).densities == [0.2]
    assert Pruning(sparsity=[0, 0.5]).densities == [1.0, 0.5]
    assert len(Pruning().densities) == 10 and Pruning().densities[-1] == pytest.approx(0.134, abs=1e-3)


def test_a_sweep_is_one_table(tmp_path: Path) -> None:
    """Jobs that share a dense network show it once; seeds are averaged in the table, its sentences and the figures."""
    table = ["job,seed,callbacks.pruning.method,parameters,status,run_dir"]
    for job, (seed, method) in enumerate([(0, "l1"), (0, "random"), (1, "l1")]):
        run = tmp_path / str(job)
        run.mkdir()
        pruning = {"method": method}
        net = {"_target_": "Direct", "backbone": {"_target_": "networks.series.transformer.Transformer"}}
        config = {"model": {"_target_": "Forecaster", "net": net}, "seed": seed, "callbacks": {"pruning": pruning}}
        (run / "results.json").write_text(json.dumps({"config": config}))
        rows = [
            {"name": "dense", "stage": "dense", "method": "none", "density": 1.0, "mse": 1.0 + seed},
            {"name": f"{method}_0.5", "stage": "pruned", "method": method, "density": 0.5, "mse": 2.0 + seed},
            {"name": NAIVE, "stage": "reference", "method": "none", "mse": 3.0},
        ]
        common = {"macs": 10, "parameters": 8, "nnz": 4, "sparse_bytes": 30, "latency_1_ms": 2.0, "density_model": 0.7}
        write_table(Table([common | row | {"layers": {"a.weight": 0.5}} for row in rows]), run)
        table.append(f"{job},{seed},{method},8,completed,{run}")
    (tmp_path / "table.csv").write_text("\n".join(table) + "\n")
    rows = read_study(tmp_path)
    assert [(row["name"], row["seed"]) for row in rows] == [
        ("dense", 0), ("l1_0.5", 0), (NAIVE, 0), ("random_0.5", 0), ("dense", 1), ("l1_0.5", 1), (NAIVE, 1),
    ]  # fmt: skip
    means = {row["name"]: row["mse"] for row in averaged(rows)}
    assert means == {"dense": 1.5, "l1_0.5": 2.5, NAIVE: 3.0, "random_0.5": 2.0}
    printed = draw_sweep(tmp_path)
    assert "Transformer l1_0.5" in printed and "error_against_density.png" in printed
    report = (tmp_path / "pruning.md").read_text()
    assert [line.split(" | ")[0] for line in report.splitlines() if line.startswith("| T")] == [
        f"| Transformer {name}" for name in ("dense", "l1_0.5", NAIVE, "random_0.5")
    ]
    assert "The best pruned network (random_0.5, MSE 2) is 33.3 % worse than the dense one (MSE 1.5)" in report
    assert "Means over seeds" in report and "| 8 |" in report
    with (tmp_path / "pruning.csv").open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "0", "0", "0", "1", "1", "1"]
