"""`resume=DIR` and the choice of a checkpoint; exactness in this process and on two gloo ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from runner import job
from runner.resume import find_checkpoint, rewrite
from tests.cli import differences, results
from tests.composing import tiny


@pytest.fixture
def stored(tmp_path):
    """A folder that looks like a run."""
    (tmp_path / ".hydra" / "resumed_2").mkdir(parents=True)
    (tmp_path / ".hydra" / "config.yaml").write_text("name: x\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    return tmp_path


def test_rewrite(stored):
    assert rewrite(["run.py", "seed=1"]) == ["run.py", "seed=1"]
    argv = rewrite(["run.py", f"resume={stored}", "trainer.max_epochs=9", "--cfg", "job"])
    assert argv[:5] == ["run.py", "--config-path", str(stored / ".hydra"), "--config-name", "config"]
    assert argv[5:7] == ["--cfg", "job"]
    assert f"hydra.run.dir={stored}" in argv and "hydra.output_subdir=.hydra/resumed_3" in argv
    assert "ckpt_path=last" in argv and argv[-1] == "trainer.max_epochs=9"


def test_a_run_that_had_saved_nothing_starts_afresh(stored, capsys):
    (stored / "checkpoints" / "last.ckpt").unlink()
    assert "ckpt_path=null" in rewrite(["run.py", f"resume={stored}"])
    assert "nothing was saved yet" in capsys.readouterr().out


def test_rewrite_keeps_another_checkpoint(stored):
    assert "ckpt_path=last" not in rewrite(["run.py", f"resume={stored}", "ckpt_path=best"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer=cpu"], "keeps its groups"),
        (["+experiment=recycle"], "keeps its groups"),
        (["-m"], "--multirun"),
    ],
)
def test_refusals(stored, arguments, message):
    with pytest.raises(SystemExit, match=message):
        rewrite(["run.py", f"resume={stored}", *arguments])


def test_no_run(tmp_path):
    with pytest.raises(SystemExit, match="no run there"):
        rewrite(["run.py", f"resume={tmp_path}"])


def config(folder: Path, ckpt_path: str | None, train: bool = True, **values) -> dict:
    return {"run": {"dir": str(folder)}, "ckpt_path": ckpt_path, "train": train, **values}


def test_find_checkpoint(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    assert find_checkpoint(config(tmp_path, None)) is None
    assert find_checkpoint(config(tmp_path, "auto")) is None
    for wanted in ("last", "best", "/no/such/file.ckpt"):
        with pytest.raises(ValueError, match=f"ckpt_path={wanted}: no file"):
            find_checkpoint(config(tmp_path, wanted))
    checkpoints.mkdir()
    (checkpoints / "last.ckpt").touch()
    assert find_checkpoint(config(tmp_path, "auto", train=False)) == str(checkpoints / "last.ckpt")
    (checkpoints / "best.ckpt").touch()
    for wanted, train, name in [
        ("auto", True, "last"),
        ("auto", False, "best"),
        ("last", True, "last"),
        ("last", False, "best"),
        ("best", True, "best"),
        (str(checkpoints / "best.ckpt"), True, "best"),
    ]:
        assert find_checkpoint(config(tmp_path, wanted, train)) == str(checkpoints / f"{name}.ckpt")


def test_auto_refuses_the_checkpoint_of_another_configuration(tmp_path):
    """A folder that is used twice (RUN_STAMP, a SLURM job) must not continue what something else began."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    first = {"name": "a", "seed": 1, "data": {"batch_size": 2}, "model": {"width": 3}, "trainer": {"max_epochs": 1}}
    (tmp_path / "results.json").write_text(json.dumps({"config": first}))
    assert find_checkpoint(config(tmp_path, "auto", **first))
    assert find_checkpoint(config(tmp_path, "auto", **first | {"trainer": {"max_epochs": 9}}))
    with pytest.raises(ValueError, match=r"another configuration \(differs in seed, model\)"):
        find_checkpoint(config(tmp_path, "auto", **first | {"seed": 2, "model": {"width": 4}}))


def test_a_job_of_a_sweep_takes_what_an_earlier_one_has_trained(tmp_path):
    wanted = {"name": "x", "seed": 1, "data": {"part": "all"}, "model": {"width": 3}}

    def trained(number: int, status="completed", train=True, keeps=True, **values) -> str:
        folder = tmp_path / str(number)
        best = folder / "checkpoints" / "best.ckpt"
        best.parent.mkdir(parents=True)
        if keeps:
            best.touch()
        stored = {"config": wanted | {"train": train, "name": "y"} | values, "status": status}
        (folder / "results.json").write_text(json.dumps(stored | {"best_checkpoint": str(best)}))
        os.utime(folder / "results.json", (1000 + number, 1000 + number))
        return str(best)

    mine = config(tmp_path / "9", "sweep", train=False, **wanted)
    assert find_checkpoint(mine) is None
    trained(9)  # itself
    trained(0, status="failed")
    trained(1, train=False)
    trained(2, keeps=False)
    trained(3, model={"width": 4})
    assert find_checkpoint(mine) is None
    other_seed = trained(4, seed=2)
    assert find_checkpoint(mine) == other_seed
    other_data = trained(5, data={"part": "none"})
    assert find_checkpoint(mine) == other_data
    first, second = trained(6), trained(7)
    assert first != second == find_checkpoint(mine)
    trained(8, seed=2)
    assert find_checkpoint(mine) == second


def in_parts(folder: Path, *overrides: str) -> None:
    """Two epochs, then, as a new run in the same folder, the third."""
    assert job.run(tiny(folder, *overrides, "trainer.max_epochs=2"))["status"] == "completed"
    assert job.run(tiny(folder, *overrides))["status"] == "completed"


def stopped(folder: Path, *overrides: str, rank: int = 0, step: int = 8) -> None:
    """A signal arrives on one rank in the middle of the second epoch; then the run continues."""
    fault = ("model.fault=SIGTERM", f"model.fault_step={step}", f"model.fault_rank={rank}")
    # Or ranks would go on to the end of so short an epoch.
    with mock.patch.multiple("callbacks.interrupt", AGREE_S=0.0, LEAST_STEPS=1):
        result = job.run(tiny(folder, *overrides, *fault))
    assert result["status"] == "interrupted" and result["signum"] == signal.SIGTERM
    if step < 10:
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] in range(step, 12)
    assert job.run(tiny(folder, *overrides, "ckpt_path=last"))["status"] == "completed"


def uninterrupted(folder: Path, *overrides: str) -> None:
    assert job.run(tiny(folder, *overrides))["status"] == "completed"


SCHEDULES = {
    "constant": (),
    "decaying": ("scheduler=exponential",),
    "accumulated": ("scheduler=step", "trainer.accumulate_grad_batches=2"),
    "plateau twice": ("scheduler=plateau", "++model.scheduler.patience=0", "++model.scheduler.threshold=0.5"),
    "plateau": ("scheduler=plateau", "++model.scheduler.patience=0"),
}


@pytest.mark.parametrize("overrides", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_resumed_run_is_the_uninterrupted_one(tmp_path, overrides):
    uninterrupted(tmp_path / "whole", *overrides)
    in_parts(tmp_path / "parts", *overrides)
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    assert not differences(tmp_path / "whole", tmp_path / "parts", checkpoint="best")


@pytest.mark.parametrize("step", [7, 8, 10, 11])
def test_stopped_in_mid_epoch(tmp_path, step):
    """Epochs have six steps: after the second, in the middle, one before the last, at the last step of the second."""
    uninterrupted(tmp_path / "whole", "scheduler=cosine")
    stopped(tmp_path / "parts", "scheduler=cosine", step=step)
    assert not differences(tmp_path / "whole", tmp_path / "parts")


def _on_ranks(fn, folder: str, *args) -> dict:
    fn(Path(folder), "trainer=multi_cpu", *args)
    return results(Path(folder))


@pytest.mark.parametrize("way", [in_parts, stopped], ids=["epoch", "mid-epoch"])
def test_two_ranks(ranks2, tmp_path, way):
    ranks2(_on_ranks, uninterrupted, str(tmp_path / "whole"))
    ranks2(_on_ranks, way, str(tmp_path / "parts"))
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    assert results(tmp_path / "parts")["world_size"] == 2


def test_two_ranks_give_the_metrics_of_one(ranks2, tmp_path):
    """Equal global batches, evaluation of every sample once; 13 test samples do not divide by two."""
    exact = ("model.dropout=0", "data.num_test=13")
    uninterrupted(tmp_path / "one", *exact)
    ranks2(_on_ranks, uninterrupted, str(tmp_path / "two"), *exact)
    one, two = (results(tmp_path / name)["metrics"] for name in ("one", "two"))
    assert one.keys() == {name for name in two if not name.startswith("comm/")} and "test/loss" in one
    for name in one:
        assert one[name] == pytest.approx(two[name], rel=1e-6), name


def test_another_number_of_ranks_continues_and_says_so(ranks2, tmp_path):
    ranks2(_on_ranks, uninterrupted, str(tmp_path), "trainer.max_epochs=2")
    assert job.run(tiny(tmp_path, "trainer.devices=1"))["status"] == "completed"
    assert results(tmp_path)["global_step"] == 18
    assert "random states of 2 ranks, this run has 1" in (tmp_path / "run.log").read_text()
