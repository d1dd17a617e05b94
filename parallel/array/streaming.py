"""Arrays larger than memory, block by block: the next block is read while the last one is being used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.chunks import balanced, offsets
from parallel.array.comm import Comm
from parallel.array.store import open_store

Reader = Callable[[int, int], Tensor]


class Stream:
    """Blocks of consecutive rows of a store; the rows of a block are split over the ranks.

    ``for first, block in Stream.open("x.zarr", rows=100_000)``: at most two blocks are in memory. All ranks see
    equally many blocks.

    Args:
        read: Gives rows ``begin:end``; called in a thread.
        shape: Of all rows.
        rows: Of a block, over all ranks.
        comm: Ranks.
        begin: First row.
        end: Behind the last one; None: all.
    """

    def __init__(
        self,
        read: Reader,
        shape: tuple[int, ...],
        rows: int,
        comm: Comm | None = None,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows={rows}: a block has at least 1 row")
        self.read, self.shape, self.rows = read, shape, rows
        self.comm = comm or Comm.world()
        self.begin, self.end = begin, shape[0] if end is None else min(end, shape[0])

    @classmethod
    def open(
        cls,
        path: str | Path,
        dataset: str | None = None,
        rows: int = 1 << 16,
        comm: Comm | None = None,
        dtype: torch.dtype | None = None,
        begin: int = 0,
        end: int | None = None,
    ) -> Stream:
        """Blocks of an array in a file; see `parallel.array.store.open_store`."""
        store = open_store(path, dataset)

        def read(first: int, last: int) -> Tensor:
            part = store.read(first, last)
            # Copied only where it must be: a mapped file, or the other byte order.
            part = np.require(part, dtype=part.dtype.newbyteorder("="), requirements=("C", "W"))
            tensor = torch.from_numpy(part)
            return tensor if dtype is None else tensor.to(dtype)

        return cls(read, store.shape, rows, comm, begin, end)

    def __len__(self) -> int:
        return -(-max(self.end - self.begin, 0) // self.rows)

    def map_of(self, number: int) -> tuple[int, ...]:
        """Rows of every rank in a block."""
        first = self.begin + number * self.rows
        return balanced(min(self.rows, self.end - first), self.comm.size)

    def _part(self, number: int) -> Tensor:
        map_ = self.map_of(number)
        first = self.begin + number * self.rows + offsets(map_)[self.comm.rank]
        return self.read(first, first + map_[self.comm.rank])

    def __iter__(self) -> Iterator[tuple[int, SplitArray]]:
        for number, local in enumerate(prefetched(self._part, len(self))):
            map_ = self.map_of(number)
            shape = (sum(map_), *self.shape[1:])
            yield self.begin + number * self.rows, SplitArray(local, shape, 0, self.comm, map_)


def prefetched(read: Callable[[int], Tensor], number: int) -> Iterator[Tensor]:
    """``read(0), read(1), ...``, each read while the one before is being used.

    An error of the reader is raised here; a consumer that stops early ends the thread.
    """
    ready: queue.Queue[tuple[Tensor | None, BaseException | None]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def work() -> None:
        for i in range(number):
            try:
                item = (read(i), None)
            except BaseException as error:
                item = (None, error)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or item[1] is not None:
                return

    thread = threading.Thread(target=work, name="array-prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(number):
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        thread.join()
