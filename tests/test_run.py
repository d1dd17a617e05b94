"""The command line: mistakes, processes, signals, sweeps and exact resumption, in processes as a user starts them."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cli
from tests.cli import TINY, differences, results
from tests.composing import ROOT

MULTI_CPU = ("trainer=multi_cpu", "trainer.devices=2")
SLOW_STEPS = "model.fault=slow"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an uninterrupted run on one device, started as a user starts it, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = cli.ok(*TINY, f"hydra.run.dir={folder}", "predict=true", cwd=folder, cold=True)
    return folder, done.stdout


@pytest.fixture(scope="module")
def whole_two(tmp_path_factory):
    """Folder of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("whole_two")
    cli.ok(*TINY, *MULTI_CPU, f"hydra.run.dir={folder}", cwd=folder)
    return folder


# -- start and mistakes


@pytest.mark.parametrize("arguments", [("--help",), ("experiment=recycle", "--cfg", "job")], ids=["help", "cfg"])
def test_showing_imports_neither_torch_nor_lightning(arguments, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "run.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=cli.environment(), capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in modules
    heavy = {"torch", "lightning", "torchmetrics", "numpy", "pandas", "wandb"}
    assert not {m for m in modules if m.split(".")[0] in heavy}
    assert "experiment=recycle" in done.stdout if arguments == ("--help",) else "_target_: lightning" in done.stdout
    assert not list(tmp_path.iterdir())


def test_all_mistakes_in_one_message(tmp_path):
    done = cli.run(
        *("experiment=recycle", "trainer.max_epoch=3", "sed=3", "model.optimizer.lrr=1", "data.batchsize=4"),
        *("callbacks.checkpoint.dirpath=${run.dirr}", "model.net._target_=networks.recycle.ReCycleTransformr"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "the configuration has 6 mistakes:" in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    for key, suggestion in {
        "trainer.max_epoch": "Did you mean 'max_epochs'?",
        "sed": "Did you mean 'seed'?",
        "model.optimizer.lrr": "Did you mean 'lr'?",
        "data.batchsize": "Did you mean 'batch_size'?",
        "callbacks.checkpoint.dirpath": "Interpolation key 'run.dirr' not found",
        "model.net._target_": "Did you mean 'ReCycleTransformer'?",
    }.items():
        assert any(line.strip().startswith(f"{key}:") and suggestion in line for line in lines), (key, done.stderr)


def test_mistakes_are_found_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = cli.run("experiment=recycle", "trainer.max_epoch=3", cwd=tmp_path, cold=True, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "Did you mean 'max_epochs'?" in done.stderr
    assert "torch was imported" not in done.stderr


def test_unknown_experiment_lists_the_known_ones(tmp_path):
    done = cli.run(*TINY[:2], "experiment=does_not_exist", cwd=tmp_path)
    assert done.returncode == 1
    assert "does_not_exist" in done.stderr and "recycle" in done.stderr and "tiny" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_multi_gpu_without_a_gpu_names_the_alternative(tmp_path):
    done = cli.run("experiment=recycle", "trainer=multi_gpu", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device found" in done.stderr and "trainer=multi_cpu" in done.stderr


def test_broken_torchvision_gets_a_message(tmp_path):
    stub = tmp_path / "stub" / "torchvision"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = f"{stub.parent}:{cli.environment()['PYTHONPATH']}"
    done = cli.run(*TINY, cwd=tmp_path, cold=True, PYTHONPATH=path)
    assert done.returncode == 1
    assert "built for another torch" in done.stderr and "pip uninstall torchvision" in done.stderr
    assert "torchvision::nms" in done.stderr and "Traceback" not in done.stderr


def test_torchvision_is_not_installed():
    """Nothing that the program depends on may pull it in: its wheels break torchmetrics beside the CPU build."""
    code = "import importlib.util as u; assert u.find_spec('torchvision') is None and u.find_spec('timm') is None"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_mistake_in_a_value_is_one_line(tmp_path):
    done = cli.run(*TINY, "model.width=0", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 1
    assert "model.width=0: must be at least 1" in done.stderr and "Traceback" not in done.stderr
    assert results(tmp_path / "run")["status"] == "failed"


# -- one run


def test_a_run_leaves_its_record(whole):
    folder, output = whole
    record = results(folder)
    assert record["status"] == "completed" and record["world_size"] == 1 and record["global_step"] == 18
    assert record["metrics"]["test/loss"] > 0
    assert {"torch", "lightning", "python"} <= record["versions"].keys() and record["hardware"]["cores"] >= 1
    assert set(record["seconds"]) >= {"fit", "test", "total"}
    assert "test/loss" in output and "resume=." in output and "checkpoints/best.ckpt" in output
    assert (folder / ".hydra" / "config.yaml").is_file() and (folder / "run.log").stat().st_size
    assert (folder / "csv" / "version_0" / "metrics.csv").is_file()
    assert not (folder / "ranks").exists()
    names = {p.name for p in folder.iterdir()}
    assert names == {".hydra", "checkpoints", "csv", "energy", "results.json", "run.log"}


@pytest.mark.slow
def test_a_finished_run_can_train_on(whole, tmp_path):
    """`resume=DIR trainer.max_epochs=N` trains the missing epochs only, and equals a run that was that long."""
    longer, resumed = tmp_path / "longer", tmp_path / "resumed"
    subprocess.run(["cp", "-r", str(whole[0]), str(resumed)], check=True)
    cli.ok(*TINY, f"hydra.run.dir={longer}", "trainer.max_epochs=4", "predict=true", cwd=tmp_path)
    cli.ok(f"resume={resumed}", "trainer.max_epochs=4", cwd=tmp_path)
    assert not differences(longer, resumed)
    assert (resumed / ".hydra" / "resumed_1" / "overrides.yaml").is_file()
    assert results(resumed)["global_step"] == 24 and len(results(resumed)["earlier"]) == 1
    rows = [r for v in (0, 1) for r in csv.DictReader((resumed / f"csv/version_{v}/metrics.csv").open())]
    assert len({r["step"] for r in rows if r["val/loss"]}) == 4


def test_resume_refuses_groups_and_wrong_folders(whole, tmp_path):
    done = cli.run(f"resume={whole[0]}", "trainer=multi_cpu", cwd=tmp_path)
    assert done.returncode == 1 and "keeps its groups" in done.stderr and "trainer.<key>" in done.stderr
    done = cli.run(f"resume={tmp_path}/nothing", cwd=tmp_path)
    assert done.returncode == 1 and "no run there" in done.stderr


# -- interruptions


def killed_and_resumed(folder: Path, *more: str) -> None:
    done = cli.run(*TINY, *more, "model.fault=SIGKILL", "model.fault_step=9", f"hydra.run.dir={folder}", cwd=folder)
    assert done.returncode != 0
    cli.ok(f"resume={folder}", "model.fault=none", cwd=folder)


def test_killed_run_resumes_bit_for_bit(whole, tmp_path):
    killed_and_resumed(tmp_path)
    assert not differences(whole[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_resumes_bit_for_bit(whole_two, tmp_path, rank):
    killed_and_resumed(tmp_path, *MULTI_CPU, f"model.fault_rank={rank}")
    assert not differences(whole_two, tmp_path)
    assert results(tmp_path)["earlier"][0]["status"] == "failed"
    assert "SIGKILL" in results(tmp_path)["earlier"][0]["error"]


def interrupted(folder: Path, number: int, *more: str, group: bool = False, ranks: int = 1) -> str:
    """Stop a run in mid-epoch with a signal, then check what is left."""
    mark = folder / "mark"
    folder.mkdir()
    arguments = (*TINY, *more, SLOW_STEPS, f"model.mark={mark}", f"hydra.run.dir={folder}")
    started = cli.Started(*arguments, cwd=folder.parent)
    try:
        started.wait_for(*[Path(f"{mark}.{rank}") for rank in range(ranks)])
        started.signal(number, group)
        code, output = started.end()
    finally:
        started.kill()
    assert code == 128 + number, output
    record = results(folder)
    assert record["status"] == "interrupted" and signal.Signals(number).name in record["error"], record
    assert (folder / "checkpoints" / "last.ckpt").is_file(), output
    assert "resume=run" in output and "Traceback" not in output
    return output


def resumed(folder: Path) -> None:
    before = results(folder)
    cli.ok(f"resume={folder}", "model.fault=none", cwd=folder)
    assert results(folder)["status"] == "completed"
    assert results(folder)["earlier"][-1]["status"] == before["status"]


@pytest.mark.slow
@pytest.mark.parametrize("target", [(), MULTI_CPU], ids=["one", "two"])
def test_slurms_warning_to_the_process_that_was_started(tmp_path, target):
    """`sbatch --signal=B:USR1` and `scancel` reach run.py itself, which passes the warning on to its ranks."""
    interrupted(tmp_path / "run", signal.SIGUSR1, *target, ranks=2 if target else 1)
    resumed(tmp_path / "run")


def test_sigterm_loses_nothing(whole, tmp_path):
    interrupted(tmp_path / "run", signal.SIGTERM)
    resumed(tmp_path / "run")
    assert not differences(whole[0], tmp_path / "run")


@pytest.mark.slow
def test_sigint_loses_nothing(whole, tmp_path):
    interrupted(tmp_path / "run", signal.SIGINT, group=True)
    resumed(tmp_path / "run")
    assert not differences(whole[0], tmp_path / "run")


def test_sigint_on_two_ranks(tmp_path):
    """A Ctrl-C reaches the supervisor and every rank at the same time."""
    interrupted(tmp_path / "run", signal.SIGINT, *MULTI_CPU, group=True, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
    ids=["term", "term to all", "int"],
)
def test_two_ranks_lose_nothing(whole_two, tmp_path, number, group):
    interrupted(tmp_path / "run", number, *MULTI_CPU, group=group, ranks=2)
    resumed(tmp_path / "run")
    assert not differences(whole_two, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), MULTI_CPU], ids=["one", "two"])
def test_second_ctrl_c_ends_at_once(tmp_path, more):
    """Also if a step never ends: here each takes a minute."""
    mark = tmp_path / "mark"
    arguments = (*TINY, *more, "model.fault=hang", f"model.mark={mark}", f"hydra.run.dir={tmp_path}")
    started = cli.Started(*arguments, cwd=tmp_path)
    try:
        started.wait_for(*[Path(f"{mark}.{rank}") for rank in range(2 if more else 1)])
        started.signal(signal.SIGINT, group=True)
        with pytest.raises(subprocess.TimeoutExpired):
            started.process.wait(1.5)
        started.signal(signal.SIGINT, group=True)
        code, output = started.end(timeout=12)
    finally:
        started.kill()
    assert code == 130, output
    assert results(tmp_path)["status"] == "interrupted"


@pytest.mark.slow
def test_ranks_do_not_outlive_their_supervisor(tmp_path):
    mark = tmp_path / "mark"
    arguments = (*TINY, *MULTI_CPU, SLOW_STEPS, "trainer.max_epochs=1000", f"model.mark={mark}")
    started = cli.Started(*arguments, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    try:
        started.wait_for(Path(f"{mark}.0"), Path(f"{mark}.1"))
        started.signal(signal.SIGKILL)
        code, _ = started.end()
    finally:
        started.kill()
    assert code == -signal.SIGKILL


# -- sweeps


def table(folder: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((folder / "table.csv").open()))
    lines = (folder / "table.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == len(rows) + 2
    return rows


def sweep(folder: Path, *arguments: str, **more):
    command = ("-m", *TINY, f"hydra.sweep.dir={folder}/sweep", *arguments)
    return cli.run(*command, cwd=folder, **more), folder / "sweep"


def sweep_over_devices(tmp_path: Path, order: str) -> None:
    mark = "'model.mark=${run.dir}/mark'"
    done, folder = sweep(tmp_path, "trainer=multi_cpu", f"trainer.devices={order}", mark.strip("'"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"sweep"}, "a rank made a folder of its own"
    rows = table(folder)
    assert [row["trainer.devices"] for row in rows] == order.split(",")
    for row in rows:
        job, devices = folder / row["job"], int(row["trainer.devices"])
        assert row["status"] == "completed" and int(row["world_size"]) == devices
        seen = [json.loads(path.read_text()) for path in sorted(job.glob("mark.*"))]
        assert [s["world_size"] for s in seen] == [devices] * devices
        assert results(job)["metrics"]["test/loss"] == float(row["test/loss"])
    assert rows[0]["test/loss"] != rows[1]["test/loss"], "dropout differs between ranks"
    assert "| trainer.devices |" in done.stdout


def test_sweep_over_devices(tmp_path):
    sweep_over_devices(tmp_path, "1,2")


@pytest.mark.slow
def test_sweep_over_devices_downwards(tmp_path):
    sweep_over_devices(tmp_path, "2,1")


def test_failing_jobs_do_not_end_a_sweep(tmp_path):
    done, folder = sweep(tmp_path, "model.fault=raise,SIGKILL,none")
    assert done.returncode == 1, done.stdout + done.stderr
    failed, killed, fine = table(folder)
    assert failed["status"] == "failed" and "boom" in failed["error"]
    assert killed["status"] == "failed" and "SIGKILL" in killed["error"]
    assert fine["status"] == "completed" and float(fine["test/loss"]) > 0
    assert "tiny_model.py" in done.stderr and "boom" in done.stderr, "the user's own line helps"
    assert "ChildFailedError" not in done.stderr and "elastic" not in done.stderr
    assert "boom" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_on_failure_stop(tmp_path):
    done, folder = sweep(tmp_path, "model.fault=raise,none", "launch.on_failure=stop")
    assert done.returncode == 1
    assert [row["status"] for row in table(folder)] == ["failed"]


@pytest.mark.slow
def test_mistakes_in_one_job_of_a_sweep(tmp_path):
    """The others run, and the table says what was wrong."""
    done, folder = sweep(tmp_path, "data.batch_size=7,8", *MULTI_CPU, "train=false", "test=false")
    assert done.returncode == 1
    wrong, right = table(folder)
    assert wrong["status"] == "failed" and "batch_size=7" in wrong["error"]
    assert right["status"] == "completed"


@pytest.mark.slow
def test_timeout(tmp_path):
    arguments = ("model.fault=hang", "launch.timeout_s=12", *MULTI_CPU, f"hydra.run.dir={tmp_path}/run")
    done = cli.run(*TINY, *arguments, cwd=tmp_path)
    assert done.returncode == 1 and "launch.timeout_s=12" in done.stderr
    assert results(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
def test_retries_continue_from_the_last_checkpoint(whole, tmp_path):
    """The job fails once (a file says so) in its second epoch and finishes on the second try, bit for bit."""
    arguments = ("model.fault=once", "model.fault_step=9", f"model.mark={tmp_path}/mark", "launch.retries=2")
    done = cli.ok(*TINY, *arguments, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert "try 2 of 3" in done.stderr and "try 3" not in done.stderr
    assert not differences(whole[0], tmp_path / "run")


@pytest.mark.slow
def test_optuna_with_two_ranks(tmp_path):
    """Both ranks of a trial train with the trial's value, and the best value is the minimum of the objectives."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done, folder = sweep(
        tmp_path,
        *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"),
        *(*MULTI_CPU, "model.optimizer.lr=interval(0.01,0.5)", "optimized_metric=val/loss_best"),
        "model.mark=${run.dir}/mark",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(folder)
    assert len(rows) == 3
    for row in rows:
        seen = [json.loads((folder / row["job"] / f"mark.{rank}").read_text()) for rank in (0, 1)]
        assert seen[0] == seen[1] and seen[0]["world_size"] == 2
        assert seen[0]["lr"] == float(row["model.optimizer.lr"])
    assert len({row["model.optimizer.lr"] for row in rows}) == 3
    best = (folder / "optimization_results.yaml").read_text()
    value = float(next(line.split(":")[1] for line in best.splitlines() if line.startswith("best_value")))
    assert value == min(float(row["val/loss_best"]) for row in rows)


def test_torchrun_ranks_are_used_as_they_come(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "run.py"), *TINY, *MULTI_CPU, "model.mark=${run.dir}/mark"]
    done = subprocess.run(
        command, cwd=tmp_path, env=cli.environment(), capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "logs" / "tiny").iterdir()
    assert results(run)["status"] == "completed" and results(run)["world_size"] == 2
    assert [json.loads((run / f"mark.{r}").read_text())["world_size"] for r in (0, 1)] == [2, 2]
    assert done.stdout.count("best checkpoint") == 1
    assert (run / ".hydra" / "config.yaml").is_file()


@pytest.mark.slow
def test_torchrun_equals_the_supervisor(whole_two, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "run.py"), *TINY, *MULTI_CPU, f"hydra.run.dir={tmp_path}"]
    subprocess.run(command, cwd=tmp_path, env=cli.environment(), capture_output=True, check=True, timeout=110)
    assert not differences(whole_two, tmp_path)


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="Lightning's launcher repeats the sweep on every rank (Lightning 2.6)")
def test_lightnings_own_launcher_sweeps_over_devices(tmp_path):
    """The control: what run.py would do without its supervisor. Passes when upstream is fixed."""
    script = tmp_path / "naive.py"
    script.write_text(NAIVE)
    (tmp_path / "config.yaml").write_text("devices: 1\nmark: ???\n")
    subprocess.run(
        [
            sys.executable,
            str(script),
            "-m",
            "devices=1,2",
            f"mark={tmp_path}/mark",
            f"hydra.sweep.dir={tmp_path}/sweep",
        ],
        cwd=tmp_path,
        env=cli.environment(PYTHONPATH=f"{ROOT}:{ROOT}/tests/user"),
        capture_output=True,
        check=False,
        timeout=110,
    )
    assert {path.name for path in tmp_path.glob("mark_*")} == {"mark_1.0", "mark_2.0", "mark_2.1"}
    assert {json.loads(p.read_text())["world_size"] for p in tmp_path.glob("mark_2.*")} == {2}


NAIVE = """
from functools import partial
import hydra, torch, lightning.pytorch as pl
from tiny_model import TinyData, TinyModule

@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    module = TinyModule(mark=f"{cfg.mark}_{cfg.devices}", optimizer=partial(torch.optim.Adam, lr=0.01))
    trainer = pl.Trainer(accelerator="cpu", devices=cfg.devices, strategy="ddp",
                         max_epochs=1, logger=False, enable_checkpointing=False, use_distributed_sampler=False)
    trainer.fit(module, datamodule=TinyData())

main()
"""
