"""What every option of the group `strategy` must do, whatever it is.

It trains, on several batches a step and with clipped gradients; ranks end with equal weights, running statistics and
moving averages of weights; its checkpoints are plain, load in the bare module and go on as if the run had not stopped;
sizes that do not fit are refused by name; nothing is left behind.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from runner import job
from runner.job import instantiate
from tests.composing import ROOT, composed, plain
from tests.strategies import nets
from tests.strategies.test_daso import SaveAt

# Jigsaw trains its own networks alone: tests/strategies/test_jigsaw.py.
OPTIONS = sorted(
    path.stem
    for path in Path(ROOT, "conf/strategy").glob("*.yaml")
    if path.stem != "auto" and not path.stem.startswith("jigsaw")
)
# The length of phases, for trainings of a few epochs.
SHORT = {
    "daso": {"warmup_epochs": 1, "cooldown_epochs": 1},
    "daso_paper": {"warmup_epochs": 1, "cooldown_epochs": 1},
    "diloco": {"period": 3, "outer_lr": 0.5, "outer_momentum": 0.5},
    "ddp_powersgd": {"powersgd_start": 2},
} | {
    option: {"warmup_steps": 2, "ab_steps": 6, "full_steps": 2, "min_dim": 2, "rebound_steps": 0, "keep_full": []}
    for option in OPTIONS
    if option.startswith("ab_training")
}
# DDP learns the order of gradients in a bucket in its first step: with four ranks a restart rounds differently, and
# gradients of 16 bits round by more than the others.
ROUNDING = {"ddp_bf16": 1e-3, "ddp_fp16": 2e-4}


def configured(option, run_dir):
    config = plain(composed("experiment=daso", f"strategy={option}", "cluster.local_size=2", run_dir=run_dir))
    return config["strategy"] | SHORT.get(option, {})


class Averaged(nets.Regression):
    """Keeps a moving average of its weights beside them, which nobody trains."""

    def __init__(self):
        super().__init__(nets.network(norm=True), lambda p: torch.optim.AdamW(p, 0.01))
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def weight_averages(self):
        return [*self.average.parameters()]

    def on_train_batch_start(self, *args):  # of what the step before has left: checkpoints come before its last hook
        owners = dict(self.net.named_modules())
        with torch.no_grad():
            for name, average in self.average.named_parameters():
                owner, _, own = name.rpartition(".")
                average.lerp_(getattr(owners[owner], own), 0.2)


def module():
    return Averaged()


class Begin(nets.pl.Callback):
    """The error before the first step, of the weights with which the strategy begins."""

    def on_train_start(self, trainer, module):
        self.error = nets.error(module.eval())
        module.train()


def fit(config, folder, callbacks=(), **kwargs):
    begin = Begin()
    trained, trainer = nets.fit(
        instantiate("strategy", config), folder, module=module(), epochs=5, accumulate_grad_batches=2,
        gradient_clip_val=0.5, callbacks=(begin, *callbacks), **kwargs,
    )  # fmt: skip
    state = torch.cat([t.double().reshape(-1) for t in trained.state_dict().values()])
    return state, begin.error, nets.error(trained.eval()), trainer.global_step


def contract(config, folder):
    before = set(threading.enumerate())
    path = f"{folder}/contract.ckpt"
    # It takes memory of the device for as many objects as there are ranks, each as long as the longest.
    with mock.patch.object(
        dist, "gather_object", side_effect=AssertionError("use parallel.collectives.gather_objects")
    ):
        whole = fit(config, folder, callbacks=(SaveAt(9, path),))
    groups = len(dist.distributed_c10d._world.pg_map)
    again = fit(config, folder, ckpt_path=path)
    left = [t.name for t in set(threading.enumerate()) - before]
    content = torch.load(path, weights_only=True)
    bare = module()
    bare.load_state_dict(content["state_dict"], strict=True)
    with pytest.raises(ValueError, match=r"cluster\.local_size=3 does not divide"):
        fit(config | {"local_size": 3}, folder)
    return {
        "whole": whole, "again": again, "threads": left, "saved": content["strategy"]["steps"],
        "groups": len(dist.distributed_c10d._world.pg_map) - groups,
    }  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_strategy(ranks4, tmp_path, option):
    found = ranks4(contract, configured(option, tmp_path), str(tmp_path))
    for rank in found:
        state, begin, error, steps = rank["whole"]
        assert steps == 20 and error < begin  # 8 batches are 4 steps
        assert torch.equal(state, found[0]["whole"][0])
        assert rank["again"][3] == 20 and rank["saved"] == 9
        assert torch.equal(rank["again"][0], found[0]["again"][0])
        torch.testing.assert_close(rank["again"][0], state, atol=ROUNDING.get(option, 1e-6), rtol=0)
        assert rank["threads"] == [] and rank["groups"] == 0


# --------------------------------------------------------------------------------------- one batch, to see that it runs

EXPERIMENTS = {
    option: "ab_training" if option.startswith("ab") else "daso"
    for option in ("daso", "daso_paper", "local_sgd", "diloco", "ab_training", "ab_training_paper")
}
LEFT_OUT = {
    "daso": r"all warm-up \(1\) and cool-down \(0\): nodes exchange parameters after every step and wait",
    "ab_training": r"a training of 1 steps is too short for an AB phase .*as by strategy=ddp",
}
LEFT_OUT |= {
    "daso_paper": LEFT_OUT["daso"],
    "local_sgd": LEFT_OUT["daso"],
    "ab_training_paper": LEFT_OUT["ab_training"],
}


class Lines(logging.Handler):
    """What strategies tell the user."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append(record.getMessage())


def one_batch(folder):
    found = {}
    for option, experiment in EXPERIMENTS.items():
        lines, logger = Lines(), logging.getLogger("strategies")
        before = logger.level
        logger.addHandler(lines), logger.setLevel(logging.INFO)
        overrides = ("debug=fast", f"strategy={option}", "~callbacks.energy", "logger=none")
        # The groups of the one are nodes, those of the other halves of the only node.
        overrides += ("cluster.local_size=4",) if option == "ab_training_paper" else ()
        config = plain(composed(f"experiment={experiment}", *overrides, run_dir=f"{folder}/{option}"))
        result = job.run(config)
        logger.removeHandler(lines), logger.setLevel(before)
        sent = json.loads(Path(folder, option, "results.json").read_text())["communication"]
        found[option] = result["status"], result.get("error"), lines.found, sent
    return found


def test_debug_runs_say_what_they_leave_out(ranks4, tmp_path):
    """One batch, by an experiment's own command: phases do not fit, which is no mistake there."""
    for rank, found in enumerate(ranks4(one_batch, str(tmp_path))):
        for option, (status, error, lines, sent) in found.items():
            assert status == "completed", (option, error)
            assert sent["steps"] == 1 and (sent["inter_node_bytes"] > 0) == (option != "ab_training_paper")
            assert ("between_groups_bytes" in sent) == option.startswith("ab_training")
            if option.startswith("ab_training"):
                assert sent["group_size"] == 2 and sent["between_groups_bytes"] > 0
            wanted = LEFT_OUT.get(option) if rank == 0 else None
            said = [line for line in lines if re.search(wanted, line)] if wanted else []
            assert len(said) == (wanted is not None), (option, lines)
