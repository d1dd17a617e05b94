from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from callbacks.figures import forecast
from callbacks.figures.axes import make_figure, plain_log_ticks
from callbacks.figures.callback import FiguresCallback
from callbacks.gathering import concatenate
from lightning_modules.recycle import ReCycle
from tests.lightning_modules.tiny_series import DAY, LinearNet, TinySeries, quiet_trainer

WEEKLY = functools.partial(TinySeries, num_days=70, horizon=7 * DAY)
POINT_PLOTS = ["forecast_week", "error_by_lead", "error_by_hour_of_week", "holiday_residual"]
QUANTILE_PLOTS = ["quantile_fan", "reliability_diagram"]


class Silent(Logger):
    name, version = "silent", 0

    def log_metrics(self, metrics, step=None) -> None:
        pass

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass


class Recorder(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, list[str]]] = []

    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        self.images.append((key, images))


class Board(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[str, int]] = []
        self._experiment = SimpleNamespace(
            add_figure=lambda key, figure, global_step: self.figures.append((key, global_step))
        )

    @property
    def experiment(self):
        return self._experiment


def run_test(*callbacks: pl.Callback, quantiles: int = 0, data: TinySeries | None = None, **kwargs) -> TinySeries:
    torch.manual_seed(0)
    data = data or WEEKLY()
    module = ReCycle(LinearNet(data.horizon, quantiles), quantiles=quantiles or None)
    quiet_trainer(callbacks=list(callbacks), **kwargs).test(module, datamodule=data, verbose=False)
    return data


class Keep:
    """A plot that keeps what it is given."""

    def __call__(self, outputs, datamodule):
        from matplotlib.figure import Figure

        self.outputs, self.datamodule = outputs, datamodule
        return Figure(figsize=(1, 1))


@pytest.fixture(scope="module")
def results():
    kept = {}
    for quantiles in (0, 9):
        keep = Keep()
        folder = Path("/nonexistent") / "never-written"
        callback = FiguresCallback({"keep": keep}, folder, formats=())
        callback.dirpath = SimpleNamespace(mkdir=lambda **_: None)  # nothing is written without formats
        run_test(callback, quantiles=quantiles)
        kept[quantiles] = keep
    return kept


def test_figures_are_written_and_handed_to_every_logger(tmp_path):
    recorder, board = Recorder(), Board()
    plots = [f"callbacks.figures.forecast.{name}" for name in (*POINT_PLOTS, *QUANTILE_PLOTS)]
    callback = FiguresCallback(plots, tmp_path / "figures", formats=["png", "pdf"], dpi=40)
    run_test(callback, quantiles=9, logger=[recorder, board])
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    names = [*POINT_PLOTS, *QUANTILE_PLOTS]
    assert written == {f"{name}.{extension}" for name in names for extension in ("png", "pdf")}
    assert all(path.stat().st_size > 2000 for path in (tmp_path / "figures").iterdir())
    assert recorder.images == [(f"figures/{name}", [str(tmp_path / "figures" / f"{name}.png")]) for name in names]
    assert board.figures == [(f"figures/{name}", 0) for name in names]


def test_a_failing_plot_warns_and_the_others_are_drawn(tmp_path):
    def broken(outputs, datamodule):
        raise RuntimeError("no ink")

    callback = FiguresCallback([broken, forecast.error_by_lead], tmp_path)
    with pytest.warns(UserWarning, match="'broken' was not drawn: RuntimeError: no ink"):
        run_test(callback)
    assert [path.name for path in tmp_path.iterdir()] == ["error_by_lead.png"]


def test_max_batches_limits_what_is_kept(tmp_path):
    first, every = Keep(), Keep()
    run_test(FiguresCallback({"first": first}, tmp_path, max_batches=2), FiguresCallback({"every": every}, tmp_path))
    assert len(first.outputs["origin"]) == 8
    assert len(every.outputs["origin"]) == 20
    assert every.outputs["prediction"].shape == (20, 28, 2)
    assert "loss" not in every.outputs


def test_validation_figures(tmp_path):
    keep = Keep()
    callback = FiguresCallback({"keep": keep}, tmp_path, stage="validate")
    module = ReCycle(LinearNet(28), functools.partial(torch.optim.SGD, lr=0.0))
    quiet_trainer(callbacks=[callback], max_epochs=1, num_sanity_val_steps=1).fit(module, datamodule=WEEKLY())
    assert len(keep.outputs["origin"]) == 8
    assert callback._outputs == []


def test_partial_plots_are_named_after_their_function(tmp_path):
    callback = FiguresCallback([functools.partial(forecast.forecast_week, channel=1)], tmp_path)
    assert list(callback.plots) == ["forecast_week"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plots": ["callbacks.figures.forecast.pie"]}, r"no function 'callbacks\.figures\.forecast\.pie'"),
        ({"plots": ["pie"]}, "no function 'pie'"),
        ({"plots": [forecast.pareto, forecast.pareto]}, "twice"),
        ({"plots": [], "stage": "train"}, "choose test or validate"),
        ({"plots": [], "max_batches": 0}, "at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FiguresCallback(dirpath="figures", **arguments)


def _draw(folder: str) -> list[int]:
    from lightning.pytorch.strategies import DDPStrategy

    keep = Keep()
    callback = FiguresCallback({"keep": keep}, folder)
    strategy = DDPStrategy(process_group_backend="gloo")
    run_test(callback, data=WEEKLY(num_days=69), devices=2, strategy=strategy)
    return keep.outputs["origin"].tolist() if hasattr(keep, "outputs") else []


def test_rank_zero_draws_the_windows_of_all_ranks(ranks2, tmp_path):
    origins = [day * DAY for day in range(44, 63)]
    assert ranks2(_draw, str(tmp_path)) == [origins, []]


def test_concatenate_sorts_by_origin_and_keeps_shared_values():
    parts = [
        {"origin": torch.tensor([0, 8]), "prediction": torch.tensor([[0.0], [8.0]]), "quantiles": torch.tensor([0.5])},
        {"origin": torch.tensor([4]), "prediction": torch.tensor([[4.0]]), "quantiles": torch.tensor([0.5])},
    ]
    out = concatenate([part | {"loss": torch.tensor(1.0)} for part in parts])
    assert out["prediction"].squeeze().tolist() == [0.0, 4.0, 8.0]
    assert out["quantiles"].tolist() == [0.5]
    assert "loss" not in out


def lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}


def test_forecast_week_shows_one_window(results):
    outputs, data = results[0].outputs, results[0].datamodule
    figure = forecast.forecast_week(outputs, data, channel=1, window=5)
    drawn = lines(figure.axes[0])
    np.testing.assert_allclose(drawn["truth"], outputs["target"][5, :, 1].numpy())
    np.testing.assert_allclose(drawn["forecast"], outputs["prediction"][5, :, 1].numpy())
    np.testing.assert_allclose(drawn["profile (RHP)"], outputs["profile"][5, :, 1].numpy())
    assert figure.axes[0].get_ylabel() == "south [MW]"


def test_the_default_window_has_the_median_error(results):
    outputs, data = results[0].outputs, results[0].datamodule
    error = (outputs["prediction"] - outputs["target"]).abs()[..., 0].mean(1)
    truth = lines(forecast.forecast_week(outputs, data).axes[0])["truth"]
    window = int((outputs["target"][..., 0] - torch.tensor(truth)).abs().sum(1).argmin())
    assert (error < error[window]).sum() == len(error) // 2


def test_error_by_lead_draws_the_mean_over_valid_windows(results):
    outputs, data = results[0].outputs, results[0].datamodule
    axes = forecast.error_by_lead(outputs, data, channel=1).axes[0]
    error = (outputs["prediction"] - outputs["target"]).abs()[outputs["valid"][:, 1], :, 1].mean(0)
    assert any(len(line.get_ydata()) == 28 and np.allclose(line.get_ydata(), error, rtol=1e-5) for line in axes.lines)


def test_hour_of_week_map_puts_errors_where_they_belong(results):
    outputs, data = dict(results[0].outputs), results[0].datamodule
    times = [data.time_of(int(o), 28) for o in outputs["origin"]]
    late_friday = torch.tensor(np.array([(t.day_of_week == 4) & (t.hour == 18) for t in times]))
    outputs["prediction"] = outputs["target"] + 3.0 * late_friday[..., None]
    image = forecast.error_by_hour_of_week(outputs, data).axes[0].images[0].get_array()
    expected = np.zeros((7, 4))
    expected[4, 3] = 3.0
    np.testing.assert_allclose(image, expected, atol=1e-4)
    relative = forecast.error_by_hour_of_week(outputs | {"profile": outputs["prediction"]}, data, relative=True)
    assert np.abs(relative.axes[0].images[0].get_array()).max() == 0


def test_holiday_residual_shows_a_week_with_the_holiday(results):
    outputs, data = results[0].outputs, results[0].datamodule
    figure = forecast.holiday_residual(outputs, data)
    truth = lines(figure.axes[0])["truth"]
    window = int((outputs["target"][..., 0] - torch.tensor(truth)).abs().sum(1).argmin())
    assert outputs["target_holiday"][window, :, 0].any()
    np.testing.assert_allclose(
        lines(figure.axes[1])["_forecast"],
        (outputs["prediction"].double() - outputs["profile"].double())[window, :, 0].numpy(),
    )
    without = outputs | {"target_holiday": torch.zeros_like(outputs["target_holiday"])}
    with pytest.raises(ValueError, match="no public holiday"):
        forecast.holiday_residual(without, data)


def test_reliability_of_a_perfect_forecast_lies_on_the_diagonal(results):
    outputs, data = dict(results[9].outputs), results[9].datamodule
    noise = torch.randn(20, 28, 2, generator=torch.Generator().manual_seed(0))
    icdf = torch.distributions.Normal(0.0, 1.0).icdf(outputs["quantiles"])
    outputs["target"], outputs["prediction"] = noise, icdf.expand(20, 28, 2, 9)
    drawn = lines(forecast.reliability_diagram(outputs, data).axes[0])["forecast"]
    np.testing.assert_allclose(drawn, outputs["quantiles"], atol=0.05)


def test_quantile_figures_need_quantiles(results):
    for plot in (forecast.quantile_fan, forecast.reliability_diagram):
        with pytest.raises(ValueError, match=r"model\.quantiles"):
            plot(results[0].outputs, results[0].datamodule)


def test_quantile_fan_has_a_band_per_interval(results):
    figure = forecast.quantile_fan(results[9].outputs, results[9].datamodule, window=1)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["80 % interval", "60 % interval", "40 % interval", "20 % interval", "median", "truth"]


def test_pareto_front_joins_what_is_not_beaten():
    table = pd.DataFrame(
        {
            "model": ["cheap", "good", "beaten", "good"],
            "energy_j": [1.0, 90.0, 200.0, 110.0],
            "mae_scaled": [0.3, 0.19, 0.25, 0.21],
        }
    )
    axes = forecast.pareto(table).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1.0, 0.3], [100.0, 0.2]])
    assert axes.get_xlabel() == "energy [J]"
    assert axes.get_ylabel() == "MAE (scaled axis)"
    with pytest.raises(ValueError, match="log_cost"):
        forecast.pareto(table.assign(energy_j=0.0))


def test_profile_depth_marks_the_lowest_error():
    table = pd.DataFrame({"depth": [5, 1, 3], "mae_scaled": [0.3, 0.25, 0.2]})
    axes = forecast.profile_depth(table).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0.25], [3, 0.2], [5, 0.3]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[3, 0.2]])


def test_figures_do_not_use_pyplot(tmp_path, results, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    forecast.forecast_week(results[0].outputs, results[0].datamodule).savefig(tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("low", "high", "few", "most"), [(90, 103, 3, 8), (20, 900, 4, 6), (26_000, 120_000, 3, 6), (1e-3, 1e5, 6, 30)]
)
def test_a_logarithmic_axis_has_several_numbers_whatever_its_range(low, high, few, most):
    figure, (axes,) = make_figure(4, 3)
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis)
    axes.set_xlim(low, high)
    figure.canvas.draw()
    seen = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert few <= len(seen) <= most, seen
