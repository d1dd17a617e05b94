"""What a training went through: the numbers that are noted, after a restart too, and the figures drawn of them."""

from __future__ import annotations

import copy
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks.communication import Communication
from callbacks.comparison import draw_low_rank, draw_sweep, read_sweep
from callbacks.figures import exchanges, strategies
from callbacks.training_history import TrainingHistory, add_to_curve
from strategies.ab_training import ABTrainingStrategy
from strategies.daso import DASO
from strategies.ddp import DDP
from tests.strategies import ab_serial, nets
from tests.strategies.test_daso import SaveAt


def noted(folder, strategy="auto", more=(), net=None, **options):
    history = TrainingHistory(f"{folder}/history.json", metric="val/loss", figures_dir=f"{folder}/figures")
    module = nets.Regression(net or nets.network(torch.float32))
    _, trainer = nets.fit(strategy, str(folder), module=module, callbacks=(history, *more), **options)
    return history.history, module.losses, trainer


@pytest.mark.parametrize("number", [1, 5, 8, 9, 16, 17, 100])
def test_a_long_curve_is_means_over_neighbours(number):
    losses = np.random.default_rng(0).normal(size=number)
    curve = {"width": 1, "filled": 0, "step": [], "loss": []}
    for step, loss in enumerate(losses, 1):
        add_to_curve(curve, step, loss, 8)
    width = curve["width"]
    assert len(curve["loss"]) <= 8 and (number <= 8) == (width == 1)
    assert curve["step"] == list(range(1, number + 1, width))
    np.testing.assert_allclose(curve["loss"], [losses[i : i + width].mean() for i in range(0, number, width)])


def test_one_process(tmp_path):
    history, losses, trainer = noted(tmp_path, devices=1, epochs=3, accumulate_grad_batches=2)
    assert [row["epoch"] for row in history["epochs"]] == [1, 2, 3] and trainer.global_step == 12
    assert [row["step"] for row in history["epochs"]] == [4, 8, 12]
    np.testing.assert_allclose(history["curve"]["loss"], losses, rtol=1e-6)
    for row, own in zip(history["epochs"], np.split(np.array(losses), 3), strict=True):
        assert row["loss"] == pytest.approx(own.mean(), rel=1e-6)
    assert history["epochs"][-1]["metric"] == float(trainer.callback_metrics["val/loss"])
    seconds = [row["seconds"] for row in history["epochs"]]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert json.loads((tmp_path / "history.json").read_text()) == history
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["loss_and_phases.png"]


def test_evaluations_take_no_time_and_give_one_epoch_a_metric(tmp_path):
    class Slow(nets.Regression):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            import time

            time.sleep(0.1)

    history = TrainingHistory(str(tmp_path / "h.json"), metric="val/loss")
    often = {"epochs": 3, "check_val_every_n_epoch": 2, "limit_val_batches": 8}
    nets.fit("auto", str(tmp_path), module=Slow(), devices=1, callbacks=(history,), **often)
    rows = history.history["epochs"]
    assert [row["metric"] is None for row in rows] == [True, False, True]
    assert rows[-1]["seconds"] < 0.8  # eight batches of 0.1 s


def under_daso(folder):
    def strategy():
        return DASO(1, 1, skip=4, wait=1, plateau_patience=0, plateau_threshold=0.9, local_size=2)

    path, found = f"{folder}/h.ckpt", []
    counted = Communication()
    found.append((*noted(folder, strategy(), (counted, SaveAt(21, path)), epochs=6)[:2], counted.summary))
    found.append((*noted(folder, strategy(), (Communication(),), epochs=6, ckpt_path=path)[:2], {}))
    return found


def test_daso_and_a_restart_in_the_middle_of_an_epoch(ranks4, tmp_path):
    ranks = ranks4(under_daso, str(tmp_path))
    whole, _, counted = ranks[0][0]
    rows = whole["epochs"]
    losses = np.mean([rank[0][1] for rank in ranks], axis=0)
    np.testing.assert_allclose(whole["curve"]["loss"], losses, rtol=1e-6)
    assert rows[-1]["loss"] == pytest.approx(losses[-8:].mean(), rel=1e-6)
    assert [(p["step"], p["phase"]) for p in whole["phases"]] == [(0, "warmup"), (8, "cycling"), (40, "cooldown")]
    # The values with which an epoch was trained, not those that follow it.
    assert [row["strategy"]["daso/skip"] for row in rows] == [0, 4, 2, 1, 8, 0]
    for link in ("inter_node_bytes", "intra_node_bytes"):
        assert rows[-1][link] == counted[link]
        assert [row[link] for row in rows] == sorted(row[link] for row in rows)
    assert all(row["drift"] > 0 for row in rows)
    # Warm-up and cool-down part for one step at a time, cycling nodes for more.
    assert max(row["drift"] for row in rows[1:5]) > rows[5]["drift"]

    def without_times(history):
        history = copy.deepcopy(history)
        for row in history["epochs"]:
            del row["seconds"]
        return history

    one, other = (without_times(part[0]) for part in ranks[0])  # it writes the file
    for mine, theirs in zip(one.pop("epochs"), other.pop("epochs"), strict=True):
        assert mine == theirs
    assert one == other
    assert {rank[0][0]["epochs"][-1]["drift"] for rank in ranks} == {rows[-1]["drift"]}


def test_weights_that_a_callback_exchanges_have_a_full_rank_too(tmp_path):
    """Or the figure of ranks would take the largest one for full."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, current_epoch=0, global_step=0)
    history = TrainingHistory(f"{tmp_path}/history.json")
    history.on_train_start(trainer, None)
    for begin, full_ranks in enumerate(({"a.weight": 24}, {"a.sigma": 12}, {"a.sigma": 6})):
        strategy.phase, strategy.phase_begin, strategy.full_ranks = "ab", begin, full_ranks
        history.on_train_batch_start(trainer)
    assert history.history["sides"] == {"a.weight": 24, "a.sigma": 12}


def under_ab(folder):
    strategy = ABTrainingStrategy(8, ab_steps=12, full_steps=4, cutoff=0.4, rebound_steps=0, local_size=2)
    history = noted(folder, strategy, net=ab_serial.network(dtype=torch.float32), epochs=6)[0]
    return history, strategy.ranks, strategy.compression(), [(s.phase, s.begin) for s in strategy.schedule.segments()]


def test_ab_training(ranks4, tmp_path):
    history, ranks, compression, spans = ranks4(under_ab, str(tmp_path))[0]
    assert len(spans) == 7 and [(p["phase"], p["step"]) for p in history["phases"]] == spans
    assert history["sides"] == dict.fromkeys(ab_serial.FACTORED, 24)
    shares = exchanges.factor_ranks(history).axes[0].collections[0].get_array()
    assert shares.shape == (2, 3)
    np.testing.assert_allclose(shares[:, -1], [ranks[name] / 24 for name in ab_serial.FACTORED])
    above, below = exchanges.compression(history).axes
    assert list(above.lines[0].get_ydata())[-1] == compression > 1
    reports = [p["report"] for p in history["phases"] if p["phase"] == "full"]
    for line, key in zip(below.lines, ("ab/relative_change", "ab/cosine_of_halves"), strict=False):
        assert list(line.get_ydata()) == [report[key] for report in reports]
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.png" for name in ("loss_and_phases", "bytes_per_epoch", "factor_ranks", "compression")}


def counted_anew(folder):
    path = f"{folder}/b.ckpt"
    noted(folder, DDP(local_size=2), (SaveAt(12, path),), epochs=2)
    return noted(folder, DDP(local_size=1), epochs=3, ckpt_path=path)[0]


def test_a_ledger_that_begins_anew_adds_to_what_was_sent_before(ranks2, tmp_path):
    """The second part has nodes of another size, with which a strategy counts from zero."""
    rows = ranks2(counted_anew, str(tmp_path))[0]["epochs"]
    epoch = 8 * 2 * 4 * 74  # an all-reduce of 74 numbers over two ranks sends all of them twice
    assert [row["intra_node_bytes"] for row in rows] == [epoch] * 3
    assert [row["inter_node_bytes"] for row in rows] == [0, epoch / 2, epoch * 3 / 2]


def test_unknown_figures_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.training_history\.figures: 'rank' is unknown; choose from loss_"):
        TrainingHistory(str(tmp_path), figures=["rank"])
    with pytest.raises(ValueError, match=r"callbacks\.training_history\.curve_points=0"):
        TrainingHistory(str(tmp_path), curve_points=0)


# --------------------------------------------------------------------------------------------------------- figures


def history(epochs=4, **row):
    rows = [
        {"epoch": e, "step": 10 * e, "loss": 1.0 / e, "metric": 0.1 * e, "seconds": float(e), "strategy": {}}
        | {key: values[e - 1] for key, values in row.items()}
        for e in range(1, epochs + 1)
    ]
    curve = {"width": 1, "filled": 1, "step": list(range(1, 41)), "loss": [1.0 / i for i in range(1, 41)]}
    return {"metric": "val/accuracy", "epochs": rows, "phases": [], "sides": {}, "curve": curve}


def test_nothing_to_show_is_no_figure():
    empty = history(0) | {"curve": {"width": 1, "filled": 0, "step": [], "loss": []}}
    assert all(getattr(exchanges, name)(empty) is None for name in exchanges.FIGURES)
    drawn = [name for name in exchanges.FIGURES if getattr(exchanges, name)(history()) is not None]
    assert drawn == ["loss_and_phases"]


def test_phases_are_shaded():
    phases = [{"step": s, "epoch": 0, "phase": p, "report": {}} for s, p in ((0, "warmup"), (5, "ab"), (25, "full"))]
    figure = exchanges.loss_and_phases(history() | {"phases": phases})
    for axes in figure.axes:
        assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == [(0, 5), (5, 20), (25, 15)]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), history()["curve"]["loss"])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [0.1, 0.2, 0.3, 0.4])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "warm-up",
        "A and B apart",
        "full rank together",
    ]


def test_losses_that_are_not_positive_are_drawn_too():
    falling = history(loss=[1.0, 0.0, -1.0, -2.0])
    falling["curve"]["loss"] = list(np.linspace(1, -1, 40))
    assert exchanges.loss_and_phases(falling).axes[0].get_yscale() == "linear"


def test_the_schedule_of_daso():
    values = [{"daso/skip": b, "daso/wait": w} for b, w in ((0, 0), (4, 1), (2, 1), (0, 0))]
    above, below = exchanges.exchange_schedule(history(strategy=values)).axes
    np.testing.assert_array_equal(below.lines[0].get_ydata(), [np.nan, 4, 2, np.nan])
    np.testing.assert_array_equal(below.lines[2].get_ydata(), [np.nan, 1, 1, np.nan])
    assert [(patch.get_x(), patch.get_width()) for patch in above.patches] == [(0.5, 1), (3.5, 1)]


def test_bytes_are_those_of_the_epoch():
    traffic = history(inter_node_bytes=[1e6, 3e6, 3e6, 7e6], intra_node_bytes=[2e6, 4e6, 6e6, 8e6])
    (axes,) = exchanges.bytes_per_epoch(traffic).axes
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([1, 2, 0, 4, 2, 2, 2, 2])
    assert "7 MB between nodes" in axes.get_title()
    assert exchanges.bytes_per_epoch(history(inter_node_bytes=[0] * 4, intra_node_bytes=[0] * 4)) is None


def test_drift():
    (axes,) = exchanges.drift(history(drift=[0.1, 0.2, 0.1, 0.05])).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.1, 0.2, 0.1, 0.05])
    assert exchanges.drift(history(drift=[0.0] * 4)) is None


# ----------------------------------------------------------------------------------------------------------- sweeps


def write_sweep(folder):
    """Three strategies, one with two seeds, and a job that failed."""
    rows = []
    jobs = [("ddp", 0), ("ddp", 1), ("daso", 0), ("diloco", 0)]
    for number, (strategy, seed) in enumerate(jobs):
        run = folder / str(number)
        run.mkdir()
        (run / "history.json").write_text(json.dumps(history(seconds=[1.0, 2.0, 3.0, 4.0 + number])))
        (run / "results.json").write_text(json.dumps({"communication": {"inter_node_bytes": 1e6 * (number + 1)}}))
        status = "failed" if strategy == "diloco" else "completed"
        rows.append({"job": number, "strategy": strategy, "seed": seed, "optimizer": "sgd", "parameters": 10,
                     "status": status, "run_dir": str(run), "test/accuracy": 0.9 + 0.01 * number})  # fmt: skip
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_jobs_of_a_sweep(tmp_path):
    write_sweep(tmp_path)
    runs = read_sweep(tmp_path)
    assert [run["label"] for run in runs] == ["ddp", "ddp", "daso"]
    assert [run["metric"] for run in runs] == [0.90, 0.91, 0.92]
    times = strategies.loss_against_time(runs)
    assert [list(line.get_xdata())[-1] for line in times.axes[0].lines] == [4, 5, 6]
    assert [text.get_text() for text in times.legends[0].get_texts()] == ["ddp", "daso"]
    colors = [line.get_color() for line in times.axes[0].lines]
    assert colors[0] == colors[1] != colors[2]
    points = strategies.accuracy_against_bytes(runs).axes[0].lines
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(1, 0.90), (2, 0.91), (3, 0.92)]
    assert draw_sweep(tmp_path).splitlines() == [
        f"figure {tmp_path}/figures/loss_against_time.png",
        f"figure {tmp_path}/figures/accuracy_against_bytes.png",
    ]
    assert all((tmp_path / "figures" / f"{name}.png").stat().st_size > 5000 for name in strategies.FIGURES)


def test_a_sweep_without_histories(tmp_path):
    write_sweep(tmp_path)
    for path in tmp_path.glob("*/history.json"):
        path.unlink()
    assert "no job" in draw_sweep(tmp_path)


def test_low_rank_methods_of_a_sweep(tmp_path):
    jobs = [("stability", "completed", 0.98, 1.0), ("oialr", "completed", 0.97, 0.3), ("dlrt", "failed", "", "")]
    rows = [
        {"job": number, "callbacks": name, "parameters": 10, "status": status, "test/accuracy": accuracy,
         "test/stored_fraction": stored}
        for number, (name, status, accuracy, stored) in enumerate(jobs)
    ]  # fmt: skip
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert draw_low_rank(tmp_path) == f"figure {tmp_path}/figures/accuracy_against_stored.png"
    assert (tmp_path / "figures" / "accuracy_against_stored.png").stat().st_size > 5000
    (tmp_path / "table.csv").write_text("job,status,parameters\n0,completed,1\n")
    assert "no job has both" in draw_low_rank(tmp_path)
