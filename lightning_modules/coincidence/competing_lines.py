"""CompetingLines: spiking lines of response whose weights, decay and threshold are learned on pairs of hits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.coincidence.base import Batch, Found
from lightning_modules.coincidence.pairs import BASELINES, LearnedPairs, Scored
from networks.event_driven import EventDrivenCompetition
from physics.pet.coincidences import candidate_pairs
from physics.pet.decoding import pairs_of_lines
from physics.pet.hits import Hits
from physics.pet.matching import Spikes

log = logging.getLogger(__name__)


class CompetingLines(LearnedPairs):
    """Trains `networks.competing_lines.CompetingLines` and lists the pairs that its lines fire for.

    The potential of a line at the second hit of a pair is known in closed form, so that training needs no scan: the
    loss is the cross-entropy of its distance to the threshold for all pairs of hits that have a line. Evaluation runs
    the spiking network, event-driven: a spike of a line is a coincidence of the last hits of its two crystals, its
    score the probability that training gives to their pair. The last of its thresholds is chosen on the validation
    part.

    Args:
        net: `networks.competing_lines.CompetingLines`.
        optimizer: Partial that takes the parameters.
        scheduler: Partial that takes the optimizer.
        window: Steps that two hits of a pair may be apart in training; what lies further apart the decay has to forget.
        baselines: Classical sorters of the test's table.
        windows: Windows that they may have, steps.
        scheduler_monitor: Metric for schedulers that watch one.
        scheduler_interval: ``epoch`` or ``step``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    method: ClassVar[str] = "competing_lines"

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        window: int = 4,
        baselines: Sequence[str] = BASELINES,
        windows: Sequence[int] = (0, 1, 2),
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(net, optimizer, scheduler, window, baselines, windows, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        self._runner: EventDrivenCompetition | None = None

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        source = self.trainer.datamodule
        radius, reach = source.acquisition.source.radius_mm, self.net.reach_mm
        wide = source.acquisition.source.shape not in ("point", "line")
        if source.kind == "physics" and wide and radius > reach:
            log.warning(
                "model.net.spread=%d: lines pass the axis within %.1f mm, decays are up to %.1f mm away "
                "(data.source_radius_mm); coincidences without a line are not found: use a larger spread",
                self.net.spread, reach, radius,
            )  # fmt: skip

    @override
    def scored(self, hits: Hits) -> Scored:
        pairs = candidate_pairs(hits, self.window)
        a, b = hits.crystal[pairs.first], hits.crystal[pairs.second]
        keep = self.net.is_line(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        gap = hits.step[pairs.second] - hits.step[pairs.first]
        return Scored(pairs.where(keep), [self._logits(a[keep], b[keep], gap[keep])])

    def _logits(self, a: np.ndarray, b: np.ndarray, gap: np.ndarray) -> Tensor:
        rows = (torch.from_numpy(np.ascontiguousarray(values)).to(self.device) for values in (a, b, gap))
        return self.net.logits(*rows)

    @override
    def use_threshold(self, logit: float) -> None:
        self.net.threshold.fill_(1 + logit / self.net.slope)

    @override
    def choose_threshold(self) -> None:
        super().choose_threshold()
        self._runner = EventDrivenCompetition(self.net)

    @override
    def find(self, batch: Batch, hits: Hits) -> Found:
        fired = self._runner(hits.sample, hits.step, hits.crystal)
        pairs = pairs_of_lines(hits, fired.item, fired.a, fired.b, fired.step_a, fired.step_b)
        spikes = Spikes(np.tile(fired.item, 2), np.concatenate([fired.a, fired.b]), np.tile(fired.step, 2))
        operations = self.net.operations(len(hits), len(fired.item))
        activity = len(fired.item) / (self.net.num_lines * hits.num_samples)
        with torch.no_grad():
            loss = self.loss(self.scored(hits), hits)
            gap = np.abs(fired.step_a - fired.step_b)
            score = self._logits(fired.a, fired.b, gap).sigmoid().double().cpu().numpy()
        return Found(hits, pairs, fired.step, score, spikes, loss, float(operations), activity)
