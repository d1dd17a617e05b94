"""What modules of arrays share: iterations as training steps, fitted tensors in checkpoints, rows of every process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from parallel.array import SplitArray
from parallel.array.comm import Comm
from parallel.array.learning import (
    Estimator,
    Step,
)
from parallel.array.learning.base import all_reduce

Batch = dict[str, Tensor]
Stage = Literal["val", "test"]
HISTORY_COLUMNS = ("iteration", "objective", "change", "compute_s", "communication_s", "received_bytes")


class Iterations(torch.optim.Optimizer):
    """What Lightning counts as optimizer steps; each is an iteration of the algorithm."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__(params, {})

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


class ClassicalModule(pl.LightningModule):
    """Base of modules around an `Estimator`.

    Batches are those of `datamodules.arrays.SplitArrays`. Training ends when the estimator has converged. What is
    fitted is in ``state_dict`` and in checkpoints, the same on all processes.

    Logged in training: ``train/objective``, ``train/change``; ``time/compute_s``, ``time/communication_s`` and
    ``comm/received_bytes`` of an iteration on the first process; in validation ``val/iterations``, their number. Steps
    of validation, test and predict return ``row`` and what the estimator says of each row (``prediction``, ``target``);
    validation and test also ``loss``. The first step of a test has ``history``, an iteration per row with
    `HISTORY_COLUMNS`.

    Args:
        estimator: What is fitted.
        optimizer: Unused; accepted so that one optimizer group serves all models of a sweep.
        scheduler: Unused, like ``optimizer``.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("x", "y", "row", "map")
    streams: ClassVar[bool] = False
    totals: ClassVar[tuple[str, ...]] = ()  # numbers of `evaluate` that are added over blocks

    def __init__(
        self,
        estimator: Estimator,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.estimator = estimator
        # What moves in training: the last objective. Strategies want a parameter, runs ask whether there is one.
        self.objective = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.history: list[list[float]] = []
        self.begun = False
        self._sums: dict[str, list[tuple[float, int]]] = {}

    @property
    def comm(self) -> Comm:
        """The processes that share the rows."""
        return self.trainer.datamodule.comm

    @override
    def configure_optimizers(self) -> Iterations:
        return Iterations([self.objective])

    # ------------------------------------------------------------------------------------------------------- state

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {
            "estimator": self.estimator.state() if self.begun else {},
            "history": torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(HISTORY_COLUMNS)),
        }

    @override
    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.begun = bool(state["estimator"])
        if self.begun:
            self.estimator.load_state(state["estimator"])
        self.history = state["history"].tolist()

    # ---------------------------------------------------------------------------------------------------- training

    def arrays(self, batch: Batch) -> tuple[SplitArray, SplitArray]:
        """Rows and labels of a batch over all processes."""
        rows = batch["map"].tolist()
        return tuple(
            SplitArray(batch[key], (sum(rows), *batch[key].shape[1:]), 0, self.comm, rows) for key in ("x", "y")
        )

    @override
    def on_fit_start(self) -> None:
        if self.trainer.datamodule.block_rows is not None and not self.streams:
            raise ValueError(
                f"data.block_rows={self.trainer.datamodule.block_rows}: {type(self).__name__} needs all rows in every "
                "iteration; use data.block_rows=null, or a model that takes blocks"
            )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.optimizers().step(lambda: self._iterate(batch))

    @torch.no_grad()
    def _iterate(self, batch: Batch) -> None:
        x, y = self.arrays(batch)
        comm, began = self.comm, time.perf_counter()
        waited, received = comm.waited_s, comm.received_bytes
        if not self.begun:
            self._named(lambda: self.estimator.begin(x, y))
            self.begun = True
        done: Step = self._named(lambda: self.estimator.step(x, y))
        waited, seconds = comm.waited_s - waited, time.perf_counter() - began
        self.objective.fill_(done.objective)
        values = {
            "train/objective": done.objective, "train/change": done.change, "time/compute_s": seconds - waited,
            "time/communication_s": waited, "comm/received_bytes": float(comm.received_bytes - received),
        }  # fmt: skip
        self.history.append([float(self.estimator.n_iter), *values.values()])
        self.log_exact(values, on_step=False, on_epoch=True)
        if done.converged and not self.streams_now:
            self.trainer.should_stop = True

    @property
    def streams_now(self) -> bool:
        """Whether a pass has several blocks: the estimator has not seen all of them before it ends."""
        return self.trainer.datamodule.block_rows is not None

    def _named(self, call: Callable[[], Any]) -> Any:
        """Mistakes of the estimator name its argument: here they are those of the configuration."""
        try:
            return call()
        except ValueError as error:
            raise ValueError(
                f"model.{error}" if "=" in str(error).split(":")[0].split(" ")[0] else str(error)
            ) from error

    # -------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        """Numbers of a part by name, equal on all processes; ``loss`` is minimised. Weighted by rows over blocks."""
        raise NotImplementedError

    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        """What a step returns for each local row."""
        raise NotImplementedError

    @torch.no_grad()
    def _step(self, batch: Batch, stage: Stage | None) -> dict[str, Tensor]:
        x, y = self.arrays(batch)
        if not self.begun:
            raise ValueError(
                f"{type(self).__name__} has not been fitted: train it, or give the checkpoint of a run (ckpt_path)"
            )
        out = {"row": batch["row"], **self.outputs(x, y)}
        if stage is None:
            return out
        values = self.evaluate(x, y, stage)
        for name, value in values.items():
            self._sums.setdefault(f"{stage}/{name}", []).append((value, x.shape[0]))
        return out | {"loss": torch.tensor(values["loss"])}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        out = self._step(batch, "test")
        first = batch_idx == 0 and self.trainer.is_global_zero
        history = torch.tensor(self.history if first else [], dtype=torch.float64).reshape(-1, len(HISTORY_COLUMNS))
        fitted = {f"fitted_{k}": v if first else v[:0] for k, v in self.fitted().items()}
        return out | {"history": history, **fitted}

    def fitted(self) -> dict[str, Tensor]:
        """What figures show of the result, a row or more each."""
        return {}

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, None)

    @override
    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    @override
    def on_test_epoch_start(self) -> None:
        self._sums = {}

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_sums()
        self.log_exact({"val/iterations": float(self.estimator.n_iter)})

    @override
    def on_test_epoch_end(self) -> None:
        self._log_sums()

    def _log_sums(self) -> None:
        for name, parts in self._sums.items():
            if name.rpartition("/")[2] in self.totals:
                self.log_exact({name: sum(value for value, _ in parts)})
                continue
            rows = sum(number for _, number in parts)
            self.log_exact({name: sum(v * n for v, n in parts) / max(rows, 1)}, prog_bar=name.endswith("loss"))

    def log_exact(self, values: dict[str, float], prog_bar: bool = False, **options: Any) -> None:
        """Log values that are already equal on all ranks."""
        for name, value in values.items():
            self.log(name, value, prog_bar=prog_bar, batch_size=1, sync_dist=True, rank_zero_only=True, **options)


def half_error(estimator: Estimator, x: SplitArray, y: SplitArray) -> float:
    """Mean squared error of predictions over two."""
    error = (estimator.predict(x).local.double() - y.local.double()).square().sum()
    return 0.5 * float(all_reduce(x, error)) / max(x.shape[0], 1)


def check_choice(key: str, value: str, known: Any) -> None:
    """Raise ValueError for a value that is not among the known ones."""
    if value not in known:
        raise ValueError(f"model.{key}={value!r} is unknown; choose {', '.join(known)}")


def built(kind: Callable[..., Estimator], **options: Any) -> Estimator:
    """The estimator; its mistakes are those of the configuration."""
    try:
        return kind(**options)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None
