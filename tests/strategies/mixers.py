"""A small forecast for strategy=jigsaw: the same global batches and the same first weights on any grid."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from datamodules.loading import make_loader
from networks.weather_mixer import WeatherMixer
from parallel.sharding import clip_grad_norm_, grid_of
from parallel.sharding.blocks import whole
from strategies.jigsaw import JigsawStrategy

SHAPE = {"height": 4, "width": 16, "num_inputs": 6, "num_outputs": 5}
NET = SHAPE | {"patch": 2, "dim": 16, "blocks": 2, "dropout": 0.1}
SAMPLES, BATCH = 40, 4


class Fields(pl.LightningDataModule):
    """Random fields, and a nonlinear function of them and of their neighbours; every rank has its block."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        size = (SAMPLES, SHAPE["height"], SHAPE["width"], SHAPE["num_inputs"])
        self.x = torch.randn(size, generator=generator)
        self.y = (self.x.roll(1, 2) + 0.5 * self.x.roll(1, 3)).tanh()[..., : SHAPE["num_outputs"]]

    def train_dataloader(self) -> Any:
        grid = grid_of(self.trainer)
        blocks = grid.block(self.x), grid.block(self.y, SHAPE["num_inputs"])
        layout = self.trainer.distributed_sampler_kwargs if self.trainer.world_size > 1 else None
        return make_loader(torch.utils.data.TensorDataset(*blocks), BATCH, shuffle=True, seed=5, layout=layout)


class Forecast(pl.LightningModule):
    """Mean square error over the whole field; keeps loss and gradient norm of every step."""

    def __init__(self, optimizer: Callable[..., Any] | None = None, **net: Any) -> None:
        super().__init__()
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.01))
        self.options, self.net = NET | net, None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.at_start: dict[str, Tensor] = {}
        self.moments_at_start: dict[str, Tensor] = {}
        self.saved: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = WeatherMixer(**self.options, grid=grid_of(self._trainer))

    def on_train_start(self) -> None:
        self.at_start = self.weights()
        self.moments_at_start = self.moments()

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters by name; a collective call."""
        layouts = self.net.layouts
        return {name: whole(p, layouts[name], self.net.grid) for name, p in self.net.named_parameters()}

    def moments(self) -> dict[str, Tensor]:
        """Whole tensors of the optimizer by parameter; a collective call."""
        layouts, optimizer = self.net.layouts, self.optimizers().optimizer
        return {
            f"{name}.{key}": whole(value, layouts[name], self.net.grid)
            for name, p in self.net.named_parameters()
            for key, value in sorted(optimizer.state.get(p, {}).items())
            if key != "step"
        }

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        grid, size = self.net.grid, SHAPE["height"] * SHAPE["width"] * SHAPE["num_outputs"] * len(x)
        loss = (self.net(x) - y).square().sum() / size
        of_instance = grid.sum_over_instance(loss)
        self.losses.append(float(grid.sum_over_data(of_instance)) / grid.data_size)
        return loss

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        if gradient_clip_val:
            self.norms.append(float(clip_grad_norm_(self.net.parameters(), gradient_clip_val, self.net.grid)))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net.parameters())


def fit(
    grid: dict[str, Any],
    folder: str,
    steps: int,
    ckpt_path: str | None = None,
    save: tuple[int, str] | None = None,
    trainer_options: dict[str, Any] | None = None,
    kind: type[Forecast] = Forecast,
    **net: Any,
) -> dict[str, Any]:
    """Train some steps under strategy=jigsaw and return what happened; called on all ranks of a pool.

    Args:
        grid: Arguments of the strategy.
        folder: For Lightning.
        steps: Of the whole training.
        ckpt_path: Where to go on.
        save: (step, file) of a checkpoint.
        trainer_options: More of the Trainer's.
        kind: Of the module.
        **net: Of the network.
    """
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    os.environ["WORLD_SIZE"] = str(devices)  # the teardown of a run before has removed it
    module = kind(**net)
    strategy = JigsawStrategy(**{"timeout_s": 60} | grid)
    options = dict(trainer_options or {})
    callbacks = [*options.pop("callbacks", []), *([SaveAt(save[0], save[1], module)] if save else [])]
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=devices, max_steps=steps, max_epochs=100,
        default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, gradient_clip_val=0.5, callbacks=callbacks,
        **options,
    )  # fmt: skip
    try:
        trainer.fit(module, Fields(), ckpt_path=ckpt_path)
        return {
            "losses": module.losses, "norms": module.norms, "start": module.at_start, "end": module.weights(),
            "moments_at_start": module.moments_at_start, "draws": int(module.net.draws),
            "saved": module.saved, "sent": trainer.strategy.ledger.totals(),
        }  # fmt: skip
    finally:
        if strategy.grid is not None:
            strategy.grid.close()


class SaveAt(pl.Callback):
    """Writes a checkpoint after a step and keeps what it must hold."""

    def __init__(self, step: int, path: str, module: Forecast) -> None:
        self.step, self.path, self.module = step, path, module

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            self.module.saved = self.module.weights(), self.module.moments()
