"""Figures of uncertain classifiers, of posteriors and of layouts, and the callbacks that note what they show."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from callbacks import layouts as comparison
from callbacks.communication import Communication
from callbacks.figures import layouts, posterior, uncertainty
from callbacks.figures.callback import FiguresCallback
from callbacks.figures.forecast import interval_fan
from callbacks.footprint import Footprint
from callbacks.posterior import Posterior, read_layers
from callbacks.run_record import RunRecord
from callbacks.training_history import TrainingHistory
from datamodules.images import Images
from lightning_modules.bayes import BayesClassifier
from networks.bayes import Init, bayesian_layers
from networks.mlp import MLP
from strategies.sampling_parallel import SamplingParallel
from tests.callbacks.recorder import Recorder
from tests.lightning_modules.tiny_series import quiet_trainer
from tests.strategies import sampled

ADAM = functools.partial(torch.optim.Adam, lr=5e-3)
FEW = {"test_size": 150, "test_from": "random", "normalize": "none", "max_train": 100, "batch_size": 25}


def classifier(classes: int = 10) -> BayesClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(num_classes=classes, hidden=[12])
    return BayesClassifier(
        net, ADAM, num_classes=classes, num_samples=2, num_eval_samples=4, top_k=None, init=Init(0.5)
    )


# ------------------------------------------------------------------------------------------------------ test outputs


def outputs(number: int = 400, classes: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probability = (4 * torch.randn(number, classes, generator=generator)).softmax(1)
    return {"probability": probability, "target": torch.randint(classes, (number,), generator=generator)}


def test_reliability_is_accuracy_over_confidence():
    out = outputs()
    figure = uncertainty.reliability_diagram(out, None, num_bins=5)
    above, below = figure.axes
    confidence, guess = out["probability"].max(1)
    error = 0.0
    bars = {round(bar.get_x(), 6): bar for bar in above.containers[0]}
    for i, images in enumerate(below.containers[0]):
        inside = (confidence >= i / 5) & ((confidence < (i + 1) / 5) | (i == 4))
        assert images.get_height() == int(inside.sum())
        if inside.any():
            accuracy = (guess == out["target"])[inside].double().mean()
            assert bars[round(i / 5, 6)].get_height() == pytest.approx(float(accuracy))
            error += float((accuracy - confidence[inside].double().mean()).abs() * inside.sum() / len(confidence))
        else:
            assert round(i / 5, 6) not in bars
    assert f"ECE {error:.3f}" in above.get_title()


def test_entropies_of_unknown_images_and_how_well_they_are_told_apart():
    out = outputs(60)
    unknown = outputs(40)["probability"] ** 0.3
    unknown /= unknown.sum(1, keepdim=True)
    out |= {
        "unknown_probability": unknown,
        "mutual_information": torch.rand(60),
        "unknown_mutual_information": unknown[:, 0],
    }
    figure = uncertainty.entropy_histograms(out, None)
    known, other = (torch.special.entr(p.double()).sum(1) for p in (out["probability"], unknown))
    area = (other[None] > known[:, None]).double().mean()
    assert len(figure.axes) == 2 and figure.axes[0].get_title() == f"area under ROC curve {area:.3f}"
    assert [t.get_text() for t in figure.axes[1].get_legend().get_texts()] == ["known (60)", "unknown (40)"]
    shares = [sum(patch.get_height() for patch in group) for group in figure.axes[0].containers if len(group) > 1]
    assert shares == pytest.approx([100, 100])


def test_without_unknown_images_wrong_predictions_stand_beside_right_ones():
    out = outputs(60)
    right = int((out["probability"].argmax(1) == out["target"]).sum())
    figure = uncertainty.entropy_histograms(out, None)
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(figure.axes) == 1 and texts == [f"right ({right})", f"wrong ({60 - right})"]


def test_unknown_images_reach_a_figure_under_names_of_their_own(tmp_path):
    seen = {}

    def keep(out, datamodule):
        seen.update(out)
        return uncertainty.entropy_histograms(out, datamodule)

    pair = [{**FEW, "classes": classes, "num_classes": 5} for classes in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])]
    data = Images(**pair[0], ood=Images(**pair[1]))
    quiet_trainer(callbacks=[FiguresCallback({"entropies": keep}, tmp_path, dpi=30)]).test(
        classifier(5), datamodule=data, verbose=False
    )
    assert seen["probability"].shape == (len(seen["target"]), 5) and "unknown_target" not in seen
    assert seen["unknown_probability"].shape == (len(data.ood.test_dataloader().dataset), 5)
    assert (tmp_path / "entropies.png").stat().st_size > 2000


def test_a_fan_needs_intervals():
    with pytest.raises(ValueError, match="lower_<percent>"):
        interval_fan({"prediction": torch.zeros(1)}, None)


# --------------------------------------------------------------------------------------------------------- posterior


def test_rows_of_the_posterior():
    layers = {
        "first": posterior.LayerWeights(np.array([0.1, -3.0, 5.0]), np.array([0.5, 1.0, 2.0]), 0.25),
        "second": posterior.LayerWeights(np.array([1.0]), np.array([2.0]), None),
        "pruned": posterior.LayerWeights(np.array([]), np.array([]), 0.25),
    }
    axes = posterior.sigma_histograms(layers).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert [line.get_xdata()[0] for line in axes.lines] == [1.0, 2.0], "medians"
    figure = posterior.signal_to_noise(layers)
    right = figure.axes[0].child_axes[0]
    assert [label.get_text() for label in right.get_yticklabels()] == ["33.3 %", "100 %"]
    assert posterior.sigma_histograms({"pruned": layers["pruned"]}) is None and posterior.signal_to_noise({}) is None


def test_the_posterior_is_drawn_with_its_beginning_after_a_restart_too(tmp_path):
    module, drawn = classifier(), Posterior(figures_dir=str(tmp_path))
    before = {name: layer.weight_sigma().median().item() for name, layer in bayesian_layers(module)}
    quiet_trainer(max_epochs=1, callbacks=[drawn]).fit(module, datamodule=Images(**FEW))
    assert {path.name for path in tmp_path.iterdir()} == {"sigma_histograms.png", "signal_to_noise.png"}
    again = Posterior()
    again.load_state_dict(drawn.state_dict())
    again.on_fit_start(None, module)
    layers = read_layers(module, again._initial)
    assert list(layers) == ["layers.0", "layers.1"]
    assert [layer.initial_sigma for layer in layers.values()] == pytest.approx(list(before.values()))
    assert not np.allclose(layers["layers.0"].sigma, layers["layers.0"].initial_sigma)
    module.net.layers[0].weight_mask = torch.zeros_like(module.net.layers[0].weight_mu, dtype=torch.bool)
    assert not len(read_layers(module, {})["layers.0"].mu)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'pie' is unknown; choose from sigma_histograms"):
        Posterior(figures=["pie"])


# --------------------------------------------------------------------------------------------------------- footprint


def footprint(folder: str, devices: int = 1, epochs: int = 3):
    path = Path(folder)
    record = RunRecord(folder, {})
    _, trainer = sampled.fit(
        SamplingParallel(), folder, epochs=epochs, data={"max_train": 200, "batch_size": 50},
        callbacks=(Footprint(), TrainingHistory(str(path / "history.json"), more_metrics=["val/nll"]), record),
        devices=devices,
    )  # fmt: skip
    return record.record.get("processes"), float(trainer.callback_metrics["val/nll"])


def test_every_process_notes_its_epochs_and_its_memory(ranks2, tmp_path):
    (rows, nll), (nothing, _) = ranks2(footprint, str(tmp_path), 2)
    assert nothing is None and [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        assert len(row["wall_s"]) == len(row["cpu_s"]) == 3 and min(row["cpu_s"]) > 0
        assert 0 < row["before_mib"] <= row["peak_mib"]
    history = json.loads((tmp_path / "history.json").read_text())["epochs"]
    assert history[-1]["metrics"] == {"val/nll": nll}


class Slow(pl.Callback):
    """Evaluations that take a while, and memory."""

    def on_validation_batch_end(self, *args):
        import time

        self.large = np.ones(2**25)  # 256 MiB
        time.sleep(0.4)


def test_evaluations_do_not_count(tmp_path):
    """Nor in the speed that loggers get, of items and of items times weight samples."""
    noted, logger, module = Footprint(), Recorder(), classifier()
    trainer = quiet_trainer(max_epochs=2, callbacks=[noted, Slow()], logger=logger)
    trainer.fit(module, datamodule=Images(**FEW))
    (row,) = noted.processes
    assert len(row["wall_s"]) == 2 and max(row["wall_s"]) < 0.4
    assert row["peak_mib"] - row["before_mib"] < 200
    assert row["items"] == [trainer.num_training_batches * FEW["batch_size"]] * 2
    logged = [found for found in logger.rows if "time/items_per_s" in found]
    assert [found["time/items_per_s"] for found in logged] == pytest.approx(
        [items / wall for items, wall in zip(row["items"], row["wall_s"], strict=True)]
    )
    for found in logged:
        assert found["time/samples_per_s"] == pytest.approx(module.num_samples * found["time/items_per_s"])


def test_one_process_reports_the_phases_of_its_steps():
    """There is nothing to count without others, but what the strategy measures reaches the loggers."""
    logger = Recorder()
    strategy = SimpleNamespace(report=lambda: {"time/forward_s": 0.5})
    trainer = SimpleNamespace(world_size=1, strategy=strategy, loggers=[logger], global_step=7)
    told = Communication()
    told.on_train_start(trainer, None)
    told.on_train_epoch_start(trainer, None)
    told.on_train_epoch_end(trainer, None)
    told.on_fit_end(trainer, None)
    assert logger.rows == [{"time/forward_s": 0.5}] and told.summary == {}


# ------------------------------------------------------------------------------------------------------------ sweeps


def job(folder: Path, world: int, samples: int, size: int | str, seconds: float, **more) -> dict:
    """A finished run and its row in the table of the sweep."""
    folder.mkdir(parents=True)
    rows = [
        {"rank": r, "wall_s": [9.0, seconds, seconds], "cpu_s": [9.0, seconds / 2, seconds / 2], "before_mib": 300.0,
         "peak_mib": 350.0 + r} for r in range(world)
    ]  # fmt: skip
    config = {"model": {"num_samples": samples}, "strategy": {"sample_parallel_size": size}}
    config |= {"cluster": {"local_size": None}, "trainer": {"num_nodes": 1}}
    record = {"world_size": world, "config": config, "processes": rows, "metrics": {"test/accuracy": 0.9}}
    record |= {"communication": {"inter_node_bytes": 1e6, "intra_node_bytes": 2e6}}
    (folder / "results.json").write_text(json.dumps(record | more))
    epochs = [
        {"epoch": e, "seconds": e * seconds, "metric": 0.5 + 0.1 * e, "metrics": {"val/nll": 1 / e}} for e in (1, 2)
    ]
    (folder / "history.json").write_text(json.dumps({"metric": "val/accuracy", "epochs": epochs}))
    return {"trainer.devices": world, "model.num_samples": samples, "parameters": 7, "run_dir": str(folder)}


def table(folder: Path, rows: list[dict]) -> Path:
    rows = [{"job": i, **row, "status": "completed"} for i, row in enumerate(rows)]
    rows.append(rows[0] | {"status": "failed"})
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_a_grid_of_processes_and_samples_has_fixed_and_proportional_curves(tmp_path):
    seconds = {(1, 8): 4.0, (2, 8): 2.5, (1, 16): 8.0, (2, 16): 4.5, (4, 16): 3.0}
    folder = table(tmp_path, [job(tmp_path / f"{w}x{s}", w, s, "auto", t) for (w, s), t in seconds.items()])
    jobs = comparison.read_jobs(folder)
    assert [j["label"] for j in jobs][:2] == ["devices=1 num_samples=8", "devices=2 num_samples=8"]
    assert [j["seconds"] for j in jobs] == list(seconds.values()), "the first epoch is left out"
    fixed, proportional = (layouts.series(jobs, fixed) for fixed in (True, False))
    assert {n: [p["world_size"] for p in points] for n, points in fixed.items()} == {8: [1, 2], 16: [1, 2, 4]}
    assert {n: [p["world_size"] for p in points] for n, points in proportional.items()} == {8: [1, 2]}
    lines = comparison.scaling_table(jobs).splitlines()
    assert "| 16 | 4 | 3 | 2.67 | 0.67 | 0.67 |" in lines
    assert lines[-1] == "| 8 per process | 2 | 4.5 | 0.89 | 0.89 | 0.89 |"
    figure = layouts.scaling(jobs)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["fixed number of samples", "samples per process"]
    efficiency = figure.axes[2].lines[2].get_ydata()
    np.testing.assert_allclose(efficiency, [1.0, 8 / 4.5 / 2, 8 / 3 / 4])


def test_layouts_side_by_side(tmp_path):
    rows = [
        job(tmp_path / name, w, 8, k, t)
        for name, w, k, t in [("local", 1, 1, 4.0), ("sp", 2, 2, 2.0), ("ddp", 2, 1, 3.0)]
    ]
    rows = [{"parallel": name, **row} for name, row in zip(["local", "sp", "ddp"], rows, strict=True)]
    for row in rows:
        del row["trainer.devices"]
    printed = comparison.draw_sweep(table(tmp_path, rows))
    assert "| sp | 2 | 2 | 8 | 2 | 1 | 51 | 3 | 0.9000 |" in printed
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    # Of data parallelism there is no curve of sampling parallelism.
    assert names == {"metrics_against_time.png", "memory_per_process.png", "scaling.png"}
    jobs = comparison.read_jobs(tmp_path)
    assert list(layouts.series(jobs, True)) == [8] and len(layouts.series(jobs, True)[8]) == 2
    curves = layouts.metrics_against_time(jobs)
    assert [axes.get_ylabel() for axes in curves.axes[::2]] == ["accuracy (validation)", "NLL (validation)"]
    assert list(curves.axes[1].lines[1].get_xdata()) == [2.0, 4.0]


def test_nothing_noted_is_nothing_shown(tmp_path):
    row = job(tmp_path / "0", 1, 8, 1, 1.0, processes=[], communication=None, metrics={})
    (tmp_path / "0/history.json").unlink()
    jobs = comparison.read_jobs(table(tmp_path, [row]))
    assert [getattr(layouts, name)(jobs) for name in layouts.FIGURES] == [None] * 3
    assert comparison.draw_sweep(tmp_path).splitlines()[-1] == "| all | 1 | 1 | 8 |  |  |  | 0 |"
