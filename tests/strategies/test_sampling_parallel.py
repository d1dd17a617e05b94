"""Sampling parallelism against one process, on any mesh, after a restart; its checks, counts and hints."""

from __future__ import annotations

import logging
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from callbacks.communication import Communication
from callbacks.gathering import gather_to_rank_zero, repeats_items
from parallel.phase_times import PhaseTimes
from strategies.sampling_parallel import SamplingParallel, checksum
from tests.ranks import Ranks
from tests.strategies import nets, sampled
from tests.strategies.test_daso import SaveAt


def state(module):
    """Parameters and running statistics."""
    return torch.cat([t.double().reshape(-1) for t in module.net.state_dict().values()])


def numbers(found):
    return {name: float(value) for name, value in found.items()}


def trained(folder, cases):
    """For each (K, arguments): state and metrics of the last validation."""
    results = []
    for size, kwargs in cases:
        strategy = SamplingParallel(sample_parallel_size=size, **kwargs.get("strategy", {}))
        rest = {key: value for key, value in kwargs.items() if key != "strategy"}
        module, _ = sampled.fit(strategy, folder, **rest)
        results.append((state(module), numbers(module.found)))
    return results


def alone(folder, **kwargs):
    module, _ = sampled.fit("auto", folder, devices=1, **kwargs)
    return state(module), numbers(module.found)


def agree(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=0)
    assert found[1] == pytest.approx(expected[1], abs=tolerance)


# ----------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("objective", [pytest.param("elbo", marks=pytest.mark.slow), "predictive"])
def test_samples_on_two_processes_train_as_on_one(ranks2, tmp_path, objective):
    """Acceptance 1: (R, K) = (2, 2) and (2, 1), digits, 64-128-128-10, S = 12, 3 epochs, float64."""
    expected = alone(str(tmp_path), objective=objective)
    cases = [(2, {"objective": objective}), (1, {"objective": objective})]
    for rank in ranks2(trained, str(tmp_path), cases):
        for found in rank:
            agree(found, expected)
            assert found[1]["items"] == sampled.NUM_VAL  # no item counts twice


@pytest.mark.parametrize("objective", [pytest.param("elbo", marks=pytest.mark.slow), "predictive"])
def test_a_mesh_of_two_by_two_trains_as_one_process(ranks4, tmp_path, objective):
    """Acceptance 1: (4, 2), and uneven shares of 10 samples on 4 ranks (acceptance 3)."""
    uneven = {"samples": 10, "epochs": 1, "eval_samples": 10}
    cases = [(size, kwargs | {"objective": objective}) for size, kwargs in ((2, {}), (4, uneven))]
    expected = [alone(str(tmp_path), **kwargs) for _, kwargs in cases]
    for rank in ranks4(trained, str(tmp_path), cases):
        for found, one in zip(rank, expected, strict=True):
            agree(found, one)


@pytest.mark.slow  # pools of their own
@pytest.mark.parametrize("ranks", [1, 5])
def test_other_numbers_of_processes(tmp_path, ranks):
    """Acceptance 1, (1, 1), and acceptance 3, 12 samples on 5 ranks."""
    epochs = 3 if ranks == 1 else 1
    pool, cases = Ranks(ranks), [(ranks, {"objective": o, "epochs": epochs}) for o in ("elbo", "predictive")]
    try:
        found = pool(trained, str(tmp_path), cases)
    finally:
        pool.close()
    for i, (_, kwargs) in enumerate(cases):
        expected = alone(str(tmp_path), **kwargs)
        for rank in found:
            agree(rank[i], expected)


@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_in_single_precision_an_epoch_stays_close(ranks2, tmp_path, objective):
    """Acceptance 2."""
    kwargs = {"objective": objective, "dtype": torch.float32, "epochs": 1}
    expected = alone(str(tmp_path), **kwargs)
    for rank in ranks2(trained, str(tmp_path), [(2, kwargs)]):
        torch.testing.assert_close(rank[0][0], expected[0], atol=1e-4, rtol=0)


SHARED = {
    "dropout": {"dropout": True, "epochs": 3},  # acceptance 14
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "batch_norm": {"norm": True, "strategy": {"sync_bn": "sample"}},
    "augmented": {"scope": 4, "data": {"augment": True, "padding": 1}},
    "augmented_by_sample": {"scope": "sample", "data": {"augment": True, "padding": 1}},
}


@pytest.mark.parametrize("kind", SHARED)
def test_also_with(ranks2, tmp_path, kind):
    kwargs = {"epochs": 1} | SHARED[kind]
    expected = alone(str(tmp_path), **{key: value for key, value in kwargs.items() if key != "strategy"})
    for rank in ranks2(trained, str(tmp_path), [(2, kwargs)]):
        agree(rank[0], expected)


def test_every_rank_may_see_views_of_its_own(ranks2, tmp_path):
    data = {"augment": True, "padding": 1}
    by_rank = ranks2(trained, str(tmp_path), [(2, {"scope": "rank", "data": data, "epochs": 1})])
    agree(by_rank[0][0], alone(str(tmp_path), scope=2, data=data, epochs=1))
    shared = alone(str(tmp_path), scope="shared", data=data, epochs=1)
    assert (by_rank[0][0][0] - shared[0]).abs().max() > 1e-3


def local(folder):
    kwargs = {"sync": "local", "epochs": 1}
    return trained(folder, [(2, kwargs), (2, {"sync": "local", "samples": 2, "epochs": 1})])


def test_local_synchronisation_trains_another_objective(ranks2, tmp_path):
    """Acceptance 4: with one sample on each rank it is the ELBO."""
    exact = alone(str(tmp_path), epochs=1)[0]
    elbo = alone(str(tmp_path), epochs=1, samples=2, objective="elbo")[0]
    predictive = alone(str(tmp_path), epochs=1, samples=2)[0]
    for (biased, _), (single, _) in ranks2(local, str(tmp_path)):
        assert (biased - exact).abs().max() > 1e-4
        torch.testing.assert_close(single, elbo, atol=1e-10, rtol=0)
        assert (single - predictive).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluated(folder, samples):
    found = []
    for size in (1, 2):
        module, trainer = sampled.fit(SamplingParallel(size), folder, epochs=1, eval_samples=samples)
        part = torch.cat(module.evaluated)
        assert module.val_scores.process_group is None  # outside of an evaluation
        found.append((part, trainer.distributed_sampler_kwargs, numbers(module.found)))
    return found


def test_probabilities_and_metrics_do_not_depend_on_the_layout(ranks2, tmp_path):
    """Acceptance 13, with 64 samples."""
    module, _ = sampled.fit("auto", str(tmp_path), devices=1, epochs=1, eval_samples=64)
    whole, metrics = torch.cat(module.evaluated), numbers(module.found)
    for rank in ranks2(evaluated, str(tmp_path), 64):
        for part, layout, found in rank:
            expected = whole[layout["rank"] :: layout["num_replicas"]]
            torch.testing.assert_close(part, expected, atol=1e-12, rtol=0)
            assert found == pytest.approx(metrics, abs=1e-12)


class Outputs(nets.Regression):
    """Says what it was given."""

    def predict_step(self, batch, batch_idx):
        return {"x": batch[0][:, 0]}


class Gathered(nets.pl.Callback):
    """Collects outputs as the writers of tables and figures do."""

    def __init__(self):
        self.mine, self.parts = [], None

    def on_predict_batch_end(self, trainer, module, outputs, *args):
        self.mine.append(outputs["x"])

    def teardown(self, trainer, module, stage):
        self.parts = gather_to_rank_zero([] if repeats_items(trainer) else self.mine)


class Predicted(nets.Data):
    def predict_dataloader(self):
        return self._loader(False)


def gathered(folder):
    found = []
    for size in (1, 2, 4):
        callback = Gathered()
        os.environ["WORLD_SIZE"] = "4"  # the teardown of a run before has removed it
        trainer = nets.pl.Trainer(
            accelerator="cpu", devices=4, strategy=SamplingParallel(size), callbacks=[callback], logger=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.predict(Outputs(), datamodule=Predicted(), return_predictions=False)
        found.append(None if callback.parts is None else torch.cat([x for part in callback.parts for x in part]))
    return found


def test_collected_outputs_hold_every_item_once(ranks4, tmp_path):
    expected = nets.samples()[0][:, 0].sort().values
    for found in ranks4(gathered, str(tmp_path))[0]:
        assert torch.equal(found.sort().values, expected)


# ---------------------------------------------------------------------------------------------------------- regression


def forecasts(folder, cases):
    """For each (K, arguments): weights, metrics of the last validation, and intervals of this rank's windows."""
    results = []
    for size, kwargs in cases:
        module, trainer = sampled.fit_series(SamplingParallel(size), folder, **kwargs)
        results.append((state(module), float(module.log_sigma_y.detach()), numbers(module.found)))
        results[-1] += torch.cat(module.evaluated), trainer.distributed_sampler_kwargs
    return results


FORECASTS = {
    "dropout": {"posterior": "dropout"},  # acceptance 14
    "dropout_of_items": {"posterior": "dropout", "dropout_per_item": True, "objective": "elbo"},
    "gaussian": {},  # with ordinary dropout
    "moments": {"posterior": "dropout", "objective": "moments"},
    "predicted": {"objective": "moments", "observation": "predicted", "samples": 5},  # shares of 3 and 2
    "flipout": {"estimator": "flipout", "antithetic": True, "sample_chunk": 2},
}


@pytest.mark.parametrize("kind", FORECASTS)
def test_forecasts_with_uncertainty_do_not_depend_on_the_layout(ranks2, tmp_path, kind):
    """Training as in acceptance 1, intervals and scores as in acceptance 13, for K of 2 and 1."""
    kwargs = FORECASTS[kind]
    module, _ = sampled.fit_series("auto", str(tmp_path), devices=1, **kwargs)
    whole = torch.cat(module.evaluated)
    for rank in ranks2(forecasts, str(tmp_path), [(2, kwargs), (1, kwargs)]):
        for weights, sigma, found, part, layout in rank:
            torch.testing.assert_close(weights, state(module), atol=1e-12, rtol=0)
            assert sigma == pytest.approx(float(module.log_sigma_y.detach()), abs=1e-12)
            assert found == pytest.approx(numbers(module.found), abs=1e-10, nan_ok=True)
            expected = whole[layout["rank"] :: layout["num_replicas"]]
            torch.testing.assert_close(part, expected, atol=1e-10, rtol=0)


def few_samples(folder):
    with pytest.raises(ValueError) as error:
        sampled.fit_series(SamplingParallel(), folder, samples=3, objective="moments", sync="local")
    dist.barrier()
    sampled.fit_series(SamplingParallel(), folder, samples=3, objective="moments", epochs=1)
    return str(error.value)


def test_moments_of_one_rank_need_two_samples(ranks2, tmp_path):
    """Acceptance 16: a rank of three samples has one."""
    for text in ranks2(few_samples, str(tmp_path)):
        assert "model.num_samples=3 leaves a rank one sample" in text and "model.sync=exact" in text
        assert "model.num_samples=4 or more" in text


# ----------------------------------------------------------------------------------------------------------- restarts


def resumed(folder, first, then):
    path = f"{folder}/{first}{then}.ckpt"
    sampled.fit(SamplingParallel(first), folder, callbacks=(SaveAt(40, path),))
    torch.load(path, weights_only=True)
    module, trainer = sampled.fit(SamplingParallel(then), folder, ckpt_path=path)
    return state(module), trainer.global_step, trainer.strategy.steps


@pytest.mark.parametrize(
    ("first", "then"), [pytest.param(2, 2, marks=pytest.mark.slow), (2, 1), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_as_if_it_had_not_stopped_also_with_another_layout(ranks2, tmp_path, first, then):
    """Acceptance 12: two epochs, a checkpoint, one epoch."""
    expected = alone(str(tmp_path))[0]
    for found, step, counted in ranks2(resumed, str(tmp_path), first, then):
        assert (step, counted) == (60, 60)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"sample_parallel_size": 0}, r"strategy\.sample_parallel_size=0: it counts .* or auto"),
        ({"sample_parallel_size": "node"}, r"strategy\.sample_parallel_size='node'"),
        ({"sync_bn": "world"}, r"strategy\.sync_bn='world': choose sample or null"),
        ({"assert_replicas_equal_every_n_steps": 0}, r"strategy\.assert_replicas_equal_every_n_steps=0"),
        ({"local_size": 0}, r"cluster\.local_size=0"),
    ],
)
def test_impossible_settings(kwargs, text):
    with pytest.raises(ValueError, match=text):
        SamplingParallel(**kwargs)


def refused(folder):
    found = []
    for strategy, kwargs in [
        (SamplingParallel(3), {}),
        (SamplingParallel(4), {"samples": 3}),
        (SamplingParallel(4), {"eval_samples": 2}),
        (SamplingParallel(1), {"data": {"batch_size": 66}}),
    ]:
        with pytest.raises(ValueError) as error:
            sampled.fit(strategy, folder, epochs=1, **kwargs)
        found.append(str(error.value))
    dist.barrier()  # nobody hangs
    return found


def test_sizes_that_do_not_fit_are_refused_on_every_rank(ranks4, tmp_path):
    """Acceptance 16."""
    for size, few, few_to_evaluate, batch in ranks4(refused, str(tmp_path), timeout=30):
        assert "strategy.sample_parallel_size=3 does not divide" in size and "use one of 1, 2, 4" in size
        assert "model.num_samples=3 leaves 1 of strategy.sample_parallel_size=4 ranks without a sample" in few
        assert "=2 leaves 2 of strategy.sample_parallel_size=4" in few_to_evaluate
        assert "data.batch_size=66 cannot be split over 4 data-parallel processes" in batch


class Straying(sampled.Sampled):
    """Rank 1 changes a parameter by itself after step 7."""

    def on_train_batch_end(self, *args):
        if self.global_rank == 1 and self.trainer.global_step == 7:
            with torch.no_grad():
                self.net.layers[1].bias_mu[3] += 1e-15


def strayed(folder):
    nets.fit(
        SamplingParallel(assert_replicas_equal_every_n_steps=4), folder, module=sampled.Sampled(samples=2), epochs=1,
        datamodule=sampled.Images(test_size=360), max_steps=12,
    )  # fmt: skip
    with pytest.raises(RuntimeError) as error:
        nets.fit(
            SamplingParallel(assert_replicas_equal_every_n_steps=4), folder, module=Straying(samples=2), epochs=1,
            datamodule=sampled.Images(test_size=360), max_steps=12,
        )  # fmt: skip
    return str(error.value)


def test_replicas_that_differ_are_found_by_name(ranks2, tmp_path):
    for text in ranks2(strayed, str(tmp_path), timeout=60):
        assert "after step 8 parameter 'net.layers.1.bias_mu' differs between rank 0 and rank(s) 1" in text


def test_a_checksum_changes_with_any_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = torch.zeros(100, dtype=dtype)
        seen = {int(checksum(x))}
        for i in (0, 50, 99):
            y = x.clone()
            y[i] = 1
            seen.add(int(checksum(y)))
        assert len(seen) == 4
    assert checksum(torch.tensor([-0.0])) != checksum(torch.tensor([0.0]))


# ------------------------------------------------------------------------------------- counts, times, hints, settings


def counted(folder, trace):
    strategy = SamplingParallel(sample_parallel_size=2, local_size=2)
    told, reported = Communication(trace=trace), []
    report = strategy.report
    strategy.report = lambda: reported.append(report()) or reported[-1]
    sampled.fit(strategy, folder, epochs=1, dtype=torch.float32, callbacks=(told,))
    return told.summary["operations"], reported[0]


@pytest.mark.parametrize("trace", [False, True])
def test_what_groups_send_is_counted(ranks4, tmp_path, trace):
    """A mesh of two by two: gradients over all, one number per item and rank within each node."""
    operations, times = ranks4(counted, str(tmp_path), trace)[0]
    steps, parameters = 20, 2 * (64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10)
    assert operations["all_reduce/inter_node"]["payload_bytes"] == steps * 4 * parameters
    gathered = operations["all_gather/intra_node"]
    training = (2 * steps, 2 * steps * 2 * 32 * 4)  # two groups, two ranks each, 32 items
    if trace:
        assert (gathered["calls"], gathered["payload_bytes"]) == training
    else:  # and those of the validation: probabilities of all classes, entropies, one batch for each group
        assert gathered["calls"] == training[0] + 2
        assert gathered["payload_bytes"] == training[1] + 2 * sampled.NUM_VAL * 10 * 8
        assert operations["all_reduce/intra_node"]["payload_bytes"] == sampled.NUM_VAL * 8
    assert set(times) == {f"time/{name}_s" for name in ("forward", "backward", "optimizer", "between_steps")}
    assert all(seconds > 0 for seconds in times.values())
    assert times["time/forward_s"] + times["time/backward_s"] > times["time/between_steps_s"]


def hinted(folder, kwargs):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("strategies.sampling_parallel")  # the console shows no notes of Lightning's loggers
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        sampled.fit(SamplingParallel(), folder, epochs=1, dtype=torch.float32, **kwargs)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return [text for text in records if "too small for sampling parallelism" in text]


def test_a_small_model_is_told_that_sharing_samples_saves_no_time(ranks2, tmp_path):
    """Acceptance 10, the hint: printed once, on rank 0, for the tiny perceptron and not for the other."""
    tiny = ranks2(hinted, str(tmp_path), {"samples": 4, "hidden": (16,), "objective": "elbo"})
    assert [len(texts) for texts in tiny] == [1, 0]
    large = ranks2(hinted, str(tmp_path), {"samples": 32, "hidden": (256, 256)})
    assert [len(texts) for texts in large] == [0, 0]


class Stopwatch(nets.pl.Callback):
    """CPU time of every epoch."""

    def __init__(self):
        self.seconds = []

    def on_train_epoch_start(self, *args):
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer, *args):
        if trainer.is_last_batch:
            self.seconds.append(time.process_time() - self.begin)


def clocked(folder, kwargs):
    watch = Stopwatch()
    sampled.fit(SamplingParallel(), folder, epochs=4, dtype=torch.float32, callbacks=(watch,), **kwargs)
    return min(watch.seconds[1:])


@pytest.mark.slow
def test_two_processes_share_the_work(ranks2, tmp_path):
    """Acceptance 10: CPU time of a rank and epoch at most 0.62 of one process, 64-256-256-10 with 32 samples."""
    kwargs, one = {"samples": 32, "hidden": (256, 256)}, Ranks(1)
    try:
        pairs = [(one(clocked, str(tmp_path), kwargs), ranks2(clocked, str(tmp_path), kwargs)) for _ in range(3)]
    finally:
        one.close()
    alone, shared = (min(seconds for pair in pairs for seconds in pair[i]) for i in (0, 1))
    assert shared <= 0.62 * alone
    tiny = ranks2(hinted, str(tmp_path), {"samples": 16})  # 64-128-128-10
    assert [len(texts) for texts in tiny] == [1, 0]


def copying(folder):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        nets.fit(SamplingParallel(2), folder, epochs=1)
    return sum("Regression has no samples to share" in str(w.message) for w in said)


def test_a_module_without_samples_is_told_so(ranks2, tmp_path):
    assert ranks2(copying, str(tmp_path)) == [1, 0]


def layouts(folder):
    found = []
    for kwargs in ({}, {"local_size": 2}, {"sample_parallel_size": 1}):
        strategy = SamplingParallel(**kwargs)
        sampled.fit(strategy, folder, epochs=1, max_steps=1, samples=4)
        found.append((strategy.sample_parallel_size, strategy.distributed_sampler_kwargs))
    return found


def test_a_node_shares_its_samples_unless_told_otherwise(ranks4, tmp_path):
    for rank, (whole, nodes, data) in enumerate(ranks4(layouts, str(tmp_path))):
        assert whole == (4, {"num_replicas": 1, "rank": 0})
        assert nodes == (2, {"num_replicas": 2, "rank": rank // 2})
        assert data == (1, {"num_replicas": 4, "rank": rank})


def test_times_that_nobody_takes_do_not_pile_up():
    times = PhaseTimes(torch.device("cpu"))
    begin = times.now()
    for _ in range(5000):
        times.add("a", begin)
    assert len(times.seconds("a")) <= 1024
    total = times.take()["a"]
    assert 0 < total < 5000 * (times.now() - begin)
    assert times.take() == {}
