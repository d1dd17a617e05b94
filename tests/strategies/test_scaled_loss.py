"""Half precision with a scaled loss (trainer.precision=16-mixed): gradients overflow on some ranks, which skip a step.

A Trainer on the CPU takes bfloat16 in its place, so the plug-in is given by hand; torch can scale there.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from callbacks.oialr import OIALR
from networks.low_rank import factored_weights
from strategies.ab_training import ABTrainingStrategy
from strategies.daso import DASO
from strategies.ddp import DDP
from strategies.diloco import DiLoCo
from tests.strategies import ab_serial, nets
from tests.strategies.test_daso import SaveAt

SCALE = 1024.0


class Overflow(nets.Regression):
    """The loss of some steps is infinite on the first rank."""

    def __init__(self, at, optimizer=None, wide=False):
        net = ab_serial.network(dtype=torch.float32) if wide else nets.network(torch.float32)
        super().__init__(net, optimizer or (lambda p: torch.optim.AdamW(p, 0.01)))
        self.at, self.seen = at, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.global_rank == 0 and self.trainer.global_step in self.at else loss

    def on_train_batch_end(self, *args):
        self.seen.append(nets.weights(self))


def fit(strategy, folder, at=(), optimizer=None, wide=False, **kwargs):
    """The module, the scale at the end, and the trainer."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000))
    with torch.random.fork_rng(devices=[]):
        module, trainer = nets.fit(strategy, folder, module=Overflow(at, optimizer, wide), plugins=[plugin], **kwargs)
    return module, plugin.scaler.get_scale(), trainer


def replicas(folder, name):
    def strategy():
        if name == "diloco":
            return DiLoCo(period=5, local_size=2)
        return DASO(1, 0, skip=4, wait=2, local_size=2, schedule="fixed")

    at, path = (9, 10), f"{folder}/s.ckpt"
    module, scale, trainer = fit(strategy(), folder, at, callbacks=(SaveAt(12, path),))
    resumed, scale_of_resumed, _ = fit(strategy(), folder, at, ckpt_path=path)
    moved = [bool((b != a).any()) for a, b in zip(module.seen[8:10], module.seen[9:11], strict=True)]
    return {"weights": nets.weights(module), "again": nets.weights(resumed), "scales": (scale, scale_of_resumed),
            "moved": moved, "steps": (trainer.global_step, trainer.strategy.steps)}  # fmt: skip


@pytest.mark.parametrize("name", ["daso", "diloco"])
def test_a_node_that_skips_steps_keeps_in_time_with_the_others(ranks4, tmp_path, name):
    found = ranks4(replicas, str(tmp_path), name, timeout=60)
    for rank, one in enumerate(found):
        assert one["steps"] == (24, 24)
        assert one["scales"] == (SCALE / 4 if rank < 2 else SCALE,) * 2  # the node's own, after a restart too
        assert torch.equal(one["weights"], found[0]["weights"]) and torch.equal(one["weights"], one["again"])
        assert torch.isfinite(one["weights"]).all()
    assert [one["moved"][0] for one in found] == [False, False, True, True]
    # What was sent after step 8 is merged after step 10 by DASO; DiLoCo exchanges after step 12.
    assert [one["moved"][1] for one in found] == [name == "daso"] * 2 + [True] * 2


def momenta(folder):
    strategy = DASO(1, 0, skip=4, wait=2, local_size=2, sync_optimizer="every_blocking", timeout_s=20)
    module, _, trainer = fit(strategy, folder, (0, 1), epochs=1)
    (optimizer,) = trainer.optimizers
    return nets.weights(module), [optimizer.state[p]["exp_avg"] for p in module.parameters()]


def test_momenta_that_a_node_has_not_begun_are_averaged_later(ranks4, tmp_path):
    """A rank that waits for numbers which another has not would wait for ever."""
    found = ranks4(momenta, str(tmp_path), timeout=40)
    for weights, moments in found:
        assert torch.equal(weights, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(moments, found[0][1], strict=True))


def factors(folder, warmup, at, save):
    def strategy():
        return ABTrainingStrategy(warmup, ab_steps=8, full_steps=8, rebound_steps=0, local_size=2, timeout_s=20)

    path = f"{folder}/f.ckpt"
    module, scale, trainer = fit(strategy(), folder, at, wide=True, callbacks=(SaveAt(save, path),))
    resumed, scale_of_resumed, _ = fit(strategy(), folder, at, wide=True, ckpt_path=path)
    saved = torch.load(path, weights_only=True)["strategy"]["ab"]["groups"]
    return {"weights": nets.weights(module), "again": nets.weights(resumed), "scales": (scale, scale_of_resumed),
            "saved": [group["scaler"]["scale"] for group in saved], "steps": trainer.strategy.steps,
            "counted": [float(s["step"]) for s in trainer.optimizers[0].state.values()]}  # fmt: skip


@pytest.mark.parametrize(
    ("warmup", "at"), [(4, (6, 7)), (0, tuple(range(8)))], ids=["some steps", "all steps of the first AB phase"]
)
def test_groups_that_skip_steps_end_equal(ranks4, tmp_path, warmup, at):
    """Gradients of one scale are averaged in full-rank phases, with equal counts of steps."""
    found = ranks4(factors, str(tmp_path), warmup, at, 8 if warmup else 5, timeout=60)
    lost = SCALE / 2 ** len(at)
    for one in found:
        assert one["steps"] == 24 and one["scales"] == (lost, lost)
        assert one["saved"] == ([lost, SCALE] if warmup else [SCALE / 2**5, SCALE])
        assert torch.isfinite(one["weights"]).all()
        assert torch.equal(one["weights"], found[0]["weights"]) and torch.equal(one["weights"], one["again"])
        assert one["counted"] == found[0]["counted"]


def refused(folder):
    strategy = DDP(compression="powersgd", powersgd_start=2, local_size=1)
    with pytest.raises(ValueError, match=r"strategy\.compression=powersgd .*precision=16-mixed: use bf16-mixed"):
        fit(strategy, folder)
    torch.distributed.barrier()
    return True


def test_powersgd_would_keep_an_overflow_for_ever(ranks2, tmp_path):
    assert ranks2(refused, str(tmp_path)) == [True, True]


def low_rank(folder):
    callback = OIALR(delay=6, frequency=3, beta=0.2, progressive=1.0, export="none")
    module, scale, _ = fit(DDP(local_size=1), folder, (0, 1, 5, 6, 9), wide=True, callbacks=(callback,))
    return nets.weights(module), scale, [w.rank for w in factored_weights(module)]


def test_oialr_converts_around_skipped_steps(ranks2, tmp_path):
    """Before, at and after the conversion; the first steps too, after which an optimizer has no state to rotate."""
    found = ranks2(low_rank, str(tmp_path), timeout=60)
    for weights, scale, ranks in found:
        assert scale == SCALE / 32 and torch.isfinite(weights).all() and torch.equal(weights, found[0][0])
        assert ranks and min(ranks) < 24
