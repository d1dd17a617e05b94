"""What a run communicated: bytes and calls over fast and slow links, and the time it stood waiting for them."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

from callbacks.run_record import RunRecord
from parallel.ledger import Ledger
from parallel.tracing import CollectiveTrace

log = logging.getLogger(__name__)

# Sums over all ranks count every collective once; times are means over ranks.
SUMS = ("inter_node_bytes", "intra_node_bytes", "inter_node_calls", "intra_node_calls")
TIMES = ("blocked_s", "transfer_s")


class Communication(pl.Callback):
    """Reports the ledger of the strategy, per epoch to the loggers and at the end to results.json.

    Bytes are those of the ring model (`parallel.layout.ring_bytes`), over all ranks, each direction of a link by
    itself. ``inter_node`` are links between nodes. Logged: ``comm/inter_node_bytes``, ``comm/intra_node_bytes``,
    ``comm/inter_node_calls``, ``comm/intra_node_calls`` of each epoch; to the loggers also ``comm/blocked_s`` and
    ``comm/transfer_s`` (means over ranks) and what the strategy reports of itself.

    results.json holds the sums over the training as ``communication``, with ``between_groups_bytes`` under strategies
    whose ranks train in groups that need not be nodes (AB-training).

    A run in one process, or under a strategy without a ledger, has nothing to count unless ``trace``; what the strategy
    reports of itself reaches the loggers all the same (the phases of a step, under `strategies.sampling_parallel`).

    Args:
        trace: Count every collective of training steps instead, those of the module and of other callbacks too, with
            any strategy. Costs some microseconds per operation of torch.
        local_size: Processes of a node, for ``trace`` under a strategy without a ledger; None: all.
    """

    def __init__(self, trace: bool = False, local_size: int | None = None) -> None:
        self.trace, self.local_size = trace, local_size
        self._ledger: Ledger | None = None
        self._mode: CollectiveTrace | None = None
        self._first_step = 0
        self.summary: dict[str, Any] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ledger = getattr(trainer.strategy, "ledger", None)
        if trainer.world_size == 1:
            self._ledger = None
        elif self.trace:
            known = self._ledger.local_size if self._ledger is not None else None
            self._ledger = Ledger(trainer.global_rank, self.local_size or known or trainer.world_size)
        # A ledger that was restored counts from the beginning of the training, and knows where its epoch began.
        restored = self._ledger is not None and self._ledger.restored
        self._first_step = 0 if restored else trainer.global_step
        if self._ledger is not None and self._ledger.mark.get("epoch") != trainer.current_epoch:
            self._begin_epoch(trainer)  # saved after the last step of its epoch, or never

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning does not call this where it goes on in the middle of an epoch.
        if self._ledger is not None:
            self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: pl.Trainer) -> None:
        self._ledger.mark = self._ledger.sums() | {"epoch": trainer.current_epoch}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin to look."""
        if self.trace and self._ledger is not None:
            self._mode = CollectiveTrace(self._ledger)
            self._mode.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Look away: what the loggers and the other callbacks send is not training."""
        self._leave()

    def _leave(self) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

    def _since(self, before: dict[str, float], trainer: pl.Trainer) -> dict[str, float]:
        """What was added on all ranks; a collective call."""
        names, now = (*SUMS, *TIMES), self._ledger.sums()
        added = [now[name] - before.get(name, 0.0) for name in names]
        values = torch.tensor(added, dtype=torch.float64, device=trainer.strategy.root_device)
        if dist.is_initialized():
            dist.all_reduce(values)
        found = dict(zip(names, values.tolist(), strict=True))
        return found | {name: found[name] / trainer.world_size for name in TIMES}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shown = {}
        if self._ledger is not None:
            found = self._since(self._ledger.mark, trainer)
            for name in SUMS:
                # Equal on all ranks already.
                pl_module.log(f"comm/{name}", found[name], batch_size=1, sync_dist=True, rank_zero_only=True)
            shown |= {f"comm/{name}": found[name] for name in TIMES}
        report = getattr(trainer.strategy, "report", None)
        if report is not None:
            shown |= report()
        if shown:
            for logger in trainer.loggers:
                logger.log_metrics(shown, step=trainer.global_step)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in on_train_end, after which a strategy may still make replicas equal.
        if self._ledger is None:
            return
        found = self._since({}, trainer)
        steps = max(trainer.global_step - self._first_step, 1)
        operations: list[dict[str, Any] | None] = [None] * trainer.world_size
        dist.all_gather_object(operations, self._ledger.state_dict()["entries"])
        self.summary = {
            "steps": trainer.global_step - self._first_step,
            "local_size": self._ledger.local_size,
            "inter_node_bytes_per_step": found["inter_node_bytes"] / steps,
            **found,
            **self._between_groups(trainer),
            "operations": _added(operations),
        }
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.record["communication"] = self.summary

    def _between_groups(self, trainer: pl.Trainer) -> dict[str, float]:
        """What crossed from group to group, where the strategy has groups beside nodes; a collective call then."""
        groups: Ledger | None = getattr(trainer.strategy, "group_ledger", None)
        if groups is None:
            return {}
        sent = torch.tensor([groups.totals()["inter_node_bytes"]], dtype=torch.float64)
        sent = sent.to(trainer.strategy.root_device)
        dist.all_reduce(sent)
        return {"group_size": groups.local_size, "between_groups_bytes": float(sent)}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()


def _added(entries: list[dict[str, Any] | None]) -> dict[str, dict[str, float]]:
    """Sums over ranks by ``operation/link``."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        for key, values in (entry or {}).items():
            found[key] = [a + b for a, b in zip(found.get(key, [0.0, 0.0, 0.0]), values, strict=True)]
    names = ("calls", "payload_bytes", "wire_bytes")
    return {key: dict(zip(names, found[key], strict=True)) for key in sorted(found)}
