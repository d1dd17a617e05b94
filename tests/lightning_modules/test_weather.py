from __future__ import annotations

import csv
import time
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import xarray
from torch import nn

from callbacks.figures import weather as figures
from callbacks.forecast_store import ForecastStore
from callbacks.skill_table import SkillTable
from datamodules.weather import ShallowWater, WeatherZarr
from lightning_modules.weather import WeatherMixerModule
from lightning_modules.weather.loss import channel_weights, squared_error
from networks.weather_mixer import WeatherMixer
from parallel.sharding import JigsawGrid
from parallel.sharding.memory import SavedBytes
from tests.datamodules.weather_files import dataset, write_zarr

SIZES = {"height": 16, "width": 32, "num_inputs": 6, "num_outputs": 4}
NET = {"patch": 4, "dim": 16, "blocks": 1, "token_hidden": 16}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the trajectories of this file are."""
    return tmp_path_factory.mktemp("cache")


def planet(cache, **options) -> ShallowWater:
    small = {
        "truncation": 10, "dt_s": 900.0, "spin_up_days": 2.0, "num_train": 2, "records": 16, "leads_h": [6, 24],
        "height": 16, "width": 32, "chunk_token": 2, "eval_every": 1,
    }  # fmt: skip
    return ShallowWater(str(cache), **{**small, **options})


def module(net=None, **options) -> WeatherMixerModule:
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    made = net or partial(WeatherMixer, **SIZES, **NET)
    return WeatherMixerModule(made, optimizer, None, **{"linear_patterns": 8, **options})


def trainer(tmp_path, *callbacks, **options) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=options.pop("max_epochs", 1), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=tmp_path, callbacks=list(callbacks), **options,
    )  # fmt: skip


class Persist(nn.Module):
    """Gives the channels of the input times a parameter; counts what it is asked."""

    def __init__(self, num_inputs=6, num_outputs=4, height=16, width=32, grid=None):
        super().__init__()
        self.grid = grid or JigsawGrid()
        self.num_inputs, self.num_outputs, self.height, self.width = num_inputs, num_outputs, height, width
        self.factor = nn.Parameter(torch.ones(()))
        self.asked: list[torch.Tensor] = []

    def forward(self, x, steps=1):
        self.asked.append(x.detach())
        return x[..., : self.num_outputs] * self.factor**steps

    def flops(self, batch=1, steps=1):
        return batch * steps

    def parameter_kind(self, name):
        return "blend"


class Clock(pl.Callback):
    """Counts for itself what an epoch of training needs."""

    def __init__(self):
        self.seconds, self.samples, self.io_bytes, self.steps = 0.0, 0, 0, 0

    def on_train_epoch_start(self, trainer, *args):
        self.seconds, self.samples, self.io_bytes, self.steps = -time.perf_counter(), 0, 0, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.steps += 1
        self.samples += len(batch["input"])
        self.io_bytes += int(batch["io_bytes"])

    def on_validation_start(self, trainer, *args):
        self.seconds += time.perf_counter()

    def on_validation_end(self, trainer, *args):
        self.seconds -= time.perf_counter()

    def on_train_epoch_end(self, trainer, *args):
        self.seconds += time.perf_counter()


# --- loss -------------------------------------------------------------------------------------------------------------


def test_weights_of_the_paper():
    weights = channel_weights(["msl", "u10", "t2m", "z500", "z400", "q50", "t1000"], "era5")
    assert torch.allclose(weights, torch.tensor([6, 3.08, 12, 3, 2.7, 0.18, 1.5], dtype=torch.float64))
    assert channel_weights(["h", "u"], {"u": 2.0}).tolist() == [1.0, 2.0]
    assert channel_weights(["h", "u"], None).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="names 'x'; the channels are h, u"):
        channel_weights(["h", "u"], {"x": 1.0})
    with pytest.raises(ValueError, match="era5 has no weight for h"):
        channel_weights(["h"], "era5")


@pytest.mark.parametrize("power", [1, 2])
def test_loss_of_blocks_is_that_of_the_whole(power):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 4, 8, 3, generator=generator) for _ in range(2))
    latitude, channel = torch.tensor([0.5, 1.5, 1.4, 0.6]), torch.tensor([1.0, 2.0, 0.5])
    whole = squared_error(prediction, target, latitude, channel, power, prediction.numel())
    weight = (latitude[:, None, None] * channel) ** power
    assert torch.allclose(whole, (weight * (prediction - target) ** 2).mean(), rtol=1e-6)
    if power == 2:  # the published code: prediction and target times a v
        scaled = latitude[:, None, None] * channel
        assert torch.allclose(whole, ((prediction * scaled - target * scaled) ** 2).mean(), rtol=1e-6)
    parts = [
        squared_error(prediction[..., c, v], target[..., c, v], latitude, channel[v], power, prediction.numel())
        for c in (slice(0, 2), slice(2, 8))
        for v in (slice(0, 2), slice(2, 3))
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-6)


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_a_rollout_keeps_what_does_not_change(tmp_path, cache):
    net = Persist()
    with torch.no_grad():
        net.factor.fill_(0.5)
    made = module(lambda grid=None: net)
    run = trainer(tmp_path)
    data = planet(cache)
    run.validate(made, data, verbose=False)
    first, second, *_ = net.asked
    assert torch.equal(second[..., :4], 0.5 * first[..., :4]) and torch.equal(second[..., 4:], first[..., 4:])
    outputs = made._roll(next(iter(data.val_dataloader())), [1, 4], "autoregressive")
    assert torch.allclose(outputs[1], first[..., :4] * 0.5**4)
    latent = made._roll(next(iter(data.val_dataloader())), [1, 4], "latent")
    assert torch.allclose(latent[1], outputs[1])  # of this network


@pytest.mark.parametrize("mode", ["fixed", "cycle", "random"])
def test_how_far_training_rolls_out(mode):
    made = module(lambda grid=None: Persist(), rollout_mode=mode, rollout_max=3, seed=1)
    steps = []
    for step in range(60):
        made._trainer = SimpleNamespace(global_step=step)
        steps.append(made._steps_now())
    if mode == "fixed":
        assert set(steps) == {3}
    elif mode == "cycle":
        assert steps[:6] == [1, 2, 3, 1, 2, 3]
    else:
        assert set(steps) == {1, 2, 3} and min(steps.count(k) for k in (1, 2, 3)) > 10
        made._trainer = SimpleNamespace(global_step=7)
        assert made._steps_now() == steps[7]


def test_uneven_steps_reach_the_network(tmp_path):
    from tests.datamodules.weather_files import TIMES

    uneven = TIMES.copy()
    uneven[6:] += np.timedelta64(2, "h")
    store = write_zarr(tmp_path / "a.zarr", dataset(times=uneven))
    data = WeatherZarr(
        str(store), surface=["msl"], pressure=["z"], levels=[850, 500], statics=["lsm"], height=8, width=16,
        num_inputs=5, num_outputs=3, step_h=None, step_input=True, leads_h=[1, 2], eval_batch_size=12,
    )  # fmt: skip
    net = Persist(5, 3, 8, 16)
    made = module(lambda grid=None: net, linear_patterns=0)
    trainer(tmp_path).test(made, data, verbose=False)
    told = torch.stack([x[:, 0, 0, 4] for x in net.asked[:2]])  # (step, sample)
    assert (told == told[:, :, None, None].squeeze()).all()
    gaps = np.diff(data.hours)
    expected = (gaps - gaps.mean()) / gaps.std()
    assert np.allclose(told[0], expected[:10], atol=1e-5) and np.allclose(told[1], expected[1:11], atol=1e-5)


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_persistence_has_the_scores_of_persistence(tmp_path, cache):
    made, data = module(lambda grid=None: Persist()), planet(cache)
    run = trainer(tmp_path, SkillTable(tmp_path))
    run.test(made, data, verbose=False)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    raw = data.store.read_many(range(48, 64), data.channels)  # the fourth trajectory is the test part
    a = data.latitude_weight.numpy()[:, None]
    for lead, step in (("6h", 1), ("24h", 4)):
        origins = np.arange(0, 16 - 4)  # with all leads
        rmse = np.sqrt((a * (raw[origins + step] - raw[origins]) ** 2).mean((2, 3)).mean(0))
        climatology = data.statistics.climatology(slice(0, 4), slice(0, 32))[0]
        about = np.sqrt((a * (raw[origins + step] - climatology) ** 2).mean((2, 3)).mean(0))
        for place, channel in enumerate(data.names):
            assert found[f"test/rmse/{channel}@{lead}"] == pytest.approx(rmse[place], rel=1e-5)
            assert found[f"test/persistence_ratio/{channel}@{lead}"] == pytest.approx(1, abs=1e-6)
            assert found[f"test/climatology_ratio/{channel}@{lead}"] == pytest.approx(
                rmse[place] / about[place], rel=1e-5
            )
            assert found[f"test/small_scales/{channel}@{lead}"] == pytest.approx(1, abs=0.5)
    assert found["test/damped_ratio/h@24h"] > 0 and found["test/linear_ratio/h@24h"] > 0
    with (tmp_path / "skill.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 4 * 2
    assert {row["forecast"] for row in rows} == set(figures.FORECASTS)


def test_it_learns(tmp_path, cache):
    """A few epochs bring the error at 6 h below that of persistence, on a trajectory of its own."""
    torch.manual_seed(0)
    made, data = module(), planet(cache, records=40, batch_size=8)
    run = trainer(tmp_path, max_epochs=12, check_val_every_n_epoch=12, gradient_clip_val=1.0)
    run.fit(made, data)
    found = run.callback_metrics
    ratios = [float(found[f"val/persistence_ratio/{channel}@6h"]) for channel in data.names]
    assert np.mean(ratios) < 0.95
    assert float(found["flops/rank"]) == pytest.approx(3 * made.net.flops(8) / 1e12)
    assert float(found["tflops/s"]) > 0 and float(found["io_bytes/rank"]) == 0  # it is in memory


def test_samples_and_reading_of_an_epoch(tmp_path, cache, monkeypatch):
    """Validation, the check of it before the training too, takes time that is not the training's."""

    class Slow(Persist):
        def forward(self, x, steps=1):
            time.sleep(0.03 if self.training else 0.2)
            return super().forward(x, steps)

    made, data, clock = module(lambda grid=None: Slow()), planet(cache, in_memory=False), Clock()
    data.setup()
    assert data.block.memory is None  # its statics have been read
    blocks, spent = data.store._blocks, []

    def slow(*args):
        begin = time.perf_counter()
        time.sleep(0.04)
        found = blocks(*args)
        spent.append(time.perf_counter() - begin)
        return found

    monkeypatch.setattr(data.store, "_blocks", slow)
    reads_of_training = slice(1, 4)  # after that of the check
    run = trainer(tmp_path, clock, num_sanity_val_steps=1)
    run.fit(made, data)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert (clock.steps, clock.samples) == (3, 3 * 8)
    assert found["samples/s"] == pytest.approx(clock.samples / clock.seconds, rel=0.2)
    assert found["samples/s"] < 8 / 0.07
    assert found["io_bytes/rank"] == pytest.approx(clock.io_bytes / 3) and clock.io_bytes > 0
    assert found["io_gb/s"] == pytest.approx(1e-9 * clock.io_bytes / sum(spent[reads_of_training]), rel=0.1)
    assert found["comm_bytes/rank"] == 0


def test_memory_of_a_training_step(tmp_path, cache, monkeypatch):
    """By hand, of a network with one parameter; counted again where a rollout is longer than all before."""
    counted = []

    class Counting(SavedBytes):
        def __enter__(self):
            counted.append(self)
            return super().__enter__()

    monkeypatch.setattr("lightning_modules.weather.work.SavedBytes", Counting)
    points, data = 8 * 16 * 32, planet(cache, train_steps=2)  # of a batch
    saved = {}
    for mode, steps in (("fixed", 1), ("fixed", 2), ("cycle", 2)):
        counted.clear()
        made = module(lambda grid=None: Persist(), rollout_mode=mode, rollout_max=steps)
        run = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
        run.fit(made, data)
        saved[mode, steps] = float(run.callback_metrics["mem/activations"])
        assert len(counted) == (2 if mode == "cycle" else 1)
        assert float(run.callback_metrics["mem/params"]) == 4 * 4 + 4  # gradient, two moments, number of steps
    # The input, of which a part is multiplied; differences; weights of latitudes times those of channels.
    assert saved["fixed", 1] == 4 * points * (6 + 4) + 4 * 16 * 4
    # The input of the second step and twice what the loss saves; the factor to the power of one, a number.
    assert 4 * points * (6 + 4 + 6 + 4) <= saved["fixed", 2] <= 4 * points * (6 + 4 + 6 + 4) + 8 * 16 * 4 + 100
    assert saved["cycle", 2] == saved["fixed", 2]


def test_memory_of_a_network_is_that_of_another_count(tmp_path, cache):
    made, data = module(), planet(cache)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(made, data)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    sizes = [p.numel() for p in made.parameters()]
    assert found["mem/params"] == 4 * 4 * sum(sizes) + 4 * len(sizes)
    batch, pointers = next(iter(data.train_dataloader())), {}
    own = {p.data_ptr() for p in made.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            pointers[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    made.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made._loss(made(batch["input"]), batch["target"][:, 0])
    assert loss.requires_grad and found["mem/activations"] == pytest.approx(sum(pointers.values()), rel=0.01)


def test_a_bare_module_loads_the_weights(tmp_path, cache):
    made, data = module(logged_channels=["u"]), planet(cache)
    assert all(p.is_meta for p in made.parameters()) and sum(p.numel() for p in made.parameters()) > 1000
    run = trainer(tmp_path)
    run.validate(made, data, verbose=False)
    assert {name.split("/")[-1] for name in run.callback_metrics if "/rmse/" in name} == {"u@6h", "u@24h"}
    bare = module()
    bare.load_state_dict(made.state_dict())
    x = data.samples("val")[0]["input"][None]
    assert torch.equal(bare(x), made(x))


def test_groups_of_the_optimizer():
    made = module(edge_lr_factor=0.2)
    made.configure_model()
    groups = made.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == pytest.approx([3e-3, 6e-4])
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    edges = [p for n, p in made.net.named_parameters() if made.net.parameter_kind(n) in ("embedding", "recovery")]
    assert sum(counts) == sum(p.numel() for p in made.parameters())
    assert counts[1] == sum(p.numel() for p in edges)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout_mode": "once"}, r"model\.rollout_mode='once' is unknown; choose fixed, cycle, random"),
        ({"eval_rollout": "x"}, r"model\.eval_rollout='x' is unknown"),
        ({"weight_power": 3}, r"model\.weight_power=3: choose 1, or 2"),
        ({"edge_lr_factor": 0}, r"model\.edge_lr_factor=0: must be above 0"),
        ({"rollout_max": 0}, r"model\.rollout_max=0"),
    ],
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        module(**options)


def test_module_and_data_must_fit(tmp_path, cache):
    with pytest.raises(ValueError, match=r"model\.rollout_max=3: the training samples have 1 targets; set data\.train"):
        trainer(tmp_path).validate(module(rollout_max=3), planet(cache), verbose=False)
    with pytest.raises(ValueError, match=r"model\.logged_channels names 'x'; the channels are h, u, v, zeta"):
        trainer(tmp_path).validate(module(logged_channels=["h", "x"]), planet(cache), verbose=False)
    other = partial(WeatherMixer, **{**SIZES, "width": 64}, **NET)
    with pytest.raises(ValueError, match=r"model\.net\.width=64: the data have 32 \(data\.width\)"):
        trainer(tmp_path).validate(module(other), planet(cache), verbose=False)


# --- forecasts and figures --------------------------------------------------------------------------------------------


def test_forecasts_are_a_store_that_xarray_opens(tmp_path, cache):
    made, data = module(), planet(cache, eval_every=3)
    run = trainer(tmp_path, ForecastStore(tmp_path / "predictions"))
    run.predict(made, data, return_predictions=False)
    found = xarray.open_zarr(tmp_path / "predictions" / "forecasts.zarr", chunks=None)
    assert dict(found.sizes) == {"time": 4, "prediction_timedelta": 2, "latitude": 16, "longitude": 32}
    assert (found.time.values == data.store.times[data.columns("test", False)[:, 0]]).all()
    assert (found.prediction_timedelta.values == np.array([6, 24]) * np.timedelta64(1, "h")).all()
    batch = data.samples("test").__getitems__([2])
    made.eval()
    mean, std = data.scale
    with torch.no_grad():
        expected = made._roll(batch, [1, 4], "autoregressive")[1][0].double() * std + mean
    for place, channel in enumerate(data.names):
        assert np.allclose(found[channel].values[2, 1], expected[..., place], rtol=1e-4, atol=1e-3)
    assert [p.name for p in (tmp_path / "predictions").iterdir()] == ["forecasts.zarr"]


def test_forecasts_on_levels(tmp_path):
    store = write_zarr(tmp_path / "a.zarr", dataset())
    data = WeatherZarr(
        str(store), surface=["msl"], pressure=["z"], levels=[850, 500], statics=["lsm"], height=8, width=16,
        num_inputs=4, num_outputs=3, leads_h=[6], eval_batch_size=4,
    )  # fmt: skip
    made = module(lambda grid=None: Persist(4, 3, 8, 16))
    run = trainer(tmp_path, ForecastStore(tmp_path), limit_predict_batches=2)
    run.predict(made, data, return_predictions=False)
    found = xarray.open_zarr(tmp_path / "forecasts.zarr", chunks=None)
    assert found.z.dims == ("time", "prediction_timedelta", "level", "latitude", "longitude")
    assert found.sizes["time"] == 8 and found.level.values.tolist() == [850, 500]  # as many as were predicted
    assert np.allclose(
        found.z.sel(level=500).values[:, 0], data.store.read_many(range(8), data.channels)[:, 2], atol=1e-5
    )


def test_forecasts_know_the_time_that_they_are_for(tmp_path):
    """Between records that are unevenly apart, and between the hours."""
    begin, hour, minute = np.datetime64("2020-01-01", "ns"), np.timedelta64(1, "h"), np.timedelta64(1, "m")
    uneven = begin + np.array([0, 7, 14, 21, 29, 36, 43, 50, 58, 65, 72, 79]) * hour
    half = begin + np.arange(12) * 30 * minute
    for name, times, step_h, leads in (("uneven", uneven, None, [1, 2]), ("half", half, 0.5, [0.5, 1])):
        store = write_zarr(tmp_path / f"{name}.zarr", dataset(times=times))
        data = WeatherZarr(
            str(store), surface=["msl"], statics=["lsm"], height=8, width=16, num_inputs=2, num_outputs=1,
            step_h=step_h, leads_h=leads,
        )  # fmt: skip
        made = module(lambda grid=None: Persist(2, 1, 8, 16))
        trainer(tmp_path, ForecastStore(tmp_path, f"{name}_forecasts.zarr")).predict(
            made, data, return_predictions=False
        )
        found = xarray.open_zarr(tmp_path / f"{name}_forecasts.zarr", chunks=None)
        assert (found.time.values == times[:10]).all()
        if step_h is None:
            assert (found.valid_time.values == np.stack([times[1:11], times[2:]], 1)).all()
            assert found.prediction_timedelta.values.tolist() == [1, 2]
        else:
            assert (found.prediction_timedelta.values == np.array([30, 60]) * minute).all()


def test_figures_are_drawn(tmp_path, cache):
    made, data = module(), planet(cache)
    kept = []

    class Keep(pl.Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, *args):
            kept.append(outputs)

    trainer(tmp_path, Keep()).test(made, data, verbose=False)
    outputs = {key: torch.cat([out[key] for out in kept]) for key in kept[0] if kept[0][key].ndim}
    assert outputs["map_truth"].shape == (1, 2, 16, 32, 4) and outputs["mse"].shape == (12, 5, 2, 4)
    for plot in (figures.maps, figures.error_against_lead, figures.correlation_against_lead, figures.spectra):
        figure = plot(outputs, data)
        figure.savefig(tmp_path / "figure.png", dpi=30)
    lines = figures.error_against_lead(outputs, data, channels=["u"]).axes[0].lines
    rmse = torch.sqrt(outputs["mse"][:, 0, :, 1].mean(0))
    assert np.allclose(lines[0].get_ydata(), rmse)
    metric = [row["rmse"] for row in made.skill if row["forecast"] == "model" and row["channel"] == "u"]
    assert np.allclose(metric, rmse, rtol=1e-6)  # what is drawn is what is logged
