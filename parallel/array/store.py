"""Files of arrays: every rank reads and writes its own rows.

HDF5, NetCDF, zarr, npy, CSV and Parquet, told apart by the end of the name. `load` gives a `SplitArray`, `open_store`
something to read rows from, block by block (`parallel.array.streaming`). Packages are imported where they are needed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from parallel.array.array import SplitArray, normalized_axis
from parallel.array.chunks import balanced, offsets
from parallel.array.comm import Comm

Format = Literal["hdf5", "netcdf", "zarr", "npy", "csv", "parquet"]
SUFFIXES: dict[str, Format] = {
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".hdf": "hdf5",
    ".nc": "netcdf",
    ".nc4": "netcdf",
    ".cdf": "netcdf",
    ".zarr": "zarr",
    ".npy": "npy",
    ".csv": "csv",
    ".txt": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_CHUNK_BYTES = 1 << 22  # of the stores that are written


def format_of(path: str | Path) -> Format:
    """Format by the end of the name.

    Raises:
        ValueError: For another one.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path={path}: unknown kind of file; names end in {', '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


class Store:
    """An array in a file.

    Args:
        shape: Of the array.
        dtype: Type of its elements.
        read: Gives the part that slices select, one for each axis.
        close: Closes the file.
        chunk: Rows of a chunk of the file along the first axis; 1: rows are read alone.

    Attributes:
        bytes_read: Bytes of the elements that were read.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype,
        read: Callable[[tuple[slice, ...]], np.ndarray],
        close: Callable[[], None] = lambda: None,
        chunk: int = 1,
    ) -> None:
        self.shape, self.dtype, self.chunk = tuple(int(n) for n in shape), np.dtype(dtype), max(int(chunk), 1)
        self._read, self._close = read, close
        self.bytes_read = 0

    def read(self, begin: int, end: int, axis: int = 0) -> np.ndarray:
        """Rows ``begin:end`` along an axis, all others whole."""
        slices = tuple(slice(begin, end) if i == axis else slice(0, n) for i, n in enumerate(self.shape))
        part = np.ascontiguousarray(self._read(slices))
        self.bytes_read += part.nbytes
        return part

    def close(self) -> None:
        """Close the file."""
        self._close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(path: str | Path, dataset: str | None = None) -> Store:
    """Open an array of a file whose format allows to read rows by number (all but CSV).

    Args:
        path: File, or folder of a zarr store.
        dataset: Name of the array within it, groups divided by ``/``; of Parquet, columns divided by commas. None: the
            only one there is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the array has to be named, or does not exist, with the names that there are.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    match format_of(path):
        case "hdf5":
            return _open_hdf5(path, dataset)
        case "netcdf":
            return _open_netcdf(path, dataset)
        case "zarr":
            return _open_zarr(path, dataset)
        case "npy":
            return _open_npy(path)
        case "parquet":
            return _open_parquet(path, dataset)
    raise ValueError(f"path={path}: rows of text files cannot be found by number; load the file, or convert it (save)")


def _chosen(path: Path, names: Sequence[str], dataset: str | None) -> str:
    """The array that is meant."""
    if dataset is None and len(names) == 1:
        return names[0]
    if dataset is None or dataset.strip("/") not in names:
        asked = "several arrays: name one with dataset=..." if dataset is None else f"no array {dataset!r}"
        raise ValueError(f"{path} has {asked}; it has {', '.join(sorted(names)) or 'none'}")
    return dataset.strip("/")


def _open_hdf5(path: Path, dataset: str | None) -> Store:
    import h5py

    file = h5py.File(path, "r")
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    try:
        array = file[_chosen(path, names, dataset)]
    except ValueError:
        file.close()
        raise
    return Store(array.shape, array.dtype, lambda s: array[s], file.close, (array.chunks or (1,))[0])


def _open_netcdf(path: Path, dataset: str | None) -> Store:
    with open(path, "rb") as file:
        classic = file.read(3) == b"CDF"
    if classic:
        from scipy.io import netcdf_file

        old = netcdf_file(path, "r", mmap=False)
        names = [n for n, v in old.variables.items() if n not in old.dimensions]
        array = old.variables[_chosen(path, names or list(old.variables), dataset)]
        native = array.data.dtype.newbyteorder("=")
        return Store(array.shape, native, lambda s: array[s].astype(native), old.close)
    import h5netcdf

    file = h5netcdf.File(path, "r")
    found: dict[str, Any] = {}

    def walk(group: Any, prefix: str) -> None:
        for name, variable in group.variables.items():
            if name not in group.dimensions:
                found[prefix + name] = variable
        for name, inner in group.groups.items():
            walk(inner, f"{prefix}{name}/")

    walk(file, "")
    try:
        array = found[_chosen(path, list(found), dataset)]
    except ValueError:
        file.close()
        raise
    return Store(array.shape, array.dtype, lambda s: array[s], file.close, (array.chunks or (1,))[0])


def _open_zarr(path: Path, dataset: str | None) -> Store:
    import zarr

    root = zarr.open(str(path), mode="r")
    if isinstance(root, zarr.Array):
        array = root
    else:
        names = [name for name, item in root.members(max_depth=None) if isinstance(item, zarr.Array)]
        array = root[_chosen(path, names, dataset)]
    rows = array.chunks[0] if getattr(array, "shards", None) is None else array.shards[0]
    return Store(array.shape, array.dtype, lambda s: array[s], chunk=rows)


def _open_npy(path: Path) -> Store:
    array = np.load(path, mmap_mode="r")
    return Store(array.shape, array.dtype, lambda s: np.array(array[s]))


def _open_parquet(path: Path, dataset: str | None) -> Store:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need the package pyarrow: pip install -c constraints.txt pyarrow") from error
    file = parquet.ParquetFile(path)
    names = list(file.schema_arrow.names)
    columns = names if dataset is None else [n.strip() for n in dataset.split(",")]
    if unknown := [n for n in columns if n not in names]:
        raise ValueError(f"{path} has no column {unknown[0]!r}; it has {', '.join(names)}")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    first = np.concatenate([[0], np.cumsum(groups)]).astype(int)
    dtype = np.result_type(*(file.schema_arrow.field(n).type.to_pandas_dtype() for n in columns))

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        begin, end = slices[0].start, slices[0].stop
        wanted = [i for i in range(len(groups)) if first[i] < end and first[i + 1] > begin]
        if not wanted or end <= begin:
            return np.empty((0, len(columns)), dtype)[(slice(None), *slices[1:])]
        table = file.read_row_groups(wanted, columns=columns)
        rows = np.stack([table[n].to_numpy() for n in columns], 1).astype(dtype)
        return rows[begin - first[wanted[0]] : end - first[wanted[0]]][(slice(None), *slices[1:])]

    return Store((int(first[-1]), len(columns)), dtype, read, file.close, max(groups, default=1))


def load(
    path: str | Path,
    dataset: str | None = None,
    split: int | None = 0,
    comm: Comm | None = None,
    dtype: torch.dtype | None = None,
    begin: int = 0,
    end: int | None = None,
    **text: Any,
) -> SplitArray:
    """Read an array; every rank reads its own part.

    Args:
        path: File.
        dataset: Name of the array within it.
        split: Axis; None: every rank reads everything.
        comm: Ranks.
        dtype: Type of the elements; None: that of the file.
        begin: First row of the first axis.
        end: Behind the last one; None: all.
        **text: Of CSV files: see `load_csv`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such array, or a line of text cannot be read.
    """
    comm = comm or Comm.world()
    if format_of(path) == "csv":
        if begin or end is not None:
            return load_csv(path, split, comm, dtype, **text)[begin:end]
        return load_csv(path, split, comm, dtype, **text)
    with open_store(path, dataset) as store:
        end = store.shape[0] if end is None else min(end, store.shape[0])
        shape = (max(end - begin, 0), *store.shape[1:])
        axis = 0 if split is None else normalized_axis(split, len(shape))
        first, rows = 0, shape[axis]
        if split is not None:
            map_ = balanced(shape[axis], comm.size)
            first, rows = offsets(map_)[comm.rank], map_[comm.rank]
        if axis == 0:
            part = store.read(begin + first, begin + first + rows)
        else:
            part = store.read(first, first + rows, axis)[begin:end]
    native = part.astype(part.dtype.newbyteorder("="), copy=False)
    local = torch.from_numpy(np.array(native))
    return SplitArray(local if dtype is None else local.to(dtype), shape, split, comm)


def load_csv(
    path: str | Path,
    split: int | None = 0,
    comm: Comm | None = None,
    dtype: torch.dtype | None = None,
    header: int = 0,
    sep: str = ",",
    quote: str | None = '"',
    columns: Sequence[int] | None = None,
) -> SplitArray:
    """Read numbers from text, ``(lines, columns)``: every rank reads its own range of bytes.

    A rank begins behind the first newline of its range (the first one at once) and ends with the line that crosses the
    end of its range.

    Args:
        path: File.
        split: 0, or another axis that the array is resplit to.
        comm: Ranks.
        dtype: Type; None: float64.
        header: Lines at the top to leave out.
        sep: Between fields.
        quote: Around fields.
        columns: Fields to keep; None: all.

    Raises:
        ValueError: On all ranks, with the number of the line that does not fit.
    """
    comm = comm or Comm.world()
    text, lines_skipped = _own_lines(Path(path), comm, header)
    rows, mistake = _parsed(text, sep, quote, columns)
    lines = text.count(b"\n") + (not text.endswith(b"\n") and bool(text))
    status = torch.tensor(
        [lines, -1 if mistake is None else mistake[0], rows.shape[1] if len(rows) else -1], device=comm.device
    )
    found = comm.all_gather(status).tolist()
    before = lines_skipped
    for rank, (count, wrong, _) in enumerate(found):
        if wrong >= 0:
            reason = mistake[1] if rank == comm.rank and mistake is not None else "see the other ranks"
            if before + wrong == 0:
                reason += "; a line of names is left out by header=1 (data.csv_header=1)"
            raise ValueError(f"{path}, line {before + wrong + 1}: {reason}")
        before += count
    before, widths = lines_skipped, {width for _, _, width in found if width >= 0}
    for count, _, width in found:
        if len(widths) > 1 and width >= 0 and width != found[0][2]:
            raise ValueError(f"{path}, line {before + 1}: {width} fields, earlier lines have {found[0][2]}")
        before += count
    width = next(iter(widths), 0)
    rows = rows if len(rows) else np.empty((0, width))
    local = torch.from_numpy(rows).to(dtype or torch.float64)
    counts = comm.gather_counts(len(local))
    array = SplitArray(local, (sum(counts), width), 0, comm, counts)
    return array.balance() if split == 0 else array.resplit(split)


def _own_lines(path: Path, comm: Comm, header: int) -> tuple[bytes, int]:
    """Whole lines that begin in this rank's range of bytes."""
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    with open(path, "rb", buffering=1 << 12) as file:  # what is read beyond the own lines
        for _ in range(header):
            file.readline()
        start = file.tell()
        size = os.fstat(file.fileno()).st_size - start
        begin = start + comm.rank * size // comm.size
        end = start + (comm.rank + 1) * size // comm.size
        if comm.rank:
            file.seek(begin - 1)
            begin += len(file.readline()) - 1  # nothing, where a line begins just here
        if begin >= end:
            return b"", header
        file.seek(begin)
        text = file.read(end - begin)
        if not text.endswith(b"\n"):
            text += file.readline()
    return text, header


def _parsed(
    text: bytes, sep: str, quote: str | None, columns: Sequence[int] | None
) -> tuple[np.ndarray, tuple[int, str] | None]:
    """Numbers, or the line (from 0) that does not fit and why."""
    options = {"delimiter": sep, "quotechar": quote, "usecols": columns, "comments": None, "ndmin": 2}
    if not text.strip():
        return np.empty((0, 0)), None
    try:
        return np.loadtxt(io.BytesIO(text), **options), None
    except ValueError as error:
        lines = text.split(b"\n")
        width = None
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                fields = np.loadtxt(io.BytesIO(line), **options).shape[1]
            except ValueError as reason:
                return np.empty((0, 0)), (number, str(reason).split(";")[0].replace("at row 0, ", ""))
            if width is not None and fields != width:
                return np.empty((0, 0)), (number, f"{fields} fields, earlier lines have {width}")
            width = fields
        return np.empty((0, 0)), (0, str(error))


# ------------------------------------------------------------------------------------------------------------- writing


def save(array: SplitArray, path: str | Path, dataset: str = "data") -> None:
    """Write an array, every rank its own rows; called on all ranks together, and finished on all when it returns.

    zarr: chunks that no two ranks share. npy: rows in place. HDF5: a file for each rank beside a virtual dataset.

    Args:
        array: Split along any axis, or whole.
        path: Where; what was there is replaced.
        dataset: Name of the array, in zarr groups and HDF5.

    Raises:
        ValueError: For formats that cannot be written in parallel.
    """
    path, kind = Path(path), format_of(path)
    if kind not in ("zarr", "npy", "hdf5"):
        raise ValueError(f"save to {path}: zarr, npy and HDF5 can be written by several ranks, {kind} cannot")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = array.resplit(0) if array.ndim and array.split not in (0, None) else array
    write = {"zarr": _save_zarr, "npy": _save_npy, "hdf5": _save_hdf5}[kind]
    write(rows, path, dataset)
    array.comm.gather_counts(0)  # nobody goes on before all have written


def _mine(rows: SplitArray) -> tuple[int, np.ndarray] | None:
    """First row and values that this rank writes."""
    if rows.split is None:
        return (0, rows.local.cpu().numpy()) if rows.comm.rank == 0 else None
    return rows.offset, rows.local.cpu().numpy()


def _save_npy(rows: SplitArray, path: Path, dataset: str) -> None:
    dtype = rows.local[:0].cpu().numpy().dtype if rows.ndim else rows.local.cpu().numpy().dtype
    if rows.comm.rank == 0:
        np.lib.format.open_memmap(path, "w+", dtype, rows.shape).flush() if rows.size else np.save(
            path, np.empty(rows.shape, dtype)
        )
    rows.comm.gather_counts(0)
    if (part := _mine(rows)) is not None and part[1].size:
        file = np.lib.format.open_memmap(path, "r+")
        file[part[0] : part[0] + len(part[1])] = part[1]
        file.flush()


def _save_zarr(rows: SplitArray, path: Path, dataset: str) -> None:
    import zarr

    width = max(int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.local.element_size(), 1)
    most = max(_CHUNK_BYTES // width, 1)
    length = rows.shape[0] if rows.ndim else 1
    chunk = max(min(most, -(-length // rows.comm.size)), 1)
    if rows.split == 0:  # whole chunks to each rank
        pieces = balanced(-(-length // chunk), rows.comm.size)
        ends = [min(end, length) for end in np.cumsum(pieces) * chunk]
        rows = rows.redistribute([int(end - begin) for begin, end in zip([0, *ends[:-1]], ends, strict=True)])
    dtype = rows.local[:0].cpu().numpy().dtype
    if rows.comm.rank == 0:
        group = zarr.open_group(str(path), mode="a")
        group.create_array(
            dataset, shape=rows.shape, chunks=(chunk, *(max(n, 1) for n in rows.shape[1:])), dtype=dtype, overwrite=True
        )
    rows.comm.gather_counts(0)
    if (part := _mine(rows)) is not None and part[1].size:
        zarr.open_group(str(path), mode="r+")[dataset][part[0] : part[0] + len(part[1])] = part[1]


def _save_hdf5(rows: SplitArray, path: Path, dataset: str) -> None:
    import h5py

    number = rows.comm.size if rows.split == 0 else 1
    parts = [path.with_name(f"{path.stem}.rank{rank}{path.suffix}") for rank in range(number)]
    if (part := _mine(rows)) is not None:
        with h5py.File(parts[rows.comm.rank], "w") as file:
            file.create_dataset(dataset, data=part[1])
    rows.comm.gather_counts(0)
    if rows.comm.rank == 0:
        dtype = rows.local[:0].cpu().numpy().dtype
        layout = h5py.VirtualLayout(rows.shape, dtype)
        map_ = rows.map or (rows.shape[0],)
        for name, begin, count in zip(parts, offsets(map_), map_, strict=True):
            if count:
                layout[begin : begin + count] = h5py.VirtualSource(name.name, dataset, (count, *rows.shape[1:]))
        with h5py.File(path, "w") as file:
            file.create_virtual_dataset(dataset, layout)
