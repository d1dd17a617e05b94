"""Strategies on a slow network between two nodes of two processes: milliseconds per step, bytes, and accuracy.

DASO's headline is up to 34 % less training time than synchronous data parallelism on a cluster (Coquelin et al., 2022),
AB-training's 70.31 % less traffic on average (Coquelin et al., 2024). What a strategy saves depends on the share of
communication in a step, so both are measured over a grid of bandwidths, all strategies in one run.

The network of 0.30 million parameters (64-512-512-10) computes for 40 ms per step, by sleeping: what is compared is
communication, and shared cores do not disturb it. The link between the nodes is emulated
(`parallel.network_model`); where network namespaces can be made, the same is measured on a real link shaped by the
kernel, whose counters check the ledger.

What each strategy learns in equally many epochs is measured on the digits, DASO and its peers in experiment=daso,
AB-training in its own (a step of twice the length wants a rate that falls to 0), each against DDP in the same; bytes of
whole trainings with their phases beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import namespaces
from benchmarks.measure import median
from benchmarks.record import Result, Row
from callbacks.interrupt import Interrupt

CLAIM: str = (
    "On two nodes with 200 Mbit/s between them a step under DASO takes at most 55 % of the time of one under data "
    "parallelism and no longer than one of local SGD with as many exchanges; at 1 Gbit/s at most 80 %. In steady state "
    "it sends 83 % fewer bytes between nodes, 91.6 % fewer with 16 bits on the wire; its accuracy is at most a point "
    "lower at equal epochs. AB-training sends nothing between nodes in its AB phases and loses half a point at most."
)

COMPUTE_MS, STEPS, SKIPPED, LOCAL_SIZE, WORLD = 40.0, 60, 12, 2, 4
RATES = (1000.0, 200.0, 50.0)
# What the machinery costs where there is nothing to gain.
ALONE = ("DASO on one node", "DDP on one node")
EVERY_STEP = ("DASO, B=1, W=0", "DDP")


def strategies() -> dict[str, Callable[..., Any]]:
    """By name; each takes the arguments of `strategies.cluster.ClusterStrategy`."""
    from strategies.ab_training import ABTrainingStrategy
    from strategies.daso import DASO
    from strategies.ddp import DDP
    from strategies.diloco import DiLoCo

    steady = {"warmup_epochs": 0, "cooldown_epochs": 0, "schedule": "fixed", "wire_dtype": "fp32"}
    return {
        "DDP": DDP,
        "DDP, bf16": lambda **k: DDP(compression="bf16", **k),
        "DDP, PowerSGD": lambda **k: DDP(compression="powersgd", powersgd_rank=2, powersgd_start=2, **k),
        "local SGD, B=4": lambda **k: DASO(**steady, skip=4, wait=0, **k),
        "DiLoCo, H=16": lambda **k: DiLoCo(period=16, **k),
        "DASO": lambda **k: DASO(**steady, skip=4, wait=1, **k),
        "DASO, W=2": lambda **k: DASO(**steady, skip=4, wait=2, **k),
        EVERY_STEP[0]: lambda **k: DASO(**steady, skip=1, wait=0, **k),
        "DASO, bf16": lambda **k: DASO(**steady, skip=4, wait=1, cycling_wire_dtype="bf16", **k),
        # All steps that count lie in one AB phase.
        "AB-training": lambda **k: ABTrainingStrategy(
            warmup_steps=4, ab_steps=STEPS - 3, full_steps=1, final_full_steps=0, rebound_steps=0, **k
        ),
        ALONE[0]: lambda **k: DASO(**steady, **(k | {"local_size": WORLD})),
        ALONE[1]: lambda **k: DDP(**(k | {"local_size": WORLD})),
    }


class Net(pl.LightningModule):
    """64-512-512-10; notes when its steps end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )  # fmt: skip
        self.ends: list[float] = []
        self.bytes: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the moment, and what was sent until then."""
        self.ends.append(time.perf_counter())
        self.bytes.append(self.trainer.strategy.ledger.totals()["inter_node_bytes"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), 0.05)


def batches(number: int) -> DataLoader:
    """Of 16 samples, put together before the training: ranks share cores, and loading is not what is compared."""
    return DataLoader([[torch.randn(16, 64), torch.randint(10, (16,))] for _ in range(number)], batch_size=None)


def train(name: str, rate_mbit: float | None, compute_ms: float, steps: int) -> dict[str, float]:
    """One rank of a training; an epoch without end, so that the exchange at its end does not count."""
    torch.set_num_threads(1)
    strategy = strategies()[name](local_size=LOCAL_SIZE, rate_mbit=rate_mbit, compute_ms=compute_ms)
    module = Net()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", devices=WORLD, strategy=strategy, max_epochs=1, logger=False, default_root_dir=folder,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=[Interrupt(folder, first_only=True)],  # as every run has it
        )  # fmt: skip
        trainer.fit(module, batches(steps + 1))
    times = sorted(b - a for a, b in zip(module.ends[SKIPPED:-2], module.ends[SKIPPED + 1 : -1], strict=True))
    trimmed = times[len(times) // 20 : len(times) - len(times) // 20]
    # Whole cycles of every strategy: 48 steps hold 12 exchanges of B = 4 and 3 of H = 16.
    first = module.bytes[SKIPPED - 1]
    return {
        "step_s": statistics.fmean(trimmed),
        "inter_node_bytes": module.bytes[SKIPPED - 1 + 48] - first if len(module.bytes) > SKIPPED + 47 else 0.0,
        "blocked_s": strategy.ledger.blocked_s,
        "transfer_s": strategy.ledger.transfer_s,
    }


def _rank(rank: int, folder: str, jobs: list[tuple[str, float | None]], compute_ms: float, steps: int) -> None:
    import warnings

    warnings.simplefilter("ignore")
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    found = []
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
    torch.set_num_threads(1)
    os.environ.update({key: str(value) for key, value in env.items()} | {"MASTER_PORT": "29500"})
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name, rate in jobs:
        os.environ.update({key: str(value) for key, value in env.items()})
        found.append(train(name, rate, compute_ms, steps))
    Path(folder, str(rank)).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure(
    jobs: list[tuple[str, float | None]], compute_ms: float = COMPUTE_MS, steps: int = STEPS
) -> list[dict[str, float]]:
    """Train every job (strategy, Mbit/s) on four processes; means over ranks, sums for bytes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, jobs, compute_ms, steps), nprocs=WORLD)
        ranks = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(WORLD)]
    means = []
    for each in zip(*ranks, strict=True):
        mean = {key: statistics.fmean(rank[key] for rank in each) for key in each[0]}
        means.append(mean | {"inter_node_bytes": sum(rank["inter_node_bytes"] for rank in each)})
    return means


def run(steps: int = STEPS, repeats: int = 2, real: bool = True) -> Result:
    """All strategies at all bandwidths, interleaved."""
    names = [name for name in strategies() if name not in (*ALONE, EVERY_STEP[0])]
    jobs = [(name, rate) for _ in range(repeats) for rate in RATES for name in names]
    found = measure(jobs, steps=steps)
    by_job: dict[tuple[str, float | None], list[dict[str, float]]] = {}
    for job, values in zip(jobs, found, strict=True):
        by_job.setdefault(job, []).append(values)
    mean = {job: {key: statistics.fmean(v[key] for v in values) for key in values[0]} for job, values in by_job.items()}
    rows: list[Row] = []
    for rate in RATES:
        rows += _rows(f"{rate:g} Mbit/s", {name: mean[name, rate] for name in names}, rate)
    rows += overhead_rows()
    rows += accuracy_rows()
    note = "emulated"
    if real and (reason := namespaces.missing()) is None:
        rows += real_rows()
        note = "emulated; and a real link shaped by the kernel"
    elif real:
        note = f"emulated; no real link here: {reason}"
    settings = {"compute_ms": COMPUTE_MS, "steps": steps, "repeats": repeats, "nodes": 2, "local_size": 2, "link": note}
    return Result(rows, settings)


def _rows(what: str, found: dict[str, dict[str, float]], rate: float) -> list[Row]:
    rows: list[Row] = []
    ddp, local = found["DDP"], found["local SGD, B=4"]
    limits = {200.0: {"DASO": 0.55, "AB-training": 0.50}, 1000.0: {"DASO": 0.80}}.get(rate, {})
    saved = {"DASO": 0.83, "DASO, bf16": 0.916, "AB-training": 1.0}
    for name, values in found.items():
        rows.append({"what": f"{what}: step", "variant": name, "value": 1e3 * values["step_s"], "unit": "ms"})
    for name, values in found.items():
        if name != "DDP":
            bound = {"at_most": limits[name]} if name in limits else {}
            ratio = values["step_s"] / ddp["step_s"]
            row = {"what": f"{what}: step, ratio", "variant": f"{name} / DDP", "value": ratio, "unit": ""}
            rows.append(row | bound)
    against = found["DASO"]["step_s"]
    for name, other, bound in (("local SGD, B=4", local, 1.0), ("DDP, bf16", found["DDP, bf16"], 0.75)):
        limit = {"at_most": bound} if rate == 200.0 else {}
        ratio = against / other["step_s"]
        rows.append({"what": f"{what}: step, ratio", "variant": f"DASO / {name}", "value": ratio, "unit": "", **limit})
    for name, values in found.items():
        if rate == RATES[0] and name != "DDP" and ddp["inter_node_bytes"]:
            share = 100 * (1 - values["inter_node_bytes"] / ddp["inter_node_bytes"])
            bound = {"at_least": 100 * saved[name]} if name in saved else {}
            row = {"what": "fewer bytes between nodes than DDP", "variant": name, "value": share, "unit": "%"}
            rows.append(row | bound)
    waiting = found["DASO, W=2"]
    if waiting["transfer_s"]:
        rows.append(
            {"what": f"{what}: blocked / transfer time", "variant": "DASO, W=2", "unit": "",
             "value": waiting["blocked_s"] / waiting["transfer_s"], **({"at_most": 0.20} if rate == 200.0 else {})}
        )  # fmt: skip
    return rows


# Experiment, its epochs, options of the group ``strategy``; DDP first, and the one that is bounded by it last, with the
# percentage points that it may lose.
TRAININGS = (
    ("daso", 12, ("ddp", "ddp_bf16", "ddp_powersgd", "local_sgd", "diloco", "daso_paper", "daso"), 1.0),
    ("ab_training", 30, ("ddp", "diloco", "ab_training_paper", "ab_training"), 0.5),
)


def accuracy_rows(seeds: tuple[int, ...] = (0, 1, 2)) -> list[Row]:
    """Test accuracy and bytes of whole trainings, every strategy with the optimizer and the rates of its experiment."""
    rows: list[Row] = []
    for experiment, epochs, options, loss in TRAININGS:
        found: dict[str, tuple[float, float]] = {}
        for option in options:
            records = [_run(f"experiment={experiment}", f"strategy={option}", f"seed={seed}") for seed in seeds]
            accuracy = statistics.fmean(record["metrics"]["test/accuracy"] for record in records)
            sent = statistics.fmean(record["communication"]["inter_node_bytes"] for record in records)
            found[option] = accuracy, sent
        what = f"experiment={experiment}, {epochs} epochs"
        for option, (accuracy, sent) in found.items():
            bound = {"at_least": 100 * found["ddp"][0] - loss} if option == options[-1] else {}
            row = {"what": f"{what}: test accuracy", "variant": option, "value": 100 * accuracy, "unit": "%"}
            rows.append(row | bound)
            rows.append({"what": f"{what}: between nodes", "variant": option, "value": sent / 1e6, "unit": "MB"})
    return rows


def _run(*overrides: str) -> dict[str, Any]:
    """``results.json`` of an experiment, as the command line runs it."""
    root = Path(__file__).parents[1]
    lean = ("logger=none", "~callbacks.energy", "~callbacks.console")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(root / "run.py"), f"hydra.run.dir={folder}", *lean, *overrides]
        subprocess.run(command, check=True, capture_output=True, cwd=root)
        return json.loads(Path(folder, "results.json").read_text())


def overhead_rows(rounds: int = 5) -> list[Row]:
    """Steps without a second node, and with one that is as near as the first; pairs of runs in turns."""
    rows: list[Row] = []
    for what, pair, compute_ms, steps in (
        ("one node, no computation", ALONE, 0.0, 200),
        ("two nodes, a fast network", EVERY_STEP, COMPUTE_MS, STEPS),
    ):
        jobs = [(name, None) for _ in range(rounds) for name in pair]
        times = [values["step_s"] for values in measure(jobs, compute_ms=compute_ms, steps=steps)]
        found = median([a / b for a, b in zip(times[::2], times[1::2], strict=True)])
        rows.append(
            {"what": f"{what}: step, ratio", "variant": " / ".join(pair), "value": found.value,
             "low": found.low, "high": found.high, "unit": "", "at_most": 1.1}
        )  # fmt: skip
    return rows


def real_rows(rate: float = 200.0) -> list[Row]:
    """DDP and DASO over a link that the kernel shapes and counts."""
    rows: list[Row] = []
    steps: dict[str, float] = {}
    for name in ("DDP", "DASO"):
        found = on_a_real_link(name, rate)
        steps[name] = found["step_s"]
        what = f"real link, {rate:g} Mbit/s: step"
        rows.append({"what": what, "variant": name, "value": 1e3 * found["step_s"], "unit": "ms"})
        what = "real link: bytes by the kernel / by the ledger"
        rows.append(
            {"what": what, "variant": name, "value": found["ratio"], "unit": "", "at_least": 0.97, "at_most": 1.03}
        )
    rows.append(
        {"what": "real link, 200 Mbit/s: step, ratio", "variant": "DASO / DDP", "value": steps["DASO"] / steps["DDP"],
         "unit": "", "at_most": 0.55}
    )  # fmt: skip
    return rows


def on_a_real_link(name: str, rate: float, steps: int = STEPS, compute_ms: float = COMPUTE_MS) -> dict[str, float]:
    """Train over the link; ``ratio``: bytes that the kernel counted over those of the ledger, without the start."""
    with namespaces.link(rate):
        printed = namespaces.run_ranks("benchmarks.slow_network", [name, str(compute_ms), str(steps)], LOCAL_SIZE)
    return json.loads(printed.strip().splitlines()[-1])


class Counters(pl.Callback):
    """Reads the kernel's counter of this node's interface beside the ledger, once training has settled."""

    def __init__(self) -> None:
        self.path = f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes"
        self.kernel: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """After every step."""
        with open(self.path) as file:
            self.kernel.append(int(file.read()))


def main() -> None:
    """One rank in a namespace: prints a line of JSON on rank 0."""
    import warnings

    warnings.simplefilter("ignore")
    name, compute_ms, steps = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    counters = Counters()
    strategy = strategies()[name](local_size=LOCAL_SIZE, compute_ms=compute_ms)
    module = Net()
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_epochs=1, logger=False,
        callbacks=[counters, Interrupt(".", first_only=True)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, batches(steps + 1))
    sent = torch.tensor([float(b) for b in module.bytes])
    kernel = torch.tensor([float(k) for k in counters.kernel])
    torch.distributed.all_reduce(sent)
    begin, end = SKIPPED - 1, SKIPPED - 1 + 48
    # Sums over ranks count both directions of the link; the interface counts one. Ranks read shared counters at
    # slightly different moments: a cycle is long against that.
    ledger = float(sent[end] - sent[begin]) / 2
    times = sorted(b - a for a, b in zip(module.ends[SKIPPED:-2], module.ends[SKIPPED + 1 : -1], strict=True))
    trimmed = times[len(times) // 20 : len(times) - len(times) // 20]
    if strategy.global_rank == 0:
        print(json.dumps({"step_s": statistics.fmean(trimmed), "ratio": float(kernel[end] - kernel[begin]) / ledger}))


if __name__ == "__main__":
    main()
