"""Stores of gridded weather: zarr (v2, v3, consolidated or not, sharded or not) and NetCDF, read block by block.

Whatever the order of a store's dimensions and the direction of its latitudes, a block comes as (channel, latitude,
longitude), north first. Only the records, channels and longitudes that are asked for are fetched, and what was fetched
is counted, compressed bytes and all.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from physics.time_units import whole_units

TIME = ("time", "time_index", "valid_time")
LEVEL = ("level", "pressure_level", "isobaricInhPa", "plev")
LATITUDE = ("latitude", "lat")
LONGITUDE = ("longitude", "lon")
CHANNEL = ("channel",)
PACKED = "fields"
"""Name of the array (time, channel, latitude, longitude) of a packed store; its attribute ``channels`` has names."""

# Names of ERA5 in data sets, by the short names that people say.
ALIASES = {
    "msl": "mean_sea_level_pressure", "u10": "10m_u_component_of_wind", "v10": "10m_v_component_of_wind",
    "t2m": "2m_temperature", "sp": "surface_pressure", "tcwv": "total_column_water_vapour",
    "z": "geopotential", "q": "specific_humidity", "r": "relative_humidity", "t": "temperature",
    "u": "u_component_of_wind", "v": "v_component_of_wind", "tp": "total_precipitation",
    "lsm": "land_sea_mask", "slt": "soil_type", "orography": "geopotential_at_surface",
}  # fmt: skip
_LONG = {long: short for short, long in ALIASES.items()}


@dataclass(frozen=True)
class Channel:
    """One two-dimensional field of every record.

    Attributes:
        variable: Short name.
        level: Pressure, hPa; None: at the surface.
    """

    variable: str
    level: float | None = None

    @property
    def name(self) -> str:
        """For instance ``msl`` or ``z500``."""
        return self.variable if self.level is None else f"{self.variable}{self.level:g}"

    @classmethod
    def parse(cls, name: str, level: float | None = None) -> Channel:
        """A channel by the long or short name of its variable."""
        return cls(_LONG.get(name, name), level)

    @classmethod
    def named(cls, name: str) -> Channel:
        """A channel by its `name`: ``t2m`` is at the surface, ``t850`` on a level."""
        found = None if name in ALIASES else re.fullmatch(r"([a-z]+)(\d+)", name)
        return cls(_LONG.get(name, name)) if found is None else cls(found[1], float(found[2]))


class _CountingFile(io.RawIOBase):
    """A file that knows how many bytes were read from it."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self.count = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        read = self._file.readinto(buffer)
        self.count += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def _counting_zarr(path: str) -> Any:
    """A read-only zarr store whose ``count`` says how many bytes were fetched from it."""
    from zarr.storage import FsspecStore, LocalStore, WrapperStore

    class Counting(WrapperStore):
        count = 0

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            found = await super().get(key, prototype, byte_range)
            if found is not None:
                self.count += len(found)
            return found

        async def get_partial_values(self, prototype: Any, key_ranges: Iterable[Any]) -> Any:
            found = await super().get_partial_values(prototype, key_ranges)
            self.count += sum(len(part) for part in found if part is not None)
            return found

    remote = "://" in path
    return Counting(FsspecStore.from_url(path, read_only=True) if remote else LocalStore(path, read_only=True))


class WeatherStore:
    """A store of gridded fields.

    It is opened when it is first asked something, anew in every process.

    Args:
        path: A zarr folder or address, or a NetCDF file.

    Attributes:
        read_s: Seconds that this process has spent reading blocks so far, decompression included.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it has no grid of latitudes and longitudes, or latitudes that are not monotone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        if "://" not in self.path and not Path(self.path).exists():
            raise FileNotFoundError(f"{self.path}: there is no such store")
        self._pid: int | None = None
        self.read_s = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_pid": None, "read_s": 0.0}

    # ------------------------------------------------------------------------------------------------------ opening

    @property
    def data(self) -> Any:
        """The `xarray.Dataset`, lazy."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._data, self._counter = self._open()
        return self._data

    def _open(self) -> tuple[Any, Any]:
        import xarray

        try:
            if Path(self.path).is_file():
                with open(self.path, "rb") as file:
                    classic = file.read(3) == b"CDF"
                if classic:  # NetCDF-3: uncompressed, mapped; what is asked for is what is read
                    return xarray.open_dataset(self.path, engine="scipy", cache=False), None
                counter = _CountingFile(self.path)
                return xarray.open_dataset(counter, engine="h5netcdf", cache=False), counter
            counter = _counting_zarr(self.path)
            with warnings.catch_warnings():  # stores without consolidated metadata, with other files in their folder
                warnings.simplefilter("ignore")
                return xarray.open_zarr(counter, chunks=None, consolidated=None), counter
        except (OSError, KeyError, ValueError) as error:
            reason = str(error)
            if "decode time" in reason:
                raise ValueError(f"{self.path}: its times cannot be read ({reason})") from error
            raise ValueError(f"{self.path}: is neither a zarr group nor a NetCDF file ({reason})") from error

    @property
    def bytes_read(self) -> int:
        """Bytes that this process has fetched from the store so far, its metadata included (NetCDF-3: 0)."""
        return 0 if self._pid != os.getpid() or self._counter is None else self._counter.count

    # ----------------------------------------------------------------------------------------------- what it contains

    def _dimension(self, names: tuple[str, ...], required: bool = True) -> str | None:
        for name in names:
            if name in self.data.dims:
                return name
        if required:
            raise ValueError(
                f"{self.path}: has no dimension {' or '.join(names)}; it has {', '.join(map(str, self.data.dims))}"
            )
        return None

    @cached_property
    def times(self) -> np.ndarray:
        """Times of the records, datetime64[ns].

        Integers count hours: since the date of an attribute ``time_units``, else since 1970. A snapshot, with a time
        that is no dimension, is one record.
        """
        name = next((name for name in TIME if name in self.data.coords), None)
        if name is None:
            raise ValueError(
                f"{self.path}: its dimension {self._dimension(TIME)} has no coordinate that tells the times"
            )
        values = np.atleast_1d(self.data[name].values)
        if values.dtype == object:  # of cftime
            raise ValueError(f"{self.path}: its times are of another calendar than the usual one ({values[0]!r})")
        if not np.issubdtype(values.dtype, np.datetime64):
            units = str(self.data.attrs.get("time_units", "hours since 1970-01-01"))
            origin = np.datetime64(units.split("since")[-1].strip().split(" ")[0], "ns")
            values = origin + (values.astype(np.float64) * 3.6e12).round().astype("timedelta64[ns]")
        values = values.astype("datetime64[ns]")
        if len(values) > 1 and not (np.diff(values) > np.timedelta64(0, "ns")).all():
            raise ValueError(f"{self.path}: its times do not increase")
        return values

    @cached_property
    def latitudes(self) -> np.ndarray:
        """Degrees, from north to south."""
        values = np.asarray(self.data[self._dimension(LATITUDE)].values, dtype=np.float64)
        steps = np.diff(values)
        if not len(steps):
            raise ValueError(f"{self.path}: has a single latitude; a grid has two at least")
        if not ((steps > 0).all() or (steps < 0).all()):
            at = int(np.flatnonzero(np.sign(steps) != np.sign(steps[0]))[0]) + 1
            raise ValueError(f"{self.path}: latitudes are not monotone: {values[at]:g} follows {values[at - 1]:g}")
        return values if steps[0] < 0 else values[::-1]

    @cached_property
    def _northward(self) -> bool:
        values = self.data[self._dimension(LATITUDE)].values
        return bool(values[0] < values[-1])

    @cached_property
    def longitudes(self) -> np.ndarray:
        """Degrees, as they are stored."""
        return np.asarray(self.data[self._dimension(LONGITUDE)].values, dtype=np.float64)

    @cached_property
    def packed(self) -> list[str] | None:
        """Names of the channels of a packed store, else None."""
        if PACKED in self.data and "channels" in self.data[PACKED].attrs:
            return list(self.data[PACKED].attrs["channels"])
        return None

    def levels(self, variable: str) -> np.ndarray:
        """Pressures of a variable, hPa, as they are stored."""
        array = self._array(variable)
        name = next((d for d in array.dims if d in LEVEL), None)
        return np.zeros(0) if name is None else np.asarray(self.data[name].values, dtype=np.float64)

    def _array(self, variable: str) -> Any:
        for name in (variable, ALIASES.get(variable)):
            if name in self.data:
                return self.data[name]
        found = ", ".join(sorted(map(str, self.data.data_vars)))
        packed = f" (channels {', '.join(self.packed)})" if self.packed else ""
        raise ValueError(f"{self.path}: has no variable {variable!r}; it has {found}{packed}")

    def check(self, channels: Sequence[Channel]) -> None:
        """Raise a ValueError that names the first channel that the store lacks, and what it has."""
        for channel in channels:
            if self.packed is not None and channel.name in self.packed:
                continue
            array = self._array(channel.variable)
            levels = self.levels(channel.variable)
            if channel.level is None and len(levels):
                raise ValueError(f"{self.path}: {channel.variable} is on pressure levels; list it in data.pressure")
            if channel.level is not None and channel.level not in levels:
                have = ", ".join(f"{level:g}" for level in levels) or "no levels"
                raise ValueError(f"{self.path}: {channel.variable} has no level {channel.level:g}; it has {have}")
            known = {*TIME, *LEVEL, *LATITUDE, *LONGITUDE}
            if strange := [str(d) for d in array.dims if d not in known]:
                raise ValueError(f"{self.path}: {channel.variable} has a dimension {strange[0]!r} of unknown meaning")

    # ------------------------------------------------------------------------------------------------------- reading

    def read(self, record: int, channels: Sequence[Channel], longitudes: slice = slice(None)) -> np.ndarray:
        """A block of one record.

        Args:
            record: Its number.
            channels: Which.
            longitudes: Which columns.

        Returns:
            (channel, latitude, longitude), float32, north first.
        """
        return self.read_many([record], channels, longitudes)[0]

    def read_many(
        self, records: Sequence[int], channels: Sequence[Channel], longitudes: slice = slice(None)
    ) -> np.ndarray:
        """Blocks of several records, (record, channel, latitude, longitude), float32, north first."""
        return self._read(channels, longitudes, list(records))

    def read_static(self, variables: Sequence[str], longitudes: slice = slice(None)) -> np.ndarray:
        """Fields that do not change, (variable, latitude, longitude), float32."""
        channels = [Channel(_LONG.get(name, name)) for name in variables]
        return self._read(channels, longitudes, None)[0]

    def _read(self, channels: Sequence[Channel], longitudes: slice, records: list[int] | None) -> np.ndarray:
        begin = perf_counter()
        try:
            return self._blocks(channels, longitudes, records)
        finally:
            self.read_s += perf_counter() - begin

    def _blocks(self, channels: Sequence[Channel], longitudes: slice, records: list[int] | None) -> np.ndarray:
        width = len(range(*longitudes.indices(len(self.longitudes))))
        shape = (1 if records is None else len(records), len(channels), len(self.latitudes), width)
        out = np.empty(shape, dtype=np.float32)
        for array, axis, places, numbers in self._sources(channels):
            wanted: dict[str, Any] = {self._dimension(LONGITUDE): longitudes}
            time = next((d for d in array.dims if d in TIME), None)
            if time is not None:
                wanted[time] = _as_slice([0] if records is None else records)
            if axis is not None:
                wanted[axis] = _as_slice(numbers)
            part = array.isel(wanted)
            lead = [d for d in (time, axis) if d is not None]
            part = part.transpose(*lead, self._dimension(LATITUDE), self._dimension(LONGITUDE))
            values = np.asarray(part.values, dtype=np.float32)
            if axis is None:
                values = np.expand_dims(values, -3)
            if time is None:
                values = values[None]
            out[:, places] = values[:, :, ::-1] if self._northward else values
        return out

    def _sources(self, channels: Sequence[Channel]) -> list[tuple[Any, str | None, list[int], list[int]]]:
        """Arrays to read: (array, dimension of level or channel, places in the block, numbers along the dimension)."""
        groups: dict[tuple[str, bool], tuple[list[int], list[int]]] = {}
        for place, channel in enumerate(channels):
            if self.packed is not None and channel.name in self.packed:
                key, number = (PACKED, True), self.packed.index(channel.name)
            elif channel.level is None:
                key, number = (channel.variable, False), 0
            else:
                levels = self.levels(channel.variable)
                key, number = (channel.variable, True), int(np.flatnonzero(levels == channel.level)[0])
            places, numbers = groups.setdefault(key, ([], []))
            places.append(place)
            numbers.append(number)
        found = []
        for (name, along), (places, numbers) in groups.items():
            array = self.data[PACKED] if name == PACKED else self._array(name)
            axis = next(d for d in array.dims if d in (*LEVEL, *CHANNEL)) if along else None
            found.append((array, axis, places, numbers))
        return found

    # ----------------------------------------------------------------------------------------------------- alignment

    def wasted_factor(self, channels: Sequence[Channel], longitudes: slice = slice(None)) -> float:
        """How many values the chunks that a block of one record touches hold, for each that is asked for.

        Chunks along latitude are whole; with sharding it is the inner chunks that count.
        """
        touched = asked = 0.0
        columns = range(*longitudes.indices(len(self.longitudes)))
        for array, axis, _, numbers in self._sources(channels):
            chunks = array.encoding.get("chunks") or array.encoding.get("chunksizes")
            sizes = dict(zip(array.dims, chunks or array.shape, strict=True))
            if chunks is None:  # contiguous: rows of the last dimensions are read as they lie
                sizes = {d: 1 for d in array.dims}
            along = {self._dimension(LONGITUDE): columns}
            if axis is not None:
                along[axis] = numbers
            factor = wanted = 1.0
            for name, size in zip(array.dims, array.shape, strict=True):
                if name in TIME:
                    factor *= sizes[name]
                    continue
                which = along.get(name, range(size))
                wanted *= len(which)
                factor *= _covered(which, sizes[name], size)
            touched, asked = touched + factor, asked + wanted
        return touched / asked if asked else 1.0


def _covered(indices: Iterable[int], chunk: int, size: int) -> int:
    """Places along a dimension of the chunks that hold the indices."""
    return sum(min(chunk, size - number * chunk) for number in {index // chunk for index in indices})


def _as_slice(numbers: list[int]) -> slice | list[int]:
    """A slice where the numbers are consecutive: it is read at once."""
    first = numbers[0]
    return slice(first, first + len(numbers)) if numbers == list(range(first, first + len(numbers))) else numbers


def rechunk(
    source: str | Path,
    target: str | Path,
    channels: Sequence[Channel],
    token: int = 1,
    channel: int = 1,
    statics: Sequence[str] = (),
    num_inputs: int | None = None,
    sharded: bool = False,
    records: Sequence[int] | None = None,
    height: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a packed store whose chunks are the blocks of a ``token x channel`` grid of ranks.

    It also fits every coarser grid whose blocks are made of these. It appears under its name when it is complete.

    Args:
        source: Any store.
        target: Folder of the new one, zarr v3.
        channels: Which, in the order of the network.
        token: Longitude bands T.
        channel: Channel groups C.
        statics: Variables that do not change.
        num_inputs: Channels of the network, statics included, that groups are cut from; None: channels and statics.
        sharded: One file per record that holds all chunks, in place of a file per chunk.
        records: Numbers of the records; None: all.
        height: Rows kept, from the north; None: all.
        progress: Called after every record with how many there are by then, and how many there will be.

    Raises:
        ValueError: If the bands do not divide the longitudes, or there is something at ``target``.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target}: is there already; remove it or name another folder")
    store = WeatherStore(source)
    store.check(channels)
    records = range(len(store.times)) if records is None else records
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    writer = PackedWriter(
        unfinished, [c.name for c in channels], store.times[list(records)], store.latitudes[:height], store.longitudes,
        {name: store.read_static([name])[0, :height] for name in statics},
        token, math.ceil((num_inputs or len(channels) + len(statics)) / channel), sharded,
    )  # fmt: skip
    for place, record in enumerate(records):
        writer.write(place, store.read(record, channels)[:, :height])
        if progress is not None:
            progress(place + 1, len(records))
    writer.close()
    unfinished.rename(target)


class PackedWriter:
    """Writes a packed store, record by record.

    Args:
        path: New folder.
        channels: Names.
        times: datetime64 of the records.
        latitudes: Degrees, from north to south.
        longitudes: Degrees.
        statics: (latitude, longitude) by name.
        token: Longitude bands of a chunk's cut.
        group: Channels of a chunk.
        sharded: One file per record.
        attributes: Of the group.

    Raises:
        ValueError: If the bands do not divide the longitudes.
    """

    def __init__(
        self,
        path: str | Path,
        channels: Sequence[str],
        times: np.ndarray,
        latitudes: np.ndarray,
        longitudes: np.ndarray,
        statics: dict[str, np.ndarray],
        token: int = 1,
        group: int | None = None,
        sharded: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        import zarr

        height, width, number = len(latitudes), len(longitudes), len(channels)
        if width % token:
            raise ValueError(f"token={token}: does not divide the {width} longitudes of the store")
        self._group = zarr.create_group(str(path), attributes=attributes or {})
        chunk = (1, min(group or number, number), height, width // token)
        shard = (1, -(-number // chunk[1]) * chunk[1], height, width) if sharded else None
        self._fields = self._group.create_array(
            PACKED, shape=(len(times), number, height, width), chunks=chunk, shards=shard, dtype="float32",
            dimension_names=("time", "channel", "latitude", "longitude"), attributes={"channels": list(channels)},
            fill_value=float("nan"),
        )  # fmt: skip
        numbers, unit = whole_units((times - np.datetime64("1970-01-01", "ns")) / np.timedelta64(1, "h"))
        self._coordinate("time", numbers, {"units": f"{unit} since 1970-01-01", "calendar": "standard"})
        self._coordinate("latitude", latitudes, {"units": "degrees_north"})
        self._coordinate("longitude", longitudes, {"units": "degrees_east"})
        for name, field in statics.items():
            array = self._group.create_array(
                name, data=np.ascontiguousarray(field, dtype=np.float32), dimension_names=("latitude", "longitude"),
                chunks=(height, width // token),
            )  # fmt: skip
            array.attrs["static"] = True

    def _coordinate(self, name: str, values: np.ndarray, attributes: dict[str, str]) -> None:
        array = self._group.create_array(name, data=np.ascontiguousarray(values), dimension_names=(name,))
        array.attrs.update(attributes)

    def write(self, record: int, block: np.ndarray) -> None:
        """Write (channel, latitude, longitude) of a record, or (record, channel, latitude, longitude) of several."""
        if block.ndim == 3:
            block = block[None]
        self._fields[record : record + len(block)] = block

    def close(self) -> None:
        """Make the metadata one file, as readers like it."""
        import zarr

        with warnings.catch_warnings():  # not yet part of the specification of zarr v3
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(self._group.store)
