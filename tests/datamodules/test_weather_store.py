from __future__ import annotations

import pickle
import time

import numpy as np
import pytest

from datamodules.readers.weather_store import Channel, WeatherStore, rechunk
from datamodules.weather.rechunk import main
from tests.datamodules.weather_files import LATITUDES, TIMES, dataset, values, write_packed, write_zarr

Z850, MSL = Channel("z", 850.0), Channel("msl")


def holds_what_was_written(store: WeatherStore) -> None:
    store.check([MSL, Z850])
    assert np.allclose(store.latitudes, LATITUDES)
    assert (store.times == TIMES).all()
    block = store.read_many([3, 5], [Z850, MSL, Channel("z", 500.0)], slice(4, 12))
    assert block.dtype == np.float32 and block.shape == (2, 3, 8, 8)
    for place, channel in enumerate((Z850, MSL, Channel("z", 500.0))):
        expected = values(channel.variable, channel.level)[[3, 5], :, 4:12]
        assert np.allclose(block[:, place], expected, atol=1e-6)
    assert np.allclose(store.read(0, [MSL])[0], values("msl")[0], atol=1e-6)
    mask = store.read_static(["land_sea_mask"], slice(0, 3))
    assert (mask[0] == (values("lsm")[0, :, :3] > 0)).all()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("consolidated", [True, False])
def test_zarr(tmp_path, version, consolidated):
    store = WeatherStore(write_zarr(tmp_path / "a.zarr", dataset(), version, consolidated))
    holds_what_was_written(store)
    assert store.bytes_read > 0
    again = pickle.loads(pickle.dumps(store))  # to a worker
    assert again.bytes_read == 0 and again.read_s == 0
    holds_what_was_written(again)


def test_seconds_of_reading(tmp_path, monkeypatch):
    """Those of the blocks, however they are asked for, and nothing else."""
    store = WeatherStore(write_zarr(tmp_path / "a.zarr", dataset()))
    assert len(store.times) == 12 and store.read_s == 0
    inner = store._sources
    monkeypatch.setattr(store, "_sources", lambda channels: (time.sleep(0.05), inner(channels))[1])
    begin = time.perf_counter()
    holds_what_was_written(store)  # three reads
    assert 0.15 <= store.read_s <= time.perf_counter() - begin
    before = store.read_s
    with pytest.raises(ValueError, match="shape"):
        store.read(99, [MSL])
    assert store.read_s >= before + 0.05


@pytest.mark.parametrize(
    "order",
    [("level", "time", "latitude", "longitude"), ("time", "longitude", "latitude", "level")],
    ids="-".join,
)
def test_any_order_and_northward_latitudes(tmp_path, order):
    holds_what_was_written(WeatherStore(write_zarr(tmp_path / "a.zarr", dataset(order, northward=True))))


def test_other_names_of_dimensions(tmp_path):
    names = {"time": "valid_time", "latitude": "lat", "longitude": "lon", "level": "pressure_level"}
    names |= {"geopotential": "z", "mean_sea_level_pressure": "msl", "land_sea_mask": "lsm"}
    holds_what_was_written(WeatherStore(write_zarr(tmp_path / "a.zarr", dataset(names=names))))


def test_integer_hours(tmp_path):
    hours = ((TIMES - np.datetime64("1940-01-01", "ns")) / np.timedelta64(1, "h")).astype(np.int64)
    data = dataset(times=hours)
    data.attrs["time_units"] = "hours since 1940-01-01 00:00 (proleptic_gregorian)"
    holds_what_was_written(WeatherStore(write_zarr(tmp_path / "a.zarr", data)))


def test_a_snapshot_is_one_record(tmp_path):
    """As the sample of NeuralGCM, whose levels, longitudes and latitudes come in this order."""
    data = dataset(("level", "longitude", "latitude", "time"), northward=True).isel(time=4)
    store = WeatherStore(write_zarr(tmp_path / "a.zarr", data))
    assert store.times.tolist() == TIMES[4:5].tolist()
    assert np.allclose(store.read(0, [Z850])[0], values("z", 850.0)[4], atol=1e-6)


@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3_64BIT"])
def test_netcdf(tmp_path, kind):
    path = tmp_path / "a.nc"
    dataset().to_netcdf(path, format=kind, engine="h5netcdf" if kind == "NETCDF4" else "scipy")
    store = WeatherStore(path)
    holds_what_was_written(store)
    if kind == "NETCDF4":
        assert store.bytes_read > 0


def test_scale_and_offset(tmp_path):
    data = dataset()
    packing = {"dtype": "int16", "scale_factor": 1e-3, "add_offset": 0.5, "_FillValue": -32768}
    data.to_netcdf(tmp_path / "a.nc", engine="h5netcdf", encoding={"mean_sea_level_pressure": packing})
    assert np.allclose(WeatherStore(tmp_path / "a.nc").read(1, [MSL])[0], values("msl")[1], atol=6e-4)


@pytest.mark.parametrize(
    ("token", "group", "sharded", "fraction", "factor"),
    [(1, None, False, 1.0, 4.0), (2, 2, False, 0.25, 1.0), (2, 2, True, 0.2503, 1.0), (1, 2, False, 0.5, 2.0)],
)
def test_bytes_of_a_quarter(tmp_path, token, group, sharded, fraction, factor):
    """Line 9 of the acceptance list counts them through the DataModule."""
    path = write_packed(tmp_path / "a.zarr", 4, token, group, sharded, records=2, size=(32, 64))
    store = WeatherStore(path)
    channels = [Channel(name) for name in store.packed]
    store.read(0, channels)
    before = store.bytes_read
    store.read(1, channels)
    whole = store.bytes_read - before
    assert whole >= 0.9 * 4 * 32 * 64 * 4  # random numbers
    store = WeatherStore(path)
    store.check(channels)
    before = store.bytes_read
    part = store.read(1, channels[2:], slice(32, 64))
    assert (store.bytes_read - before) / whole == pytest.approx(fraction, abs=0.01)
    assert store.wasted_factor(channels[2:], slice(32, 64)) == factor
    assert np.array_equal(part, WeatherStore(path).read(1, channels)[2:, :, 32:])


def test_rechunk_fits_the_ranks(tmp_path):
    source = write_zarr(tmp_path / "a.zarr", dataset(northward=True))
    channels = [MSL, Z850, Channel("z", 500.0)]
    rechunk(source, tmp_path / "b.zarr", channels, 2, 2, ["land_sea_mask"], records=range(4), sharded=True)
    store = WeatherStore(tmp_path / "b.zarr")
    assert store.packed == ["msl", "z850", "z500"]
    assert store.wasted_factor(channels[:2], slice(0, 8)) == 1 and store.wasted_factor(channels[:2], slice(2, 8)) > 1
    assert np.array_equal(store.read(3, channels), WeatherStore(source).read(3, channels))
    mask = WeatherStore(source).read_static(["land_sea_mask"])
    assert np.array_equal(store.read_static(["land_sea_mask"]), mask)
    with pytest.raises(ValueError, match="token=3: does not divide the 16 longitudes"):
        rechunk(source, tmp_path / "c.zarr", channels, 3)


def test_records_between_the_hours_keep_their_times(tmp_path):
    for step in (np.timedelta64(30, "m"), np.timedelta64(90, "s")):
        times = TIMES[0] + np.arange(len(TIMES)) * step
        source, target = (tmp_path / f"{name}{step.astype(int)}.zarr" for name in "ab")
        rechunk(write_zarr(source, dataset(times=times)), target, [MSL])
        assert (WeatherStore(target).times == times).all()


def test_rechunk_on_the_command_line(tmp_path, capsys):
    source, target = write_zarr(tmp_path / "a.zarr", dataset()), tmp_path / "b.zarr"
    main([str(source), str(target), "--surface", "msl", "--period", "2020-01-02", "2020-01-02"])
    assert (WeatherStore(target).times == TIMES[4:8]).all()
    assert np.array_equal(WeatherStore(target).read(1, [MSL]), WeatherStore(source).read(5, [MSL]))
    assert "4 of 4 records" in capsys.readouterr().err
    for arguments, words in (
        ([str(source), str(target), "--surface", "msl"], "b.zarr: is there already; remove it or name another folder"),
        ([str(source), str(tmp_path / "c.zarr")], "name the channels: --surface, or --pressure and --levels"),
        ([str(source), str(tmp_path / "c.zarr"), "--surface", "msl", "--period", "1990", "1991"], "--period=['1990'"),
        ([str(tmp_path / "x.zarr"), str(tmp_path / "c.zarr"), "--surface", "msl"], "x.zarr: there is no such store"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert words in capsys.readouterr().err and not (tmp_path / "c.zarr").exists()


def test_an_unfinished_store_has_another_name(tmp_path):
    data = dataset()
    source, stopped = write_zarr(tmp_path / "a.zarr", data), tmp_path / "b.zarr"

    def stop(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rechunk(source, stopped, [MSL], progress=stop)
    assert not stopped.exists()
    rechunk(source, stopped, [MSL])
    assert np.isfinite(WeatherStore(stopped).read_many([0, 11], [MSL])).all()
    assert {path.name for path in tmp_path.iterdir()} == {"a.zarr", "b.zarr"}


def test_what_is_missing_is_named(tmp_path):
    store = WeatherStore(write_zarr(tmp_path / "a.zarr", dataset()))
    with pytest.raises(ValueError, match=r"has no variable 't2m'; it has geopotential, land_sea_mask, mean_sea"):
        store.check([Channel("t2m")])
    with pytest.raises(ValueError, match="z has no level 700; it has 500, 850, 1000"):
        store.check([Channel("z", 700.0)])
    with pytest.raises(ValueError, match=r"z is on pressure levels; list it in data\.pressure"):
        store.check([Channel("z")])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zarr: there is no such store"):
        WeatherStore(tmp_path / "nowhere.zarr")


def test_malformed_stores(tmp_path):
    data = dataset()
    jump = data.assign_coords(latitude=[70, 60, 50, 55, 0, -20, -40, -80])
    with pytest.raises(ValueError, match="latitudes are not monotone: 55 follows 50"):
        _ = WeatherStore(write_zarr(tmp_path / "a.zarr", jump)).latitudes
    back = data.isel(time=[0, 2, 1])
    with pytest.raises(ValueError, match="its times do not increase"):
        _ = WeatherStore(write_zarr(tmp_path / "b.zarr", back)).times
    flat = data.rename(latitude="y")
    with pytest.raises(ValueError, match="has no dimension latitude or lat; it has"):
        _ = WeatherStore(write_zarr(tmp_path / "c.zarr", flat)).latitudes
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is neither a zarr group nor a NetCDF file"):
        _ = WeatherStore(tmp_path / "empty").times
    (tmp_path / "text.nc").write_text("nothing")
    with pytest.raises(ValueError, match=r"text\.nc: is neither a zarr group nor a NetCDF file"):
        _ = WeatherStore(tmp_path / "text.nc").times
    with pytest.raises(ValueError, match=r"d\.zarr: its dimension time has no coordinate that tells the times"):
        _ = WeatherStore(write_zarr(tmp_path / "d.zarr", data.drop_vars("time"))).times
    other = dataset(times=np.arange(len(TIMES)) * 6)
    other["time"].attrs.update(units="hours since 2020-01-01", calendar="noleap")
    with pytest.raises(ValueError, match=r"e\.zarr: its times (cannot be read|are of another calendar)"):
        _ = WeatherStore(write_zarr(tmp_path / "e.zarr", other)).times
    with pytest.raises(ValueError, match=r"f\.zarr: has a single latitude"):
        _ = WeatherStore(write_zarr(tmp_path / "f.zarr", data.isel(latitude=[0]))).latitudes
