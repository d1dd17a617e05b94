"""Modules that learn which pairs of hits are coincidences: what they share, and a perceptron that scores pairs."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.coincidence.base import TUNING_HITS, Batch, CoincidenceModule, Found
from physics.pet.coincidences import greedy_one_to_one
from physics.pet.hits import Hits, Pairs, true_pairs
from physics.pet.pair_features import Candidates, pair_candidates

log = logging.getLogger(__name__)

BASELINES = ("scw_paper", "scw_raw", "scw", "scw_geometry", "take_winner_of_goods")
"""Sorters that learned pairs are compared with, unless others are named."""


class Scored(NamedTuple):
    """Pairs of hits, and the logits that every stage of a network gives them, (pair,) each."""

    pairs: Pairs
    logits: list[Tensor]


class LearnedPairs(CoincidenceModule):
    """Base of modules that learn from pairs of hits whether they are of one decay, and choose a threshold.

    The threshold is that of the last stage's logit above which the list of the validation part has the largest F1,
    where the best pair takes its hits first. Where that part does not say which pairs are of one decay, as files may
    not, the threshold stays what it is: that of the checkpoint.

    Args:
        net: The network.
        optimizer: Partial that takes the parameters.
        scheduler: Partial that takes the optimizer.
        window: Steps that two hits of a candidate may be apart, on times without delays.
        baselines: Classical sorters of the test's table.
        windows: Windows that they may have, steps.
        scheduler_monitor: Metric for schedulers that watch one.
        scheduler_interval: ``epoch`` or ``step``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None,
        scheduler: Callable[..., Any] | None,
        window: int,
        baselines: Sequence[str],
        windows: Sequence[int],
        scheduler_monitor: str,
        scheduler_interval: Literal["epoch", "step"],
    ) -> None:
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval, baselines, windows, True, 1)
        if window < 0:
            raise ValueError(f"model.window={window}: must be at least 0 steps")
        self.window = window

    @abstractmethod
    def scored(self, hits: Hits) -> Scored:
        """Candidates with their logits."""

    @abstractmethod
    def use_threshold(self, logit: float) -> None:
        """Take a threshold of the last stage's logit."""

    def loss(self, scored: Scored, hits: Hits) -> Tensor:
        """Cross-entropy of whether pairs are of one decay, mean over pairs and stages."""
        pairs, logits = scored
        same = (hits.decay[pairs.first] == hits.decay[pairs.second]) & (hits.decay[pairs.first] >= 0)
        target = torch.from_numpy(same.astype(np.float32)).to(self.device)
        losses = [F.binary_cross_entropy_with_logits(stage, target, reduction="sum") for stage in logits]
        return sum(losses) / (max(len(same), 1) * len(losses))

    def _part(self, name: str) -> Hits:
        """A part of the data without delays, as much of it as settings are chosen on."""
        source = self.trainer.datamodule
        hits = source.parts[name]
        last = int(hits.sample[min(len(hits), TUNING_HITS) - 1]) if len(hits) else 0
        return hits.samples(0, last + 1).shifted(source.delays)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hits = self.hits_of(batch, True)
        loss = self.loss(self.scored(hits), hits)
        self._add_to_epoch("loss", loss.detach() * len(batch["sample"]), len(batch["sample"]))
        return loss

    @override
    def on_validation_start(self) -> None:
        self.choose_threshold()

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self.choose_threshold()

    @override
    def on_predict_start(self) -> None:
        self.choose_threshold()

    @torch.no_grad()
    def choose_threshold(self) -> None:
        """Take the threshold of the largest F1 on the validation part, if that has coincidences."""
        hits = self._part("val")
        true = len(true_pairs(hits).first)
        if not true:
            log.info("the validation part has no known coincidence: the threshold is not chosen anew")
            return
        candidates, logits = self.scored(hits)
        scores = logits[-1].double().cpu().numpy()
        kept = greedy_one_to_one(candidates, scores, len(hits))
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        pairs = candidates.where(kept)
        correct = np.cumsum((hits.decay[pairs.first] == hits.decay[pairs.second]) & (hits.decay[pairs.first] >= 0))
        f1 = 2 * correct / (np.arange(1, len(kept) + 1) + true)
        if len(f1):
            self.use_threshold(float(scores[kept[f1.argmax()]]) - 1e-6)


class PairScorer(LearnedPairs):
    """Scores of candidates, one to one by the greatest first, above a threshold chosen on the validation part.

    Args:
        net: `networks.petnet.PairNetwork`: ``net(features, first, second) -> [logits of every stage]``.
        optimizer: Partial that takes the parameters.
        scheduler: Partial that takes the optimizer.
        window: Steps that two hits of a candidate may be apart, on times without delays.
        min_angle_degree: Least angle between their crystals as seen from the axis.
        baselines: Classical sorters of the test's table.
        windows: Windows that they may have, steps.
        scheduler_monitor: Metric for schedulers that watch one.
        scheduler_interval: ``epoch`` or ``step``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    method: ClassVar[str] = "pair_scorer"

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        window: int = 2,
        min_angle_degree: float = 90.0,
        baselines: Sequence[str] = BASELINES,
        windows: Sequence[int] = (0, 1, 2),
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(net, optimizer, scheduler, window, baselines, windows, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        if not 0 <= min_angle_degree < 180:
            raise ValueError(f"model.min_angle_degree={min_angle_degree}: use 0 to below 180")
        self.min_angle_degree = min_angle_degree
        self.register_buffer("threshold", torch.zeros(()))  # of the logit

    def candidates(self, hits: Hits) -> Candidates:
        """Pairs that are scored, with their features."""
        return pair_candidates(hits, self.scanner, self.window, self.min_angle_degree)

    @override
    def scored(self, hits: Hits) -> Scored:
        pairs, features = self.candidates(hits)
        first, second = (torch.from_numpy(rows).to(self.device) for rows in pairs)
        return Scored(pairs, self.net(torch.from_numpy(features).to(self.device), first, second))

    @override
    def use_threshold(self, logit: float) -> None:
        self.threshold.fill_(logit)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # else the scale is in the checkpoint
            some = self._part("train")
            self.net.fit_scale(torch.from_numpy(self.candidates(some).features).to(self.device))

    @override
    def find(self, batch: Batch, hits: Hits) -> Found:
        with torch.no_grad():
            scored = self.scored(hits)
            loss = self.loss(scored, hits)
        scores = scored.logits[-1].double().cpu().numpy()
        kept = greedy_one_to_one(scored.pairs, scores, len(hits))
        kept = kept[scores[kept] > float(self.threshold)]
        pairs = scored.pairs.where(kept)
        score = 1 / (1 + np.exp(-scores[kept]))
        return Found(hits, pairs, hits.step[pairs.second], score, None, loss)
