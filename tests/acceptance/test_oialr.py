"""What OIALR must achieve, on whole trainings: the numbered lines of the acceptance list that need them.

Lines 1 to 4 are closed forms (tests/networks/test_low_rank.py), 5, 6, 11 and 12 are about the callback
(tests/callbacks/test_oialr.py). Three seeds of every comparison are in ``benchmarks/oialr.py``.
"""

from __future__ import annotations

import copy
import csv
import functools
import itertools
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import oialr
from benchmarks.measure import compare, ratio
from benchmarks.oialr import layer_steps, vit_steps
from callbacks.oialr import OIALR
from callbacks.stability import BasisStability
from networks.low_rank import LayerChoice, convert, decompose
from runner import job
from runner.load import load_run
from tests import cli
from tests.acceptance.test_recycle import needs
from tests.callbacks.digits_mlp import DigitsData, DigitsMLP, digits
from tests.composing import SERIES, composed, plain
from tests.lightning_modules.tiny_series import quiet_trainer

LEAN = ("logger=none", "~callbacks.energy", "num_threads=1")
BASELINE = ("callbacks=stability",)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder: Path | str, *overrides: str) -> dict[str, float]:
    result = job.run(plain(composed(*overrides, *LEAN, run_dir=folder)))
    assert result["status"] == "completed", result.get("error")
    return result["metrics"]


# --- 7: the loss does not jump at a late conversion -----------------------------------------------------------------


@pytest.fixture(scope="module")
def late() -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """64-64-64-64-10 on noisy digits after 1,500 steps of AdamW at 1e-3, two seeds: a late moment of a quiet training.

    Wider ones are not quiet: at a loss of 0.001 Adam's own spikes treble it within thirty steps.
    """
    trained = []
    images, labels = (t[:1437] for t in digits())
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = DigitsMLP(widths=(64, 64, 64)).net
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for _ in range(1500):
            step(net, optimizer, images, labels)
        trained.append((net, optimizer))
    return trained


def step(net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    rows = torch.randint(len(images), (64,))
    noisy = images[rows] + 0.1 * torch.randn(64, 64)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(noisy), labels[rows]).backward()
    optimizer.step()


def worst_loss(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> tuple[float, float]:
    """Loss on all training images, now and at its worst in the next thirty steps."""
    images, labels = (t[:1437] for t in digits())

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(net(images), labels))

    torch.manual_seed(seed)
    now, worst = loss(), 0.0
    for _ in range(30):
        step(net, optimizer, images, labels)
        worst = max(worst, loss())
    return now, worst


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rotate", "reset", "zero"])
def test_a_late_conversion_does_not_make_the_loss_jump(late, mode):
    """Measured: rotate 1.15 and 1.09, reset 1.00 and 1.05, zero 2.9 and 5.2; without a conversion 1.13 and 1.07."""
    jumps = []
    for seed, pair in enumerate(late):
        net, optimizer = copy.deepcopy(pair)
        before, _ = worst_loss(*copy.deepcopy(pair), seed=100 + seed)
        for weight in LayerChoice()(net):
            convert(weight, decompose(weight.matrix()), [optimizer], mode)
        now, worst = worst_loss(net, optimizer, seed=100 + seed)
        assert before > 0.01 and now == pytest.approx(before, rel=1e-3)
        jumps.append(worst / before)
    if mode == "zero":
        assert min(jumps) >= 1.3, jumps
    else:
        assert max(jumps) <= 1.25, jumps


# --- 8: accuracy at fewer stored parameters -------------------------------------------------------------------------


def digits_accuracy(folder: Path, *options: str) -> tuple[list[float], dict[str, float]]:
    """Test accuracy of three seeds that train on all 1,437 digits, and the metrics of the last."""
    runs = [
        run(folder / str(seed), "experiment=oialr", "data.val_fraction=0", f"seed={seed}", *options)
        for seed in range(3)
    ]
    return [metrics["test/accuracy"] for metrics in runs], runs[-1]


@pytest.fixture(scope="module")
def dense_digits(tmp_path_factory) -> list[float]:
    return digits_accuracy(tmp_path_factory.mktemp("dense"), *BASELINE)[0]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("options", "stored", "trainable"),
    [
        ((), 0.35, 0.06),  # the experiment as it is, which drops more than the acceptance line asks for
        (("callbacks.oialr.frequency=400", "callbacks.oialr.progressive=0.5"), 0.70, 0.11),
    ],
    ids=["preset", "slower"],
)
def test_digits_keep_their_accuracy(tmp_path, dense_digits, options, stored, trainable):
    """Means of three seeds. Measured: dense 0.9815; 0.9815 at 0.27 to 0.31 of the stored parameters, 0.9824 at 0.64."""
    accuracy, metrics = digits_accuracy(tmp_path, *options)
    assert metrics["test/stored_fraction"] <= stored
    assert metrics["test/trainable_fraction"] <= trainable
    wrong = [
        round(360 * sum(1 - value for value in values)) for values in (accuracy, dense_digits)
    ]  # of 3 x 360 images
    assert wrong[0] <= wrong[1], (dense_digits, accuracy)


# --- 9: it does not overfit where the dense network does ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs("ETTh2.csv")
def test_forecasts_of_the_last_epoch_are_better(tmp_path):
    data = f"data_dir={os.environ.get('WATTLIGHT_DATA', SERIES)}"
    for seed in (0, 1):
        runs = {
            name: run(tmp_path / f"{name}{seed}", "experiment=oialr/ett", data, f"seed={seed}", *overrides)
            for name, overrides in (("dense", BASELINE), ("oialr", ()))
        }
        assert runs["oialr"]["test/mse_scaled"] <= runs["dense"]["test/mse_scaled"]
        assert runs["oialr"]["test/trainable_fraction"] <= 0.30
        # The same trainings, tested with the epoch of the lowest validation error.
        keep = ("callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min")
        best = {
            name: run(tmp_path / f"{name}{seed}best", "experiment=oialr/ett", data, f"seed={seed}", *keep, *overrides)
            for name, overrides in (("dense", BASELINE), ("oialr", ()))
        }
        assert best["oialr"]["test/mse_scaled"] <= 1.05 * best["dense"]["test/mse_scaled"]


# --- 10: factored layers are faster ---------------------------------------------------------------------------------


def test_a_factored_layer_is_faster():
    """Forward and backward of 1024 x 1024, batch 512, rank 128; CPU seconds, which other processes disturb least."""
    timings = compare(layer_steps(1024, 1024, 128, 512), repeats=3)
    assert ratio(timings["factored"].cpu, timings["dense"].cpu).value <= 0.4
    assert ratio(timings["factored"].cpu, timings["materialised"].cpu).value <= 0.35


def test_the_benchmark_has_a_row_for_every_claim():
    result = oialr.run(repeats=1, layers=((48, 32, 4, 8),), trainings=False, width=48)
    bounds = [row["what"] for row in result.rows if "at_most" in row or "at_least" in row]
    assert len(bounds) == 1 and "mini-ViT" in bounds[0]
    assert [row["variant"] for row in result.rows[:5]] == [
        "dense",
        "materialised",
        "factored",
        "factored / dense",
        "factored / materialised",
    ]


@pytest.mark.slow
def test_a_vision_transformer_is_faster():
    timings = compare(vit_steps(width=384, batch=32, rank_fraction=0.2), repeats=3)
    assert ratio(timings["oialr"].cpu, timings["dense"].cpu).value <= 0.8


# --- 11: several devices, as a user starts them ---------------------------------------------------------------------

SHORT = ("experiment=oialr", "trainer.max_epochs=3", "callbacks.oialr.delay=20", "callbacks.oialr.frequency=10")


def short(folder: str, *overrides: str) -> dict[str, float]:
    torch.set_num_threads(1)
    return run(folder, *SHORT, "callbacks.oialr.export=none", *overrides)


def test_two_devices_give_the_metrics_of_one(ranks2, tmp_path):
    """To single precision, which sixty steps amplify; tests/callbacks/test_oialr.py has the double one."""
    one = short(str(tmp_path / "one"))
    two, _ = ranks2(short, str(tmp_path / "two"), "trainer=multi_cpu")
    assert one.keys() == {name for name in two if not name.startswith("comm/")}
    assert one["oialr/rank/net.layers.2"] < 256
    for name in one:
        if "rank" in name or "fraction" in name:
            assert two[name] == one[name], name
        elif name.endswith("loss"):
            assert two[name] == pytest.approx(one[name], rel=1e-2), name


# --- 12: a run that was stopped, and what it leaves -----------------------------------------------------------------


def test_a_run_resumes_and_its_export_is_a_plain_network(tmp_path):
    options = (*SHORT, "callbacks.oialr.figures=[]", "callbacks.stability.gap=1", "callbacks.stability.every=1")
    whole = run(tmp_path / "whole", *options)
    run(tmp_path / "parts", *options, "trainer.max_epochs=2")
    assert run(tmp_path / "parts", *options) == whole  # from last.ckpt, which lies there
    states = [torch.load(tmp_path / d / "checkpoints/last.ckpt", weights_only=True) for d in ("whole", "parts")]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(states[1]["state_dict"][key], value)

    module, datamodule, _ = load_run(tmp_path / "whole", str(tmp_path / "whole/checkpoints/best_dense.ckpt"))
    assert not [name for name, _ in module.named_parameters() if name.endswith("sigma")]
    (found,) = quiet_trainer().test(module, datamodule=datamodule, verbose=False)
    assert found["test/loss"] == pytest.approx(whole["test/loss"], rel=1e-4)


# --- 13: bases of digits stand still after a few epochs -------------------------------------------------------------


@pytest.mark.slow
def test_bases_stand_still_early():
    """Gradient descent at 0.1 with a cosine, forty epochs, bases five epochs apart."""
    torch.manual_seed(0)
    scheduler = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=40)
    module = DigitsMLP(functools.partial(torch.optim.SGD, lr=0.1), noise=0.1, scheduler=scheduler)
    callback = BasisStability(gap=5, every=1)
    quiet_trainer(callbacks=[callback], max_epochs=40).fit(module, datamodule=DigitsData())
    mean = {row["epoch"]: sum(row["stability"].values()) / len(row["stability"]) for row in callback.history}
    later = [mean[epoch] for epoch in range(15, 41)]
    assert min(later) > 0.98, mean
    assert all(b >= a - 0.01 for a, b in itertools.pairwise(later)), mean
    assert mean[5] < later[0]  # they had turned before


def test_layers_are_converted_when_they_stand_still():
    """The paper's observation, used: the run itself finds when each layer may be frozen."""
    torch.manual_seed(0)
    module = DigitsMLP(noise=0.1, widths=(64, 64, 64))
    callback = OIALR(delay="stability:0.98", frequency=22, beta=0.2, progressive=1, stability_gap=2)
    quiet_trainer(callbacks=[callback], max_epochs=12).fit(module, datamodule=DigitsData())
    first = {row["epoch"]: row["ranks"] for row in callback.history["rows"]}
    assert all(w.converted for w in callback.weights)
    assert first[2] == {"net.0": 64, "net.2": 64, "net.4": 64}
    assert 2 * 22 < callback._first_event <= 12 * 22


# --- 14: the comparison ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_comparison_is_one_table_at_equal_storage(tmp_path):
    begin = time.process_time(), os.times().children_user
    arguments = ("experiment=oialr/compare", f"hydra.sweep.dir={tmp_path}/sweep", "callbacks.energy.codecarbon=false")
    cli.ok(*arguments, cwd=tmp_path, timeout=800)
    seconds = time.process_time() - begin[0] + os.times().children_user - begin[1]
    table = list(csv.DictReader((tmp_path / "sweep/table.csv").open()))
    rows = {row["callbacks"]: row for row in table}
    assert set(rows) == {"stability", "oialr", "post_hoc_svd", "dlrt"}
    assert {row["status"] for row in table} == {"completed"}
    stored = {name: float(row["test/stored_fraction"]) for name, row in rows.items()}
    accuracy = {name: float(row["test/accuracy"]) for name, row in rows.items()}
    assert stored.pop("stability") == 1
    assert max(stored.values()) < 1.05 * min(stored.values()), stored
    assert float(rows["oialr"]["test/trainable_fraction"]) < 0.25 * float(
        rows["post_hoc_svd"]["test/trainable_fraction"]
    )
    assert all(accuracy["oialr"] >= other - 0.01 for other in accuracy.values()), accuracy
    assert seconds < 300  # of CPU time: five minutes on a machine of one's own
    shown = (tmp_path / "sweep/table.md").read_text()
    assert "test/stored_fraction" in shown and "test/trainable_fraction" in shown and "test/accuracy" in shown
