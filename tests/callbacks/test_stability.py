"""The observer of bases: what it compares and when, what it says about undefined ones, figure, resumption."""

from __future__ import annotations

import functools
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.figures import low_rank as figures
from callbacks.oialr import OIALR
from callbacks.rng_state import RngState
from callbacks.stability import BasisStability
from networks.low_rank import LayerChoice, mixing, mixing_similarity, polar_factor, stability
from networks.tall_view import to_tall
from tests.callbacks.test_oialr import SMALL, Save, differing, fit, mlp


class Weights(pl.Callback):
    """Weights of one layer before the first step and after every epoch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(pl_module.net[0].weight.detach().clone())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(pl_module.net[0].weight.detach().clone())


@pytest.mark.parametrize(
    ("gap", "every", "epochs"), [(2, 1, [2, 3, 4, 5]), (2, None, [2, 4]), (1, None, [1, 2, 3, 4, 5])]
)
def test_bases_that_are_a_gap_apart_are_compared(gap, every, epochs):
    callback, weights = BasisStability(gap=gap, every=every), Weights()
    _, trainer = fit(callback, weights, max_epochs=5)
    assert [row["epoch"] for row in callback.history] == epochs
    for row in callback.history:
        pair = [to_tall(weights.seen[row["epoch"] - back])[0] for back in (gap, 0)]
        expected = stability(*map(polar_factor, pair))
        assert row["stability"]["net.0"] == pytest.approx(expected, abs=1e-6)
        assert row["r_similarity"]["net.0"] == pytest.approx(mixing_similarity(*map(mixing, pair)), abs=1e-6)
        assert 0.5 < expected < 1
    last = callback.history[-1]
    metrics = trainer.callback_metrics
    assert set(last["stability"]) == {"net.0", "net.2", "net.4"}
    assert float(metrics["oialr/stability/net.2"]) == pytest.approx(last["stability"]["net.2"])
    assert float(metrics["oialr/stability"]) == pytest.approx(sum(last["stability"].values()) / 3)
    assert float(metrics["oialr/r_similarity"]) == pytest.approx(sum(last["r_similarity"].values()) / 3)
    assert len(callback._bases) <= gap + 1


def test_it_changes_nothing():
    watched, alone = mlp(), mlp()
    fit(BasisStability(gap=1), module=watched)
    fit(module=alone)
    assert watched.losses == alone.losses
    assert differing(watched.state_dict(), alone.state_dict()) == []


def test_estimates_follow_the_exact_values():
    exact, estimate = BasisStability(gap=1), BasisStability(gap=1, estimator="newton_schulz")
    for callback in (exact, estimate):
        fit(callback, module=mlp(optimizer=functools.partial(torch.optim.Adam, lr=1e-2)))
    for one, other in zip(exact.history, estimate.history, strict=True):
        assert other["stability"] == pytest.approx(one["stability"], abs=0.02)
    assert min(min(row["stability"].values()) for row in exact.history) < 0.9


def test_a_deficient_weight_is_named_once_and_left_out_of_the_mean():
    module = mlp()
    torch.nn.init.zeros_(module.net[2].weight)  # then neither it nor its input gets a gradient
    torch.nn.init.zeros_(module.net[4].weight)
    callback = BasisStability(gap=1)
    with pytest.warns(UserWarning, match=r"the stability of net\.2 is not defined") as caught:
        _, trainer = fit(callback, module=module, max_epochs=2)
    assert sum("net.2 is not defined" in str(w.message) for w in caught) == 1
    assert all(math.isnan(row["stability"]["net.2"]) for row in callback.history)
    assert float(trainer.callback_metrics["oialr/stability"]) == pytest.approx(
        callback.history[-1]["stability"]["net.0"]
    )


def test_beside_oialr_the_bases_stand_still_between_updates():
    """U and V are frozen, Sigma may turn within them; a cut alone is no turn."""
    module = mlp(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    callback = BasisStability(gap=1)
    oialr = OIALR(delay=3, frequency=6, beta=0.5, progressive=1)
    fit(callback, oialr, module=module)
    assert {w.rank for w in oialr.weights} != {48}
    for row in callback.history:
        assert row["stability"] == pytest.approx(dict.fromkeys(row["stability"], 1.0), abs=1e-4)


def test_dense_networks_stand_in_the_table_too():
    callback = BasisStability()
    module, trainer = fit(callback, max_epochs=1)
    (found,) = trainer.test(module, datamodule=SMALL(), verbose=False)
    assert found["test/stored_fraction"] == found["test/trainable_fraction"] == 1


@pytest.mark.parametrize("step", [6, 9, 12])
def test_a_resumed_run_has_the_same_history(step, tmp_path):
    whole, path = BasisStability(gap=2, every=1), tmp_path / "saved.ckpt"
    _, trainer = fit(RngState(), whole, Save(step, path), max_epochs=4)
    expected = dict(trainer.callback_metrics)
    torch.load(path, weights_only=True)
    resumed = BasisStability(gap=2, every=1)
    _, trainer = fit(RngState(), resumed, max_epochs=4, ckpt=path)
    assert resumed.history == whole.history
    assert differing(dict(trainer.callback_metrics), expected) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap": 0}, r"callbacks\.stability\.gap=0"),
        ({"gap": 5, "every": 2}, r"callbacks\.stability\.every=2 must divide"),
        ({"estimator": "qr"}, r"callbacks\.stability\.estimator='qr'.*svd or newton_schulz"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BasisStability(**options)


def test_no_layer_is_an_error():
    with pytest.raises(ValueError, match=r"callbacks\.stability\.layers: no weight is left"):
        fit(BasisStability(layers=LayerChoice(min_ratio=0.9, include=["net.6"])))


# -------------------------------------------------------------------------------------------------------------- figures


def row(epoch: int, metric: float | None, trainable: float, stored: float, a: int, b: int) -> dict[str, Any]:
    ranks = {"a": a, "b": b}
    numbers = {"epoch": epoch, "metric": metric, "trainable": trainable, "stored": stored}
    return numbers | {"metric_name": "val/accuracy", "ranks": ranks}


HISTORY = {
    "rows": [row(1, 0.5, 1.0, 1.0, 8, 4), row(2, 0.8, 0.5, 1.2, 4, 2), row(4, None, 0.1, 0.4, 2, 1)],
    "sides": {"a": [16, 8], "b": [4, 4]},
    "spectra": {"a": {"before": [4.0, 2.0, 1.0], "after": [5.0, 1.0]}, "b": {"before": [1.0, 0.5]}},
}


def test_the_rank_map_shows_shares_of_full_rank():
    figure = figures.ranks(HISTORY)
    (mesh,) = [c for c in figure.axes[0].collections if hasattr(c, "get_array")]
    assert mesh.get_array().reshape(2, 3).tolist() == [[1.0, 0.5, 0.25], [1.0, 0.5, 0.25]]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_metric_and_parameters_have_an_axis_each():
    figure = figures.metric_and_parameters(HISTORY)
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.8]]
    assert [line.get_ydata().tolist() for line in right.lines] == [[100, 50, 10], [100, 120, 40]]
    assert left.get_ylabel() == "val/accuracy"


def test_spectra_are_relative_to_the_largest_value():
    panel, other = figures.spectra(HISTORY).axes
    assert [line.get_ydata().tolist() for line in panel.lines] == [[1, 0.5, 0.25], [1, 0.2]]
    assert len(other.lines) == 1


def test_names_of_layers_do_not_run_into_each_other():
    parts = ("self_attn.in_proj_weight", "multihead_attn.in_proj_weight", "linear1", "linear2")
    names = [f"net.transformer.{coder}.layers.{i}.{part}" for coder in ("encoder", "decoder")
             for i in (0, 11) for part in parts]  # fmt: skip
    figure = figures.spectra({"spectra": {name: {"before": [2.0, 1.0], "after": [2.0]} for name in names}})
    figure.draw_without_rendering()
    shown = [axes.title.get_window_extent() for axes in figure.axes]
    assert len(shown) == 12 and all(title.x0 >= 0 and title.x1 <= figure.bbox.width for title in shown)
    assert not [1 for i, one in enumerate(shown) for other in shown[:i] if one.overlaps(other)]
    titles = [axes.get_title().replace("\n", "") for axes in figure.axes]
    assert titles == names[:12]


@pytest.mark.parametrize("epochs", [[5], [1, 2]])
def test_epochs_are_whole_numbers(epochs):
    rows = [{"epoch": e, "ranks": {"a": 2}, "trainable": 1.0, "stored": 1.0, "metric": 0.5, "metric_name": "x"}
            for e in epochs]  # fmt: skip
    turned = [{"epoch": e, "stability": {"a": 0.9}, "r_similarity": {"a": 0.3}} for e in epochs]
    history = {"rows": rows, "sides": {"a": (4, 4)}, "spectra": {}}
    drawn = figures.ranks(history), figures.metric_and_parameters(history), figures.stability(turned)
    for axes in (drawn[0].axes[0], drawn[1].axes[0], *drawn[2].axes[:2]):
        axes.figure.draw_without_rendering()
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_the_stability_map_and_its_mean():
    history = [
        {"epoch": e, "stability": {"a": 0.5 + 0.1 * e, "b": math.nan}, "r_similarity": {"a": 0.3, "b": 0.5}}
        for e in (1, 2, 4)
    ]
    figure = figures.stability(history)
    below = figure.axes[1]
    assert below.lines[0].get_ydata().tolist() == pytest.approx([0.6, 0.7, 0.9])
    assert below.lines[1].get_ydata().tolist() == pytest.approx([0.4] * 3)


def test_methods_against_stored_parameters():
    rows = [
        {"callbacks": "oialr", "test/accuracy": "0.97", "test/stored_fraction": 0.3},
        {"callbacks": "dense", "test/accuracy": 0.96, "test/stored_fraction": "1.0"},
        {"callbacks": "failed", "test/accuracy": "", "test/stored_fraction": ""},
    ]
    axes = figures.accuracy_against_stored(rows).axes[0]
    assert [c.get_offsets().tolist() for c in axes.collections] == [[[30.0, 0.97]], [[100.0, 0.96]]]


def test_there_may_be_nothing_to_show():
    empty = {"rows": [], "sides": {}, "spectra": {}}
    assert figures.ranks(empty) is figures.metric_and_parameters(empty) is figures.spectra(empty) is None
    assert figures.stability([]) is figures.accuracy_against_stored([]) is None


def test_the_figure_is_written(tmp_path):
    fit(BasisStability(gap=1, figures_dir=str(tmp_path / "figures")))
    assert (tmp_path / "figures/stability.png").stat().st_size > 4000
