"""What the platform adds to a training step of a small network.

Compared on the same network, data, loader order, optimizer and thread:

- *bare PyTorch*: a loop of forward, ``zero_grad``, ``backward``, ``step``;
- *Lightning, bare bones*: ``Trainer(barebones=True)``, the least that Lightning can do (no logging, no checkpoints);
- *Lightning*: ``Trainer`` with its own defaults (progress bar, logger, checkpoint of every epoch), output discarded;
- *platform*: the composed configuration (``trainer=cpu callbacks=default logger=csv``) through `runner.job`, as
  ``python run.py`` does it.

A step is measured from its beginning to the beginning of the next one inside an epoch. What happens between two epochs
(validation on one batch, checkpoints, log files) is a quantity of its own. Rounds are short and many, since a shared
machine changes its speed by half within minutes. No paper claims a number; what Lightning's loop costs is the floor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from benchmarks.measure import REPEATS, Clock, Lap, Timing, difference_row, interleave, ratio_row, threads, time_rows
from benchmarks.record import Result, Row
from datamodules.loading import make_loader

CLAIM: str = (
    "A training step through the platform takes at most 5 % longer than one through Lightning's defaults, although it "
    "can be interrupted and resumed exactly."
)

CONF = Path(__file__).parents[1] / "conf"
BARE, BAREBONES, LIGHTNING, PLATFORM = "bare PyTorch", "Lightning, bare bones", "Lightning", "platform"
# Steps at the begin of an epoch that are not counted: Lightning fetches ahead there.
SKIPPED = 3


class Size(NamedTuple):
    """Width of all layers, samples per batch, steps per epoch."""

    width: int
    batch: int
    steps: int

    def __str__(self) -> str:
        return f"width {self.width}, batch {self.batch}"


SIZES = (Size(16, 32, 150), Size(256, 256, 40))
ROUNDS = 3 * REPEATS
MAX_LIGHTNING_RATIO = 1.05
EPOCHS = 3  # the first one warms up


class StepClock:
    """Notes the time at the beginning of every training step; shared by all variants."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.laps: list[Lap] = []

    def tick(self) -> None:
        """A step begins."""
        self.laps.append(self.clock.now())

    def per_step(self, steps_per_epoch: int) -> Lap:
        """Mean time of a step inside the epochs after the first."""
        inside = [
            _elapsed(epoch[SKIPPED], epoch[-1], len(epoch) - 1 - SKIPPED) for epoch in self._epochs(steps_per_epoch)[1:]
        ]
        return Lap(statistics.fmean(lap.wall for lap in inside), statistics.fmean(lap.cpu for lap in inside))

    def between_epochs(self, steps_per_epoch: int) -> Lap:
        """Mean time from the end of the last step of an epoch to the first step of the next one."""
        epochs, step = self._epochs(steps_per_epoch), self.per_step(steps_per_epoch)
        gaps = [_elapsed(before[-1], after[0]) for before, after in pairwise(epochs)]
        return Lap(
            statistics.fmean(lap.wall for lap in gaps) - step.wall, statistics.fmean(lap.cpu for lap in gaps) - step.cpu
        )

    def _epochs(self, steps: int) -> list[list[Lap]]:
        if len(self.laps) % steps or len(self.laps) < 2 * steps:
            raise ValueError(f"{len(self.laps)} steps were taken; at least two epochs of {steps} were expected")
        return [self.laps[begin : begin + steps] for begin in range(0, len(self.laps), steps)]


def _elapsed(begin: Lap, end: Lap, steps: int = 1) -> Lap:
    return Lap((end.wall - begin.wall) / steps, (end.cpu - begin.cpu) / steps)


class Samples:
    """A regression problem in memory that is read a batch at a time."""

    def __init__(self, number: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(number, width, generator=generator)
        self.y = self.x.mean(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"x": self.x[indices], "y": self.y[indices]}


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


class RegressionData(pl.LightningDataModule):
    """Batches ``{"x": (batch, width), "y": (batch, 1)}``; the validation part is one batch.

    Args:
        width: Features of a sample.
        batch_size: Samples of a batch.
        steps: Batches of an epoch.
        seed: Of the order.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("x", "y")

    def __init__(self, width: int, batch_size: int, steps: int, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        self.train, self.val = Samples(steps * batch_size, width), Samples(batch_size, width)

    def train_dataloader(self) -> Any:
        """Training batches in a new order every epoch."""
        return make_loader(self.train, self.batch_size, shuffle=True, seed=self.seed, collate_fn=_as_it_is)

    def val_dataloader(self) -> Any:
        """The validation batch."""
        return make_loader(self.val, self.batch_size, collate_fn=_as_it_is)


class Regression(pl.LightningModule):
    """A perceptron with two hidden layers.

    Args:
        width: Of the input and the hidden layers.
        optimizer: Partial that takes the parameters.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("x", "y")
    clock: StepClock  # set before training

    def __init__(self, width: int, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 1))
        self.make_optimizer = optimizer
        self.val_loss = MeanMetric()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self.make_optimizer(self.net.parameters())

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(self.net(batch["x"]), batch["y"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        self.clock.tick()
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.val_loss.update(self.loss(batch))
        self.log("val/loss", self.val_loss)


class TimedRegression(Regression):
    """Takes the clock of the running variant, for code that builds its module itself (`runner.job`)."""

    running: ClassVar[StepClock]

    def __init__(self, width: int, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(width, optimizer)
        self.clock = self.running


# --------------------------------------------------------------------------------------------------------- variants


def configuration(size: Size, run_dir: str, epochs: int = EPOCHS) -> dict[str, Any]:
    """What ``python run.py`` resolves for the platform variant; all variants take model, data and optimizer from it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from runner import check, schema

    schema.register()
    module = Path(__file__).stem
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "config",
            [
                "optimizer=adam",
                f"+data._target_=benchmarks.{module}.RegressionData",
                f"+data.width={size.width}",
                f"+data.batch_size={size.batch}",
                f"+data.steps={size.steps}",
                f"+model._target_=benchmarks.{module}.TimedRegression",
                f"+model.width={size.width}",
                "test=false",
                "num_threads=1",
                f"trainer.max_epochs={epochs}",
                f"run.dir={run_dir}",
            ],
        )
    check.check(config)
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)


def train_bare(config: dict[str, Any]) -> nn.Module:
    """The loop that everybody writes; returns the trained network."""
    from runner import job

    module, data = job.build(config)
    net, optimizer, clock = module.net, module.configure_optimizers(), module.clock
    train, val = data.train_dataloader(), data.val_dataloader()
    for epoch in range(config["trainer"]["max_epochs"]):
        net.train()
        train.sampler.set_epoch(epoch)
        for batch in train:
            clock.tick()
            loss = nn.functional.mse_loss(net(batch["x"]), batch["y"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            for batch in val:
                nn.functional.mse_loss(net(batch["x"]), batch["y"])
    return net


def train_lightning(config: dict[str, Any], **arguments: Any) -> None:
    """Lightning's Trainer with its defaults, or with ``arguments``."""
    from runner import job

    module, data = job.build(config)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=config["trainer"]["max_epochs"],
        default_root_dir=config["run"]["dir"],
        **arguments,
    )
    trainer.fit(module, datamodule=data)


def train_platform(config: dict[str, Any]) -> None:
    """A run as the platform does it."""
    from runner import job

    outcome = job.run(config)
    if outcome["status"] != "completed":
        raise RuntimeError(f"the run {outcome['status']}: {outcome.get('trace') or outcome.get('error')}")


VARIANTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    BARE: train_bare,
    BAREBONES: lambda config: train_lightning(config, barebones=True),
    LIGHTNING: train_lightning,
    PLATFORM: train_platform,
}


def timed(train: Callable[[dict[str, Any]], Any], size: Size, epochs: int = EPOCHS) -> StepClock:
    """Train once in a temporary folder and return the clock of its steps."""
    TimedRegression.running = clock = StepClock()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        train(configuration(size, folder, epochs))
    return clock


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what runs print, and leave logging and warnings as they were."""
    from runner import logs

    logs.adopt_lightning()  # its own handlers write to the stream that was there when it was imported
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.captureWarnings(False)
        for handler in root.handlers:
            handler.close()
        root.handlers, root.level = handlers, level


# -------------------------------------------------------------------------------------------------------------- run


def run(repeats: int = ROUNDS, sizes: tuple[Size, ...] = SIZES, epochs: int = EPOCHS) -> Result:
    """Compare the variants at every size."""
    rows: list[Row] = []
    with threads(1):
        for size in sizes:
            clocks = interleave(
                {name: lambda train=train, size=size: timed(train, size, epochs) for name, train in VARIANTS.items()},
                repeats,
            )
            rows += _rows(size, clocks)
    settings = {
        "network": "2 hidden layers",
        "optimizer": "Adam",
        "steps per epoch": ", ".join(f"{size.steps} (width {size.width})" for size in sizes),
        "epochs": epochs,
        "threads": 1,
        "repeats": repeats,
    }
    return Result(rows, settings)


def _rows(size: Size, clocks: Mapping[str, list[StepClock]]) -> list[Row]:
    steps = {name: Timing.of([clock.per_step(size.steps) for clock in each]) for name, each in clocks.items()}
    gaps = {name: Timing.of([clock.between_epochs(size.steps) for clock in each]) for name, each in clocks.items()}
    what = f"{size}: training step"
    return [
        *time_rows(what, steps, unit="µs"),
        difference_row(what, steps, PLATFORM, BARE, unit="µs"),
        difference_row(what, steps, PLATFORM, BAREBONES, unit="µs"),
        ratio_row(what, steps, PLATFORM, BARE),
        ratio_row(what, steps, PLATFORM, LIGHTNING, at_most=MAX_LIGHTNING_RATIO),
        *time_rows(f"{size}: between two epochs", gaps, unit="ms"),
    ]
