"""AB-training against its formulas, a serial twin, DDP, and itself after a restart."""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as pl
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from networks import low_rank
from networks.ab_factors import ABFactor, Decomposition, Factors, decompose, num_factored, split
from networks.bayes.convert import to_bayesian
from parallel.ab_layout import ab_layout
from strategies.ab_training import ABTrainingStrategy
from strategies.ab_training.ab_phase import ABPhase, Groups
from strategies.ab_training.cutoff import Cutoff
from strategies.ab_training.optimizer_slots import OptimizerSlots
from strategies.ab_training.phases import PhaseSchedule, make_schedule
from strategies.ab_training.rebound import Rebound
from strategies.ab_training.selection import select
from strategies.ddp import DDP
from tests.ranks import Ranks
from tests.strategies import nets
from tests.strategies.ab_serial import FACTORED, network, simulate

# --------------------------------------------------------------------------------------------------- the schedule


def _spans(schedule):
    return [(s.phase, s.begin, s.end) for s in schedule.segments()]


def test_the_last_phase_is_a_full_rank_one():
    """The digits preset: what is left after three cycles lengthens the last AB phase, where it costs no traffic."""
    expected = [
        ("warmup", 0, 44), ("ab", 44, 104), ("full", 104, 114), ("ab", 114, 174), ("full", 174, 184),
        ("ab", 184, 254), ("full", 254, 264),
    ]  # fmt: skip
    assert _spans(PhaseSchedule(44, 60, 10, 10, 264)) == expected


@pytest.mark.parametrize("total", range(1, 400, 7))
def test_phases_of_trainings_of_any_length(total):
    schedule = PhaseSchedule(44, 60, 10, 10, total)
    spans = _spans(schedule)
    assert [s[1] for s in spans] == [0, *(s[2] for s in spans[:-1])] and spans[-1][2] == total
    if total >= 44 + 10 + 10:
        assert spans[-1][0] == "full" and spans[-1][2] - spans[-1][1] >= 10
        assert all(10 <= end - begin <= 60 + 20 for phase, begin, end in spans if phase == "ab")
    else:
        assert spans == [("warmup", 0, total)]


def test_without_a_last_phase_the_schedule_does_not_depend_on_the_length():
    long = _spans(PhaseSchedule(10, 20, 5, 0, 200))
    for total in range(11, 200, 13):
        short = _spans(PhaseSchedule(10, 20, 5, 0, total))
        assert short[:-1] == long[: len(short) - 1] and short[-1][:2] == long[len(short) - 1][:2]


def test_phases_of_the_published_program():
    """By absolute steps: back to full rank at t mod 12 = 0, to factors at t mod 12 = 4, whatever the warm-up."""
    schedule = PhaseSchedule(20, 8, 4, 0, 60, "reference")
    phases = [phase for phase, begin, end in _spans(schedule) for _ in range(begin, end)]
    factored, expected = False, []
    for t in range(60):
        if t == 20:
            factored = True
        elif t > 20 and t % 12 == 0:
            factored = False
        elif t > 20 and t % 12 == 4:
            factored = True
        expected.append("warmup" if t < 20 else "ab" if factored else "full")
    assert phases == expected


@pytest.mark.parametrize(
    ("warmup", "cycle", "full", "steps", "share"),
    [(24000, 6000, 300, 90000, 0.303), (9300, 3000, 300, 45000, 0.286), (6150, 1500, 150, 22500, 0.346),
     (3750, 600, 75, 11250, 0.417), (1900, 400, 38, 5700, 0.397), (581, 94, 19, 2850, 0.365)],
)  # fmt: skip
def test_the_share_of_full_rank_steps_of_the_published_runs(warmup, cycle, full, steps, share):
    """ResNet-50 on 2 to 64 nodes, 150 epochs: (T_w + T_f per cycle) / T."""
    schedule = PhaseSchedule(warmup, cycle - full, full, 0, steps, "reference")
    assert 1 - schedule.steps_in("ab") / steps == pytest.approx(share, abs=0.02)


def test_fractions_and_impossible_lengths():
    assert make_schedule(0.2, 60, 10, None, 300, "relative").warmup == 60
    with pytest.raises(ValueError, match=r"strategy\.warmup_steps=0\.2 is a fraction .* trainer\.max_steps"):
        make_schedule(0.2, 60, 10, None, None, "relative")
    with pytest.raises(ValueError, match=r"strategy\.ab_steps=60 leaves no step .* training of 50"):
        make_schedule(0.2, 60, 10, None, 50, "relative")
    with pytest.raises(ValueError, match=r"strategy\.warmup_steps=80 and strategy\.final_full_steps=10 leave no room"):
        make_schedule(80, 60, 10, None, 95, "relative")
    assert _spans(make_schedule(80, 60, 10, None, 5, "relative", short=True)) == [("warmup", 0, 5)]


def test_the_cutoff_rises_between_two_moments_of_the_training():
    rising = Cutoff(0.2, 0.6, (0.5, 0.75))
    assert [rising.at(t, 400) for t in (0, 200, 250, 300, 400)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    assert [Cutoff(0.2, 0.6, (0.5, 0.5)).at(t, 400) for t in (199, 200)] == [0.2, 0.6]
    assert Cutoff(0.2, None, (0.5, 0.75)).at(300, None) == 0.2
    with pytest.raises(ValueError, match=r"strategy\.final_cutoff=0\.6 .* unknown: set trainer\.max_steps"):
        rising.at(300, None)


def test_splits_take_the_cutoff_of_their_moment():
    strategy = ABTrainingStrategy(cutoff=0.2, final_cutoff=0.6, cutoff_rise=(0.5, 0.75))
    strategy.schedule = PhaseSchedule(44, 60, 10, 10, 400)
    sigma, kept = (torch.arange(100, 0, -1) + 0.5) / 100.5, []
    for strategy.steps in (0, 200, 250, 300, 399):
        kept.append(strategy._cut_rank(SimpleNamespace(path="net"), Decomposition(sigma, sigma, sigma)))
    assert kept == [81, 81, 61, 41, 41]


# ------------------------------------------------------------------------------------------------- groups, settings


def test_layouts():
    layout = ab_layout(8, 2, None)
    assert layout.groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [layout.member(r).side for r in range(8)] == list("aaaabbbb")
    assert layout.member(5) == (1, 0, 1) and layout.num_ranks_on("a") == layout.num_ranks_on("b") == 4
    assert ab_layout(4, 4, None).groups() == [[0, 1], [2, 3]], "a single node is divided"
    assert ab_layout(8, 4, 1).num_groups == 8
    assert ab_layout(1, 1, None) == (1, 1) and ab_layout(1, 1, None).member(0).side == "b"
    alone = ab_layout(4, 2, None, grouped=False)
    assert alone.groups() == [[0, 1, 2, 3]] and (alone.num_ranks_on("a"), alone.num_ranks_on("b")) == (0, 4)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((6, 2, None), r"cluster\.local_size=2 makes 3 groups, an odd number.*use one of 1, 3"),
        ((4, 2, 4), r"strategy\.group_size=4 makes one group of all 4.*use one of 1, 2, or strategy\.sync=only-b"),
        ((4, 2, 3), r"strategy\.group_size=3 does not divide 4"),
        ((4, 2, 0), r"strategy\.group_size=0"),
        ((3, 1, None), r"cluster\.local_size=1 makes 3 groups.*change trainer\.devices"),
    ],
)
def test_groups_that_do_not_come_out_even(sizes, text):
    with pytest.raises(ValueError, match=text):
        ab_layout(*sizes)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"cutoff": 1.0}, r"strategy\.cutoff=1\.0"),
        ({"cutoff": -0.1}, r"strategy\.cutoff=-0\.1"),
        ({"final_cutoff": 1.0}, r"strategy\.final_cutoff=1\.0"),
        ({"final_cutoff": 0.1}, r"strategy\.final_cutoff=0\.1 is below strategy\.cutoff=0\.15"),
        ({"final_cutoff": 0.5, "cutoff_rise": (0.8, 0.5)}, r"strategy\.cutoff_rise=\[0\.8, 0\.5\]: give two fractions"),
        ({"cutoff_rise": (0.5,)}, r"strategy\.cutoff_rise=\[0\.5\]"),
        ({"max_drop": 1.5}, r"strategy\.max_drop=1\.5"),
        ({"sync": "mean"}, r"strategy\.sync='mean': choose one of only-learned, with-stale, full, only-b"),
        ({"opt_state": "keep"}, r"strategy\.opt_state='keep'"),
        ({"init": "ortho"}, r"strategy\.init='ortho'"),
        ({"eval_model": "mean"}, r"strategy\.eval_model='mean'"),
        ({"wire_dtype": "int8"}, r"strategy\.wire_dtype='int8'"),
        ({"resume": "any"}, r"strategy\.resume='any'"),
        ({"sigma_split": "a"}, r"strategy\.sigma_split='a'"),
        ({"schedule": "paper"}, r"strategy\.schedule='paper'"),
        ({"warmup_steps": 2.5}, r"strategy\.warmup_steps=2\.5"),
        ({"warmup_steps": -1}, r"strategy\.warmup_steps=-1"),
        ({"ab_steps": 0}, r"strategy\.ab_steps=0"),
        ({"full_steps": -1}, r"strategy\.full_steps=-1"),
        ({"full_steps": 0, "schedule": "reference"}, r"strategy\.full_steps=0"),
        ({"rebound_steps": -1}, r"strategy\.rebound_steps=-1"),
        ({"rebound_lr": -1.0}, r"strategy\.rebound_lr=-1\.0"),
        ({"min_dim": 0}, r"strategy\.min_dim=0"),
        ({"local_size": 0}, r"cluster\.local_size=0"),
    ],
)
def test_impossible_settings_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        ABTrainingStrategy(**kwargs)


# --------------------------------------------------------------------------------------------------------- selection


def test_the_first_and_the_last_layer_stay_whole_unless_named_otherwise():
    net = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 40), nn.Linear(40, 20), nn.Linear(20, 4))
    assert [layer.path for layer in select(net, None, 16)] == ["2.weight", "3.weight"]
    assert [layer.path for layer in select(net, [], 16)] == ["0.weight", "2.weight", "3.weight"], "4 has 4 rows"
    assert [layer.path for layer in select(net, ["0", "[23].weight"], 1)] == ["4.weight"]
    net[2].weight.requires_grad_(False)
    assert [layer.path for layer in select(net, [], 16)] == ["0.weight", "3.weight"]


def test_all_kinds_of_layers_are_found():
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(16, 32, 3),
            "attention": nn.MultiheadAttention(32, 4),
            "separate": nn.MultiheadAttention(32, 4, kdim=16, vdim=16),
            "table": nn.Embedding(50, 32),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
        }
    )
    expected = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    expected += [f"separate.{c}_proj_weight" for c in "qkv"] + ["separate.out_proj.weight"]
    assert [layer.path for layer in select(net, [], 16)] == expected
    assert [layer.path for layer in select(net, [], 16, factor_embeddings=True)] == [*expected, "table.weight"]


def test_of_weights_that_are_low_rank_sigma_is_found():
    net = nn.ModuleDict(
        {"first": nn.Linear(20, 32), "attention": nn.MultiheadAttention(32, 4), "table": nn.Embedding(50, 32)}
    )
    for name in ("first.weight", "attention.in_proj_weight", "attention.out_proj.weight", "table.weight"):
        weight = low_rank.weight_of(net, name)
        low_rank.convert(weight, low_rank.decompose(weight.matrix()))
    attention = ["attention.parametrizations.in_proj_weight.original", "attention.out_proj.sigma"]
    assert [layer.path for layer in select(net, [], 16)] == ["first.sigma", *attention]
    whole = ["first", "attention.out_proj.weight"]  # names of the plain network go on to count
    assert [layer.path for layer in select(net, whole, 16)] == attention[:1]
    assert [layer.path for layer in select(net, whole, 16, factor_embeddings=True)] == [attention[0], "table.sigma"]
    assert select(net, [], 64) == [], "they may have become small in the course of a training"


def test_what_cannot_be_factored_is_named():
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    with pytest.raises(
        ValueError, match=r"strategy\.keep_full names 'head\*', which matches no layer; there are: 0, 1, 2"
    ):
        select(net, ["head*"], 16)
    with pytest.raises(ValueError, match=r"nothing is left to factorise.*strategy\.min_dim=64"):
        select(net, None, 64)
    bayesian = to_bayesian(nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)))
    with pytest.raises(ValueError, match=r"nothing can be factorised: the weights of BayesLinear are none of linear"):
        select(bayesian, None, 16)
    with pytest.raises(ValueError, match=r"nothing can be factorised: no trainable weight has two axes"):
        select(nn.BatchNorm1d(20), None, 16)
    net[2].weight = net[1].weight
    with pytest.raises(ValueError, match=r"1\.weight and 2\.weight are one weight.*strategy\.keep_full"):
        select(net, [], 16)
    select(net, ["1", "2"], 16)
    with pytest.raises(ValueError, match=r"3 has sparse gradients"):
        select(nn.Sequential(*net, nn.Embedding(5, 20, sparse=True)), ["1", "2"], 16)


# ------------------------------------------------------------------------------------------------------ learning rate


def test_the_rebound_is_a_ramp_below_the_schedule():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.02}])
    rebound = Rebound(steps=4, start=1e-5)
    rebound.switch(7, [optimizer])
    used = []
    for k in range(6):
        optimizer.param_groups[1]["lr"] = scheduled = 0.02 * 0.7**k
        rebound.apply(7 + k, [optimizer])
        used.append([group["lr"] for group in optimizer.param_groups])
        rebound.restore()
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, scheduled]
    ramps = [[1e-5 + k * (lr - 1e-5) / 4 if k < 4 else math.inf for lr in (0.1, 0.02)] for k in range(6)]
    assert used == [[min(0.1, a), min(0.02 * 0.7**k, b)] for k, (a, b) in enumerate(ramps)]
    again = Rebound(4, 1e-5)
    again.load_state_dict(rebound.state_dict())
    assert [again.limit(t, 0, 0) for t in range(6, 12)] == [rebound.limit(t, 0, 0) for t in range(6, 12)]


# ----------------------------------------------------------------------------------------------------- a small network

SETTINGS = {"warmup_steps": 5, "ab_steps": 6, "full_steps": 3, "min_dim": 8, "cutoff": 0.6, "local_size": 2,
            "rebound_steps": 0}  # fmt: skip
PHASES = ["warmup"] * 5 + ["ab"] * 6 + ["full"] * 3 + ["ab"] * 7 + ["full"] * 3  # of the steps of three epochs


class Recorder(pl.Callback):
    """Weights, phase and rate after every step; values of the whole module where a switch has just put them back."""

    def __init__(self) -> None:
        self.phases, self.rates, self.params, self.totals, self.scheduled = [], [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, *args):
        strategy = trainer.strategy
        self.phases.append(getattr(strategy, "phase", "full"))
        self.scheduled.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.params.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.totals.append(strategy.ledger.totals())


def fit(folder, *, norm=False, epochs=3, optimizer=None, scheduler=None, callbacks=(), ckpt_path=None, ddp=False,
        trainer=None, module=None, dtype=torch.float64, **settings):  # fmt: skip
    recorder = Recorder()
    module = module or nets.Regression(network(norm, dtype), optimizer, scheduler)
    strategy = DDP(local_size=2) if ddp else ABTrainingStrategy(**SETTINGS | settings)
    module, trainer = nets.fit(
        strategy, folder, module=module, epochs=epochs, callbacks=(*callbacks, recorder), ckpt_path=ckpt_path,
        **trainer or {},
    )  # fmt: skip
    return module, trainer, recorder


# ---------------------------------------------------------------------------------------------- acceptance 10: memory


def memory(opt_state, side):
    """Bytes in a training of a square layer with AdamW, as shares of what it takes whole: all, and without what waits.

    All is what a rank keeps of the layer in an AB phase: factors, averages of the optimizer, factors at the split, and
    the averages of the weight, which wait in host memory or in a file.
    """
    layer = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())

    def step():
        layer(torch.randn(8, 256)).sum().backward()
        optimizer.step()
        layer.zero_grad(set_to_none=True)

    def taken(*more):
        states = [v for state in optimizer.state.values() for v in state.values()]
        tensors = [t for t in (*layer.parameters(), ab.weight, *states, *more) if t.dim()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    ab = ABFactor(layer, "weight")
    step()
    whole = taken()
    assert whole == 3 * 4 * 256 * 256
    slots = OptimizerSlots([optimizer], [ab], opt_state)
    groups = Groups(side, {"a": 1, "b": 1}, "only-learned")
    start = Factors(*(f.contiguous() for f in split(decompose(layer.weight), 32)))  # as they come from other ranks
    phase = ABPhase(layer, slots, groups, [(ab, start, None)])
    step()
    (entry,) = phase.entries
    held = [v for state in slots.held.values() for v in state.values()]
    return taken(*entry.start, *held) / whole, taken(*entry.start) / whole


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("opt_state", ["hold", "reset", "project"])
def test_an_ab_phase_takes_little_memory_of_the_device(opt_state, side):
    """At r = n / 8: A, B, two averages of one of them and its value at the split, of 24 such pieces of n^2 / 8."""
    everything, on_device = memory(opt_state, side)
    assert on_device == pytest.approx(5 / 24)
    assert on_device <= 0.6
    assert everything == pytest.approx(5 / 24 + (0 if opt_state == "reset" else 2 / 3))


@pytest.mark.parametrize("opt_state", ["hold", "reset", "project"])
def test_an_ab_phase_takes_little_memory_of_a_machine_without_devices(opt_state):
    """The averages of the weight wait in a file (tests/strategies/test_put_aside.py has that they leave the memory)."""
    resident = psutil.Process().memory_full_info
    layer = nn.Linear(4096, 4096, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    one = 4 * 4096**2

    def step():
        layer(torch.ones(1, 4096)).sum().backward()
        optimizer.step()
        layer.zero_grad(set_to_none=True)

    ab = ABFactor(layer, "weight")
    step()
    generator = torch.Generator().manual_seed(0)
    start = Factors(torch.randn(4096, 512, generator=generator), torch.randn(512, 4096, generator=generator))
    slots = OptimizerSlots([optimizer], [ab], opt_state)
    groups = Groups("a", {"a": 1, "b": 1}, "only-learned")
    before = resident().uss  # weight and two averages, and the factors, which are all that is new
    ABPhase(layer, slots, groups, [(ab, start, None)])
    step()
    kept = 3 * one + 2 * one / 8 + resident().uss - before
    assert kept <= 0.6 * 3 * one


# ------------------------------------------------------------------------------- acceptance 3: distributed == serial


def two_cycles(folder, sync, group_size, wire_dtype="fp32", sigma_split="both"):
    module, trainer, seen = fit(
        folder, sync=sync, group_size=group_size, wire_dtype=wire_dtype, sigma_split=sigma_split
    )
    assert seen.phases == [*PHASES[1:], "full"], "after a step the switch is done"
    assert set(trainer.strategy.ranks) == set(FACTORED)
    assert all(rank < 12 for rank in trainer.strategy.ranks.values()), "factors are smaller than the weights"
    return {n: p.detach() for n, p in module.named_parameters()}, seen.params


@pytest.mark.parametrize(
    ("sync", "group_size"),
    [(sync, size) for sync in ("only-learned", "with-stale", "full") for size in (1, 2)] + [("only-b", None)],
)
def test_the_run_is_that_of_the_formulas(ranks4, tmp_path, sync, group_size):
    """Phases, groups, gradients, combination, averages and momenta at once: two cycles against one process."""
    expected = simulate(PHASES, sync, 4 // (group_size or 4), SETTINGS["cutoff"], "both")
    results = ranks4(two_cycles, str(tmp_path), sync, group_size)
    for final, _ in results:
        for name, value in expected[-1].items():
            assert (final[name] - value).abs().max() < 1e-6, name
    for step, (ours, theirs) in enumerate(zip(results[0][1], expected, strict=True)):
        assert ours.keys() == theirs.keys(), step
        for path in [name.removesuffix("_a") for name in theirs if not name.endswith("_b")]:
            assert (_weight(ours, path) - _weight(theirs, path)).abs().max() < 1e-6, (step, path)


def _weight(params, path):
    """Singular vectors have no sign: factors are compared by their product."""
    return params[path] if path in params else params[f"{path}_a"] @ params[f"{path}_b"]


def two_cycles_with_files(folder):
    with mock.patch("strategies.ab_training.put_aside._SMALLEST", 0):
        return two_cycles(folder, "only-learned", 1)


def test_what_waits_in_files_comes_back(ranks4, tmp_path):
    """The averages of momentum, of layers that are too small for files otherwise."""
    expected = simulate(PHASES, "only-learned", 4, SETTINGS["cutoff"], "both")
    final, _ = ranks4(two_cycles_with_files, str(tmp_path))[0]
    for name, value in expected[-1].items():
        assert (final[name] - value).abs().max() < 1e-6, name


def test_singular_values_for_the_trained_factor_alone(ranks4, tmp_path):
    expected = simulate(PHASES, "only-learned", 2, SETTINGS["cutoff"], "trained")
    final, _ = ranks4(two_cycles, str(tmp_path), "only-learned", 2, "fp32", "trained")[3]
    for name, value in expected[-1].items():
        assert (final[name] - value).abs().max() < 1e-6, name


def test_half_the_bytes_of_a_synchronisation_cost_little(ranks4, tmp_path):
    exact, half = (ranks4(two_cycles, str(tmp_path), "only-learned", 2, d)[0][0] for d in ("fp32", "bf16"))
    begin = dict(nets.Regression(network()).named_parameters())
    moved = math.sqrt(sum((exact[n] - begin[n]).square().sum() for n in exact))
    apart = math.sqrt(sum((exact[n] - half[n]).square().sum() for n in exact))
    assert 0 < apart < 0.02 * moved


def test_ranks_are_equal_whenever_they_train_together(ranks4, tmp_path):
    results = ranks4(two_cycles, str(tmp_path), "only-learned", 1)
    for final, _ in results[1:]:
        assert all(torch.equal(final[n], results[0][0][n]) for n in final)


# ------------------------------------------------------------------- states of optimizers that groups build differently


class Branch(nets.Regression):
    """A branch beside the network that the two ranks use in different steps."""

    def __init__(self, used, optimizer):
        super().__init__(network(), optimizer)
        self.branch = nn.Linear(nets.IN, nets.OUT, dtype=torch.float64)
        nn.init.zeros_(self.branch.weight), nn.init.zeros_(self.branch.bias)
        self.used = used

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        if self.used(self.global_rank, self.trainer.global_step):
            output = output + self.branch(batch[0])
        return nn.functional.mse_loss(output, batch[1])


def every_other_step(rank, step):
    """All steps on the first rank."""
    return rank == 0 or step % 2 == 0


def from_the_ab_phase_on(rank, step):
    """Until its end by the first rank alone."""
    return step >= 7 and (rank == 0 or step >= 11)


BRANCH_OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "NAdam": partial(torch.optim.NAdam, lr=1e-2),  # a product of momenta beside the steps
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-2),  # averages in another shape than the parameter's
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}


def branched(folder, used):
    found = {}
    for name, optimizer in BRANCH_OPTIMIZERS.items():
        module = Branch(used, optimizer)
        _, trainer, seen = fit(
            folder, module=module, local_size=1, find_unused_parameters=True, opt_state="hold", timeout_s=20
        )
        assert seen.phases == [*PHASES[1:], "full"]
        states = [trainer.optimizers[0].state.get(p, {}) for p in module.parameters()]
        state = [torch.as_tensor(v).double().flatten() for s in states for _, v in sorted(s.items())]
        found[name] = nets.weights(module), torch.cat(state)
    return found


@pytest.mark.parametrize("used", [every_other_step, from_the_ab_phase_on])
def test_groups_that_use_a_branch_in_different_steps_end_equal(ranks2, tmp_path, used):
    """Their optimizers have counted different steps of it, or one has none at all."""
    first, second = ranks2(branched, str(tmp_path), used, timeout=60)
    for name in BRANCH_OPTIMIZERS:
        for one, other in zip(first[name], second[name], strict=True):
            assert torch.equal(one, other), name


# ----------------------------------------------------------------------------------------- acceptance 5: silent groups


class Wiretap(TorchDispatchMode):
    """Ranks of the group of every collective that passes torch's dispatcher, DDP's own and that of hooks included."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            scripted = next(a for a in args if isinstance(a, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(scripted)
            self.heard.append((str(func), tuple(dist.get_process_group_ranks(group))))
        return func(*args, **kwargs or {})


class Tapped(nets.Regression):
    """Keeps what was heard in each phase, and the groups of synchronised batch norms."""

    def __init__(self, net):
        super().__init__(net, lambda p: torch.optim.AdamW(p, 1e-3))
        self.heard, self.norm_groups = {}, {}

    def training_step(self, batch, batch_idx):
        phase = self.trainer.strategy.phase
        for module in self.modules():
            if isinstance(module, nn.SyncBatchNorm):
                ranks = tuple(dist.get_process_group_ranks(module.process_group or dist.group.WORLD))
                self.norm_groups.setdefault(phase, set()).add(ranks)
        return super().training_step(batch, batch_idx)


class Listen(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, *args):
        self.phase, self.tap = trainer.strategy.phase, Wiretap()
        self.tap.__enter__()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # before a switch can come
        self.tap.__exit__(None, None, None)
        pl_module.heard.setdefault(self.phase, set()).update(ranks for _, ranks in self.tap.heard)


def tapped(folder, group_size, shared):
    net = network(norm=True)
    module, options = Tapped(net), {"sync_batchnorm": shared}
    module, trainer, seen = fit(folder, module=module, callbacks=(Listen(),), trainer=options, group_size=group_size)
    between = trainer.strategy.interconnect.between
    return module.heard, [t["inter_node_bytes"] for t in seen.totals], between.totals()["inter_node_bytes"]


@pytest.mark.parametrize(("group_size", "shared"), [(1, False), (2, False), (2, True)])
def test_no_byte_passes_between_groups_in_an_ab_phase(ranks4, tmp_path, group_size, shared):
    """Heard below torch.distributed, with a batch norm whose statistics DDP sends around, or the norm itself."""
    everyone = (0, 1, 2, 3)
    for rank, (heard, inter, _) in enumerate(ranks4(tapped, str(tmp_path), group_size, shared)):
        own = rank // group_size
        assert heard["warmup"] == heard["full"] == {everyone}
        assert heard["ab"] == {tuple(range(own * group_size, (own + 1) * group_size))}
        after = {t + 1: value for t, value in enumerate(inter)}  # after the step and the switch that follows it
        assert after[10] == after[5] and after[20] == after[14], "the ledger agrees"
        if rank == 0:
            assert after[5] < after[11] < after[14] < after[21] < after[24], "switches and full-rank phases are counted"


class _Aside(Tapped):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * sum(p.sum() for p in self.aside.parameters())


def with_synchronised_norm(folder):
    """DDP refuses such a norm on the CPU, and it cannot be computed there: it stands aside and is only looked at."""
    module = _Aside(network())
    module.aside = nn.SyncBatchNorm(3).double()
    with mock.patch.object(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None):
        fit(folder, module=module, group_size=2)
    return module.norm_groups


def test_synchronised_batch_norms_speak_to_their_group_alone(ranks4, tmp_path):
    for rank, groups in enumerate(ranks4(with_synchronised_norm, str(tmp_path))):
        assert groups == {"warmup": {(0, 1, 2, 3)}, "ab": {(0, 1) if rank < 2 else (2, 3)}, "full": {(0, 1, 2, 3)}}


def measured_traffic(folder, sync):
    _, trainer, seen = fit(folder, sync=sync, optimizer=partial(torch.optim.AdamW, lr=1e-3), dtype=torch.float32)
    ledgers = trainer.strategy.ledger.totals()["inter_node_bytes"]
    ranks = {p: r for p, r in trainer.strategy.ranks.items()}
    plain, _, _ = fit(folder, ddp=True, optimizer=partial(torch.optim.AdamW, lr=1e-3), dtype=torch.float32)
    total = torch.tensor([ledgers, plain.trainer.strategy.ledger.totals()["inter_node_bytes"]])
    dist.all_reduce(total)
    first = [p for p in seen.params if f"{FACTORED[0]}_a" in p]
    cycles = [{n: first[i][f"{n}_a"].shape[1] for n in FACTORED} for i in (0, -1)]
    return total.tolist(), cycles, ranks


def test_traffic_is_that_of_the_formula(ranks4, tmp_path):
    """Bytes over the links between nodes: gradients in warm-up and full-rank phases, two exchanges per cycle."""
    (ab, ddp), cycles, ranks = ranks4(measured_traffic, str(tmp_path), "only-learned")[0]
    shapes = {n: p.shape for n, p in nets.Regression(network()).named_parameters()}
    whole = sum(math.prod(s) for s in shapes.values())
    common = whole - sum(math.prod(shapes[n]) for n in FACTORED)
    assert cycles[1] == ranks
    # Two of the ring's four edges lie between nodes; an all-reduce sends 2 (p - 1) / p of its numbers over each of
    # them, a broadcast all.
    all_reduce, broadcast = 2 * 2 * 3 / 4, 2
    gradients = sum(p != "ab" for p in PHASES) * whole * all_reduce
    switches = 0.0
    for cycle in cycles:
        factors = sum(num_factored(shapes[n], r) for n, r in cycle.items())
        switches += all_reduce * (factors + 3 * common)  # with AdamW's two averages
        switches += broadcast * (factors + sum(cycle.values()))  # with roots of the singular values
        switches += all_reduce * 2 * len(FACTORED)  # ranks, 8 bytes each
        switches += all_reduce * 2 * (2 + 2 * 3 * (len(shapes) - len(FACTORED)))  # what optimizers have counted
    assert ab == pytest.approx(4 * (gradients + switches), rel=1e-3)
    assert ddp == 4 * len(PHASES) * whole * all_reduce


# -------------------------------------------------------------------------------- acceptance 11: checkpoints, resuming


class SaveAt(pl.Callback):
    """Saves after some steps, and remembers the weights after all."""

    def __init__(self, folder, steps):
        self.folder, self.steps = Path(folder), steps

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def decaying(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def interrupted_and_not(folder, steps, settings):
    """Parameters of this rank after every step: of the whole run, and of runs that go on from its checkpoints."""
    kwargs = {"optimizer": adam, "scheduler": decaying, "norm": True, "rebound_steps": 4} | settings
    kwargs["final_full_steps"] = 3
    _, _, whole = fit(folder, callbacks=(SaveAt(folder, steps),), **kwargs)
    resumed = {}
    for step in steps:
        dist.barrier()
        # Other weights and another seed: everything must come from the file.
        module = nets.Regression(network(norm=True), adam, decaying)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        _, _, seen = fit(folder, module=module, ckpt_path=f"{folder}/{step}.ckpt", **kwargs)
        resumed[step] = (seen.params, seen.totals, seen.phases, seen.rates)
    return (whole.params, whole.totals, whole.phases, whole.rates), resumed


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"group_size": 2}, (3, 5, 8, 10, 17)),
        ({"group_size": 1, "opt_state": "project", "sync": "with-stale", "wire_dtype": "bf16"}, (8, 17)),
        (
            {
                "group_size": 2,
                "opt_state": "reset",
                "sync": "full",
                "sigma_split": "trained",
                "final_cutoff": 0.9,
                "cutoff_rise": (0.2, 0.7),
            },
            (8,),
        ),
        ({"sync": "only-b"}, (8,)),
    ],
    ids=["hold", "project", "reset", "only-b"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(ranks4, tmp_path, settings, steps):
    """From warm-up, from a switch, from within AB phases: the same weights on every rank to the end of the training."""
    for rank, (whole, resumed) in enumerate(ranks4(interrupted_and_not, str(tmp_path), steps, settings)):
        for step in steps:
            (params, *rest), (again, *rest_again) = whole, resumed[step]
            assert [values[step:] for values in rest] == rest_again, "bytes, phases, rates"
            assert len(again) == 24 - step
            # Sums of four ranks depend on the order within DDP's buckets, which a fresh DDP learns in its first step.
            exact = whole[2][step - 1] == "ab" and settings.get("sync") != "only-b"
            for k, (ours, theirs) in enumerate(zip(again, params[step:], strict=True)):
                assert ours.keys() == theirs.keys()
                for path in [name.removesuffix("_a") for name in theirs if not name.endswith("_b")]:
                    if exact:
                        assert torch.equal(_weight(ours, path), _weight(theirs, path)), (rank, step, k, path)
                    else:
                        torch.testing.assert_close(_weight(ours, path), _weight(theirs, path), rtol=1e-5, atol=1e-6)


def checkpoints(folder):
    """The files, and what every group held when they were written."""
    _, _, seen = fit(folder, optimizer=adam, norm=True, group_size=2, callbacks=(SaveAt(folder, (8, 24)),))
    dist.barrier()
    # Any strategy can go on from the file of an AB phase: names, shapes and optimizer state are those of the module.
    module, _, _ = fit(folder, optimizer=adam, norm=True, ddp=True, ckpt_path=f"{folder}/8.ckpt")
    shapes_fit = all(
        state["exp_avg"].shape == parameter.shape for parameter, state in module.trainer.optimizers[0].state.items()
    )
    return seen.params[7], shapes_fit and len(module.losses) == 16


def consensus(name, value, of_a, of_b):
    """Of what a rank that trains A and one that trains B hold, by the rule only-learned."""
    if name not in FACTORED:
        return (of_a[name] + of_b[name]) / 2
    product = of_a[f"{name}_a"] @ of_b[f"{name}_b"]
    return product.T if value.shape != product.shape else product


def test_the_file_of_an_ab_phase_is_the_consensus_under_plain_names(ranks4, tmp_path):
    results = ranks4(checkpoints, str(tmp_path))
    assert all(fits for _, fits in results)
    checkpoint = torch.load(tmp_path / "8.ckpt", weights_only=True)
    module = nets.Regression(network(norm=True))
    assert list(checkpoint["state_dict"]) == list(module.state_dict()), "plain names in the plain order"
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    of_a, of_b = results[0][0], results[2][0]
    start = checkpoint["strategy"]["ab"]["starts"]
    for name, value in module.named_parameters():
        if name in FACTORED:
            assert torch.equal(of_b[f"{name}_a"], start[name][0]) and torch.equal(of_a[f"{name}_b"], start[name][1])
        torch.testing.assert_close(value.detach(), consensus(name, value, of_a, of_b), rtol=1e-10, atol=1e-12)
    last = torch.load(tmp_path / "24.ckpt", weights_only=True)
    assert last["strategy"]["ab"]["phase"] == "full" and "groups" not in last["strategy"]["ab"]


def other_sizes(folder):
    fit(folder, optimizer=adam, group_size=2, callbacks=(SaveAt(folder, (8,)),))
    dist.barrier()
    with pytest.raises(ValueError, match=r"written within an AB phase with group_size=2 \(here 1\).*resume=consensus"):
        fit(folder, optimizer=adam, group_size=1, ckpt_path=f"{folder}/8.ckpt")
    with pytest.raises(ValueError, match=r"sync=only-learned \(here full\)"):
        fit(folder, optimizer=adam, group_size=2, sync="full", ckpt_path=f"{folder}/8.ckpt")
    with pytest.raises(ValueError, match=r"factors of net\.4\.weight \(here kept whole\)"):
        fit(folder, optimizer=adam, group_size=2, keep_full=["net.[046]"], ckpt_path=f"{folder}/8.ckpt")
    _, _, seen = fit(folder, optimizer=adam, group_size=1, resume="consensus", ckpt_path=f"{folder}/8.ckpt")
    return seen.phases


def test_another_number_of_groups_goes_on_from_the_consensus(ranks4, tmp_path):
    for phases in ranks4(other_sizes, str(tmp_path)):
        assert phases == ["full"] * 2 + ["ab"] * 6 + ["full"] * 0 + phases[8:] and phases[-1] == "full"


# --------------------------------------------------------------------------------------- validation sees the consensus


class Watch(pl.Callback):
    """What validation sees, and what training has before and after it; a checkpoint in between."""

    def __init__(self, folder):
        self.folder, self.seen, self.states = Path(folder), [], []

    def _params(self, pl_module):
        return {n: t.detach().clone() for n, t in [*pl_module.named_parameters(), *pl_module.named_buffers()]}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.before = self._params(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.seen.append((trainer.strategy.phase, self._params(pl_module), self.before))

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "validation.ckpt")

    def on_train_batch_start(self, trainer, pl_module, *args):
        if hasattr(self, "before"):
            self.states.append((self.before, self._params(pl_module)))


def validated(folder, eval_model):
    watch = Watch(folder)
    kwargs = {"optimizer": adam, "norm": True, "group_size": 2, "trainer": {"val_check_interval": 4}}
    kwargs |= {"eval_model": eval_model, "epochs": 1, "warmup_steps": 2, "final_full_steps": 1, "full_steps": 1}
    _, _, seen = fit(folder, callbacks=(watch,), **kwargs)
    _, _, without = fit(folder, **kwargs | {"trainer": {"limit_val_batches": 0}})
    undisturbed = all(torch.equal(a[n], b[n]) for a, b in zip(seen.params, without.params, strict=True) for n in a)
    kept = all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in watch.states)
    return watch.seen[0], undisturbed, kept


def test_validation_sees_the_consensus_and_disturbs_nothing(ranks4, tmp_path):
    results = ranks4(validated, str(tmp_path), "consensus")
    module = nets.Regression(network(norm=True))
    plain = [n for n, _ in [*module.named_parameters(), *module.named_buffers()]]
    of_a, of_b = results[0][0][2], results[2][0][2]
    assert not torch.equal(of_a["net.0.weight"], of_b["net.0.weight"])
    for (phase, shown, _), undisturbed, kept in results:
        assert phase == "ab" and list(shown) == plain
        for name in plain:
            if shown[name].is_floating_point():
                expected = consensus(name, shown[name], of_a, of_b)
                torch.testing.assert_close(shown[name], expected, rtol=1e-10, atol=1e-12)
        assert all(torch.equal(shown[n], results[0][0][1][n]) for n in shown), "the same on all ranks"
        assert undisturbed and kept
    groups = ranks4(validated, str(tmp_path), "group")
    assert f"{FACTORED[0]}_a" in groups[0][0][1], "each group its own"
    assert not torch.equal(groups[0][0][1]["net.0.weight"], groups[2][0][1]["net.0.weight"])


# ------------------------------------------------------------------------------------------------------------- the end


class StopAt(pl.Callback):
    def __init__(self, step, error=False):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            if self.error:
                raise RuntimeError("enough")
            trainer.should_stop = True


def ended(folder):
    module, _, _ = fit(folder, callbacks=(StopAt(8),), group_size=2)
    stopped = {n: p.detach().clone() for n, p in module.named_parameters()}
    module, _, _ = fit(folder, schedule="reference", ab_steps=4, full_steps=3, warmup_steps=6, epochs=3)
    by_clock = {n: p.detach().clone() for n, p in module.named_parameters()}
    module = nets.Regression(network())
    with pytest.raises(RuntimeError, match="enough"):
        fit(folder, module=module, callbacks=(StopAt(8, error=True),), group_size=1)
    failed = [n for n, _ in module.named_parameters()], [type(m) for m in module.net]
    return stopped, by_clock, failed


def test_training_never_ends_apart(ranks4, tmp_path):
    """Stopped early, by the published program's clock, or by an error: a plain module; equal ones unless it failed."""
    plain = nets.Regression(network())
    names, kinds = [n for n, _ in plain.named_parameters()], [type(m) for m in plain.net]
    results = ranks4(ended, str(tmp_path))
    for stopped, by_clock, failed in results:
        assert list(stopped) == list(by_clock) == names and failed == (names, kinds)
        for ours, first in ((stopped, results[0][0]), (by_clock, results[0][1])):
            assert all(torch.equal(ours[n], first[n]) for n in names)


def cut_short(folder):
    _, _, one = fit(folder, trainer={"limit_train_batches": 1}, epochs=1)
    _, _, fast = fit(folder, trainer={"fast_dev_run": True})
    return one.phases + fast.phases


def test_a_run_cut_short_on_purpose_needs_no_ab_phase(ranks4, tmp_path):
    assert ranks4(cut_short, str(tmp_path)) == [["warmup"] * 2] * 4


def groups_and_threads(folder):
    import threading

    fit(folder, group_size=2)
    before = threading.active_count(), len(dist.distributed_c10d._world.pg_map)
    for group_size in (1, 2, None):
        fit(folder, group_size=group_size, local_size=4)
    return before, (threading.active_count(), len(dist.distributed_c10d._world.pg_map))


def test_no_thread_or_group_is_left(ranks4, tmp_path):
    for before, after in ranks4(groups_and_threads, str(tmp_path)):
        assert before == after


# --------------------------------------------------------------------------------- acceptance 12: optimizer, scheduler


class Two(nets.Regression):
    """Two parameter groups with options of their own, weights in both."""

    def configure_optimizers(self):
        early, late = [*self.net[:3].parameters()], [*self.net[3:].parameters()]
        groups = [
            {"params": early, "lr": 0.01, "weight_decay": 0.0},
            {"params": late, "lr": 0.002, "weight_decay": 0.3},
        ]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 32)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Complete(pl.Callback):
    """Every parameter with a gradient stands in the optimizer once, and nothing else does."""

    def __init__(self):
        self.wrong, self.options = [], set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in pl_module.parameters() if p.requires_grad}
        if len(listed) != len(set(listed)) or set(listed) != trained:
            self.wrong.append(trainer.global_step)
        if set(map(id, optimizer.state)) - set(listed):
            self.wrong.append(("state", trainer.global_step))
        self.options.add(tuple((g["weight_decay"], g["betas"], len(g["params"])) for g in optimizer.param_groups))


def three_cycles(folder, opt_state):
    complete = Complete()
    kwargs = {"ab_steps": 5, "full_steps": 3, "warmup_steps": 4, "rebound_steps": 2, "group_size": 2, "epochs": 4}
    _, trainer, ours = fit(folder, module=Two(network()), callbacks=(complete,), opt_state=opt_state, **kwargs)
    steps = {id(p): int(s["step"]) for p, s in trainer.optimizers[0].state.items()} if trainer.optimizers else {}
    _, _, plain = fit(folder, module=Two(network()), ddp=True, epochs=4)
    return (
        ours.phases,
        ours.rates,
        ours.scheduled,
        plain.rates,
        plain.scheduled,
        complete.wrong,
        complete.options,
        steps,
    )


@pytest.mark.parametrize("opt_state", ["hold", "reset", "project"])
def test_options_and_schedules_survive_three_cycles(ranks4, tmp_path, opt_state):
    results = ranks4(three_cycles, str(tmp_path), opt_state)
    for phases, used, scheduled, plain_used, plain_scheduled, wrong, options, _ in results:
        assert sum(a != b == "ab" for a, b in pairwise(phases)) == 3
        assert not wrong and len(options) == 1
        assert scheduled == plain_scheduled, "the schedule goes on undisturbed"
        switches = [t + 1 for t in range(31) if phases[t] != (phases[t - 1] if t else "warmup")]
        for t in range(32):
            after = [t - s for s in switches if 0 <= t - s < 2]
            if not after:
                assert used[t] == plain_used[t], t
            else:
                at_switch = plain_used[t - after[0] - 1]
                ramp = [1e-5 + after[0] * (lr - 1e-5) / 2 for lr in at_switch]
                assert used[t] == pytest.approx([min(a, b) for a, b in zip(ramp, plain_used[t], strict=True)])


# ------------------------------------------------------------------------------------------- acceptance 13: mistakes


class Manual(nets.Regression):
    def __init__(self):
        super().__init__(network())
        self.automatic_optimization = False


def mistakes(folder):
    """Seconds of the slowest; every rank must raise every one of them."""
    slowest = 0.0
    tied = network()
    tied.append(nn.Linear(24, 24, dtype=torch.float64)).append(nn.Linear(24, 24, dtype=torch.float64))
    tied[8].weight = tied[7].weight
    frozen = [r"stands 0 times in the optimizer", {"optimizer": lambda p: torch.optim.SGD([*p][:2], 0.1)}]
    for text, kwargs in [
        (r"strategy\.group_size=4 makes one group", {"group_size": 4}),
        (r"cluster\.local_size=3 does not divide", {"local_size": 3}),
        (r"strategy\.ab_steps=24 leaves no step .* training of 24", {"ab_steps": 24}),
        (r"strategy\.warmup_steps=23 .* leave no room", {"warmup_steps": 23}),
        (r"strategy\.final_cutoff=0\.9 .* number of steps is unknown", {"final_cutoff": 0.9, "epochs": -1}),
        (r"strategy\.keep_full names 'decoder'", {"keep_full": ["decoder"]}),
        (r"nothing is left to factorise", {"min_dim": 100}),
        (r"net\.7\.weight and net\.8\.weight are one weight", {"module": nets.Regression(tied), "keep_full": []}),
        (r"automatic_optimization=False", {"module": Manual()}),
        (frozen[0], frozen[1]),
        (r"net\.2\.weight holds values that are not finite", {"module": _broken()}),
    ]:
        begin = time.perf_counter()
        with pytest.raises(Exception, match=text):
            fit(folder, **kwargs)
        slowest = max(slowest, time.perf_counter() - begin)
        dist.barrier()
    return slowest


class _Broken(nets.Regression):
    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 4:
            self.net[2].weight.data[0, 0] = float("nan")


def _broken():
    return _Broken(network())


def test_mistakes_are_found_on_every_rank_within_seconds(ranks4, tmp_path):
    assert max(ranks4(mistakes, str(tmp_path), timeout=60)) < 5


# --------------------------------------------------------------------------------------------------------- one process


def in_one_process(folder):
    with pytest.warns(UserWarning, match=r"strategy\.sync=only-learned needs two processes"):
        module, _, seen = fit(folder, local_size=None, epochs=3)
    frozen = [p[f"{FACTORED[0]}_a"] for p, phase in zip(seen.params, seen.phases, strict=True) if phase == "ab"]
    return frozen, [n for n, _ in module.named_parameters()]


def test_one_process_trains_b_alone(tmp_path):
    """So that experiments can be tried without a cluster; it says so."""
    pool = Ranks(1)
    try:
        frozen, names = pool(in_one_process, str(tmp_path))[0]
    finally:
        pool.close()
    assert len(frozen) == 13 and torch.equal(frozen[0], frozen[5]) and not torch.equal(frozen[0], frozen[6])
    assert names == [n for n, _ in nets.Regression(network()).named_parameters()]


# ------------------------------------------------------------------------------------------------------------- report


def reported(folder):
    fit_ = fit(folder, group_size=1)
    strategy = fit_[1].strategy
    return strategy.report(), {n: p.shape for n, p in fit_[0].named_parameters()}


def test_what_is_reported(ranks4, tmp_path):
    report, shapes = ranks4(reported, str(tmp_path))[0]
    ranks = {n: int(report[f"ab/rank/{n}"]) for n in FACTORED}
    whole = sum(math.prod(s) for s in shapes.values())
    saved = sum(math.prod(shapes[n]) - num_factored(shapes[n], r) for n, r in ranks.items())
    assert report["ab/compression"] == pytest.approx(whole / (whole - saved)) and report["ab/compression"] > 1.2
    assert report["ab/phase"] == 2 and report["ab/cycle"] == 2 and report["ab/lr"] == 0.05
    assert -1 <= report["ab/cosine_of_halves"] <= 1 and report["ab/relative_change"] > 0
    assert all(report[f"time/ab_{name}_s"] > 0 for name in ("svd", "sync", "rewrap"))
    assert all(report[f"time/step_{phase}_s"] > 0 for phase in ("warmup", "ab", "full"))
    assert report["comm/between_groups_bytes"] > 0
