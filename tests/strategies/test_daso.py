"""DASO against closed forms, a serial simulation, DDP, and itself after a restart."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F

from datamodules.loading import RankSampler
from strategies.daso import DASO
from strategies.daso.schedule import Plateau, Schedule
from strategies.ddp import DDP
from strategies.diloco import DiLoCo
from tests.ranks import Ranks
from tests.strategies import nets

# --------------------------------------------------------------------------------------------------- the schedule


def trace(loss, rule="code", epochs=40, **kwargs):
    """(first epoch, (B, W, L)) of every change; entry e holds after e epochs."""
    schedule, found = Schedule(kwargs.pop("of", epochs), rule=rule, **kwargs), []
    for epoch in range(1, epochs + 1):
        schedule.end_epoch(loss(epoch))
        v = schedule.values
        if not found or found[-1][1] != (v.skip, v.wait, v.local_skip):
            found.append((epoch, (v.skip, v.wait, v.local_skip)))
    return found


def test_schedule_of_a_constant_loss():
    cycle = [(4, 1, 1), (2, 1, 1), (1, 1, 1), (8, 2, 2)]
    expected = [(1, (0, 0, 0))] + [(4 + 3 * i, cycle[i % 4]) for i in range(11)] + [(36, (0, 0, 0))]
    assert trace(lambda epoch: 1.0) == expected


def test_schedule_of_a_loss_that_falls_and_stops():
    expected = [
        (1, (0, 0, 0)), (4, (4, 1, 1)), (16, (2, 1, 1)), (19, (1, 1, 1)), (22, (8, 2, 2)), (25, (4, 1, 1)),
        (28, (2, 1, 1)), (31, (1, 1, 1)), (34, (8, 2, 2)), (36, (0, 0, 0)),
    ]  # fmt: skip
    assert trace(lambda epoch: 2 * 0.93 ** (epoch - 1) if epoch <= 12 else 0.8) == expected


def test_the_paper_halves_the_wait_where_its_code_subtracts_one():
    kwargs = {"skip": 16, "wait": 8, "warmup_epochs": 0, "cooldown_epochs": 0, "of": None}
    assert trace(lambda epoch: 1.0, "code", 8, **kwargs)[1] == (4, (8, 7, 1))
    assert trace(lambda epoch: 1.0, "paper", 8, **kwargs)[1] == (4, (8, 4, 1))
    assert trace(lambda epoch: 1.0, "fixed", 8, **kwargs) == [(1, (16, 8, 1))]


def test_a_schedule_continues_from_its_state():
    whole, first = Schedule(40), Schedule(40)
    losses = [1.0 - 0.02 * e for e in range(40)]
    for loss in losses[:17]:
        whole.end_epoch(loss)
        first.end_epoch(loss)
    second = Schedule(40)
    second.load_state_dict(first.state_dict())
    for loss in losses[17:]:
        whole.end_epoch(loss)
        second.end_epoch(loss)
        assert second.values == whole.values
        assert second.state_dict() == whole.state_dict()


def test_plateaus_of_negative_losses_need_an_improvement_too():
    plateau = Plateau(patience=0, threshold=0.1)
    assert [plateau.update(x) for x in (-1.0, -1.05, -1.2)] == [False, True, False]
    assert plateau.update(float("inf"))


def test_fractions_of_epochs():
    schedule = Schedule(10, warmup_epochs=0.2, cooldown_epochs=0.1)
    phases = []
    for _ in range(10):
        phases.append(schedule.phase)
        schedule.end_epoch(1.0)
    assert phases == ["warmup"] * 2 + ["cycling"] * 7 + ["cooldown"]


@pytest.mark.parametrize(
    ("epochs", "warmup", "cooldown", "short", "expected"),
    [
        (1, 0.1, 0.1, False, (1, 0)),  # shares of all epochs give way, the cool-down first
        (2, 0.1, 0.1, False, (1, 1)),
        (3, 0.5, 0.5, False, (2, 1)),
        (3, 0.1, 3, False, (0, 3)),
        (3, 3, 0.1, False, (3, 0)),
        (1, 4, 4, True, (1, 0)),  # numbers in a training that was cut short on purpose
        (6, 4, 4, True, (4, 2)),
        (4, 0.1, 0.1, False, (1, 1)),
    ],
)
def test_phases_of_short_trainings(epochs, warmup, cooldown, short, expected):
    schedule = Schedule(epochs, warmup, cooldown, short=short)
    assert (schedule.warmup, schedule.cooldown) == expected and schedule.cycles == (sum(expected) < epochs)
    phases = []
    for _ in range(epochs):
        phases.append(schedule.phase)
        schedule.end_epoch(1.0)
    between = ["cycling"] * (epochs - sum(expected))
    assert phases == ["warmup"] * expected[0] + between + ["cooldown"] * expected[1]


def test_numbers_of_epochs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"warmup_epochs=4 .*are 4 \+ 4 epochs, trainer\.max_epochs=7: lower them"):
        Schedule(7, 4, 4)
    with pytest.raises(ValueError, match=r"cooldown_epochs=4 .*are 1 \+ 4 epochs, trainer\.max_epochs=3"):
        Schedule(3, 0.1, 4)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"warmup_epochs": 0.6, "cooldown_epochs": 0.6}, r"warmup_epochs=0\.6 .* are more than all epochs together"),
        ({"skip": 2, "wait": 3}, r"strategy\.wait=3 is not between 0 and strategy\.skip=2"),
        ({"skip": 0}, r"strategy\.skip=0"),
        ({"warmup_epochs": -1}, r"strategy\.warmup_epochs=-1"),
        ({"cooldown_epochs": 1.5}, r"strategy\.cooldown_epochs=1\.5"),
        ({"max_skip": 0}, r"strategy\.max_skip=0"),
        ({"reduction": 1}, r"strategy\.reduction=1"),
        ({"schedule": "papers"}, r"strategy\.schedule='papers'"),
        ({"merge_rule": "mean"}, r"strategy\.merge_rule='mean': choose delta, paper"),
        ({"wire_dtype": "int8"}, r"strategy\.wire_dtype='int8'"),
        ({"exchange": "ring"}, r"strategy\.exchange='ring'"),
        ({"sync_buffers": "max"}, r"strategy\.sync_buffers='max'"),
        ({"plateau_patience": -1}, r"strategy\.plateau_patience=-1"),
        ({"local_size": 0}, r"cluster\.local_size=0"),
        ({"rate_mbit": 0}, r"cluster\.rate_mbit=0"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        DASO(**kwargs)


def too_many_phases(folder):
    with pytest.raises(ValueError, match=r"strategy\.warmup_epochs=4 and strategy\.cooldown_epochs=4.*max_epochs=3"):
        nets.fit(DASO(local_size=2), folder)
    with pytest.raises(ValueError, match=r"cluster\.local_size=3 does not divide .* = 4; use one of 1, 2, 4"):
        nets.fit(DASO(local_size=3), folder)
    torch.distributed.barrier()
    return True


def test_sizes_are_checked_on_every_rank_before_training(ranks4, tmp_path):
    assert ranks4(too_many_phases, str(tmp_path), timeout=30) == [True] * 4


class ByHand(nets.Regression):
    """Steps by itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not begin")


class WithEmbedding(nets.Regression):
    """A network whose table of words has sparse gradients."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(4, nets.IN, sparse=True, dtype=torch.float64)


def sharded_optimizer(parameters):
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.05)


REFUSED = {
    "manual optimisation": (ByHand, r"strategy=DASO acts after the optimizer steps of the Trainer.*use strategy=ddp"),
    "sparse gradients": (WithEmbedding, r"model: words has sparse gradients.*set sparse=False"),
    "sharded optimizer": (
        lambda: nets.Regression(optimizer=sharded_optimizer),
        r"model\.optimizer: DASO keeps an optimizer per node, it cannot be sharded",
    ),
}


def refusal(folder, kind):
    """Type and text of the error on this rank, and the seconds until it."""
    build, begin = REFUSED[kind][0], time.perf_counter()
    try:
        nets.fit(DASO(local_size=2, warmup_epochs=1, cooldown_epochs=1, timeout_s=20), folder, module=build())
    except ValueError as error:
        found = str(error), time.perf_counter() - begin
    torch.distributed.barrier()  # nobody waits in a collective for a rank that has gone
    return found


@pytest.mark.parametrize("kind", REFUSED)
def test_modules_that_daso_cannot_train_are_refused_on_every_rank(ranks4, tmp_path, kind):
    """daso.md, acceptance 13."""
    for text, seconds in ranks4(refusal, str(tmp_path), kind, timeout=20):
        assert re.search(REFUSED[kind][1], text) and seconds < 5


class Branch(nets.Regression):
    """A branch beside the network that only the first node uses in the first steps."""

    def __init__(self):
        super().__init__(optimizer=lambda p: torch.optim.AdamW(p, 0.01))
        self.branch = torch.nn.Linear(nets.IN, nets.OUT, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        if self.global_rank == 0 or self.trainer.global_step >= 10:
            output = output + self.branch(batch[0])
        return F.mse_loss(output, batch[1])


def branched(folder):
    torch.manual_seed(1)
    strategy = DASO(2, 0, local_size=1, sync_optimizer="every_blocking", find_unused_parameters=True, timeout_s=20)
    module, trainer = nets.fit(strategy, folder, module=Branch(), epochs=2)  # of 8 steps, all waited for
    (optimizer,) = trainer.optimizers
    moments = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in module.parameters()])
    return nets.weights(module), moments, [float(optimizer.state[p]["step"]) for p in module.branch.parameters()]


def test_momenta_of_a_branch_that_a_node_has_not_used_yet_are_averaged_later(ranks2, tmp_path):
    """A node that sends fewer numbers than the other would end both."""
    (weights, moments, steps), (other, others, fewer) = ranks2(branched, str(tmp_path), timeout=40)
    assert torch.equal(weights, other) and torch.equal(moments, others)
    assert steps == [16, 16] and fewer == [6, 6]


class Freeze(nets.pl.Callback):
    """The first layer stops to learn after an epoch."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            module.net[0].requires_grad_(False)


def frozen_in_between(folder):
    common = {"local_size": 2, "find_unused_parameters": True, "timeout_s": 20}
    found = []
    for strategy in (DASO(0, 0, skip=3, wait=1, schedule="fixed", **common), DiLoCo(period=3, **common)):
        module, _ = nets.fit(strategy, folder, epochs=3, callbacks=(Freeze(),))
        found.append((nets.weights(module), strategy._exchange.numel))
    return found


def test_layers_may_stop_to_learn(ranks4, tmp_path):
    """The vector of what is exchanged is built anew, after a step in which the nodes have parted."""
    found = ranks4(frozen_in_between, str(tmp_path), timeout=30)
    for rank in found:
        for (weights, exchanged), (expected, _) in zip(rank, found[0], strict=True):
            assert torch.equal(weights, expected)
            assert exchanged == nets.HIDDEN * nets.OUT + nets.OUT


def lonely(folder):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module, _ = nets.fit(DASO(local_size=2, warmup_epochs=1, cooldown_epochs=1, timeout_s=20), folder)
    plain, _ = nets.fit(DDP(local_size=2), folder)
    text = "strategy=DASO on one node of 2 processes is plain data parallelism; cluster.local_size makes smaller nodes"
    return any(text in str(w.message) for w in said), nets.weights(module), nets.weights(plain)


def test_a_single_node_is_data_parallelism_and_is_told_so(ranks2, tmp_path):
    found = ranks2(lonely, str(tmp_path), timeout=30)
    assert [said for said, *_ in found] == [True, False]  # once
    for _, weights, plain in found:
        assert torch.equal(weights, plain)


# ------------------------------------------------------------------------------------------------------ closed form


class Slope(nets.Regression):
    """A scalar x with the constant gradient c of its rank."""

    def __init__(self, slopes):
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, 0.1))
        self.net = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros((), dtype=torch.float64))])
        self.slopes, self.seen = slopes, []

    def training_step(self, batch, batch_idx):
        return self.slopes[self.global_rank] * self.net[0]

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, *args):
        self.seen.append(float(self.net[0]))


def closed_form(folder, rule):
    strategy = DASO(0, 0, skip=4, wait=1, merge_rule=rule, local_size=1, wire_dtype="fp32")
    module, _ = nets.fit(strategy, folder, module=Slope([1.0, 2.0, 3.0, 4.0]), epochs=1)
    return module.seen[:2]


@pytest.mark.parametrize("rule", ["paper", "delta"])
def test_closed_form_of_a_merge(ranks4, tmp_path, rule):
    """daso.md, acceptance 1."""
    found = torch.tensor(ranks4(closed_form, str(tmp_path), rule))
    c = torch.arange(1.0, 5.0)
    torch.testing.assert_close(found[:, 0], -0.1 * c)
    expected = (-0.4 * c - 1) / 6 if rule == "paper" else -0.25 - 0.1 * c
    torch.testing.assert_close(found[:, 1], expected, atol=1e-7, rtol=0)


# ----------------------------------------------------------------------------------------- distributed equals serial


def rank_batches(epoch, ranks):
    """Indices of the samples of each rank, step by step."""
    shares = []
    for rank in range(ranks):
        sampler = RankSampler(
            range(nets.SAMPLES), shuffle=True, seed=3, num_replicas=ranks, rank=rank, multiple_of=nets.BATCH
        )
        sampler.set_epoch(epoch)
        order, size = list(sampler), nets.BATCH // ranks
        shares.append([order[i : i + size] for i in range(0, len(order), size)])
    return shares


def simulate(epochs, skip, wait, rule):
    """Two nodes of two ranks in one process: each node is a network trained on the samples of its ranks."""
    x, y = nets.samples()
    nodes = [nets.Regression() for _ in range(2)]
    optimizers = [node.configure_optimizers() for node in nodes]
    flight, t = None, 0

    def get(node):
        return nets.weights(node)

    def put(node, vector):
        torch.nn.utils.vector_to_parameters(vector.clone(), node.parameters())

    def merge():
        step, sent = flight
        mean, waited = (sent[0] + sent[1]) / 2, t - step
        for node, own in zip(nodes, sent, strict=True):
            now = get(node)
            put(node, now + mean - own if rule == "delta" else (2 * waited * now + 2 * mean) / (2 * waited + 2))

    for epoch in range(epochs):
        shares = rank_batches(epoch, 4)
        for step in range(len(shares[0])):
            for n, (node, optimizer) in enumerate(zip(nodes, optimizers, strict=True)):
                optimizer.zero_grad()
                # The node's gradient is the mean over its ranks of the gradients of their means.
                loss = sum(F.mse_loss(node.net(x[i]), y[i]) for i in (shares[2 * n][step], shares[2 * n + 1][step])) / 2
                loss.backward()
                optimizer.step()
            last = step == len(shares[0]) - 1
            if flight and (last or t - flight[0] >= wait):
                merge()
                flight = None
            if last:
                mean = (get(nodes[0]) + get(nodes[1])) / 2
                put(nodes[0], mean), put(nodes[1], mean)
            elif t % skip == 0:
                if flight:
                    merge()
                flight = (t, [get(node) for node in nodes])
            t += 1
    return get(nodes[0])


def two_by_two(folder, skip, wait, rule, exchange):
    strategy = DASO(
        0,
        0,
        skip=skip,
        wait=wait,
        merge_rule=rule,
        exchange=exchange,
        local_size=2,
        wire_dtype="fp32",
        schedule="fixed",
    )
    module, _ = nets.fit(strategy, folder, epochs=EPOCHS)
    return nets.weights(module)


EPOCHS = 8  # 64 steps
WAITS = [(1, 1), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3)]
PRODUCT = [(*waits, rule, way) for waits in WAITS for rule in ("paper", "delta") for way in ("rotate", "sharded")]
# Every pair of two settings: who carries a vector and what is made of it have nothing to do with each other.
PAIRS = [
    (*waits, rule, ("rotate", "sharded")[(i + j) % 2])
    for i, waits in enumerate(WAITS)
    for j, rule in enumerate(("paper", "delta"))
]


def all_cases(folder, cases):
    return [two_by_two(folder, *case) for case in cases]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(PAIRS, id="pairs"),
        pytest.param(PRODUCT, id="product", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_two_nodes_of_two_ranks_equal_the_serial_simulation(ranks4, tmp_path, cases):
    """daso.md, acceptance 3, in float64."""
    expected = [simulate(EPOCHS, skip, wait, rule) for skip, wait, rule, _ in cases]
    for rank in ranks4(all_cases, str(tmp_path), cases, timeout=len(cases) * 15.0):
        for case, weights, serial in zip(cases, rank, expected, strict=True):
            torch.testing.assert_close(weights, serial, atol=1e-12, rtol=0, msg=lambda m, c=case: f"{c}: {m}")


def blocking(folder, momentum, optimizer, wire):
    make = (lambda p: torch.optim.SGD(p, 0.05, momentum=momentum)) if optimizer == "sgd" else torch.optim.Adam
    daso = DASO(3, 0, local_size=2, wire_dtype=wire)
    a, _ = nets.fit(daso, folder, module=nets.Regression(optimizer=make))
    b, _ = nets.fit(DDP(local_size=2), folder, module=nets.Regression(optimizer=make))
    return float((nets.weights(a) - nets.weights(b)).abs().max())


@pytest.mark.parametrize(
    ("momentum", "optimizer", "wire", "low", "high"),
    [
        (0.0, "sgd", "fp32", 0, 1e-12),
        (0.9, "sgd", "fp32", 0, 1e-12),
        (0.0, "sgd", "bf16", 1e-9, 1e-3),
        (0.0, "adam", "fp32", 1e-6, 1e-1),  # not linear: averaging parameters is not averaging gradients
    ],
)
def test_exchanging_after_every_step_is_data_parallelism_for_linear_optimizers(
    ranks4, tmp_path, momentum, optimizer, wire, low, high
):
    """daso.md, acceptance 2."""
    for difference in ranks4(blocking, str(tmp_path), momentum, optimizer, wire):
        assert low <= difference <= high


# ---------------------------------------------------------------------------------------------------------- restarts


class SaveAt(nets.pl.Callback):
    """Writes a checkpoint after a step, without disturbing the run; keeps what this rank has then."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:  # once: the batches that follow may not be a step yet
            self.step = None
            self.own = everything(module)
            trainer.save_checkpoint(self.path)


def everything(module):
    """Parameters and floating-point buffers as one vector."""
    buffers = [b.detach().reshape(-1) for b in module.buffers() if b.is_floating_point()]
    return torch.cat([nets.weights(module), *buffers])


RESUME = {
    "rotate": {"skip": 4, "wait": 3},
    "sharded": {"skip": 4, "wait": 2, "exchange": "sharded", "merge_rule": "paper"},
    "narrow": {"skip": 4, "wait": 2, "cycling_wire_dtype": "bf16"},
    "no_norm_sync": {"skip": 3, "wait": 1, "sync_buffers": "own"},
}


# Steps 14 and 21: nodes differ, with an exchange under way but for `no_norm_sync`; 16: the end of an epoch.
STOPS = (14, 16, 21)


def resumed(folder, kwargs):
    """Of a whole run, of one that writes checkpoints, and of one that goes on from each of them."""

    def fit(callbacks=(), **more):
        module = nets.Regression(nets.network(norm=True), lambda p: torch.optim.AdamW(p, 0.01))
        trained, trainer = nets.fit(
            DASO(1, 0, local_size=2, **kwargs), folder, module=module, epochs=4, callbacks=callbacks, **more
        )
        buffers = torch.cat([b.double().reshape(-1) for b in trained.buffers()])
        return nets.weights(trained), buffers, trainer.global_step

    paths = {step: f"{folder}/{step}.ckpt" for step in STOPS}
    whole = fit()
    saves = {step: SaveAt(step, path) for step, path in paths.items()}
    saved = fit(tuple(saves.values()))
    again, contents = [], []
    for step, path in paths.items():
        again.append(fit(ckpt_path=path))
        content = torch.load(path, weights_only=True)
        plain = nets.Regression(nets.network(norm=True))
        plain.load_state_dict(content["state_dict"], strict=True)
        flights = ["flight" in replica for replica in content["strategy"]["replicas"]]
        contents.append((everything(plain), saves[step].own, flights))
    return whole, saved, again, contents


@pytest.mark.parametrize("kind", RESUME)
def test_a_run_that_stops_in_the_cycle_goes_on_as_if_it_had_not(ranks4, tmp_path, kind):
    """daso.md, acceptance 11: exactly, with and without an exchange under way, per node optimizers."""
    found = ranks4(resumed, str(tmp_path), RESUME[kind])
    for i, step in enumerate(STOPS):
        one, other = (found[rank][3][i][1] for rank in (0, 2))  # the first ranks of the two nodes
        mean = (one + other) / 2
        if kind == "no_norm_sync":
            parameters = len(found[0][0][0])
            mean[parameters:] = one[parameters:]  # running statistics of the first node
        assert torch.equal(one, other) == (step == 16 and kind != "no_norm_sync"), step
        for whole, saved, again, contents in found:
            weights, buffers, steps = again[i]
            plain, _, flights = contents[i]
            assert torch.equal(saved[0], whole[0])  # writing them changed nothing
            assert steps == 32 and flights == [kind != "no_norm_sync" and step != 16] * 2, step
            assert torch.equal(weights, whole[0]) and torch.equal(buffers, whole[1]), step
            torch.testing.assert_close(plain, mean, atol=1e-15, rtol=1e-15)


def mixed_types(folder):
    """Types of what a checkpoint holds while the nodes differ, beside those of the module, which has several."""
    module = nets.Regression(nets.network(torch.float32, norm=True))
    module.register_buffer("units", torch.tensor([3.0]))
    module.register_buffer("exact", torch.tensor([0.1], dtype=torch.float64))
    path = f"{folder}/m.ckpt"
    nets.fit(DASO(0, 0, local_size=1), folder, module=module, epochs=2, callbacks=(SaveAt(13, path),))
    content = torch.load(path, weights_only=True)
    assert not content["strategy"]["equal"]
    types = {name: (value.dtype, module.state_dict()[name].dtype) for name, value in content["state_dict"].items()}
    return types, [float(content["state_dict"][name]) for name in ("units", "exact")]


def test_a_checkpoint_has_the_types_of_the_module(ranks2, tmp_path):
    """Sums over nodes are in the widest of them."""
    for types, values in ranks2(mixed_types, str(tmp_path)):
        assert {found for found, _ in types.values()} == {torch.float32, torch.float64, torch.int64}
        assert all(found == expected for found, expected in types.values())
        assert values == [3.0, 0.1]


class SaveInValidation(nets.pl.Callback):
    """What ModelCheckpoint does: it saves while the module shows the mean of the nodes."""

    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, *args):
        if trainer.global_step == 11:
            trainer.save_checkpoint(self.path)


def validated(folder):
    def fit(**kwargs):
        module = nets.Regression(nets.network(norm=True), lambda p: torch.optim.AdamW(p, 0.01))
        strategy = DASO(1, 0, skip=4, wait=2, local_size=2)
        trained, _ = nets.fit(strategy, folder, module=module, epochs=3, val_check_interval=3, **kwargs)
        return nets.weights(trained)

    path = f"{folder}/v.ckpt"
    whole = fit()
    saved = fit(callbacks=(SaveInValidation(path),))
    content = torch.load(path, weights_only=True)
    parameters = [replica["parameters"] for replica in content["strategy"]["replicas"]]
    return whole, saved, fit(ckpt_path=path), parameters


def test_a_checkpoint_of_a_validation_holds_the_nodes_themselves(ranks4, tmp_path):
    for whole, saved, again, (first, second) in ranks4(validated, str(tmp_path)):
        assert torch.equal(whole, saved) and torch.equal(again, whole)
        assert not torch.equal(first, second)


def four_nodes(folder):
    def fit(**kwargs):
        strategy = DASO(0, 0, skip=4, wait=3, cycling_wire_dtype="bf16", schedule="fixed", local_size=1)
        module, _ = nets.fit(strategy, folder, epochs=2, val_check_interval=2, **kwargs)
        return nets.weights(module)

    path = f"{folder}/n.ckpt"
    return fit(), fit(callbacks=(SaveAt(5, path),)), fit(ckpt_path=path)


def test_two_halves_of_an_exchange_may_have_a_validation_and_a_checkpoint_between(ranks4, tmp_path):
    """Sixteen bits between four nodes take an all-to-all and an all-gather, begun in the same order everywhere."""
    found = ranks4(four_nodes, str(tmp_path))
    for whole, saved, again in found:
        assert torch.equal(whole, saved) and torch.equal(whole, again) and torch.equal(whole, found[0][0])


class Lopsided(nets.Data):
    """Rank 0 has a batch more than the others."""

    def train_dataloader(self):
        rank = torch.distributed.get_rank()
        return torch.utils.data.DataLoader(torch.utils.data.Subset(self.data, range(8 + 2 * (rank == 0))), batch_size=2)


def lopsided(folder):
    found = []
    for strategy in (DASO(0, 0, local_size=2), DDP(local_size=2)):
        try:
            nets.fit(strategy, folder, epochs=1, datamodule=Lopsided())
        except ValueError as error:
            found.append(str(error))
    return found


def test_uneven_training_shares_are_refused_on_all_ranks(ranks4, tmp_path):
    for errors in ranks4(lopsided, str(tmp_path)):
        assert len(errors) == 2
        assert all("[5, 4, 4, 4] training batches per epoch" in error for error in errors)


def norms(folder):
    """Running statistics that the ranks see in a validation, and accumulation and clipping besides."""
    seen = []

    class Look(nets.pl.Callback):
        def on_validation_batch_start(self, trainer, module, *args):
            seen.append(torch.cat([b.double().reshape(-1) for b in module.buffers()]))

    for strategy in (DASO(1, 0, skip=2, wait=1, local_size=2), DDP(local_size=2)):
        module = nets.Regression(nets.network(norm=True))
        nets.fit(
            strategy, folder, module=module, epochs=3, callbacks=(Look(),), accumulate_grad_batches=2,
            gradient_clip_val=0.5, val_check_interval=6,
        )  # fmt: skip
        seen.append(nets.weights(module))
    return seen


def test_all_ranks_validate_with_the_same_running_statistics(ranks4, tmp_path):
    found = ranks4(norms, str(tmp_path))
    assert len(found[0]) > 6
    for seen in found:
        assert all(torch.equal(a, b) for a, b in zip(seen, found[0], strict=True))


def halved(folder):
    said, handler, logger = [], logging.Handler(), logging.getLogger("strategies.replicas")
    handler.emit = lambda record: said.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler), logger.setLevel(logging.INFO)
    strategy = DASO(0, 0, skip=4, wait=1)
    module, trainer = nets.fit(strategy, folder, epochs=1)
    sent = strategy.ledger.totals()["inter_node_bytes"]
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())  # the end of the fit has removed it
    trainer.validate(module, datamodule=nets.Data(torch.float64), verbose=False)
    logger.removeHandler(handler), logger.setLevel(before)
    return strategy.local_size, sent, said


def test_one_machine_is_taken_as_two_nodes(ranks4, tmp_path):
    found = ranks4(halved, str(tmp_path))
    assert [size for size, *_ in found] == [2] * 4 and sum(sent for _, sent, _ in found) > 0
    # By one rank, before the training; an evaluation after it does not depend on nodes.
    assert [said for *_, said in found] == [
        ["one machine, taken as 2 nodes of 2; cluster.local_size sets it"],
        [],
        [],
        [],
    ]


def alone(folder):
    with pytest.warns(UserWarning, match="strategy=DASO in one process is plain training.*trainer=cluster_2x2"):
        nets.fit(DASO(1, 1), folder)
    return True


def test_one_process_is_told_how_there_are_more(tmp_path):
    pool = Ranks(1)
    try:
        assert pool(alone, str(tmp_path)) == [True]
    finally:
        pool.close()


class Phases(nets.pl.Callback):
    """(epoch, phase, steps) before every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, *args):
        self.seen.append((trainer.current_epoch, trainer.strategy.phase, trainer.strategy.steps))


def after_another_strategy(folder):
    found = []
    for step, strategy in (
        (28, DASO(2, 2, local_size=1)),
        (32, DASO(2, 2, local_size=1)),
        (32, DASO(0, 0, warmup_steps=36, local_size=1)),
    ):
        path, phases = f"{folder}/{step}.ckpt", Phases()
        nets.fit(DDP(local_size=1), folder, epochs=8, callbacks=(SaveAt(step, path),))
        nets.fit(strategy, folder, epochs=8, ckpt_path=path, callbacks=(phases,))
        found.append(phases.seen)
    return found


def test_phases_belong_to_epochs_whoever_trained_the_first_ones(ranks2, tmp_path):
    """A checkpoint of another strategy, from within its fourth epoch and from the end of it."""
    expected = {3: "cycling", 4: "cycling", 5: "cycling", 6: "cooldown", 7: "cooldown"}
    for within, at_end, counted in ranks2(after_another_strategy, str(tmp_path), timeout=60):
        assert within == [(t // 8, expected[t // 8], t) for t in range(28, 64)]
        assert at_end == [(t // 8, expected[t // 8], t) for t in range(32, 64)]
        assert counted == [(t // 8, "warmup" if t < 36 else "cycling", t) for t in range(32, 64)]


def other_cluster(folder):
    path = f"{folder}/x.ckpt"
    nets.fit(DASO(1, 0, local_size=2), folder, epochs=4, callbacks=(SaveAt(14, path),))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module, trainer = nets.fit(DASO(1, 0, local_size=1), folder, epochs=4, ckpt_path=path)
    expected = "goes on with 4, 1 a node: exchanges are waited for in this epoch"
    return trainer.global_step, nets.weights(module), any(expected in str(w.message) for w in said)


def test_a_checkpoint_goes_on_with_other_nodes(ranks4, tmp_path):
    found = ranks4(other_cluster, str(tmp_path))
    assert [said for *_, said in found] == [True, False, False, False]  # once
    for steps, weights, _ in found:
        assert steps == 32
        assert torch.equal(weights, found[0][1])


def test_a_checkpoint_goes_on_in_one_process(ranks4, tmp_path):
    ranks4(save_one, str(tmp_path))
    module, trainer = nets.fit("auto", str(tmp_path), epochs=4, ckpt_path=f"{tmp_path}/x.ckpt", devices=1)
    assert trainer.global_step == 32
    assert sum(module.losses[-8:]) < sum(module.losses[:8])


def save_one(folder):
    nets.fit(DASO(1, 0, local_size=2), folder, epochs=4, callbacks=(SaveAt(14, f"{folder}/x.ckpt"),))


# ------------------------------------------------------------------------------------------- epochs, validation, end


class Watch(nets.pl.Callback):
    """What other parts of the program see of the replicas."""

    def __init__(self):
        self.validated, self.ended, self.between = [], [], []

    def on_validation_start(self, trainer, module):
        self.between.append(nets.weights(module))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.validated.append(nets.weights(module))

    def on_train_epoch_end(self, trainer, module):
        self.ended.append(nets.weights(module))


def watched(folder):
    watch = Watch()
    strategy = DASO(0, 0, skip=4, wait=1, local_size=2)
    module, _ = nets.fit(strategy, folder, epochs=3, callbacks=(watch,), val_check_interval=3)
    return watch.validated, watch.ended, nets.weights(module), strategy.turn, watch.between


def test_validation_sees_the_mean_and_epochs_end_with_equal_nodes(ranks4, tmp_path):
    found = ranks4(watched, str(tmp_path))
    validated, ended, *_ = found[0]
    assert len(ended) == 3 and len(validated) == 6
    # Lightning calls callbacks before the strategy shows the mean: what every node has by itself.
    nodes = list(zip(found[0][4], found[2][4], strict=True))
    assert not any(torch.equal(*pair) for pair in nodes)
    for (first, second), shown in zip(nodes, validated, strict=True):
        torch.testing.assert_close(shown, (first + second) / 2, atol=1e-15, rtol=1e-15)
    for other, other_ended, last, turn, _ in found:
        assert all(torch.equal(a, b) for a, b in zip(other, validated, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(other_ended, ended, strict=True))  # acceptance 10
        assert torch.equal(last, ended[-1])
        assert turn == 9  # 24 steps: 6 exchanges in flight and one at each of 3 ends, of which none coincide


def max_steps(folder):
    module, trainer = nets.fit(DASO(0, 0, skip=4, wait=3, local_size=2), folder, epochs=3, max_steps=14)
    return nets.weights(module), trainer.global_step


def limited(folder):
    """Phases of a training of 40 steps, 5 epochs, under a limit of 1000 epochs."""
    phases, strategy = [], DASO(0.2, 0.2, local_size=2)

    class Look(nets.pl.Callback):
        def on_train_epoch_start(self, *args):
            phases.append(strategy.schedule.phase)

    nets.fit(strategy, folder, epochs=1000, max_steps=40, callbacks=(Look(),))
    return phases


def test_phases_are_shares_of_what_max_steps_leaves(ranks4, tmp_path):
    expected = ["warmup", "cycling", "cycling", "cycling", "cooldown"]
    assert ranks4(limited, str(tmp_path)) == [expected] * 4


def test_a_run_limited_by_steps_ends_with_equal_nodes(ranks4, tmp_path):
    found = ranks4(max_steps, str(tmp_path))
    assert all(torch.equal(weights, found[0][0]) and steps == 14 for weights, steps in found)


def threads_after(folder):
    import threading

    before = set(threading.enumerate())
    nets.fit(DASO(0, 0, local_size=2, rate_mbit=100), folder, epochs=1)
    groups = len(torch.distributed.distributed_c10d._world.pg_map)
    nets.fit(DASO(0, 0, local_size=2, rate_mbit=100), folder, epochs=1)
    return (
        [t.name for t in set(threading.enumerate()) - before],
        groups,
        len(torch.distributed.distributed_c10d._world.pg_map),
    )


def test_nothing_is_left_behind(ranks4, tmp_path):
    for threads, groups, after in ranks4(threads_after, str(tmp_path)):
        assert threads == [] and after == groups


# -------------------------------------------------------------------------------------------------------------- bytes


def traffic(folder, kwargs):
    strategy = DASO(0, 0, schedule="fixed", local_size=2, **kwargs)
    module = nets.Regression(nets.network(torch.float32))
    nets.fit(strategy, folder, module=module, epochs=1, max_steps=8)
    return strategy.ledger.totals()


@pytest.mark.parametrize("exchange", ["rotate", "sharded"])
def test_bytes_between_nodes_follow_the_ring_model(ranks4, tmp_path, exchange):
    """Eight steps at B = 4: two exchanges in flight and the one that ends the epoch, each 2 ways x the parameters."""
    kwargs = {"skip": 4, "wait": 1, "wire_dtype": "fp32", "exchange": exchange}
    found = ranks4(traffic, str(tmp_path), kwargs)
    parameters = 4 * 74
    assert sum(f["inter_node_bytes"] for f in found) == 3 * 2 * parameters
    # Gradients, every step, two nodes, and what spreads the result of each exchange within both.
    within = sum(f["intra_node_bytes"] for f in found) - 8 * 2 * 2 * parameters
    assert within == (3 * 2 * parameters * 2 if exchange == "rotate" else 3 * 2 * parameters)


def traffic_of_state(folder, exchange):
    """Eight steps that are waited for, with running statistics and the momenta of AdamW."""
    module = nets.Regression(nets.network(torch.float32, norm=True), lambda p: torch.optim.AdamW(p, 0.01))
    strategy = DASO(1, 0, local_size=2, wire_dtype="fp32", exchange=exchange, sync_optimizer="warm_end")
    nets.fit(strategy, folder, module=module, epochs=2, max_steps=8)
    seen = torch.cat([nets.weights(module), *(b.double().reshape(-1) for b in module.buffers())])
    return strategy.ledger.totals()["inter_node_bytes"], seen


@pytest.mark.parametrize("exchange", ["rotate", "sharded"])
def test_statistics_and_momenta_cross_the_slow_network_once_per_node(ranks4, tmp_path, exchange):
    found = ranks4(traffic_of_state, str(tmp_path), exchange)
    parameters, statistics, momenta = 90, 16, 2 * 90
    counts = 2 * 6 * 8 * 2  # of what six parameters keep, 8 bytes each, by both ranks of a node
    expected = 2 * 4 * (8 * (parameters + statistics) + momenta) + 2 * counts
    assert sum(sent for sent, _ in found) == expected
    assert all(torch.equal(seen, found[0][1]) for _, seen in found)
