"""OIALR under the strategies whose replicas differ between exchanges."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from unittest import mock

import pytest
import torch

from callbacks.oialr import OIALR
from networks.low_rank import LayerChoice, factored_weights
from strategies.ab_training import ABTrainingStrategy
from strategies.daso import DASO
from strategies.ddp import DDP
from strategies.diloco import DiLoCo
from tests.strategies import nets

STRATEGIES = {
    "ddp": lambda: DDP(local_size=2),
    "daso": lambda: DASO(0, 0, skip=3, wait=2, schedule="fixed", wire_dtype="fp32", local_size=2),
    "local_sgd": lambda: DASO(0, 0, skip=2, wait=0, schedule="fixed", wire_dtype="fp32", local_size=2),
    "diloco": lambda: DiLoCo(period=2, outer_lr=1.0, outer_momentum=0.0, local_size=2),
}


def square():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        layers = [torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)]
        return nets.Regression(torch.nn.Sequential(*layers).double(), lambda p: torch.optim.SGD(p, 0.05))


def trained(folder, name, frequency):
    """Full rank, square bases: plain gradient descent on Sigma is that on W, whatever the updates of the bases."""
    callback = OIALR(delay=4, frequency=frequency, beta=0.0, progressive=1.0, export="none")
    module, _ = nets.fit(STRATEGIES[name](), folder, module=square(), epochs=3, callbacks=(callback,))
    ranks = [weight.rank for weight in factored_weights(module)]
    return torch.cat([w.matrix().reshape(-1) for w in factored_weights(module)]).detach(), ranks


def both(folder, name):
    return trained(folder, name, 1000), trained(folder, name, 4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_updates_of_the_bases_change_nothing_at_full_rank(ranks4, tmp_path, name):
    found = ranks4(both, str(tmp_path), name)
    for (never, ranks), (often, _) in found:
        assert ranks == [6, 6]
        assert torch.equal(often, found[0][1][0])
        if name != "daso":  # its exchanges fall differently; the others meet after every second step anyway
            torch.testing.assert_close(often, never, atol=1e-9, rtol=0)


# -------------------------------------------------------------------------------------- AB-training takes turns with it


class Watched(OIALR):
    """Notes the step of every event, and parameters at the end of every step."""

    def __init__(self, save_at=(), **options):
        super().__init__(export="none", **options)
        self.events, self.params, self.save_at = [], {}, save_at

    def _event(self, trainer, pl_module, due, treated):
        assert trainer.strategy.ab is None
        self.events.append((trainer.global_step, len(due), [w.label for w in treated]))
        super()._event(trainer, pl_module, due, treated)

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")
        self.params[trainer.global_step] = nets.weights(pl_module)


def wide(optimizer=None):
    """Three square layers; the last one has few outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        sizes = (6, 24, 24, 24, 2)
        layers = [torch.nn.Linear(m, n) for m, n in pairwise(sizes)]
        net = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.Tanh())][:-1]).double()
    return nets.Regression(net, optimizer or (lambda p: torch.optim.SGD(p, 0.05)))


def ab(**options):
    lengths = {"warmup_steps": 3, "ab_steps": 5, "full_steps": 2}
    return ABTrainingStrategy(**lengths | {"cutoff": 0.3, "local_size": 2, "min_dim": 8} | options)


ALTERNATING = {"delay": 4, "frequency": 5, "beta": 0.2, "progressive": 1.0}


def alternating(folder):
    callback = Watched(**ALTERNATING)
    optimizer = lambda p: torch.optim.AdamW(p, 0.01)  # noqa: E731
    with mock.patch("callbacks.oialr.log.info") as said:
        module, trainer = nets.fit(ab(), folder, module=wide(optimizer), epochs=4, callbacks=(callback,))
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    return {
        "events": callback.events,
        "low-rank": [w.label for w in factored_weights(module)],
        "ranks": [w.rank for w in factored_weights(module)],
        "factorised": sorted(trainer.strategy.ranks),
        "optimizer": held == trained,
        "said": said.call_count,
        "weights": nets.weights(module),
    }


def test_ab_training_and_oialr_take_turns(ranks4, tmp_path):
    first, *others = ranks4(alternating, str(tmp_path))
    # Whole weights train in the steps 0 to 3, 8 to 10, 15 to 17, ...: the conversion due at 4 comes at 8.
    steps = [step for step, _, _ in first["events"]]
    assert steps[0] == 8 and first["events"][0][1] == 3
    assert all(step % 7 in (1, 2, 3) for step in steps)
    assert len(steps) >= 3 and first["low-rank"] == ["net.0", "net.2", "net.4"]
    assert max(first["ranks"][1:]) < 24
    assert first["factorised"] == ["net.2.sigma", "net.4.sigma"]  # the first layer stays whole
    assert all(found["optimizer"] for found in (first, *others))
    assert all(torch.equal(found["weights"], first["weights"]) for found in others)
    assert first["said"] == len(steps) and not any(found["said"] for found in others), "one console has all ranks"


def at_full_rank(folder, sync):
    """Dense weights after a training with and without OIALR, whose square bases lose nothing."""
    found = []
    squares = LayerChoice(keep_first=True)
    with_oialr = OIALR(squares, delay=1, frequency=4, beta=0.0, progressive=1.0, export="none")
    for callbacks in ((), (with_oialr,)):
        strategy = ab(sync=sync, cutoff=0.6)
        module, _ = nets.fit(strategy, folder, module=wide(), epochs=3, callbacks=callbacks)
        low_rank = {id(w.module): w.matrix() for w in factored_weights(module)}
        assert len(low_rank) == 2 * len(callbacks)
        layers = [part for part in module.net if isinstance(part, torch.nn.Linear)]
        dense = [low_rank.get(id(layer), layer.weight) for layer in layers]
        ranks = [rank for path, rank in sorted(strategy.ranks.items())]
        found.append((torch.cat([w.detach().reshape(-1) for w in dense]), ranks))
    return found


@pytest.mark.parametrize("sync", ["only-learned", "full", "only-b"])
def test_factors_of_sigma_learn_what_factors_of_the_weight_learn(ranks4, tmp_path, sync):
    """Plain gradient descent turns with square bases: singular values, ranks and products are those of the weight."""
    for (plain, ranks), (with_oialr, same) in ranks4(at_full_rank, str(tmp_path), sync):
        assert ranks == same and max(ranks) < 12  # so factors are smaller than their weights
        torch.testing.assert_close(with_oialr, plain, atol=1e-9, rtol=0)


CUTS = (7, 9, 12, 16)  # before the conversion, after it, within an AB phase of low-rank weights, after an update


def stopped_and_not(folder, make=wide, options=ALTERNATING):
    optimizer = lambda p: torch.optim.AdamW(p, 0.01)  # noqa: E731
    run = partial(nets.fit, folder=folder, epochs=4)
    whole = Watched(**options, save_at=CUTS)
    _, trainer = run(ab(), module=make(optimizer), callbacks=(whole,))
    resumed = {}
    for step in CUTS:
        again = Watched(**options)
        run(ab(), module=make(optimizer), callbacks=(again,), ckpt_path=f"{folder}/{step}.ckpt")
        resumed[step] = again.params
    return whole.params, resumed, sorted(trainer.strategy.ranks)


def assert_same_steps(runs, atol):
    for whole, resumed, _ in runs:
        for cut in CUTS:
            assert set(resumed[cut]) == {step for step in whole if step > cut}
            for step, params in resumed[cut].items():
                torch.testing.assert_close(params, whole[step], atol=atol, rtol=0)


def test_a_resumed_run_of_both_is_the_same_bit_for_bit(ranks2, tmp_path):
    assert_same_steps(ranks2(stopped_and_not, str(tmp_path)), atol=0)


class Attending(torch.nn.Module):
    """Three tokens of two numbers that look at each other; attention reads its input projection as a parameter."""

    def __init__(self):
        super().__init__()
        self.into = torch.nn.Linear(2, 16)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = torch.nn.Linear(16, 2)

    def forward(self, x):
        tokens = self.into(x.unflatten(1, (3, 2)))
        return self.out(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def attending(optimizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nets.Regression(Attending().double(), optimizer)


def test_weights_of_attention_take_turns_too(ranks2, tmp_path):
    found = ranks2(stopped_and_not, str(tmp_path), attending)
    for *_, ranks in found:
        assert ranks == [
            f"net.attention.{name}" for name in ("out_proj.sigma", "parametrizations.in_proj_weight.original")
        ]
    assert_same_steps(found, atol=0)


SMALL = {"delay": 1, "frequency": 1, "beta": 0.99, "max_drop": 0.9, "progressive": 1.0}


def test_a_run_goes_on_when_every_sigma_is_small(ranks2, tmp_path):
    """Ranks of two or one, below ``min_dim``: nothing is left to factorise, and that is no reason to stop."""
    found = ranks2(stopped_and_not, str(tmp_path), wide, SMALL)
    assert all(ranks == [] for *_, ranks in found)
    assert_same_steps(found, atol=0)


def test_a_resumed_run_of_both_on_four_processes(ranks4, tmp_path):
    """DDP arranges its buckets anew after its first step, and sums of four round by where a gradient lies there."""
    assert_same_steps(ranks4(stopped_and_not, str(tmp_path)), atol=1e-10)


def never_whole(folder):
    with pytest.raises(ValueError, match=r"strategy\.full_steps=0 leaves no step .* callbacks\.oialr could act"):
        nets.fit(ab(full_steps=0), folder, module=wide(), callbacks=(OIALR(delay=4),))
    return True


def test_a_schedule_without_whole_weights_is_refused(ranks2, tmp_path):
    assert all(ranks2(never_whole, str(tmp_path)))
