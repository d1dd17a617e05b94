"""Files of arrays: what other libraries have written loads to equal arrays, and each rank reads its own part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import parallel.array as pa
from parallel.array.comm import Comm
from parallel.array.store import load, open_store, save
from parallel.array.streaming import Stream, prefetched
from tests.parallel.array_cases import comm_of

NAMES = {"a.h5": "group/data", "a.nc": "group/data", "old.nc": "data", "a.zarr": "group/data", "a.npy": None,
         "a.csv": None, "a.parquet": None}  # fmt: skip
SHAPE = (13, 5)


def written(folder: Path, shape: tuple[int, int] = SHAPE, chunk: int | None = None) -> np.ndarray:
    """The same numbers in all formats, each by the library that the format is known by."""
    import h5netcdf
    import h5py
    import zarr
    from scipy.io import netcdf_file

    values = np.random.default_rng(0).normal(size=shape)
    rows = chunk or 4
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("group/data", data=values, chunks=(min(rows, shape[0]), shape[1]))
        file.create_dataset("other", data=np.arange(3))
    with h5netcdf.File(folder / "a.nc", "w") as file:
        group = file.create_group("group")
        group.dimensions = {"row": shape[0], "column": shape[1]}
        group.create_variable("data", ("row", "column"), "f8", data=values)
    with netcdf_file(folder / "old.nc", "w") as old:
        for name, length in zip(("row", "column"), shape, strict=True):
            old.createDimension(name, length)
        old.createVariable("data", "f8", ("row", "column"))[:] = values
    root = zarr.open_group(str(folder / "a.zarr"), mode="w")
    root.create_group("group").create_array("data", shape=shape, chunks=(min(rows, shape[0]), shape[1]), dtype="f8")[
        :
    ] = values
    np.save(folder / "a.npy", values)
    np.savetxt(folder / "a.csv", values, delimiter=",", header="a,b,c,d,e", comments="", fmt="%.17g")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return values
    table = pyarrow.table({f"c{i}": values[:, i] for i in range(shape[1])})
    parquet.write_table(table, folder / "a.parquet", row_group_size=rows)
    return values


def read_all(size: int, folder: str) -> dict[str, np.ndarray]:
    comm = comm_of(size)
    found: dict[str, np.ndarray] = {}
    if comm is None:
        return found
    for name, dataset in NAMES.items():
        path = Path(folder) / name
        if not path.exists():
            continue
        for split in (None, 0, 1):
            options = {"header": 1} if name.endswith("csv") else {}
            array = load(path, dataset, split, comm, **options)
            assert array.is_balanced and array.split == split
            found[f"{name} {split}"] = array.numpy()
            found[f"{name} {split} part"] = load(path, dataset, split, comm, begin=3, end=9, **options).numpy()
    return found


def write_all(size: int, folder: str) -> None:
    comm = comm_of(size)
    if comm is None:
        return
    values = pa.randn(*SHAPE, dtype=torch.float64, split=0, comm=comm, seed=9)
    for name in ("b.zarr", "b.npy", "b.h5"):
        for split in (None, 0, 1):
            save(values.resplit(split), Path(folder) / f"{split}{name}")
    save(values[:0], Path(folder) / "empty.npy")
    save(values[values > 9], Path(folder) / "none.zarr")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_files_of_other_libraries_load(size, tmp_path, ranks4):
    values = written(tmp_path)
    for found in ranks4(read_all, size, str(tmp_path))[:size] if size > 1 else [read_all(1, str(tmp_path))]:
        assert len(found) >= 36
        for key, array in found.items():
            np.testing.assert_array_equal(array, values[3:9] if key.endswith("part") else values, err_msg=key)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_is_saved_is_loaded(size, tmp_path, ranks4):
    if size == 1:
        write_all(1, str(tmp_path))
    else:
        ranks4(write_all, size, str(tmp_path))
    values = pa.randn(*SHAPE, dtype=torch.float64, comm=Comm(), seed=9).numpy()
    for name in ("b.zarr", "b.npy", "b.h5"):
        for split in (None, 0, 1):
            np.testing.assert_array_equal(load(tmp_path / f"{split}{name}", comm=Comm()).numpy(), values)
    assert np.load(tmp_path / "empty.npy").shape == (0, 5)
    assert load(tmp_path / "none.zarr", comm=Comm()).shape == (0,)


def test_csv_lines_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "ragged.csv"
    path.write_text("a,b\n" + "1,2\n" * 5 + "1,2,3\n" + "1,2\n" * 5)
    with pytest.raises(ValueError, match=r"ragged.csv, line 7: 3 fields, earlier lines have 2"):
        load(path, comm=Comm(), header=1)
    path.write_text("1,2\n3,x\n")
    with pytest.raises(ValueError, match=r"line 2: could not convert string 'x'"):
        load(path, comm=Comm())
    path.write_text('"1";"2"\n"3";"4"\n')
    assert load(path, comm=Comm(), sep=";").tolist() == [[1, 2], [3, 4]]
    path.write_text("")
    assert load(path, comm=Comm()).shape == (0, 0)


def _ragged(folder: str) -> str:
    try:
        load(Path(folder) / "ragged.csv", comm=Comm.world(), header=1)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_csv_mistakes_are_told_on_all_ranks(tmp_path, ranks2):
    (tmp_path / "ragged.csv").write_text("a,b\n" + "1,2\n" * 50 + "1,2,3\n" + "1,2\n" * 3)
    assert all("line 52: " in message for message in ranks2(_ragged, str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "dataset", "message"),
    [
        ("a.h5", None, "several arrays: name one with dataset=...; it has group/data, other"),
        ("a.h5", "nope", "no array 'nope'; it has group/data, other"),
        ("a.nc", "nope", "no array 'nope'; it has group/data"),
        ("a.zarr", "nope", "no array 'nope'; it has group/data"),
        ("a.csv", None, "cannot be found by number"),
        ("a.xyz", None, "unknown kind of file"),
    ],
)
def test_mistakes_are_named(name, dataset, message, tmp_path):
    written(tmp_path)
    (tmp_path / "a.xyz").touch()
    with pytest.raises(ValueError, match=message.replace("...", r"\.\.\.")):
        open_store(tmp_path / name, dataset)
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path / "missing.h5")


def test_streams_give_every_row_once(tmp_path):
    values = written(tmp_path)
    stream = Stream.open(tmp_path / "a.zarr", "group/data", rows=5, comm=Comm(), begin=1)
    blocks = [(first, block.numpy()) for first, block in stream]
    assert [first for first, _ in blocks] == [1, 6, 11] and len(stream) == 3
    np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]), values[1:])


def test_a_reader_that_fails_is_heard():
    def read(number: int) -> torch.Tensor:
        if number == 2:
            raise OSError("the disk is gone")
        return torch.zeros(1)

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(prefetched(read, 5))
    stopped = prefetched(read, 2)
    next(stopped)
    stopped.close()  # its thread ends


def test_a_line_of_names_is_pointed_at(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(ValueError, match=r"line 1: .*header=1 \(data.csv_header=1\)"):
        load(tmp_path / "rows.csv", split=0, comm=Comm())
    assert load(tmp_path / "rows.csv", split=0, comm=Comm(), header=1).numpy().tolist() == [[1, 2], [3, 4]]
