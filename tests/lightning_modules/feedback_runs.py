"""Small trainings by feedback: a table of random numbers, a perceptron, one process or a rank of several."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.loading import make_loader, whole_batch
from datamodules.tables import Rows
from lightning_modules.feedback import FeedbackRegressor
from networks.feedback import FeedbackWeights, Perceptron
from strategies.ddp import DDP
from tests.lightning_modules.tiny_series import quiet_trainer

FEATURES, OUTPUTS, SAMPLES, BATCH = 6, 3, 48, 8
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=1e-2)


class Numbers(pl.LightningDataModule):
    """Random features, and one-hot classes that depend on them, as a table."""

    batch_keys: ClassVar[tuple[str, ...]] = ("features", "target", "index")

    def __init__(self, dtype: torch.dtype = torch.float32, batch: int = BATCH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
        w = torch.randn(FEATURES, OUTPUTS, generator=generator, dtype=torch.float64)
        y = nn.functional.one_hot((x @ w).argmax(1), OUTPUTS)
        self.rows, self.batch = Rows(x.to(dtype), y.to(dtype)), batch

    def _loader(self, shuffle: bool) -> Any:
        layout = self.trainer.distributed_sampler_kwargs if self.trainer and self.trainer.world_size > 1 else None
        return make_loader(
            self.rows, self.batch, shuffle=shuffle, seed=3, layout=layout, drop_last=shuffle, collate_fn=whole_batch
        )

    def train_dataloader(self) -> Any:
        return self._loader(True)

    def val_dataloader(self) -> Any:
        return self._loader(False)


def network(dtype: torch.dtype = torch.float32, depth: int = 2, dropout: float = 0.0) -> nn.Sequential:
    """The same weights every time; 7 features in hidden blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Perceptron((FEATURES,), OUTPUTS, depth, 7)
        if dropout:
            net = nn.Sequential(
                *(m for layer in net for m in ([layer, nn.Dropout(dropout)] if layer is net[2] else [layer]))
            )
        return net.to(dtype)


def module(
    algorithm: str = "f3", optimizer: Any = ADAM, net: nn.Module | None = None, **options: Any
) -> FeedbackRegressor:
    """A module for `Numbers`; classes as values with sigmoids, so that every signal of the paper makes sense."""
    options = {"objective": "sigmoid_bce", "input_shape": (FEATURES,), "num_outputs": OUTPUTS} | options
    options.setdefault("feedback", FeedbackWeights("kaiming_uniform"))
    net = network() if net is None else net
    return FeedbackRegressor(net, optimizer, algorithm=algorithm, **options)


def fit(
    trained: FeedbackRegressor,
    epochs: int = 2,
    data: pl.LightningDataModule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    ckpt_path: str | Path | None = None,
    **trainer: Any,
) -> pl.Trainer:
    """Train in this process, alone or as one rank of its pool."""
    if dist.is_initialized():
        os.environ["WORLD_SIZE"] = str(dist.get_world_size())  # the teardown of a run before has removed it
        trainer |= {"strategy": DDP(), "devices": dist.get_world_size()}
    trainer.setdefault("limit_val_batches", 0)
    trainer_ = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), **trainer)
    data = data or Numbers(next(trained.parameters()).dtype)
    trainer_.fit(trained, datamodule=data, ckpt_path=ckpt_path)
    return trainer_


def weights(trained: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in trained.parameters()])


def states(trained: FeedbackRegressor, trainer: pl.Trainer) -> list[Tensor]:
    """Weights, state of the optimizer and stored errors."""
    found = [*(p.detach() for p in trained.parameters())]
    for state in trainer.optimizers[0].state_dict()["state"].values():
        found += [value for value in state.values() if isinstance(value, Tensor)]
    return found + ([] if trained.errors is None else [trained.errors.rows, trained.errors.visited])
