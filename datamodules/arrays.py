"""Rows of arrays, of which every process holds or reads its own: generated, embedded, or from files."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override

from datamodules.readers.digits import read_digits
from parallel.array import SplitArray, take
from parallel.array.chunks import balanced, offsets
from parallel.array.comm import Comm
from parallel.array.generators import GENERATORS, Generated
from parallel.array.learning import finite_rows
from parallel.array.rng import Generator
from parallel.array.store import Store, format_of, load_csv, open_store
from parallel.array.streaming import prefetched

log = logging.getLogger(__name__)

Source = Literal["blobs", "susy_like", "sparse_regression", "low_rank", "moons", "waves", "digits", "file"]
Part = Literal["train", "val", "test", "all"]
_TYPES = {"float32": torch.float32, "float64": torch.float64}
# Arguments of this class by the argument of a generator.
_OPTIONS = {"num_features": "num_features", "num_groups": "num_groups", "rank": "rank", "noise": "noise",
            "num_nonzero": "num_nonzero", "scale": "scale"}  # fmt: skip


class Rows(NamedTuple):
    """Local rows of a range, their labels, and the rows that each process has."""

    x: Tensor
    y: Tensor
    map: tuple[int, ...]


class _Blocks(IterableDataset[dict[str, Tensor]]):
    """Blocks of a part, the next one read while the last one is in use."""

    def __init__(self, source: SplitArrays, part: Part) -> None:
        self.source, self.part = source, part

    def __len__(self) -> int:
        return self.source.num_blocks(self.part)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from prefetched(lambda i: self.source.batch(self.part, i), len(self))


class _Whole(Dataset[dict[str, Tensor]]):
    """The one batch of a part that stays in memory."""

    def __init__(self, source: SplitArrays, part: Part) -> None:
        self.source, self.part = source, part

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.source.batch(self.part, index)


class SplitArrays(LightningDataModule):
    """Rows that are split over all processes: an epoch is a pass over them, one step the whole of it or a block.

    Rows ``0 ... n_train - 1`` are for training, then come validation and test. Nothing is padded: every row is on one
    process, which may have none. A batch is a dictionary:

    ===== ============= =====================================================================================
    key   shape         meaning
    ===== ============= =====================================================================================
    x     (m, f)        rows of this process
    y     (m,)          labels or targets; zeros where there are none
    row   (m,) int64    their numbers in the data set
    map   (P,) int64    how many rows each process has
    ===== ============= =====================================================================================

    Args:
        source: ``blobs``, ``susy_like``, ``sparse_regression``, ``low_rank``, ``moons``, ``waves`` (all generated, see
            `parallel.array.generators`), ``digits`` (embedded, 1,797 images of 64 pixels) or ``file``.
        num_rows: Of generated data.
        num_features: Of generated data, where it can be chosen; None: its default.
        num_groups: Clouds of ``blobs``; None: its default.
        rank: Directions of ``low_rank``; None: its default.
        num_nonzero: Coefficients of ``sparse_regression`` that are not zero; None: its default.
        scale: Scale of the last column of ``sparse_regression``; None: its default.
        noise: Of ``low_rank``, ``moons``, ``waves``; None: its default.
        path: File: HDF5, NetCDF, zarr, npy, Parquet or CSV by its name; below ``data_dir`` if it is relative.
        data_dir: Folder of files.
        dataset: Name of the array in the file; of Parquet: columns divided by commas.
        labels: Name of an array in the same file with a label for each row; None: none.
        label_column: Column of ``x`` that is the label, and is taken out; None: none.
        flatten: How an array of a file becomes rows: axes after the first are one (``first``), or all axes but the last
            are rows (``last``), as pixels of images are.
        csv_header: Lines at the top of a CSV file to leave out.
        csv_sep: Between its fields.
        dtype: ``float32`` or ``float64``.
        val_fraction: Part of the rows for validation; 0: it sees the training rows.
        test_fraction: Part of the rows for the test; 0: the test sees the training rows.
        shuffle: Whether rows change places, by a permutation of the seed, before they are divided; not while streaming.
        nan_policy: Rows with NaN: ``raise``, or ``omit`` them.
        block_rows: Rows of a step over all processes, for data larger than memory; None: all of a part, kept in memory.
        seed: Of generators and of the permutation.

    Raises:
        ValueError: Names the argument and the remedy.
        FileNotFoundError: If there is no such file.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("x", "y", "row", "map")

    def __init__(
        self,
        source: Source = "blobs",
        num_rows: int = 20000,
        num_features: int | None = None,
        num_groups: int | None = None,
        rank: int | None = None,
        num_nonzero: int | None = None,
        scale: float | None = None,
        noise: float | None = None,
        path: str | None = None,
        data_dir: str | None = None,
        dataset: str | None = None,
        labels: str | None = None,
        label_column: int | None = None,
        flatten: Literal["first", "last"] = "first",
        csv_header: int = 0,
        csv_sep: str = ",",
        dtype: Literal["float32", "float64"] = "float32",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        shuffle: bool = False,
        nan_policy: Literal["raise", "omit"] = "raise",
        block_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.num_rows, self.path, self.data_dir = source, num_rows, path, data_dir
        self.dataset, self.labels, self.label_column, self.flatten = dataset, labels, label_column, flatten
        self.csv_header, self.csv_sep, self.dtype_name = csv_header, csv_sep, dtype
        self.val_fraction, self.test_fraction, self.shuffle = val_fraction, test_fraction, shuffle
        self.nan_policy, self.block_rows, self.seed = nan_policy, block_rows, seed
        self._options = {"num_features": num_features, "num_groups": num_groups, "rank": rank, "noise": noise,
                         "num_nonzero": num_nonzero, "scale": scale}  # fmt: skip
        self._check_arguments()
        self.generator: Generated | None = self._generator()
        self._comm: Comm | None = None
        self._memory: tuple[SplitArray, SplitArray] | None = None
        self._store: Store | None = None
        self._label_store: Store | None = None
        self._order: Tensor | None = None
        self._resident: dict[Part, dict[str, Tensor]] = {}

    def _check_arguments(self) -> None:
        known = {"source": get_args(Source), "dtype_name": tuple(_TYPES), "nan_policy": ("raise", "omit")}
        for key, allowed in (known | {"flatten": ("first", "last")}).items():
            if getattr(self, key) not in allowed:
                name = key.removesuffix("_name")
                raise ValueError(f"data.{name}={getattr(self, key)!r} is unknown; choose {', '.join(allowed)}")
        for key in ("num_rows", "block_rows"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        for key in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)}: give a part of the rows, 0 or more and below 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.val_fraction={self.val_fraction}, data.test_fraction={self.test_fraction}: nothing is left"
            )
        if (self.source == "file") != (self.path is not None):
            raise ValueError(
                f"data.source={self.source} and data.path={self.path}: source=file and a path belong together"
            )
        if self.labels is not None and self.label_column is not None:
            raise ValueError("data.labels and data.label_column both name the labels: give one")
        if self.shuffle and self.block_rows is not None:
            raise ValueError("data.shuffle=true needs all rows in memory: data.block_rows=null, or data.shuffle=false")

    def _generator(self) -> Generated | None:
        if self.source not in GENERATORS:
            return None
        kind = GENERATORS[self.source]
        known = inspect.signature(kind.__init__).parameters
        given = {name: value for name, value in self._options.items() if value is not None}
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"data.{unknown[0]}={given[unknown[0]]}: data.source={self.source} has no such option; use null"
            )
        try:
            return kind(self.num_rows, seed=self.seed, **given)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None

    # --------------------------------------------------------------------------------------------------- preparation

    @property
    def comm(self) -> Comm:
        """The processes that share the rows."""
        if self._comm is None:
            strategy = getattr(self.trainer, "strategy", None)
            self._comm = Comm.of_strategy(strategy)
        return self._comm

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return _TYPES[self.dtype_name]

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the source once; later calls return at once."""
        if (
            self._memory is not None
            or self._store is not None
            or (self.generator is not None and self._order is not None)
        ):
            return
        self._order = torch.empty(0)
        if self.source == "digits":
            images = read_digits()
            pixels = images.load(np.arange(len(images.labels)))
            rows = torch.from_numpy(pixels.reshape(len(pixels), -1)).to(self.dtype)
            labels = torch.from_numpy(images.labels)
            self._memory = tuple(SplitArray(t, t.shape, None, self.comm).resplit(0) for t in (rows, labels))
        elif self.source == "file":
            self._open()
        if self.shuffle:
            self._permute()
        name, size = self.path or self.source, self.comm.size
        log.info("%s: %d rows of %d columns on %d process(es)", name, self.length, self.num_features, size)

    def _open(self) -> None:
        path = Path(self.path)
        path = path if path.is_absolute() or self.data_dir is None else Path(self.data_dir) / path
        if not path.exists():
            raise FileNotFoundError(f"data.path={self.path}: there is no {path}")
        try:
            if format_of(path) == "csv":
                rows = load_csv(path, 0, self.comm, torch.float64, self.csv_header, self.csv_sep)
                self._memory = self._divided(rows)
            else:
                self._store = open_store(path, self.dataset)
                self._label_store = None if self.labels is None else open_store(path, self.labels)
        except ValueError as error:
            raise ValueError(f"data.path={self.path}: {error}") from None

    def _divided(self, rows: SplitArray) -> tuple[SplitArray, SplitArray]:
        """Columns and labels of rows that hold both."""
        column = self.label_column
        if column is None:
            labels = rows.like(torch.zeros(len(rows.local), dtype=self.dtype), rows.shape[:1], 0, rows.map)
            return rows.astype(self.dtype), labels
        if not -rows.shape[1] <= column < rows.shape[1]:
            raise ValueError(f"data.label_column={column}: the rows have {rows.shape[1]} columns")
        kept = [i for i in range(rows.shape[1]) if i != column % rows.shape[1]]
        x = rows.like(rows.local[:, kept].to(self.dtype), (rows.shape[0], len(kept)), 0, rows.map)
        return x, rows.like(_whole_numbers(rows.local[:, column]), rows.shape[:1], 0, rows.map)

    def _permute(self) -> None:
        x, y, _ = self._read(0, self.length)
        rows = [SplitArray(t, (self.length, *t.shape[1:]), 0, self.comm) for t in (x, y)]
        order = Generator(self.seed, stream=99).permutation(self.length, 0, self.comm)
        self._memory = tuple(take(one, order, 0) for one in rows)

    @property
    def length(self) -> int:
        """Rows of all parts together."""
        if self._memory is not None:
            return self._memory[0].shape[0]
        if self._store is not None:
            if self.flatten == "last" and len(self._store.shape) > 1:
                return math.prod(self._store.shape[:-1])
            return self._store.shape[0]
        return self.num_rows

    @property
    def num_features(self) -> int:
        """Columns."""
        if self._memory is not None:
            return self._memory[0].shape[1]
        if self._store is not None:
            tail = self._store.shape[-1:] if self.flatten == "last" else self._store.shape[1:]
            columns = math.prod(tail)
            return columns - (self.label_column is not None)
        return self.generator.num_features

    def bounds(self, part: Part) -> tuple[int, int]:
        """First row of a part, and the row behind its last one."""
        n = self.length
        val, test = int(n * self.val_fraction), int(n * self.test_fraction)
        train = n - val - test
        found = {"train": (0, train), "val": (train, train + val), "test": (train + val, n), "all": (0, n)}[part]
        return found if found[1] > found[0] or part == "all" else (0, train)

    # ----------------------------------------------------------------------------------------------------------- rows

    def _read(self, begin: int, end: int) -> Rows:
        """This process's rows of ``begin:end``, balanced over all processes."""
        map_ = balanced(end - begin, self.comm.size)
        first = begin + offsets(map_)[self.comm.rank]
        last = first + map_[self.comm.rank]
        if self._memory is not None:
            x, y = (one[begin:end].balance().local for one in self._memory)
        elif self._store is not None:
            x, y = self._from_store(first, last)
        else:
            x, y = self.generator.rows(first, last, self.dtype)
        return Rows(x, y, map_)

    def _from_store(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        store = self._store
        if self.flatten == "last" and len(store.shape) > 2:
            inner = math.prod(store.shape[1:-1])
            low, high = first // inner, -(-last // inner)
            part = torch.from_numpy(store.read(low, high)).reshape(-1, store.shape[-1])[
                first - low * inner : last - low * inner
            ]
        else:
            part = torch.from_numpy(store.read(first, last))
        columns = math.prod(part.shape[1:])
        rows = part.reshape(last - first, columns)
        rows = rows.to(self.dtype if self.label_column is None else torch.float64)
        if self.label_column is not None:
            alone = Comm()
            x, y = self._divided(SplitArray(rows, rows.shape, 0, alone))
            return x.local, y.local
        if self._label_store is not None:
            return rows, _whole_numbers(torch.from_numpy(self._label_store.read(first, last)).reshape(-1))
        return rows, torch.zeros(last - first, dtype=self.dtype)

    def num_blocks(self, part: Part) -> int:
        """Steps of a pass over a part."""
        begin, end = self.bounds(part)
        return 1 if self.block_rows is None else max(-(-(end - begin) // self.block_rows), 1)

    def batch(self, part: Part, number: int) -> dict[str, Tensor]:
        """Block of a part; the only one is kept."""
        if part in self._resident:
            return self._resident[part]
        begin, end = self.bounds(part)
        if self.block_rows is not None:
            begin, end = begin + number * self.block_rows, min(begin + (number + 1) * self.block_rows, end)
        x, y, map_ = self._read(begin, end)
        row = torch.arange(len(x)) + begin + offsets(map_)[self.comm.rank]
        arrays = [SplitArray(t, (end - begin, *t.shape[1:]), 0, self.comm, map_) for t in (x, y, row)]
        try:
            arrays = finite_rows(arrays[0], self.nan_policy, *arrays[1:])
        except ValueError as error:
            raise ValueError(f"data.nan_policy={self.nan_policy}: {error}") from None
        found = {name: one.local for name, one in zip(("x", "y", "row"), arrays, strict=True)}
        found["map"] = torch.tensor(arrays[0].map)
        if self.block_rows is None:
            self._resident[part] = found
        return found

    def arrays(self, part: Part) -> tuple[SplitArray, SplitArray]:
        """All rows and labels of a part, in memory."""
        if self.block_rows is not None:
            raise ValueError("data.block_rows: a streamed part is never in memory as a whole; use data.block_rows=null")
        found = self.batch(part, 0)
        return array_of(found, "x", self.comm), array_of(found, "y", self.comm)

    def _loader(self, part: Part) -> DataLoader[Any]:
        data = _Whole(self, part) if self.block_rows is None else _Blocks(self, part)
        return DataLoader(data, batch_size=None)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("all")

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Rows that stay in memory move to the device once."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        for found in self._resident.values():
            if found["x"] is batch["x"]:
                found.update(moved)
        return moved

    @property
    def bytes_read(self) -> int:
        """Bytes of elements that this process has read from files."""
        return sum(store.bytes_read for store in (self._store, self._label_store) if store is not None)


def array_of(batch: dict[str, Tensor], key: str, comm: Comm) -> SplitArray:
    """An entry of a batch as an array over all processes."""
    map_ = batch["map"].tolist()
    return SplitArray(batch[key], (sum(map_), *batch[key].shape[1:]), 0, comm, map_)


def _whole_numbers(labels: Tensor) -> Tensor:
    """Labels as int64 where all are whole numbers."""
    if not labels.is_floating_point():
        return labels.long()
    return labels.long() if bool((labels == labels.round()).all()) else labels
