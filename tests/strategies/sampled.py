"""A Bayesian classifier of the embedded digits in float64, as small as the strategy's contract with modules allows."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from datamodules.images import Images
from lightning_modules.metrics.classification import ClassificationScores
from networks.bayes import (
    Init,
    SampleContext,
    Stream,
    data_term,
    kl_divergence,
    to_bayesian,
    to_mc_dropout,
)
from networks.mlp import MLP
from parallel.sample_collectives import mean_over_samples
from parallel.sample_layout import SampleShare, check_num_samples, view_streams
from tests.strategies import nets

SAMPLES, NUM_TRAIN, NUM_VAL = 12, 1293, 144


class NormMLP(nn.Sequential):
    """64-32-10 with batch normalisation."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


class Sampled(pl.LightningModule):
    """Cross-entropy of S weight samples (or dropout masks), shared as the strategy says."""

    def __init__(
        self,
        objective: str = "predictive",
        sync: str = "exact",
        samples: int = SAMPLES,
        eval_samples: int = 16,
        scope: Any = "shared",
        dropout: bool = False,
        norm: bool = False,
        hidden: tuple[int, ...] = (128, 128),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = NormMLP() if norm else MLP(hidden=hidden, dropout=0.2 if dropout else 0.0)
            self.net = to_mc_dropout(net) if dropout else to_bayesian(net, init=Init(sigma_scale=1.0))
        self.to(dtype)
        self.objective, self.sync, self.samples, self.eval_samples = objective, sync, samples, eval_samples
        self.scope, self.scores = scope, ClassificationScores(10)
        self.items = SumMetric()
        self.found: dict[str, Tensor] = {}
        self.evaluated: list[Tensor] = []

    @property
    def share(self) -> SampleShare:
        """Of this process, under any strategy."""
        return getattr(self.trainer.strategy, "sample_share", SampleShare())

    def setup(self, stage: str) -> None:
        for number in (self.samples, self.eval_samples):
            check_num_samples(number, self.share.size)

    def view_streams(self) -> list[int]:
        """See `datamodules.images.Images`."""
        return view_streams(self.scope, self.samples, self.share)

    def sampled(self, image: Tensor, items: int, num: int, stream: int, step: int) -> Tensor:
        """Logits (S_local, B, class)."""
        layout = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        ids = self.share.ids(num)
        rows = (layout["rank"], layout["num_replicas"])
        image = image.to(next(self.parameters()).dtype)
        expanded = len(image) == items and not any("log_sigma" in name for name, _ in self.named_parameters())
        image = image.repeat(len(ids), 1, 1, 1) if expanded else image
        with SampleContext(ids, num, batch=items, seed=3, step=step, stream=stream, rows=rows, expanded=expanded):
            return self.net(image).view(len(ids), items, -1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        label = batch["label"]
        logits = self.sampled(batch["image"], len(label), self.samples, Stream.WEIGHTS, self.trainer.global_step)
        likelihood = logits.log_softmax(2).gather(2, label.expand(len(logits), -1)[..., None])[..., 0]
        data = data_term(likelihood, self.samples, self.share, self.objective, self.sync)
        return data + 0.1 * kl_divergence(self.net) / NUM_TRAIN

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        label = batch["label"]
        logits = self.sampled(batch["image"], len(label), self.eval_samples, Stream.EVALUATION, 0)
        probability = mean_over_samples(logits.softmax(2), self.eval_samples, self.share)
        self.evaluated.append(probability)
        self.scores.update(probability.log(), label)
        self.items.update(len(label))

    def on_validation_epoch_start(self) -> None:
        self.scores.reset()
        self.items.reset()
        self.evaluated = []

    def on_validation_epoch_end(self) -> None:
        self.found = self.scores.compute() | {"items": self.items.compute()}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def fit(strategy: Any, folder: str, epochs: int = 3, data: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Train on the digits; returns the module and its trainer. Arguments of `nets.fit` and of `Sampled`."""
    of_trainer = {"callbacks", "ckpt_path", "devices", "accumulate_grad_batches", "gradient_clip_val", "max_steps"}
    own = {key: value for key, value in kwargs.items() if key not in of_trainer}
    rest = {key: value for key, value in kwargs.items() if key in of_trainer}
    options = {"test_size": 360, "test_from": "random", "normalize": "none", "seed": 5} | (data or {})
    return nets.fit(strategy, folder, module=Sampled(**own), epochs=epochs, datamodule=Images(**options), **rest)
