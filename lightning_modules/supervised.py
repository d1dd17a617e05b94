"""What modules that learn from targets share: optimizer and scheduler, exact logging, means of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.schedules import lr_scheduler


class Supervised(pl.LightningModule):
    """A network with its optimizer, and means over an epoch of training that no restart changes.

    Args:
        net: The network.
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        scheduler_monitor: Metric given to schedulers that watch one (ReduceLROnPlateau).
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.

    Raises:
        ValueError: For an unknown interval, and for settings that make no optimizer.
    """

    # Arguments that checkpoints do not store as hyper-parameters: they are no plain data.
    objects: ClassVar[tuple[str, ...]] = ("net", "optimizer", "scheduler")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None,
        scheduler: Callable[..., Any] | None,
        scheduler_monitor: str,
        scheduler_interval: Literal["epoch", "step"],
    ) -> None:
        super().__init__()
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"model.scheduler_interval={scheduler_interval!r} is unknown; choose epoch or step.")
        if optimizer is not None and not callable(optimizer):
            raise ValueError(
                f"model.optimizer={optimizer!r} makes no optimizer (no _target_): choose optimizer=adamw, adam or sgd; "
                "optimizer=none is for modules without one, model.optimizer=null for evaluation alone"
            )
        self.net = net
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.scheduler_monitor, self.scheduler_interval = scheduler_monitor, scheduler_interval
        self._train_mean = SumRatio()
        # Sum and weight of every mean in the running epoch, on this rank.
        self._train_sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._epoch_of_sums: int | None = None  # where they come from a checkpoint

    def parameter_groups(self) -> list[Any]:
        """What the optimizer gets: parameters, or groups of them with settings of their own."""
        return [p for p in self.parameters() if p.requires_grad]

    @override
    def configure_optimizers(self) -> Any:
        if self.make_optimizer is None:
            return None
        optimizer = self.make_optimizer(self.parameter_groups())
        if self.make_scheduler is None:
            return optimizer
        if self.scheduler_interval == "step":
            scheduler = lr_scheduler(self.make_scheduler, optimizer, self.trainer, "step")
        else:
            scheduler = self.make_scheduler(optimizer)
        schedule = {"scheduler": scheduler, "interval": self.scheduler_interval, "monitor": self.scheduler_monitor}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _log_exact(self, values: dict[str, Tensor], prog_bar: bool = False) -> None:
        """Log values that are already equal on all ranks.

        ``sync_dist`` asks for no warning about unsynchronised values, ``rank_zero_only`` for no communication; the
        values reach ``trainer.callback_metrics`` on every rank all the same.
        """
        for name, value in values.items():
            self.log(name, value, prog_bar=prog_bar, batch_size=1, sync_dist=True, rank_zero_only=True)

    # ------------------------------------------------------------------------------------------- means of training

    def _add_to_epoch(self, name: str, total: Tensor, weight: Tensor | int) -> None:
        """Add to the sums whose quotient is logged as ``train/<name>`` at the end of the epoch.

        Summed here and handed to a metric once per epoch: a call of ``self.log`` costs as much as a small network's
        step.
        """
        sums = self._train_sums.get(name)
        self._train_sums[name] = (total, weight) if sums is None else (sums[0] + total, sums[1] + weight)

    @override
    def on_train_start(self) -> None:
        if self._epoch_of_sums != self.trainer.current_epoch:  # they were saved after the last step of their epoch
            self._train_sums = {}

    @override
    def on_train_epoch_start(self) -> None:
        # Lightning does not call this where it goes on in the middle of an epoch.
        self._train_sums = {}

    @override
    def on_train_epoch_end(self) -> None:
        for name, sums in self._train_sums.items():
            self._train_mean.reset()
            self._train_mean.update(*sums)
            self._log_exact({f"train/{name}": self._train_mean.compute()}, prog_bar=name == "loss")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mine = {name: [float(total), float(weight)] for name, (total, weight) in self._train_sums.items()}
        every = [mine] * self.trainer.world_size
        if len(every) > 1:  # this hook runs on every rank
            dist.all_gather_object(every, mine)
        checkpoint["train_sums"] = {"epoch": self.trainer.current_epoch, "ranks": every, "copies": self._copies()}

    def _copies(self) -> int:
        """Ranks that see the same items."""
        layout = self.trainer.distributed_sampler_kwargs or {}
        return self.trainer.world_size // layout.get("num_replicas", self.trainer.world_size)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is None:  # loaded outside of a run, which has no running epoch
            return
        saved = checkpoint.get("train_sums", {"epoch": None, "ranks": []})
        self._epoch_of_sums, every = saved["epoch"], saved["ranks"]
        copies = self._copies() / saved.get("copies", 1)  # an item counts once for each
        if len(every) == self.trainer.world_size and copies == 1:
            self._train_sums = {name: tuple(sums) for name, sums in every[self.trainer.global_rank].items()}
        else:  # other ranks than before: nobody's share is anybody's now, but the sums over all of them are the same
            names = {name for one in every for name in one}
            share = copies * (self.trainer.global_rank == 0)
            self._train_sums = {
                name: tuple(share * sum(one.get(name, (0.0, 0.0))[i] for one in every) for i in (0, 1))
                for name in sorted(names)
            }
