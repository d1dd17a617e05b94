"""What networks are judged by: training batches and the loss of one for scores of weights, the validation part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor


def training_batches(trainer: pl.Trainer, pl_module: pl.LightningModule, number: int) -> Iterator[Mapping[str, Tensor]]:
    """The first batches of the training part, on the device of the module."""
    loader = islice(trainer.datamodule.train_dataloader(), number)
    return (move_data_to_device(batch, pl_module.device) for batch in loader)


def squared_error(pl_module: pl.LightningModule) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Mean squared error of the point forecasts of valid windows."""

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        squared = (pl_module.point(pl_module(batch)) - batch["target"]).square().mean(1)
        return (squared * batch["valid"]).sum() / batch["valid"].sum().clamp(min=1)

    return loss


@torch.no_grad()
def validation_loss(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """``val/loss`` of the network in the module during a fit, as the validation of an epoch would log it."""
    limit = trainer.num_val_batches[0] if trainer.num_val_batches else None
    loader = islice(trainer.datamodule.val_dataloader(), None if limit == float("inf") else limit)
    total, windows, training = 0.0, 0.0, pl_module.training
    pl_module.eval()
    for index, batch in enumerate(loader):
        batch = move_data_to_device(batch, pl_module.device)
        with trainer.precision_plugin.forward_context():
            loss = pl_module.validation_step(batch, index)["loss"]
        total += float(loss) * float(batch["valid"].sum())
        windows += float(batch["valid"].sum())
    pl_module.train(training)
    return total / windows
