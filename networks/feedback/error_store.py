"""The error of every training sample at its last visit (F3, section 2.1: E)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

StoreType = Literal["float32", "float16", "bfloat16", "float64"]


class ErrorStore(nn.Module):
    """A row of C numbers per training sample; the row of a sample that was not visited yet is its target.

    So the first epoch sees targets, without a pass over the data before it. Rows that are not visited (a last batch
    that is dropped) keep what they have.

    It is part of a module's ``state_dict`` but none of its buffers: replicas of data parallelism hold the rows of their
    own samples until `merge`, and buffers would be overwritten with those of the first replica.

    Args:
        num_samples: n.
        num_outputs: C.
        dtype: Of the rows.

    Raises:
        ValueError: For an unknown type.
    """

    def __init__(self, num_samples: int, num_outputs: int, dtype: StoreType = "float32") -> None:
        super().__init__()
        if dtype not in ("float32", "float16", "bfloat16", "float64"):
            raise ValueError(f"model.store_dtype={dtype!r}: choose float32, float16, bfloat16 or float64")
        self.rows = torch.zeros(num_samples, num_outputs, dtype=getattr(torch, dtype))
        self.visited = torch.zeros(num_samples, dtype=torch.bool)
        self._written: list[Tensor] = []  # numbers of the rows written since the last merge

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, index: Tensor) -> None:
        """Raise ValueError where there is no row for a sample."""
        if len(index) and (int(index.max()) >= len(self) or int(index.min()) < 0):
            raise ValueError(
                f"a sample has the number {int(index.max())}, the error store has {len(self)} rows: the numbers of the "
                "training samples (batch key index) must be 0 to n - 1"
            )

    def read(self, index: Tensor, target: Tensor) -> Tensor:
        """Rows of samples ``index`` (batch,), in the type of their ``target`` (batch, C)."""
        return torch.where(self.visited[index, None], self.rows[index].to(target.dtype), target)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Replace rows; of equal numbers in a batch the last counts."""
        self.rows[index] = rows.to(self.rows.dtype)
        self.visited[index] = True
        self._written.append(index)

    def news(self) -> tuple[Tensor, Tensor]:
        """Numbers and rows that were written since the last merge, and forget that they were."""
        numbers = torch.cat(self._written) if self._written else torch.zeros(0, dtype=torch.int64)
        numbers = numbers.to(self.rows.device).unique()
        self._written = []
        return numbers, self.rows[numbers]

    def merge(self, gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Give all replicas the rows that any of them has written; of several that wrote one, the last one's counts.

        Args:
            gather: Collects a tensor of every replica, of equal shape but for its length, in the order of the replicas.
        """
        for numbers, rows in zip(*(gather(news) for news in self.news()), strict=True):
            self.rows[numbers] = rows
            self.visited[numbers] = True

    # ----------------------------------------------------------------------------------------------------- state

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ErrorStore:
        moved = fn(self.rows)
        self.rows = self.rows.to(moved.device)  # the type is chosen, not that of the network
        self.visited = self.visited.to(moved.device)
        return super()._apply(fn, recurse)

    @override
    def get_extra_state(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "visited": self.visited}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the rows of a checkpoint, and their number where there is no store yet."""
        rows, visited = state["rows"], state["visited"]
        if len(self) and rows.shape != self.rows.shape:
            raise ValueError(
                f"the checkpoint has the errors of {len(rows)} training samples with {rows.shape[1]} outputs, the data "
                f"have {len(self)} with {self.rows.shape[1]}: continue with the data of the run"
            )
        # In place: whoever saves holds references to these.
        if len(self):
            self.rows.copy_(rows)
            self.visited.copy_(visited)
        else:
            self.rows, self.visited = rows.to(self.rows), visited.to(self.visited)
        self._written = []
