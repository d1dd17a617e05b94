"""A small regression task for strategies: the same batches for any number of ranks, in float64 where asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.loading import make_loader

IN, HIDDEN, OUT, SAMPLES, BATCH = 6, 8, 2, 64, 8


def network(dtype: torch.dtype = torch.float64, norm: bool = False) -> nn.Sequential:
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        middle = [nn.BatchNorm1d(HIDDEN)] if norm else []
        return nn.Sequential(nn.Linear(IN, HIDDEN), *middle, nn.Tanh(), nn.Linear(HIDDEN, OUT)).to(dtype)


def samples(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs ``(64, 6)`` and targets ``(64, 2)``."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, IN, generator=generator, dtype=torch.float64)
    w = torch.randn(IN, OUT, generator=generator, dtype=torch.float64)
    y = (x @ w).sin() + 0.1 * torch.randn(SAMPLES, OUT, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


class Data(pl.LightningDataModule):
    """Shuffled batches of ``BATCH`` samples over all ranks."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.data = torch.utils.data.TensorDataset(*samples(dtype))

    def _loader(self, shuffle: bool) -> Any:
        layout = self.trainer.distributed_sampler_kwargs if self.trainer.world_size > 1 else None
        return make_loader(self.data, BATCH, shuffle=shuffle, seed=3, layout=layout, drop_last=shuffle)

    def train_dataloader(self) -> Any:
        return self._loader(True)

    def val_dataloader(self) -> Any:
        return self._loader(False)


class Regression(pl.LightningModule):
    """Mean square error; keeps the loss of every step."""

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net or network()
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))
        self.make_scheduler = scheduler
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])


def weights(module: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def error(module: Regression) -> float:
    """Mean square error over all samples."""
    x, y = samples(next(module.parameters()).dtype)
    with torch.no_grad():
        return float(F.mse_loss(module.net(x), y))


def fit(
    strategy: Any,
    folder: str,
    *,
    module: Regression | None = None,
    epochs: int = 3,
    callbacks: tuple[pl.Callback, ...] = (),
    ckpt_path: str | None = None,
    devices: int | None = None,
    datamodule: pl.LightningDataModule | None = None,
    **trainer: Any,
) -> tuple[Regression, pl.Trainer]:
    """Train in this process as one rank of its pool (or alone).

    Two batches of a validation are as good here as eight, which would take as long as the training.
    """
    if devices is None:
        devices = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized():
        os.environ["WORLD_SIZE"] = str(devices)  # the teardown of a run before has removed it
    module = module or Regression()
    trainer.setdefault("limit_val_batches", 1.0 if datamodule else 2)
    trainer_ = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=epochs, default_root_dir=folder,
        callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        **trainer,
    )  # fmt: skip
    datamodule = datamodule or Data(next(module.parameters()).dtype)
    trainer_.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module, trainer_
