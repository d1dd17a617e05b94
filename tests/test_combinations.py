"""Any experiment with any strategy or callback of another paper: it trains, or says in one line why not.

Two processes as two simulated nodes, eight steps. Slow: every combination is a training of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner import job
from tests.composing import composed, plain
from tests.test_experiments import CUT, DATA_DIR

NODES = ("trainer=multi_cpu", "trainer.devices=2", "cluster.local_size=1")
WITH = {
    "daso": (*NODES, "strategy=daso"),
    "diloco": (*NODES, "strategy=diloco", "strategy.period=2"),
    "ab_training": (
        *NODES, "strategy=ab_training", "strategy.warmup_steps=2", "strategy.ab_steps=3", "strategy.full_steps=1",
        "strategy.rebound_steps=0",
    ),
    "oialr": (*NODES, "strategy=ddp", "callbacks=oialr", "callbacks.oialr.delay=2", "callbacks.oialr.frequency=2"),
}  # fmt: skip
BOTH = "ab_training and oialr"
WITH[BOTH] = (*WITH["ab_training"], *WITH["oialr"][-3:])
EXPERIMENTS = (
    "bayesian_lottery", "classification", "energy_measurement", "energy_scaling", "f3", "neuron_transplantation",
    "petnet", "power_flow", "pruning", "recycle", "sampling_parallelism", "thin_film", "weather",
)  # fmt: skip
FEW_STEPS = ("debug=tiny", DATA_DIR, "callbacks.energy=null", "predict=false", "hydra.mode=RUN")
# What does not make sense, and a part of the line that says why.
BAYESIAN = "Bayesian layers have"
NO_LAYER = "no trainable linear, convolutional or attention layer"
BY_ITSELF = "steps by itself"
REFUSED = {
    ("bayesian_lottery", "ab_training"): "the two cannot take turns",
    ("bayesian_lottery", "oialr"): NO_LAYER,
    ("energy_measurement", "ab_training"): "nothing is left to factorise",
    ("energy_measurement", "oialr"): "no weight is left to convert",
    ("f3", "daso"): BY_ITSELF,
    ("f3", "diloco"): BY_ITSELF,
    ("f3", "ab_training"): BY_ITSELF,
    ("neuron_transplantation", "oialr"): "joins weights of several networks",
    ("petnet", "ab_training"): "nothing can be factorised",
    ("petnet", "oialr"): NO_LAYER,
    ("sampling_parallelism", "ab_training"): BAYESIAN,
    ("sampling_parallelism", "oialr"): NO_LAYER,
    ("weather", "ab_training"): "nothing can be factorised",
    ("weather", "oialr"): NO_LAYER,
}
REFUSED |= {
    (name, BOTH): REFUSED[name, "ab_training"]
    for name in ("energy_measurement", "f3", "petnet", "sampling_parallelism", "weather")
} | {
    ("bayesian_lottery", BOTH): BAYESIAN,
    ("neuron_transplantation", BOTH): REFUSED["neuron_transplantation", "oialr"],
}
REFUSED |= {("pruning", name): "callbacks.pruning runs in one process" for name in ("daso", "diloco", "ab_training")}
# Enough weather for both processes.
CUTS = CUT | {
    "pruning": ("model.net.backbone.d_model=16", "model.net.backbone.feed_forward=32"),
    "weather": (*CUT["weather"], "data.records=64"),
}


def _on_ranks(name: str, folder: str, *more: str) -> dict[str, Any]:
    return job.run(plain(composed(f"experiment={name}", *more, *FEW_STEPS, *CUTS.get(name, ()), run_dir=folder)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("other", WITH)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_with_what_another_paper_adds(name, other, tmp_path, ranks2):
    results = ranks2(_on_ranks, name, str(tmp_path), *WITH[other], timeout=500)
    if reason := REFUSED.get((name, other)):
        assert [result["status"] for result in results] == ["failed"] * 2
        assert all(reason in result["error"] and "\n" not in result["error"] for result in results), results
        return
    assert [result["status"] for result in results] == ["completed"] * 2, results
    record = json.loads((Path(tmp_path) / "results.json").read_text())
    assert record["world_size"] == 2 and record["metrics"]
