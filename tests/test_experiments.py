"""Every experiment runs: fit, validate, test and predict on one batch each, in this process."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from networks.lottery.tickets import find_tickets, load_ticket
from runner import job
from tests import cli
from tests.composing import ROOT, SERIES, composed, experiments, plain

DATA_DIR = f"data_dir={os.environ.get('WATTLIGHT_DATA', SERIES)}"
# An experiment of many networks sweeps over other options; one job of it is what is run here.
SMALL = (
    "debug=fast",
    "validate=true",
    "predict=true",
    "num_threads=1",
    DATA_DIR,
)
# Drawing and starting codecarbon are most of the time.
SMALL += ("++callbacks.figures.dpi=30", "callbacks.energy.figures=[]", "callbacks.energy.codecarbon=false")


def missing_file(config: dict[str, Any]) -> str | None:
    """The data file that an experiment needs and that is not on this machine."""
    folder = config["data"].get("data_dir")
    keys = [key for key in config["data"] if key in ("file", "store") or key.endswith("_file")]
    named = [config["data"][key] or [] for key in keys]
    files = [file for value in named for file in ([value] if isinstance(value, str) else value)]
    return next((file for file in files if folder and not (Path(folder) / file).exists()), None)


@cache
def chosen_trainer(name: str) -> str:
    """The option of `trainer/` that an experiment chooses, itself or in one that it builds on.

    Read from its file: to compose all experiments takes every worker a quarter of a minute before its first test.
    """
    text = (ROOT / f"conf/experiment/{name}.yaml").read_text()
    if own := re.search(r"^  - override /trainer: (\S+)", text, re.MULTILINE):
        return own[1]
    bases = ["/".join(base) for base in re.findall(r"^  - /experiment/([\w/]+)(?:: (\w+))?$", text, re.MULTILINE)]
    return next((option for base in bases if (option := chosen_trainer(base.strip("/"))) != "cpu"), "cpu")


def has_processes(name: str) -> bool:
    """Whether an experiment asks for several processes on the CPU."""
    return chosen_trainer(name) in ("cluster_2x2", "multi_cpu")


# Big networks on real data, minutes each on a core.
LARGE = (
    "classification/cifar10",
    "classification/cifar10_vgg16",
    "daso/cifar10",
    "ab_training/cifar10",
    "oialr/cifar10",
    "sampling_parallelism/cifar10_vit",
    "bayesian_lottery/cifar10_vgg11",
    "bayesian_lottery/cifar10_vit",
    "thin_film/paper",
)
# What a batch of them computes is cut where it takes minutes.
FEW = ("data.batch_size=8", "data.eval_batch_size=4", "model.num_samples=2", "model.num_eval_samples=2")
TICKETS = (*FEW, "model.evaluation_seeds=1")  # two tickets are tested
FEW_XRAYS = ("data.num_train=64", "data.num_val=16", "data.num_test=16")  # to generate them takes longer than all else
CUT = {
    "sampling_parallelism/cifar10_vit": FEW,
    "energy_measurement/xray": FEW_XRAYS,
    "energy_measurement/xray_inference": FEW_XRAYS,
}
# Generating trajectories too.
GENERATED = ("blend", "grids", "latent", "rollout", "weak_scaling")
FEW_DAYS = ("data.num_train=1", "data.records=24", "data.spin_up_days=0.5", "data.cache_dir=${run.dir}/cache")
CUT |= {name: FEW_DAYS for name in ("weather", *(f"weather/{n}" for n in GENERATED))}
FEW_ROTATIONS = ("data.num_train=1", "data.records=24", "data.cache_dir=${run.dir}/cache")
CUT |= {f"energy_scaling/{name}": FEW_ROTATIONS for name in ("afno_pretrain", "afno_finetune", "afno_sweep")}
SMALL_FORECASTER = (
    "model.net.backbone.d_model=16", "model.net.backbone.feed_forward=32", "callbacks.pruning.densities=[0.5]",
    "callbacks.pruning.latency_batches=[1]", "callbacks.pruning.latency_repeats=1", "callbacks.pruning.energy_s=0",
)  # fmt: skip
CUT |= {f"pruning/{name}": SMALL_FORECASTER for name in ("paper", "crossformer")}
CUT |= {f"bayesian_lottery/{name}": TICKETS for name in ("cifar10_resnet20", "cifar10_vgg11", "cifar10_vit", "paper")}
# A library of 100,000 stacks is a baseline of each of them.
FEW_STACKS = ("data.num_train=2000", "data.num_val=20", "data.num_test=10")
CUT |= {name: FEW_STACKS for name in experiments() if name.split("/")[0] == "thin_film"}
CUT["thin_film/dielectric10"] += ("data.batch_size=16",)
CUT["petnet/paper"] = ("data.num_train=64", "data.num_val=16", "data.num_test=16", "data.batch_size=8")
SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = [pytest.param(name, marks=SLOW if name in LARGE else []) for name in experiments()]


def is_sweep(name: str) -> bool:
    """Whether an experiment is a sweep over others."""
    return "mode: MULTIRUN" in (ROOT / f"conf/experiment/{name}.yaml").read_text()


DISTRIBUTED = [n for n in experiments() if has_processes(n) and n not in LARGE and not is_sweep(n)]
# What is on the command line is drawn or measured elsewhere.
FEWER = ("debug=tiny", DATA_DIR, "callbacks.energy.figures=[]", "callbacks.energy.codecarbon=false", "predict=false")


def on_ranks(name: str, folder: str) -> dict[str, Any]:
    return job.run(plain(composed(f"experiment={name}", *FEWER, *CUT.get(name, ()), run_dir=folder)))


def leaves_what_several_processes_leave(folder: Path, world_size: int) -> None:
    record = json.loads((folder / "results.json").read_text())
    assert record["status"] == "completed" and record["world_size"] == world_size
    sent = record["communication"]
    # Between simulated nodes, or within the one that there is.
    assert sent["steps"] > 0 and sent["inter_node_bytes"] + sent["intra_node_bytes"] > 0
    assert record["energy"]["it_j"] > 0
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["strategy"]["world_size"] == world_size


def processes_and_data(name: str, folder: Path) -> int:
    """Processes of an experiment whose data are here, else the test is skipped."""
    config = plain(composed(f"experiment={name}", *FEWER, *CUT.get(name, ()), run_dir=folder))
    if file := missing_file(config):
        pytest.skip(f"needs {file}, which does not ship with the program")
    assert config["trainer"]["accelerator"] == "cpu" and config["trainer"]["devices"] > 1
    return config["trainer"]["devices"]


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_experiment_runs_on_its_processes(name, tmp_path, request):
    world_size = processes_and_data(name, tmp_path)
    results = request.getfixturevalue(f"ranks{world_size}")(on_ranks, name, str(tmp_path))
    assert [result["status"] for result in results] == ["completed"] * world_size, results
    leaves_what_several_processes_leave(tmp_path, world_size)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_experiment_runs_on_its_processes_as_a_user_starts_it(name, tmp_path):
    """The same through the command line and its launcher, which tests/test_run.py has with a smaller experiment."""
    world_size = processes_and_data(name, tmp_path)
    folder = tmp_path / "run"
    cli.ok(f"experiment={name}", *FEWER, "hydra.mode=RUN", f"hydra.run.dir={folder}", cwd=tmp_path, timeout=280)
    leaves_what_several_processes_leave(folder, world_size)


@pytest.mark.parametrize("name", NAMES)
def test_experiment_runs(name, tmp_path):
    alone = ["trainer=cpu", "strategy=auto"] if has_processes(name) else []
    config = plain(composed(f"experiment={name}", *alone, *SMALL, *CUT.get(name, ()), run_dir=tmp_path))
    assert config["trainer"]["devices"] == 1 or config["trainer"]["accelerator"] != "cpu"
    if file := missing_file(config):
        pytest.skip(f"needs {file}, which does not ship with the program")
    result = job.run(config)
    if torch.distributed.is_initialized():  # a strategy of several processes, here of one
        torch.distributed.destroy_process_group()
    assert result["status"] == "completed", result["error"]
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["status"] == "completed" and record["world_size"] == 1 and record["metrics"]
    assert record["metrics"] == pytest.approx(result["metrics"], rel=0, abs=0, nan_ok=True)
    assert any(key.startswith("test/") for key in record["metrics"]) == config["test"]
    validates = any(key.startswith("val/") for key in record["metrics"])
    assert validates or config["data"].get("val_fraction") == 0
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["config"] == config
    trains = config["train"] and any(p.requires_grad for p in job.build(config)[0].parameters())
    assert (tmp_path / "checkpoints/last.ckpt").is_file() == trains
    assert (tmp_path / "checkpoints/best.ckpt").is_file() == trains
    if "_target_" in config["callbacks"].get("iterative_pruning", {}):  # it has pruned once
        tickets = {level: load_ticket(path) for level, path in find_tickets(tmp_path).items()}
        assert list(tickets) == [0, 1] and tickets[1].about["remaining"] == pytest.approx(0.8, abs=1e-3)
        assert {f"test/level_0{level}/accuracy" for level in tickets} <= record["metrics"].keys()
    if "predictions" in config["callbacks"]:
        assert (tmp_path / "predictions" / config["callbacks"]["predictions"]["filename"]).stat().st_size > 0
    if config["test"] and "_target_" in config["callbacks"].get("figures", {}):  # a value alone makes none
        figures = {p.stem for p in (tmp_path / "figures").glob("*.png")}
        wanted = set(config["callbacks"]["figures"]["plots"])
        assert {plot for plot in wanted if any(f.startswith(plot) for f in figures)} >= wanted - {"holiday_residual"}
