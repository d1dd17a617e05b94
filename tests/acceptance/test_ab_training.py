"""What AB-training promises, on whole trainings: bytes, accuracy, time, size; and with another kind of experiment.

What needs no whole training is in `tests/networks/test_ab_factors.py` and `tests/strategies/test_ab_training.py`.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from datamodules.image_set import ImageBatches
from runner import job
from runner.load import load_run
from tests import cli
from tests.composing import composed, plain

# An MLP 64-256-256-10 on all 1,437 digits, 22 steps per epoch, two nodes of two processes, as the document of the paper
# measured: AdamW at a constant 2e-3, 32 images per node and step, Gaussian noise of 0.1 on them.
DIGITS = ("experiment=ab_training/compare", "data.val_fraction=0", "cluster.rate_mbit=null", "cluster.compute_ms=0",
          "scheduler=none", "data.augment=true", "data.padding=0", "data.noise=0.1")  # fmt: skip
LONG = ("trainer.max_epochs=28",)  # 616 steps
SHORT = ("trainer.max_epochs=12", "strategy=ab_training", "strategy.warmup_steps=44")  # 264 steps
AB = ("strategy=ab_training", "strategy.warmup_steps=100", *LONG)
STRATEGIES = {
    "ddp": ("strategy=ddp", *LONG),
    "only-learned": AB,
    "with-stale": (*AB, "strategy.sync=with-stale"),
    "ortho-sigma": (*AB, "strategy.init=ortho-sigma", "strategy.cutoff=0.3"),
}
SQUARE = "ab/rank/net.layers.1.weight"


def _run(folder: str, *overrides: str, callbacks: str = "communication") -> dict[str, Any]:
    """Train in this process as one rank of the pool; what came out, on rank 0."""
    lean = ("callbacks=default", "~callbacks.energy") if callbacks == "default" else (f"callbacks={callbacks}",)
    result = job.run(plain(composed(*DIGITS, *lean, *overrides, run_dir=folder)))
    assert result["status"] == "completed", result.get("error")
    if torch.distributed.get_rank():
        return {}
    record = json.loads((Path(folder) / "results.json").read_text())
    traffic = {key: record["communication"][key] for key in ("inter_node_bytes", "steps")}
    return result["metrics"] | traffic | {"fit_s": record["seconds"]["fit"]} | _last_report(Path(folder))


def _last_report(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        for row in csv.DictReader(path.open()):
            found |= {k: float(v) for k, v in row.items() if k.startswith(("ab/", "time/")) and v}
    return found


def _learned(folder: str, *overrides: str) -> dict[str, Any]:
    """The same, with the loss of the trained network on all training images as they are."""
    found = _run(folder, *overrides, callbacks="default")
    if not found:
        return {}
    module, data, _ = load_run(folder, "last")
    data.setup("fit")
    images = ImageBatches(data.images("train"))
    batch = data.normalized(images.__getitems__(list(range(len(images)))))
    with torch.no_grad():
        return found | {"loss": float(F.cross_entropy(module.net(batch["image"]), batch["label"]))}


def _mean(runs: dict[str, list[dict[str, Any]]], name: str, key: str) -> float:
    return sum(run[key] for run in runs[name]) / len(runs[name])


@pytest.fixture(scope="module")
def runs(ranks4, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Two seeds of every strategy."""
    folder = tmp_path_factory.mktemp("digits")
    return {
        name: [
            ranks4(_learned, str(folder / f"{name}{seed}"), *overrides, f"seed={seed}", timeout=280)[0]
            for seed in (0, 1)
        ]
        for name, overrides in STRATEGIES.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_thirds_of_the_traffic_between_nodes_are_saved(runs, ranks4, tmp_path):
    """Acceptance 5: at least 68 % in the preset of 264 steps, of which warm-up and full-rank phases are 28 %."""
    short = ranks4(_run, str(tmp_path), *SHORT, timeout=280)[0]
    assert short["steps"] == 264 and all(run["steps"] == 616 for pair in runs.values() for run in pair)
    per_step = runs["ddp"][0]["inter_node_bytes"] / 616
    assert 0.68 <= 1 - short["inter_node_bytes"] / (264 * per_step) <= 1 - 74 / 264
    for name in ("only-learned", "with-stale"):
        assert 1 - _mean(runs, name, "inter_node_bytes") / (616 * per_step) >= 0.68, name


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_accuracy_is_that_of_data_parallelism(runs):
    """Acceptance 6: means of two seeds."""
    ddp = _mean(runs, "ddp", "test/accuracy")
    assert ddp > 0.96
    assert _mean(runs, "only-learned", "test/accuracy") >= ddp - 0.005
    assert _mean(runs, "only-learned", "loss") <= 1.5 * _mean(runs, "ddp", "loss")
    assert _mean(runs, "with-stale", "test/accuracy") >= ddp - 0.02


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_orthogonal_beginnings_make_small_networks(runs):
    """Acceptance 8: the square layer needs at most 32 of 256 directions, at 1 pp of accuracy."""
    for run in runs["ortho-sigma"]:
        assert run[SQUARE] <= 32
    assert _mean(runs, "ortho-sigma", "test/accuracy") >= _mean(runs, "ddp", "test/accuracy") - 0.01
    # 3.39 and 2.26 times smaller.
    assert _mean(runs, "ortho-sigma", "ab/compression") > max(3.3, _mean(runs, "only-learned", "ab/compression"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.xfail(strict=True, reason="1.4998 times: not asked by the acceptance list, but what was hoped for")
def test_orthogonal_beginnings_are_half_as_small_again(runs):
    assert _mean(runs, "ortho-sigma", "ab/compression") > 1.5 * _mean(runs, "only-learned", "ab/compression")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slow_network_costs_little_of_the_time(ranks4, tmp_path):
    """Acceptance 7: a step of an AB phase takes half of the time of DDP at most, the whole run 0.60 of it.

    301,066 parameters, as with 200 Mbit/s between nodes and 40 ms of emulated computation, but everything emulated
    takes twice as long, so that a busy machine matters less.
    """
    slow = ("cluster.rate_mbit=100", "cluster.compute_ms=80", "test=false", "model.net.hidden=[512,512]")
    ddp = ranks4(_run, str(tmp_path / "ddp"), "strategy=ddp", "trainer.max_epochs=12", *slow, timeout=280)[0]
    ours = ranks4(_run, str(tmp_path / "ab"), *SHORT, *slow, timeout=280)[0]
    assert ours["fit_s"] <= 0.60 * ddp["fit_s"], (ours["fit_s"], ddp["fit_s"])
    assert ours["time/step_ab_s"] <= 0.50 * ours["time/step_warmup_s"], "which is a step of DDP"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recycle_is_killed_in_an_ab_phase_and_ends_as_if_nothing_had_happened(tmp_path):
    """Another kind of network and data, by the command line; checkpoints are written at the end of every epoch."""
    arguments = ("experiment=recycle", "strategy=ab_training", "trainer=multi_cpu", "trainer.devices=4", "seed=1",
                 "trainer.max_epochs=12", "strategy.warmup_steps=10", "strategy.ab_steps=120",
                 "predict=false")  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cli.ok(*arguments, f"hydra.run.dir={whole}", cwd=tmp_path, timeout=250)
    started = cli.Started(*arguments, f"hydra.run.dir={killed}", cwd=tmp_path)
    try:
        started.wait_for(killed / "checkpoints" / "last.ckpt", timeout=150)
        while (json.loads((killed / "results.json").read_text())["epoch"] or 0) < 2:
            time.sleep(0.02)
    finally:
        started.kill()
    interrupted = torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)
    assert interrupted["strategy"]["ab"]["phase"] == "ab" and len(interrupted["strategy"]["ab"]["groups"]) == 2
    cli.ok(f"resume={killed}", cwd=tmp_path, timeout=250)
    assert cli.differences(whole, killed) == []
    final = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert final["strategy"]["ab"]["phase"] == "full" and final["strategy"]["ab"]["cycles"] >= 1
    record = cli.results(whole)
    sent = record["communication"]  # the machine is one node, and two groups
    assert sent["steps"] == final["global_step"] and sent["group_size"] == 2
    assert 0 < sent["between_groups_bytes"] < 0.5 * sent["intra_node_bytes"] and sent["inter_node_bytes"] == 0
    assert record["energy"]["it_j"] > 0
    assert record["parameters"] == sum(t.numel() for n, t in final["state_dict"].items() if n.startswith("net."))
