"""A run in this process: what it leaves where."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.energy_cost import PlansRefused
from runner import job
from strategies.daso import DASO
from strategies.ddp import DDP
from tests.composing import composed, plain, tiny


def test_without_callbacks_there_is_a_record_and_no_checkpoint(tmp_path):
    result = job.run(tiny(tmp_path, "callbacks=none", "trainer.max_epochs=1"))
    assert result["status"] == "completed"
    assert (tmp_path / "results.json").is_file()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_auto_is_counted_data_parallelism_where_there_are_several_processes(tmp_path):
    config = tiny(tmp_path, "trainer=multi_cpu", "cluster.local_size=1", "cluster.rate_mbit=100")
    strategy = job._strategy(config)
    assert type(strategy) is DDP and strategy.local_size == 1 and strategy.network.rate_mbit == 100
    assert job._strategy(tiny(tmp_path)) == "auto"
    assert type(job._strategy(tiny(tmp_path, "trainer=multi_cpu", "strategy=daso"))) is DASO


@pytest.mark.parametrize(
    ("experiment", "few"),
    [
        ("classification", ()),
        ("energy_measurement/xray", ("data.num_train=32", "data.num_val=16", "data.num_test=16")),
    ],
    ids=["classification", "xray"],
)
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_images_come_in_the_precision_of_the_network(tmp_path, experiment, few, precision):
    options = (*few, "debug=fast", "callbacks.energy.figures=[]", f"trainer.precision={precision}")
    result = job.run(plain(composed(f"experiment={experiment}", *options, run_dir=tmp_path)))
    assert result["status"] == "completed", result


def test_a_module_without_parameters_is_only_evaluated(tmp_path):
    little = ("debug=fast", "predict=false", "callbacks.energy.figures=[]", "~callbacks.figures")
    config = plain(composed("experiment=recycle", "model=rhp", *little, run_dir=tmp_path))
    result = job.run(config)
    assert result["status"] == "completed", result
    assert result["metrics"]["test/mae_scaled"] == result["metrics"]["test/rhp_mae_scaled"]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_checkpoint_does_not_wait_for_a_better_one(tmp_path):
    """ModelCheckpoint(save_last=True) writes it with a new best only: a killed run would lose every epoch since."""
    result = job.run(tiny(tmp_path, "model.optimizer.lr=0.0", "trainer.max_epochs=3"))
    assert result["status"] == "completed"
    best, last = (torch.load(tmp_path / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (0, 2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_signal_is_obeyed_where_every_step_is_the_last_of_its_epoch(tmp_path):
    options = ("data.batch_size=48", "trainer.max_epochs=8")  # one step an epoch
    whole = job.run(tiny(tmp_path / "whole", *options))
    cut = job.run(tiny(tmp_path / "cut", *options, "model.fault=SIGTERM", "model.fault_step=3"))
    assert cut["status"] == "interrupted"
    assert torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)["epoch"] == 3
    resumed = job.run(tiny(tmp_path / "cut", *options, "ckpt_path=last"))
    assert resumed["status"] == "completed" and resumed["metrics"] == whole["metrics"]


def test_an_error_past_the_first_batch_keeps_its_traceback_unless_it_says_that_the_message_is_enough():
    for error, enough in ((ValueError("in a step"), False), (PlansRefused("data.plans: all are refused"), True)):
        error.computing = True  # as the runner notes it down
        assert job.is_input_error(error) is enough
    assert job.is_input_error(ValueError("data.batch_size=0")) and not job.is_input_error(KeyError("x"))
