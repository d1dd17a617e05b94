"""SplitArray: an array whose rows along one axis lie on different ranks, and how they move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from parallel.array.chunks import Map, balanced, check_maps, offsets, receives, sends
from parallel.array.comm import Comm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _unary(name: str) -> Callable[[SplitArray], SplitArray]:
    def method(self: SplitArray) -> SplitArray:
        from parallel.array import elementwise

        return getattr(elementwise, name)(self)

    return method


def _binary(name: str, swapped: bool = False) -> Callable[[SplitArray, Any], SplitArray]:
    def method(self: SplitArray, other: Any) -> SplitArray:
        from parallel.array import elementwise

        function = getattr(elementwise, name)
        return function(other, self) if swapped else function(self, other)

    return method


def _reduction(name: str) -> Callable[..., SplitArray]:
    def method(self: SplitArray, axis: Any = None, keepdims: bool = False, **options: Any) -> SplitArray:
        from parallel.array import moments, reductions

        function = getattr(reductions, name, None) or getattr(moments, name)
        return function(self, axis=axis, keepdims=keepdims, **options)

    return method


class SplitArray:
    """A dense array that is split along one axis over the ranks of a `Comm`, or the same on all of them.

    All ranks run the same program on it (SPMD): every function that moves data is called on all ranks together. A rank
    may have no rows at all. Functions are those of `parallel.array`, named like NumPy's.

    Args:
        local: Rows of this rank; the whole array where ``split`` is None.
        shape: Of the whole array.
        split: Axis that is split; None: every rank has everything.
        comm: Ranks.
        map: Rows of every rank along ``split``; None: the balanced map.

    Raises:
        ValueError: If local and global shape do not fit.
    """

    # Of NumPy: operators with arrays on the left are ours.
    __array_priority__ = 1000

    def __init__(
        self,
        local: Tensor,
        shape: Sequence[int],
        split: int | None,
        comm: Comm,
        map: Sequence[int] | None = None,
    ) -> None:
        self.local, self.shape, self.comm = local, tuple(int(n) for n in shape), comm
        self.split = None if split is None else normalized_axis(split, len(self.shape))
        self.map: Map = ()
        expected = list(self.shape)
        if self.split is not None:
            self.map = balanced(self.shape[self.split], comm.size) if map is None else tuple(map)
            check_maps(balanced(self.shape[self.split], comm.size), self.map)
            expected[self.split] = self.map[comm.rank]
        if tuple(local.shape) != tuple(expected):
            raise ValueError(
                f"rank {comm.rank} has local shape {tuple(local.shape)}, but an array of shape {self.shape} with "
                f"split={self.split} and map={self.map} has {tuple(expected)} there"
            )

    # ------------------------------------------------------------------------------------------------------ describe

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """Where the local rows are."""
        return self.local.device

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.local.element_size()

    @property
    def offset(self) -> int:
        """Global number of the first local row along the split axis; 0 where nothing is split."""
        return 0 if self.split is None else offsets(self.map)[self.comm.rank]

    @property
    def is_balanced(self) -> bool:
        """Whether the rows lie as the canonical map says."""
        return self.split is None or self.map == balanced(self.shape[self.split], self.comm.size)

    def __repr__(self) -> str:
        where = f"map={self.map}" if self.split is not None else f"on {self.comm.size} rank(s)"
        return f"SplitArray(shape={self.shape}, dtype={self.dtype}, split={self.split}, {where})"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def like(
        self, local: Tensor, shape: Sequence[int], split: int | None, map: Sequence[int] | None = None
    ) -> SplitArray:
        """Another array on the same ranks."""
        return SplitArray(local, shape, split, self.comm, map)

    # ---------------------------------------------------------------------------------------------------------- move

    def resplit(self, split: int | None, map: Sequence[int] | None = None) -> SplitArray:
        """The same array, split along another axis (an all-to-all), or whole on every rank (None: a gather).

        Args:
            split: New axis.
            map: Rows of every rank along it; None: the map that the array has there, else the balanced one.
        """
        split = None if split is None else normalized_axis(split, self.ndim)
        if split == self.split and (map is None or tuple(map) == self.map):
            return self
        if split is None:
            whole = self.comm.all_gather_rows(_first(self.local, self.split), self.map)
            return self.like(_back(whole, self.split), self.shape, None)
        target = balanced(self.shape[split], self.comm.size) if map is None else tuple(map)
        check_maps(balanced(self.shape[split], self.comm.size), target)
        if self.split is None:
            part = self.local.narrow(split, offsets(target)[self.comm.rank], target[self.comm.rank])
            return self.like(part.contiguous(), self.shape, split, target)
        if split == self.split:
            return self._redistributed(target)
        shape = list(self.local.shape)
        shape[split] = target[self.comm.rank]
        shapes = [_replaced(shape, self.split, rows) for rows in self.map]
        came = self.comm.all_to_all(self.local.split(list(target), dim=split), shapes)
        return self.like(torch.cat(came, dim=self.split), self.shape, split, target)

    def _redistributed(self, target: Map) -> SplitArray:
        rank, axis = self.comm.rank, self.split
        parts = [self.local.narrow(axis, p.begin, p.end - p.begin) for p in sends(self.map, target, rank)]
        rows = receives(self.map, target, rank)
        came = self.comm.all_to_all(parts, [_replaced(self.local.shape, axis, n) for n in rows])
        return self.like(torch.cat(came, dim=axis), self.shape, axis, target)

    def redistribute(self, map: Sequence[int]) -> SplitArray:
        """The same array with other numbers of rows on the ranks.

        Raises:
            ValueError: If nothing is split, or the map does not have all rows.
        """
        if self.split is None:
            raise ValueError("redistribute(map) of an array with split=None: every rank has all rows; resplit it first")
        return self.resplit(self.split, map)

    def balance(self) -> SplitArray:
        """The same array with the balanced map."""
        return (
            self if self.split is None else self.resplit(self.split, balanced(self.shape[self.split], self.comm.size))
        )

    def halo(self, before: int, after: int) -> Tensor:
        """Local rows with those of the neighbours around them, fewer at the ends of the array.

        Works with ranks that have fewer rows than are asked for: they come from further ranks.

        Args:
            before: Rows before the local ones.
            after: Rows behind them.
        """
        if self.split is None or self.comm.size == 1:
            return self.local
        length, first = self.shape[self.split], offsets(self.map)
        wanted = [
            (max(begin - before, 0), min(begin + count + after, length)) if count else (0, 0)
            for begin, count in zip(first, self.map, strict=True)
        ]
        mine = (self.offset, self.offset + self.map[self.comm.rank])

        def common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
            low = max(a[0], b[0])
            return low, max(min(a[1], b[1]), low)

        parts, shapes = [], []
        for rank, (begin, count) in enumerate(zip(first, self.map, strict=True)):
            low, high = common(wanted[rank], mine)
            parts.append(self.local.narrow(self.split, low - mine[0] if high > low else 0, high - low))
            low, high = common(wanted[self.comm.rank], (begin, begin + count))
            shapes.append(_replaced(self.local.shape, self.split, high - low))
        return torch.cat(self.comm.all_to_all(parts, shapes), dim=self.split)

    # ------------------------------------------------------------------------------------------------------- convert

    def numpy(self) -> np.ndarray:
        """The whole array on every rank, in host memory."""
        return self.resplit(None).local.cpu().numpy()

    def item(self) -> Any:
        """The value of an array with one element."""
        if self.size != 1:
            raise ValueError(f"item() of an array of shape {self.shape}: it has {self.size} elements, not one")
        return self.resplit(None).local.item()

    def tolist(self) -> Any:
        """The whole array as nested lists."""
        return self.resplit(None).local.tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.numpy()
        return whole if dtype is None else whole.astype(dtype)

    def astype(self, dtype: torch.dtype) -> SplitArray:
        """With elements of another type."""
        return self.like(self.local.to(dtype), self.shape, self.split, self.map or None)

    def to(self, device: torch.device | str) -> SplitArray:
        """On another device."""
        return self.like(self.local.to(device), self.shape, self.split, self.map or None)

    def copy(self) -> SplitArray:
        """With memory of its own."""
        return self.like(self.local.clone(), self.shape, self.split, self.map or None)

    def to_dtensor(self) -> DTensor:
        """A `torch.distributed.tensor.DTensor` over the same ranks; without copying where the rows lie as there.

        DTensor puts ``ceil(n / P)`` rows on each rank, so that unbalanced arrays move first.

        Raises:
            ValueError: Without a process group.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if self.comm.group is None:
            raise ValueError("to_dtensor: a DTensor needs a process group of at least two ranks")
        mesh = DeviceMesh(self.device.type, list(self.comm.group.ranks), _init_backend=False)
        mesh._dim_group_names = [self.comm.group.handle.group_name]
        if self.split is None:
            return DTensor.from_local(self.local, mesh, [Replicate()], run_check=False)
        there = self.redistribute(torch_chunks(self.shape[self.split], self.comm.size))
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            there.local.contiguous(),
            mesh,
            [Shard(self.split)],
            run_check=False,
            shape=torch.Size(self.shape),
            stride=stride,
        )

    @classmethod
    def from_dtensor(cls, tensor: DTensor, comm: Comm | None = None) -> SplitArray:
        """The array that a DTensor over one mesh axis is; its memory is shared."""
        placement = tensor.placements[0]
        comm = comm or Comm.world()
        if placement.is_replicate():
            return cls(tensor.to_local(), tensor.shape, None, comm)
        if not placement.is_shard() or len(tensor.placements) != 1:
            raise ValueError(f"from_dtensor: placements {tensor.placements}; give one Shard or Replicate")
        return cls(
            tensor.to_local(), tensor.shape, placement.dim, comm, torch_chunks(tensor.shape[placement.dim], comm.size)
        )

    def to_heat(self) -> Any:
        """A `heat.DNDarray` of the same rows; HeAT must have been started on the same ranks.

        Raises:
            ImportError: Where HeAT is not installed.
        """
        try:
            import heat
        except ImportError as error:
            raise ImportError("to_heat needs the package heat (pip install --no-deps heat==1.8.0 mpi4py)") from error
        return heat.array(self.local.cpu(), is_split=self.split)

    # ----------------------------------------------------------------------------------------------- index, operate

    def __getitem__(self, key: Any) -> SplitArray:
        from parallel.array.indexing import getitem

        return getitem(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        from parallel.array.indexing import setitem

        setitem(self, key, value)

    def __matmul__(self, other: SplitArray) -> SplitArray:
        from parallel.array.products import matmul

        return matmul(self, other)

    def reshape(self, *shape: Any, split: int | None = None) -> SplitArray:
        """See `parallel.array.shaping.reshape`."""
        from parallel.array.shaping import reshape

        return reshape(self, shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape, split)

    @property
    def T(self) -> SplitArray:
        """Axes in reverse order; nothing moves."""
        from parallel.array.shaping import transpose

        return transpose(self)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """The module whose functions take these arrays (Python array API standard)."""
        import parallel.array

        return parallel.array

    __hash__ = None
    __neg__, __pos__, __abs__, __invert__ = (_unary(n) for n in ("negative", "positive", "abs", "bitwise_invert"))
    __add__, __radd__ = _binary("add"), _binary("add", True)
    __sub__, __rsub__ = _binary("subtract"), _binary("subtract", True)
    __mul__, __rmul__ = _binary("multiply"), _binary("multiply", True)
    __truediv__, __rtruediv__ = _binary("divide"), _binary("divide", True)
    __floordiv__, __rfloordiv__ = _binary("floor_divide"), _binary("floor_divide", True)
    __mod__, __rmod__ = _binary("remainder"), _binary("remainder", True)
    __pow__, __rpow__ = _binary("power"), _binary("power", True)
    __and__, __rand__ = _binary("bitwise_and"), _binary("bitwise_and", True)
    __or__, __ror__ = _binary("bitwise_or"), _binary("bitwise_or", True)
    __xor__, __rxor__ = _binary("bitwise_xor"), _binary("bitwise_xor", True)
    __lshift__, __rshift__ = _binary("bitwise_left_shift"), _binary("bitwise_right_shift")
    __eq__, __ne__ = _binary("equal"), _binary("not_equal")
    __lt__, __le__ = _binary("less"), _binary("less_equal")
    __gt__, __ge__ = _binary("greater"), _binary("greater_equal")
    sum, prod, min, max = (_reduction(n) for n in ("sum", "prod", "min", "max"))
    any, all, argmin, argmax = (_reduction(n) for n in ("any", "all", "argmin", "argmax"))
    mean, var, std = (_reduction(n) for n in ("mean", "var", "std"))


def normalized_axis(axis: int, ndim: int) -> int:
    """An axis counted from 0.

    Raises:
        ValueError: If there is no such axis.
    """
    if not -ndim <= axis < max(ndim, 1) or ndim == 0:
        raise ValueError(f"axis={axis}: an array with {ndim} axes has none of that number")
    return int(axis) % ndim


def torch_chunks(length: int, size: int) -> Map:
    """The map of torch.chunk and DTensor: ``ceil(length / size)`` rows each, the last ranks may be empty."""
    rows = -(-length // size)
    return tuple(max(min(rows, length - rank * rows), 0) for rank in range(size))


def check_same_program(array: SplitArray) -> None:
    """Raise ValueError on all ranks if they disagree about an array; a tiny all-gather, for debugging."""
    import zlib

    names = (array.shape, array.split, array.map, str(array.dtype))
    signature = zlib.crc32(repr(names).encode())
    found = array.comm.gather_counts(signature)
    if len(set(found)) > 1:
        raise ValueError(
            f"the ranks disagree about an array: rank {array.comm.rank} has shape {array.shape}, split={array.split}, "
            f"map={array.map}, {array.dtype}, and ranks {[r for r, one in enumerate(found) if one != signature]} have "
            "another one; all ranks must run the same program"
        )


def _first(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).contiguous()


def _back(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(0, axis).contiguous() if axis else tensor


def _replaced(shape: Sequence[int], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])
