"""Modules of coincidences: what they learn, what their table says, and what they refuse."""

from __future__ import annotations

import functools
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from datamodules.pet_events import PETEvents
from lightning_modules.coincidence.competing_lines import CompetingLines
from lightning_modules.coincidence.pairs import PairScorer
from lightning_modules.coincidence.petnet import PETNet
from lightning_modules.coincidence.sorters import Sorter, counts_by_sample, tuned
from lightning_modules.metrics.coincidence import PairScores, SpikeScores, bootstrap_f1
from networks.competing_lines import CompetingLines as Lines
from networks.petnet import LORNetwork, PairNetwork, RingPETNet
from networks.petnet import PETNet as Net
from physics.pet.hits import Pairs, true_pairs
from physics.pet.matching import SpikeCounts

ADAM = functools.partial(torch.optim.Adam, lr=2e-2)
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def data(**changes):
    settings = {
        "scanner": "toy24", "num_train": 600, "num_val": 200, "num_test": 300, "num_steps": 100, "rate": 2.0,
        "efficiency": 0.3, "delay_trials": 8, "batch_size": 30, "eval_batch_size": 100,
    }  # fmt: skip
    return PETEvents(**(settings | changes))


def trainer(epochs=1, **options):
    return pl.Trainer(accelerator="cpu", max_epochs=epochs, use_distributed_sampler=False, **QUIET, **options)


@pytest.fixture(scope="module")
def ring():
    """A ring network after three epochs, its DataModule, its table, and the test's metrics."""
    pl.seed_everything(0, verbose=False)
    module = PETNet(RingPETNet("toy24"), ADAM, silence=8, tolerance=0, compare_lor=True)
    source, run = data(), trainer(3)
    run.fit(module, datamodule=source)
    (metrics,) = run.test(module, datamodule=source, verbose=False)
    return module, source, {row["method"]: row for row in module.results_table()}, metrics


def test_a_ring_network_learns_its_scanner(ring):
    module, _, table, metrics = ring
    assert metrics["test/f1"] >= 0.97 and metrics["test/pair_f1"] >= 0.97 and metrics["test/time_error_steps"] == 0
    assert metrics["test/f1"] == pytest.approx(float(table["snn"]["f1"]))
    kernel = module.net.kernel[0].detach()
    facing = [(12 + k) % 24 for k in range(-2, 3)]
    others = [k for k in range(1, 24) if k not in facing]
    # Crystals that face each other hear each other best.
    assert kernel[facing].min() > kernel[others].max() and kernel[0] > 0.4
    assert kernel[facing].mean() > 2 * kernel[others].abs().mean()


def test_the_table_has_all_methods_on_the_same_samples(ring):
    _, source, table, metrics = ring
    assert list(table) == ["snn", "lor_snn", "scw_paper", "scw_raw", "scw", "scw_geometry", "take_winner_of_goods"]
    assert {float(row["hits"]) for row in table.values()} == {len(source.parts["test"])}
    assert table["scw_paper"]["window"] == 8 and table["scw"]["window"] == 0
    for row in table.values():
        assert row["f1_low"] <= row["f1"] <= row["f1_high"] and row["hits_per_s"] > 0
        assert row["precision"] == pytest.approx(1 - float(row["randoms_fraction"]), abs=1e-6)
    f1 = {name: float(row["f1"]) for name, row in table.items()}
    assert f1["scw_paper"] <= f1["scw_raw"] < f1["scw"] <= f1["scw_geometry"] <= f1["lor_snn"]
    assert not any("hits_per_s" in name for name in metrics), "equal runs have equal metrics"


def test_steps_return_what_figures_and_lists_need(ring):
    module, source, _, _ = ring
    run = trainer()
    outputs = run.predict(module, datamodule=source)
    hits = np.concatenate([o["hits"].numpy() for o in outputs])
    assert len(hits) == len(source.parts["test"]) and hits[:, 0].max() < 300
    for out in outputs:
        table = source.prediction_table(out)
        assert list(table) == ["sample", "crystal_a", "crystal_b", "step", "time_ns", "score", "same_decay"]
        assert (table["crystal_a"] != table["crystal_b"]).all()
        known = {(s, c) for s, c in out["hits"][:, :2].tolist()}
        assert all((s, a) in known and (s, b) in known for s, a, b in out["prediction"][:, :3].tolist())


def test_silence_is_skipped_without_a_difference(ring):
    module, source, _, _ = ring
    trainer().validate(module, datamodule=source, verbose=False)  # attaches the DataModule
    batch = next(iter(source.val_dataloader()))
    hits = module.hits_of(batch, True)
    short = module.find(batch, hits)
    module.silence, kept = None, module.silence
    try:
        whole = module.find(batch, hits)
    finally:
        module.silence = kept
    assert set(zip(*(v.tolist() for v in short.spikes), strict=True)) == set(
        zip(*(v.tolist() for v in whole.spikes), strict=True)
    )
    assert short.loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)


def test_several_objectives(ring):
    module, source, _, _ = ring
    batch = next(iter(source.val_dataloader()))
    own = PETNet(Net("toy24", [16], beta=0.5), None, timing="soft", activity_weight=0.1, count_weight=2.0)
    for layer in own.net.spiking.linear:
        layer.weight.detach().mul_(4)
    own.trainer = module.trainer
    events, clock = own.events(batch, True, None)
    parts = own.objective(batch, own.net.layers(events), clock)
    assert set(parts) == {"count", "timing", "activity"} and all(v >= 0 for v in parts.values())
    alone = PETNet(own.net, None, timing="none")
    alone.trainer = module.trainer
    assert parts["count"].item() == pytest.approx(
        2 * alone.objective(batch, own.net.layers(events), clock)["count"].item()
    )


def test_lines_need_no_training():
    module = PETNet(LORNetwork("toy24"), None, tolerance=0, reach=0, pair_window=0)
    (metrics,) = trainer().test(module, datamodule=data(), verbose=False)
    assert metrics["test/f1"] >= 0.98 and metrics["test/operations_per_hit"] > 5


def high_activity():
    return data(
        kind="physics", scanner="safir2880", num_steps=2000, num_train=200, num_val=40, num_test=80, align="true",
        activity_bq=3e8, batch_size=25,
    )  # fmt: skip


def test_pairs_are_scored_better_than_sorted():
    pl.seed_everything(0, verbose=False)
    source = high_activity()
    module = PairScorer(PairNetwork(hidden=[32]), ADAM, baselines=["scw", "scw_geometry", "take_all_goods"])
    run = trainer(4)
    run.fit(module, datamodule=source)
    (metrics,) = run.test(module, datamodule=source, verbose=False)
    assert metrics["test/f1"] > metrics["test/scw_geometry_f1"] > metrics["test/scw_f1"]
    assert metrics["test/f1"] > 0.88 and float(module.threshold) != 0
    outputs = run.predict(module, datamodule=source)
    scores = torch.cat([o["prediction"][:, 4] for o in outputs])
    same = torch.cat([o["prediction"][:, 5] for o in outputs])
    assert 0 < scores.min() < scores.max() <= 1
    assert abs(float(scores.mean() - same.mean())) < 0.08, "scores are probabilities"


def test_lines_compete_for_hits():
    pl.seed_everything(0, verbose=False)
    source = high_activity()
    module = CompetingLines(Lines(), ADAM, baselines=["scw", "scw_geometry", "take_all_goods"])
    run = trainer(8)
    run.fit(module, datamodule=source)
    (metrics,) = run.test(module, datamodule=source, verbose=False)
    assert metrics["test/f1"] > metrics["test/scw_geometry_f1"] > metrics["test/scw_f1"]
    assert metrics["test/f1"] > 0.9 and metrics["test/pair_f1"] > 0.9 and metrics["test/operations_per_hit"] > 656
    assert module.net.across[:10].min() > module.net.across[17:].max(), "lines that face each other are heavier"
    outputs = run.predict(module, datamodule=source)
    listed = torch.cat([o["prediction"] for o in outputs])
    ends = torch.cat([listed[:, [0, 1]], listed[:, [0, 2]]])
    assert len(ends.unique(dim=0)) > 0.98 * len(ends), "a hit is in one coincidence"
    score, same = listed[:, 4], listed[:, 5]
    sure = score > score.median()
    assert 0 < score.min() < score.max() < 1 and same[sure].mean() > same[~sure].mean() + 0.05
    with pytest.raises(ValueError, match="window=-1"):
        CompetingLines(Lines(), None, window=-1)


def without_truth(source):
    source.setup()
    source.parts = {name: replace(hits, decay=np.full(len(hits), -1)) for name, hits in source.parts.items()}
    return source


@pytest.mark.parametrize("kind", ["scorer", "lines"])
def test_hits_without_truth_are_listed_with_the_threshold_of_training(kind):
    pl.seed_everything(0, verbose=False)
    source = high_activity()
    module = (
        PairScorer(PairNetwork(hidden=[16]), ADAM, baselines=[])
        if kind == "scorer"
        else CompetingLines(Lines(), ADAM, baselines=[])
    )
    run = trainer(1)
    run.fit(module, datamodule=source)
    known = torch.cat([o["prediction"] for o in run.predict(module, datamodule=source)])
    module._runner = None  # as in a new process, from a checkpoint
    unknown = torch.cat([o["prediction"] for o in trainer().predict(module, datamodule=without_truth(source))])
    assert len(known) > 100 and torch.equal(known[:, :5], unknown[:, :5])
    with pytest.raises(ValueError, match="no coincidence to learn from"):
        trainer(1).fit(module, datamodule=without_truth(high_activity()))


def test_validation_without_coincidences(caplog):
    source = high_activity()
    source.setup()
    source.parts["val"] = without_truth(high_activity()).parts["val"]
    module = CompetingLines(Lines(), ADAM, baselines=[])
    run = trainer(1)
    run.fit(module, datamodule=source)
    assert float(module.net.threshold) == 1 and run.callback_metrics["val/f1"] == 0
    run.test(module, datamodule=source, verbose=False)
    assert "no known coincidence in the validation part:" in caplog.text


@pytest.mark.parametrize(("spread", "said"), [(20, False), (8, True)])
def test_lines_that_miss_a_part_of_the_source_are_said(spread, said, caplog):
    net = Lines(spread=spread)
    assert net.reach_mm == pytest.approx(64 * np.cos(np.deg2rad(90 - 2 * spread / 2)))
    source = high_activity()
    trainer().validate(CompetingLines(net, None), datamodule=source, verbose=False)
    assert ("use a larger spread" in caplog.text) == said


def test_spikes_of_a_neuron():
    module = PETNet(LORNetwork("toy24"), None, tolerance=0, reach=0, pair_window=0, baselines=[])
    source = data(num_train=600)
    (metrics,) = trainer().test(module, datamodule=source, verbose=False)
    spikes = 0
    for batch in source.test_dataloader():
        events, _ = module.events(batch, True, None)
        layers = [trace.spikes for trace in module.net.layers(events)]
        spikes += sum(float(layer.sum()) for layer in layers)
    neurons = sum(layer.shape[2] for layer in layers)
    samples = source.parts["test"].num_samples
    assert metrics["test/spikes_per_neuron"] == pytest.approx(spikes / neurons / samples, rel=1e-4) and spikes > 100


def test_a_checkpoint_restores_the_module(ring, tmp_path):
    _, source, _, _ = ring
    run = trainer(1, default_root_dir=tmp_path)
    run.fit(PETNet(RingPETNet("toy24"), ADAM, silence=8), datamodule=source)
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["silence"] == 8
    again = PETNet(RingPETNet("toy24"), ADAM, silence=8)
    again.load_state_dict(stored["state_dict"])


# ----------------------------------------------------------------------------------------------- metrics and sorters


def test_pair_scores_add_up():
    whole, parts = PairScores(), [PairScores(), PairScores()]
    generator = torch.Generator().manual_seed(0)
    for k in range(4):
        by_sample = torch.randint(1, 5, (6, 3), generator=generator)
        by_sample[:, 0] = by_sample.min(1).values
        counts = dict(zip(("correct", "pairs", "true"), by_sample.sum(0).tolist(), strict=True))
        counts |= {"randoms": 1, "scattered": 2, "multiples": 0, "hits": 30, "seconds": 0.5}
        for metric in (whole, parts[k % 2]):
            metric.update(counts, by_sample)
    found = whole.compute()
    assert found["hits_per_s"] == 60 and found["f1_low"] < found["f1"] < found["f1_high"]
    total = whole.sums
    assert torch.equal(parts[0].sums + parts[1].sums, total)
    assert found["f1"] == 2 * total[1] / (total[0] + total[2])
    assert whole.to(torch.bfloat16).sums.dtype == torch.float64


def test_interval_of_f1_is_that_of_a_binomial():
    correct = torch.zeros(2000, 3, dtype=torch.float64)
    correct[:, 1:] = 1
    correct[: int(2000 * 0.9), 0] = 1
    low, high = bootstrap_f1(correct)
    width = 2 * 1.96 * (0.9 * 0.1 / 2000) ** 0.5
    assert float(high - low) == pytest.approx(width, rel=0.15) and low < 0.9 < high


def test_spike_scores():
    metric = SpikeScores()
    metric.update(SpikeCounts(10, 8, 6, 3, 2, 2.0, 4))
    found = metric.compute()
    assert found["hit_precision"] == 0.6 and found["hit_recall"] == 0.75 and found["time_error_steps"] == 0.5
    assert found["pair_precision"] == 0.5 and found["pair_recall"] == 0.5 and found["pair_f1"] == 0.5
    silent = SpikeScores()
    silent.update(SpikeCounts(0, 8, 0, 0, 0, 0.0, 4))
    assert "time_error_steps" not in silent.compute() and silent.compute()["pair_f1"] == 0  # no NaN in a table


def test_settings_of_sorters_are_chosen():
    source = data(num_train=3000)
    source.setup()
    raw = source.parts["val"]
    aligned = raw.shifted(source.delays)
    angles = (0.0, 90.0, 150.0)
    assert tuned("scw_paper", raw, aligned, source.layout, (0, 1), angles) == Sorter("scw_paper", 8)
    assert tuned("scw", raw, aligned, source.layout, (0, 1, 3), angles).window == 0
    best = tuned("scw_raw_geometry", raw, aligned, source.layout, (0, 1), angles)
    assert best.window > 1 and best.min_angle_degree == 150 and not best.calibrated
    assert tuned("take_all_goods", raw, aligned, source.layout, (0, 1), angles).window == 0


def test_counts_by_sample_add_up():
    source = data()
    source.setup()
    hits = source.parts["val"]
    true = true_pairs(hits)
    wrong = Pairs(np.array([0]), np.array([1]))
    found = counts_by_sample(hits, Pairs(*(np.concatenate(x) for x in zip(true, wrong, strict=True))), true)
    assert found.shape == (200, 3) and (found[:, 2] == found[:, 1] - (np.arange(200) == hits.sample[0])).all()
    assert found[:, 0].sum() >= len(true.first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": "l2"}, "model.count"),
        ({"timing": "late"}, "model.timing"),
        ({"timing_weight": -1.0}, "model.timing_weight"),
        ({"tau": 0.0}, "model.tau"),
        ({"silence": 0}, "model.silence"),
        ({"baselines": ["nope"]}, "model.baselines"),
        ({"windows": [-1]}, "model.windows"),
        ({"tolerance": -1}, "model.tolerance"),
    ],
)
def test_wrong_values(changes, words):
    with pytest.raises(ValueError, match=words):
        PETNet(Net("toy24", [4]), None, **changes)


def test_the_network_of_another_scanner():
    with pytest.raises(ValueError, match=r"240 crystals, the data have 24"):
        trainer().test(PETNet(RingPETNet("clinical240"), None), datamodule=data(num_train=600), verbose=False)


@pytest.mark.parametrize("net", [Lines, RingPETNet])
def test_the_network_of_other_rings(net):
    """As many crystals, but other ones face each other."""
    source = data(scanner="safir2880", scanner_changes={"crystals_per_ring": 160, "num_rings": 18}, num_train=50)
    module = CompetingLines(net(), None) if net is Lines else PETNet(net("safir2880"), None)
    with pytest.raises(ValueError, match=r"180 crystals times 16, the data have 160 times 18"):
        trainer().test(module, datamodule=source, verbose=False)


def test_wrong_values_of_the_scorer():
    with pytest.raises(ValueError, match="window=-1"):
        PairScorer(PairNetwork(), None, window=-1)
    with pytest.raises(ValueError, match="min_angle_degree"):
        PairScorer(PairNetwork(), None, min_angle_degree=180.0)
