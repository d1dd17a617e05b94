"""An experiment of a user, outside of the program's tree: a regression with dropout that trains in a second."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

from datamodules.loading import make_loader


class TinyData(pl.LightningDataModule):
    """``{"x": (batch, 4), "y": (batch, 1)}``; the numbers of samples are odd on purpose."""

    batch_keys: ClassVar[tuple[str, ...]] = ("x", "y")

    def __init__(self, batch_size: int = 8, num_train: int = 53, num_test: int = 13, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_train, self.num_test, self.seed = batch_size, num_train, num_test, seed

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.num_train + self.num_test, 4, generator=generator)
        y = x.sum(1, keepdim=True) + 0.1 * torch.randn(len(x), 1, generator=generator)
        self.train = TensorDataset(x[: self.num_train], y[: self.num_train])
        self.test = TensorDataset(x[self.num_train :], y[self.num_train :])

    def _loader(self, data: TensorDataset, shuffle: bool):
        def collate(items):
            return {"x": torch.stack([i[0] for i in items]), "y": torch.stack([i[1] for i in items])}

        return make_loader(
            data,
            self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.seed,
            layout=self.trainer.distributed_sampler_kwargs if self.trainer.world_size > 1 else None,
            collate_fn=collate,
        )

    def train_dataloader(self):
        return self._loader(self.train, True)

    def val_dataloader(self):
        return self._loader(self.test, False)

    test_dataloader = predict_dataloader = val_dataloader


class TinyModule(pl.LightningModule):
    """A small network. ``fault`` breaks it on purpose: raise, once, slow, hang, or a signal."""

    batch_keys: ClassVar[tuple[str, ...]] = ("x", "y")

    def __init__(
        self,
        width: int = 8,
        dropout: float = 0.3,
        fault: str = "none",
        fault_rank: int = 0,
        fault_step: int = 3,
        mark: str | None = None,
        optimizer=None,
        scheduler=None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        if width < 1:
            raise ValueError(f"model.width={width}: must be at least 1")
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(width, 1)
        )
        self.optimizer, self.scheduler = optimizer, scheduler
        self.val_loss, self.test_loss, self.seen = MeanMetric(), MeanMetric(), MeanMetric()
        self.count = 0

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "monitor": "val/loss"},
        }

    def training_step(self, batch, batch_idx):
        if self.hparams.mark and self.global_step == 0:
            seen = {"lr": self.optimizers().param_groups[0]["lr"], "world_size": self.trainer.world_size}
            Path(f"{self.hparams.mark}.{self.global_rank}").write_text(json.dumps(seen))
        if self.hparams.fault != "none" and self.global_rank == self.hparams.fault_rank:
            self._fault()
        return torch.nn.functional.mse_loss(self.net(batch["x"]), batch["y"])

    def _fault(self) -> None:
        if self.hparams.fault == "slow":
            time.sleep(0.05)
        if self.hparams.fault == "hang":
            time.sleep(60)
        if self.global_step != self.hparams.fault_step:
            return
        if self.hparams.fault == "raise":
            raise RuntimeError("boom")
        if self.hparams.fault == "once" and not Path(f"{self.hparams.mark}.failed").exists():
            Path(f"{self.hparams.mark}.failed").touch()
            raise RuntimeError("boom")
        if self.hparams.fault.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.hparams.fault])

    def validation_step(self, batch, batch_idx):
        loss = torch.nn.functional.mse_loss(self.net(batch["x"]), batch["y"], reduction="none")
        self.val_loss.update(loss)
        self.log("val/loss", self.val_loss)

    def test_step(self, batch, batch_idx):
        prediction = self.net(batch["x"])
        loss = torch.nn.functional.mse_loss(prediction, batch["y"], reduction="none")
        self.test_loss.update(loss)
        self.log("test/loss", self.test_loss)
        return {"loss": loss.mean(), "prediction": prediction, "target": batch["y"]}

    def predict_step(self, batch, batch_idx):
        return {"prediction": self.net(batch["x"])}
