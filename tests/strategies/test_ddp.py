"""Synchronous baselines: equal to one process, whole or compressed, counted, and on the emulated network."""

from __future__ import annotations

import time

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from callbacks.communication import Communication
from parallel.gradient_hooks import PowerSGDHook
from strategies.daso import DASO
from strategies.ddp import DDP
from strategies.diloco import DiLoCo
from tests.strategies import nets
from tests.strategies.test_daso import SaveAt


def trained(folder, kwargs, dtype=torch.float64, epochs=3):
    strategy = DDP(local_size=2, **kwargs)
    module, _ = nets.fit(strategy, folder, module=nets.Regression(nets.network(dtype)), epochs=epochs)
    return nets.weights(module), strategy.ledger.totals()


def test_data_parallelism_equals_one_process(ranks4, tmp_path):
    alone, _ = nets.fit("auto", str(tmp_path), devices=1)
    for weights, _ in ranks4(trained, str(tmp_path), {}):
        torch.testing.assert_close(weights, nets.weights(alone), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "share", "tolerance"),
    [
        ({}, 1.0, 1e-5),
        ({"compression": "bf16"}, 0.5, 0.05),
        ({"compression": "fp16"}, 0.5, 0.02),
    ],
)
def test_bytes_and_accuracy_of_compressed_gradients(ranks4, tmp_path, kwargs, share, tolerance):
    alone, _ = nets.fit("auto", str(tmp_path), devices=1, module=nets.Regression(nets.network(torch.float32)))
    found = ranks4(trained, str(tmp_path), kwargs, torch.float32)
    for weights, _ in found:
        assert torch.equal(weights, found[0][0])
        torch.testing.assert_close(weights, nets.weights(alone), atol=tolerance, rtol=0)
    inter = sum(totals["inter_node_bytes"] for _, totals in found)
    assert inter == 24 * 3 * share * 4 * 74  # 24 steps, 1.5 x in both directions
    assert inter == sum(totals["intra_node_bytes"] for _, totals in found)


def powersgd(folder, at, norm=False):
    """Weights and numbers of a whole run and of one that was stopped after so many steps."""

    def strategy():
        return DDP(compression="powersgd", powersgd_rank=1, powersgd_start=4, local_size=2)

    def module():
        return nets.Regression(nets.network(torch.float32, norm))

    path = f"{folder}/p{at}.ckpt"
    whole, resumed = strategy(), strategy()
    a, _ = nets.fit(whole, folder, module=module(), callbacks=(SaveAt(at, path),))
    b, _ = nets.fit(resumed, folder, module=module(), ckpt_path=path)
    errors = torch.load(path, weights_only=True)["strategy"]["powersgd"]
    return {"weights": (nets.weights(a), nets.weights(b)), "error": nets.error(a), "saved": errors,
            "bytes": (whole.ledger.totals(), resumed.ledger.totals())}  # fmt: skip


def test_powersgd_learns_with_fewer_bytes(ranks4, tmp_path):
    found = ranks4(powersgd, str(tmp_path), 13)
    whole, factors = 74, (8 + 6) + 16 + 10  # one weight as rank-one factors; the other is too small; biases
    for part in (0, 1):  # also of a run that stopped
        inter = sum(rank["bytes"][part]["inter_node_bytes"] for rank in found)
        assert inter == 3 * 4 * (4 * whole + 20 * factors)
    for rank in found:
        assert rank["error"] < 0.95 * nets.error(nets.Regression())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("at", [2, 4, 5, 13])
def test_powersgd_goes_on_with_the_errors_and_factors_of_every_rank(ranks2, tmp_path, at, norm):
    """Before, at and after the first compressed step: bit for bit."""
    found = ranks2(powersgd, str(tmp_path), at, norm)
    for rank in found:
        whole, resumed = rank["weights"]
        assert torch.equal(whole, resumed) and torch.equal(whole, found[0]["weights"][0])
    one, other = found[0]["saved"]
    if at > 4:
        assert one["factors"].keys() == {"net.0.weight"} and one["steps"] == at
        assert torch.equal(one["factors"]["net.0.weight"], other["factors"]["net.0.weight"])
        assert not torch.equal(one["errors"]["net.0.weight"], other["errors"]["net.0.weight"])
        mean = {name: (error + other["errors"][name]) / 2 for name, error in one["errors"].items()}
        assert mean["net.0.weight"].norm() > 1e-3
        assert mean["net.0.bias"].norm() < 1e-6  # was sent whole: ranks differ from their mean, which everybody has
    else:
        assert one["errors"] == {} == one["factors"]


class SaveFrozen(SaveAt):
    """The first layer learns nothing while the checkpoint is written."""

    def on_train_batch_end(self, trainer, module, *args):
        module.net[0].requires_grad_(False)
        super().on_train_batch_end(trainer, module, *args)
        module.net[0].requires_grad_(True)


def frozen(folder):
    path = f"{folder}/frozen.ckpt"
    strategy = DDP(compression="powersgd", powersgd_start=2, local_size=1)
    nets.fit(strategy, folder, epochs=2, callbacks=(SaveFrozen(12, path),))
    return sorted(torch.load(path, weights_only=True)["strategy"]["powersgd"][0]["errors"])


def test_powersgd_saves_what_is_left_of_a_layer_that_stopped_to_learn(ranks2, tmp_path):
    names = [name for name, _ in nets.Regression().named_parameters()]
    assert ranks2(frozen, str(tmp_path)) == [sorted(names)] * 2


def unused(folder):
    strategy = DDP(compression="powersgd", find_unused_parameters=True, local_size=1)
    with pytest.raises(ValueError, match=r"strategy\.find_unused_parameters=true .* use strategy\.compression=bf16"):
        nets.fit(strategy, folder)
    return True


def test_powersgd_over_gloo_cannot_look_for_unused_parameters(ranks2, tmp_path):
    """A rank would crash, and the others wait for it."""
    assert ranks2(unused, str(tmp_path)) == [True, True]


def fewer_ranks(folder, path):
    strategy = DDP(compression="powersgd", powersgd_rank=1, powersgd_start=4, local_size=1)
    saved = []

    class Look(nets.pl.Callback):
        def on_train_start(self, trainer, module):
            saved.append(strategy.state_dict())

    nets.fit(strategy, folder, module=nets.Regression(nets.network(torch.float32)), ckpt_path=path, callbacks=(Look(),))
    return saved[0].get("powersgd")


def test_fewer_ranks_share_what_had_not_been_sent(ranks4, ranks2, tmp_path):
    """The mean over ranks of the errors, which the next step adds to the gradients, is the same."""
    before = ranks4(powersgd, str(tmp_path), 13)[0]["saved"]
    after = ranks2(fewer_ranks, str(tmp_path), f"{tmp_path}/p13.ckpt")[0]
    assert len(before) == 4 and len(after) == 2
    for name in ("net.0.weight", "net.2.weight"):
        mean = torch.stack([one["errors"][name] for one in before]).mean(0)
        for one in after:
            torch.testing.assert_close(one["errors"][name], mean)


def test_errors_and_factors_follow_their_parameters_from_bucket_to_bucket():
    hook = PowerSGDHook.__new__(PowerSGDHook)
    hook.state = powerSGD_hook.PowerSGDState(None, 2, 2)
    hook._buckets, hook._apart = {}, {}
    shapes = [(20, 9), (5,), (30, 10), (20, 9), (2, 2)]
    parameters = [torch.zeros(shape) for shape in shapes]
    errors = {id(p): torch.randn(p.numel()) for p in parameters}
    factors = {id(p): torch.randn(2 * p.shape[1]) for p, s in zip(parameters, shapes, strict=True) if s[0] >= 20}
    names = {id(p): f"p{i}" for i, p in enumerate(parameters)}
    hook._apart = {key: (errors[key], factors.get(key)) for key in errors}
    a, b, c, d, e = parameters
    for arrangement in ([[a, b, c, d, e]], [[e, d, c], [b, a]], [[c], [d, e, a, b]], [[b, a], [e, d, c]]):
        for index, members in enumerate(arrangement):
            hook._arrange(index, members, torch.zeros(()))
        for index, members in enumerate(arrangement):
            assert torch.equal(hook.state.error_dict[index], torch.cat([errors[id(p)] for p in members]))
        assert hook.state.p_memory_dict[0].numel() + sum(
            hook.state.p_memory_dict[i].numel() for i in range(1, len(arrangement))
        ) == 2 * (20 + 30 + 20)
        kept = hook.state_dict(names)
        assert {name: v.tolist() for name, v in kept["errors"].items()} == {
            names[key]: v.tolist() for key, v in errors.items()
        }
        assert {name: v.tolist() for name, v in kept["factors"].items()} == {
            names[key]: v.tolist() for key, v in factors.items()
        }
    # Weights of one shape stand together in torch's memory: c is not between a and d.
    hook._arrange(0, [a, c, d], torch.zeros(()))
    expected = torch.cat([factors[id(p)] for p in (a, d, c)])
    assert torch.equal(hook.state.q_memory_dict[0], expected)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"compression": "int8"}, r"strategy\.compression='int8': choose none, fp16, bf16 or powersgd"),
        ({"powersgd_rank": 0}, r"strategy\.powersgd_rank=0"),
        ({"powersgd_start": 1}, r"strategy\.powersgd_start=1"),
        ({"compute_ms": -1}, r"cluster\.compute_ms=-1"),
    ],
)
def test_impossible_settings(kwargs, text):
    with pytest.raises(ValueError, match=text):
        DDP(**kwargs)


# ------------------------------------------------------------------------------------------------------- the network


def timed(folder, rate):
    strategy = DDP(local_size=2, rate_mbit=rate, compute_ms=5)
    begin = time.perf_counter()
    nets.fit(strategy, folder, module=nets.Regression(nets.network(torch.float32)), epochs=1)
    return time.perf_counter() - begin


def test_a_slow_network_slows_ddp_by_what_it_sends(ranks4, tmp_path):
    """8 steps of 1.5 x 296 bytes at 8.88 kB/s are 50 ms each."""
    assert min(ranks4(timed, str(tmp_path), 0.07104)) >= 8 * 0.055


# ------------------------------------------------------------------------------------------ local SGD and DiLoCo


def average_only(folder):
    local, _ = nets.fit(DASO(0, 0, skip=8, wait=0, schedule="fixed", wire_dtype="fp32", local_size=2), folder)
    outer, _ = nets.fit(DiLoCo(period=8, outer_lr=1.0, outer_momentum=0.0, local_size=2), folder)
    return nets.weights(local), nets.weights(outer)


def test_diloco_with_a_plain_outer_step_is_local_sgd(ranks4, tmp_path):
    for local, outer in ranks4(average_only, str(tmp_path)):
        torch.testing.assert_close(local, outer, atol=1e-12, rtol=0)


def diloco(folder):
    def strategy():
        return DiLoCo(period=5, outer_lr=0.5, outer_momentum=0.5, local_size=2)

    path = f"{folder}/d.ckpt"
    whole, _ = nets.fit(strategy(), folder, epochs=4, callbacks=(SaveAt(14, path),))
    again, _ = nets.fit(strategy(), folder, epochs=4, ckpt_path=path)
    torch.load(path, weights_only=True)
    return nets.weights(whole), nets.weights(again), nets.error(whole)


def test_diloco_learns_and_resumes_exactly(ranks4, tmp_path):
    found = ranks4(diloco, str(tmp_path))
    for whole, again, error in found:
        assert torch.equal(whole, again) and torch.equal(whole, found[0][0])
        assert error < 0.95 * nets.error(nets.Regression())


def one_outer_step(folder):
    module, _ = nets.fit(
        DiLoCo(period=4, outer_lr=0.7, outer_momentum=0.9, local_size=2), folder, epochs=1, max_steps=4
    )
    alone = []
    for node in range(2):
        net = nets.Regression()
        optimizer = net.configure_optimizers()
        alone.append((net, optimizer, node))
    return nets.weights(module)


def test_an_outer_step_follows_algorithm_1(ranks4, tmp_path):
    from tests.strategies.test_daso import rank_batches

    x, y = nets.samples()
    start, ends, shares = nets.weights(nets.Regression()), [], rank_batches(0, 4)
    for node in range(2):
        net = nets.Regression()
        optimizer = net.configure_optimizers()
        for step in range(4):
            optimizer.zero_grad()
            indices = [shares[2 * node + i][step] for i in range(2)]
            (sum(torch.nn.functional.mse_loss(net.net(x[i]), y[i]) for i in indices) / 2).backward()
            optimizer.step()
        ends.append(nets.weights(net))
    gradient = start - (ends[0] + ends[1]) / 2
    expected = start - 0.7 * (gradient + 0.9 * gradient)
    for weights in ranks4(one_outer_step, str(tmp_path)):
        torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------- the communication


def reported(folder, trace):
    callback = Communication(trace=trace)
    module = nets.Regression(nets.network(torch.float32))
    _, trainer = nets.fit(DDP(local_size=2), folder, module=module, epochs=2, callbacks=(callback,))
    return callback.summary, {k: float(v) for k, v in trainer.callback_metrics.items()}


def counted_twice(folder):
    def fit(**kwargs):
        callback, module = Communication(), nets.Regression(nets.network(torch.float32))
        more = kwargs.pop("callbacks", ())
        strategy = DDP(local_size=2)
        _, trainer = nets.fit(strategy, folder, module=module, epochs=2, callbacks=(callback, *more), **kwargs)
        bytes_ = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("comm/")}
        return {k: callback.summary[k] for k in ("steps", "inter_node_bytes", "operations")}, bytes_

    path = f"{folder}/c.ckpt"
    found = [fit(callbacks=(SaveAt(step, path),)) + fit(ckpt_path=path) for step in (8, 11)]
    return found


def test_a_restart_in_the_middle_of_an_epoch_counts_the_whole_training(ranks4, tmp_path):
    for rank in ranks4(counted_twice, str(tmp_path)):
        for whole, bytes_, again, bytes_again in rank:
            assert whole == again and bytes_ == bytes_again
            assert whole["steps"] == 16


def test_the_ledger_and_the_trace_agree_on_gradients(ranks4, tmp_path):
    for summary, metrics in ranks4(reported, str(tmp_path), False):
        assert summary["inter_node_bytes"] == 16 * 3 * 4 * 74
        assert summary["steps"] == 16 and summary["inter_node_bytes_per_step"] == 3 * 4 * 74
        assert metrics["comm/inter_node_bytes"] == 8 * 3 * 4 * 74  # of the last epoch
        assert summary["operations"]["all_reduce/inter_node"]["calls"] == 16
        assert summary["blocked_s"] >= 0
    traced = ranks4(reported, str(tmp_path), True)
    for summary, _ in traced:
        assert summary["operations"]["all_reduce/inter_node"]["payload_bytes"] == 16 * 4 * 74


# ------------------------------------------------------------------------------------------------- uneven evaluation


class Uneven(nets.Data):
    """Five samples to evaluate, two at a time: rank 0 of two has two batches, rank 1 one."""

    def val_dataloader(self):
        data = torch.utils.data.Subset(self.data, range(5))
        return nets.make_loader(data, 4, layout=self.trainer.distributed_sampler_kwargs)


class Counted(nets.Regression):
    """Batch norm has buffers, which DDP would broadcast in a forward pass that other ranks never make."""

    def __init__(self):
        super().__init__(nets.network(norm=True))
        self.seen = 0

    def validation_step(self, batch, batch_idx):
        self.seen += len(self.net(batch[0]))


def uneven(folder, kind):
    module, strategy = Counted(), {"ddp": DDP, "diloco": DiLoCo}[kind](local_size=1)
    nets.fit(strategy, folder, module=module, epochs=1, datamodule=Uneven())
    return module.seen


@pytest.mark.parametrize("kind", ["ddp", "diloco"])
def test_ranks_with_fewer_evaluation_steps_do_not_hang_the_others(ranks2, tmp_path, kind):
    assert ranks2(uneven, str(tmp_path), kind) == [3, 2]


# ------------------------------------------------------------------------------- parameters that a callback exchanges


class Exchange(nets.pl.Callback):
    """Replaces a weight by another of another size after a step, as low-rank methods do."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step != 5:
            return
        trainer.strategy.synchronize()
        optimizer = trainer.optimizers[0]
        old, new = module.net[2], torch.nn.Linear(nets.HIDDEN, nets.OUT, bias=False).double()
        with torch.no_grad():
            new.weight.copy_(old.weight)
        module.net[2] = new
        kept = [p for p in optimizer.param_groups[0]["params"] if p is not old.weight and p is not old.bias]
        optimizer.param_groups[0]["params"] = [*kept, new.weight]
        trainer.strategy.model._remove_autograd_hooks()
        trainer.strategy.model = module
        trainer.strategy.configure_ddp()


def exchanged(folder):
    found = []
    for strategy in (DASO(0, 0, skip=3, wait=2, local_size=2), DiLoCo(period=3, local_size=2)):
        module, _ = nets.fit(strategy, folder, epochs=2, callbacks=(Exchange(),))
        found.append(nets.weights(module))
    return found


def test_callbacks_may_exchange_parameters(ranks4, tmp_path):
    found = ranks4(exchanged, str(tmp_path))
    for weights in found:
        for mine, first in zip(weights, found[0], strict=True):
            assert mine.numel() == 74 - nets.OUT
            assert torch.equal(mine, first) and torch.isfinite(mine).all()
