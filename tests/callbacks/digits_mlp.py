"""The digits and a small perceptron on them: what tests of low-rank callbacks train. Nothing draws random numbers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from datamodules.loading import make_loader
from tests.composing import ROOT

DIGITS = ROOT / "datamodules" / "embedded" / "digits.csv.gz"

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in 0..1 and labels, in an order of seed 0."""
    table = torch.from_numpy(np.loadtxt(DIGITS, delimiter=",", dtype=np.float32))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    return table[order, :64] / 16, table[order, 64].long()


class DigitsData(pl.LightningDataModule):
    """1,437 images to train, 360 to validate and to test, as in the published measurements."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label")

    def __init__(self, batch_size: int = 64, seed: int = 0, limit: int | None = None, double: bool = False) -> None:
        super().__init__()
        self.batch_size, self.seed, self.limit, self.double = batch_size, seed, limit, double

    def setup(self, stage: str) -> None:
        images, labels = digits()
        images = images.double() if self.double else images
        self.train = TensorDataset(images[:1437][: self.limit], labels[:1437][: self.limit])
        self.test = TensorDataset(images[1437:], labels[1437:])

    def _loader(self, data: TensorDataset, shuffle: bool) -> Any:
        def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            return {"image": torch.stack([i[0] for i in items]), "label": torch.stack([i[1] for i in items])}

        layout = self.trainer.distributed_sampler_kwargs if self.trainer.world_size > 1 else None
        return make_loader(
            data,
            self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.seed,
            layout=layout,
            collate_fn=collate,
        )

    def train_dataloader(self) -> Any:
        return self._loader(self.train, True)

    def val_dataloader(self) -> Any:
        return self._loader(self.test, False)

    test_dataloader = predict_dataloader = val_dataloader


class DigitsMLP(pl.LightningModule):
    """64-256-256-256-10 by default, with Gaussian noise on the inputs that depends on the step alone."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label")

    def __init__(
        self,
        optimizer: Callable[..., Any] = ADAMW,
        widths: Sequence[int] = (256, 256, 256),
        noise: float = 0.0,
        scheduler: Callable[..., Any] | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        sizes = [64, *widths, 10]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.net = net or nn.Sequential(*layers[:-1])
        self.make_optimizer, self.make_scheduler, self.noise = optimizer, scheduler, noise
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image = batch["image"]
        if self.noise:
            generator = torch.Generator().manual_seed(self.global_step)
            image = image + self.noise * torch.randn(image.shape, generator=generator, dtype=image.dtype)
        loss = nn.functional.cross_entropy(self(image), batch["label"])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["image"])
        size = len(logits)
        self.log("val/loss", nn.functional.cross_entropy(logits, batch["label"]), batch_size=size)
        self.log("val/accuracy", (logits.argmax(1) == batch["label"]).float().mean(), batch_size=size)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        right = (self(batch["image"]).argmax(1) == batch["label"]).float().mean()
        self.log("test/accuracy", right, batch_size=len(batch["label"]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["image"])
