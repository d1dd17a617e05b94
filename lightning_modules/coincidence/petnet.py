"""PETNet: a spiking network that marks coincidences, trained for their number, their time, and few spikes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.coincidence.base import Batch, CoincidenceModule, Found
from networks.event_driven import EventDrivenLines
from networks.petnet import LORNetwork, unique_events
from networks.silence import SilenceMap, skip_silence
from networks.spike_losses import COUNTS, TIMINGS
from networks.spiking import Events, LIFTrace
from physics.pet.decoding import decode_pairs
from physics.pet.hits import Hits
from physics.pet.matching import Spikes


class PETNet(CoincidenceModule):
    """A spiking network ``net(events) -> output spikes (T, B, crystal)``, trained with several objectives.

    ``loss = count_weight * count + timing_weight * timing + activity_weight * hidden spikes per sample``. The output
    spikes confirm hits, confirmed hits become a list of coincidences (`physics.pet.decoding`), which is compared with
    those of classical sorters.

    Args:
        net: `networks.petnet.PETNet`, `networks.petnet.LORNetwork`, or another with ``layers`` and ``operations``.
        optimizer: Partial that takes the parameters; None: nothing is trained.
        scheduler: Partial that takes the optimizer.
        count: ``mse``, the paper's, or ``l1``: of the numbers of spikes of a crystal.
        count_weight: Its weight.
        timing: ``none``; ``van_rossum`` or ``soft``, which have gradients; ``legacy`` or ``chamfer``, the reference's,
            which have **none** and change nothing but the value of the loss.
        timing_weight: Its weight.
        tau: Time constant of the timing loss, steps.
        activity_weight: Weight of the spikes of hidden neurons, which cost energy.
        silence: Longest silence between hits on the network's clock, steps; longer ones are cut. At least the largest
            delay where ``aligned`` is false. None: the network takes every step.
        aligned: Whether the network sees times without delays.
        tolerance: Steps between an output spike and its label.
        reach: Steps between an output spike and the hit that it confirms; None: 1, or ``silence`` or 20 with delays.
        pair_window: Steps between two output spikes of a coincidence.
        min_angle_degree: Least angle of a listed coincidence; 0: the network alone decides.
        compare_lor: Whether the test's table has the network of lines of response, which needs no training.
        baselines: Classical sorters of the table.
        windows: Windows that they may have, steps.
        scheduler_monitor: Metric for schedulers that watch one.
        scheduler_interval: ``epoch`` or ``step``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    method: ClassVar[str] = "snn"

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        count: Literal["mse", "l1"] = "l1",
        count_weight: float = 1.0,
        timing: Literal["none", "van_rossum", "soft", "legacy", "chamfer"] = "van_rossum",
        timing_weight: float = 1.0,
        tau: float = 3.0,
        activity_weight: float = 0.0,
        silence: int | None = None,
        aligned: bool = True,
        tolerance: int = 1,
        reach: int | None = None,
        pair_window: int = 2,
        min_angle_degree: float = 0.0,
        compare_lor: bool = False,
        baselines: Sequence[str] = ("scw_paper", "scw_raw", "scw", "scw_geometry", "take_winner_of_goods"),
        windows: Sequence[int] = (0, 1, 2, 3),
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        self.compare_lor = compare_lor
        super().__init__(
            net, optimizer, scheduler, scheduler_monitor, scheduler_interval, baselines, windows, aligned, tolerance
        )
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        for key, value, known in (("count", count, tuple(COUNTS)), ("timing", timing, ("none", *TIMINGS))):
            if value not in known:
                raise ValueError(f"model.{key}={value!r} is unknown; choose {', '.join(known)}")
        weights = {"count_weight": count_weight, "timing_weight": timing_weight, "activity_weight": activity_weight}
        for key, value in weights.items():
            if value < 0:
                raise ValueError(f"model.{key}={value}: must not be negative")
        if not tau > 0:
            raise ValueError(f"model.tau={tau}: must be above 0 steps")
        if silence is not None and silence < 1:
            raise ValueError(f"model.silence={silence}: must be at least 1 step, or null")
        self.count, self.timing, self.tau, self.silence = count, timing, tau, silence
        self.count_weight, self.timing_weight, self.activity_weight = count_weight, timing_weight, activity_weight
        self.reach = reach if reach is not None else 1 if aligned else silence or 20
        self.pair_window, self.min_angle_degree = pair_window, min_angle_degree
        self._lines: EventDrivenLines | None = None

    @override
    def companions(self) -> dict[str, Callable[[Batch, Hits], Found]]:
        return {"lor_snn": self._find_by_lines} if self.compare_lor else {}

    # ------------------------------------------------------------------------------------------------- in and out of it

    def events(self, batch: Batch, aligned: bool, silence: int | None) -> tuple[Events, SilenceMap | None]:
        """The binary input of a batch, and the clock that it is on (None: the full one)."""
        item, step = batch["hit_item"], batch["hit_aligned_step" if aligned else "hit_step"]
        clock = None if silence is None else skip_silence(item, step, silence)
        if clock is None:
            num_steps = max(self.trainer.datamodule.num_steps, int(step.max()) + 1 if len(step) else 1)
        else:
            step, num_steps = clock.shorten(item, step), clock.num_steps
        value = torch.ones(len(step), dtype=self.dtype, device=step.device)
        return unique_events(Events(step, item, batch["hit_crystal"], value, num_steps, len(batch["sample"]))), clock

    def target(self, batch: Batch, spikes: Tensor, clock: SilenceMap | None) -> Tensor:
        """Labels as a tensor like the output: 1 in both crystals at the step of the decay."""
        item, step = batch["label_item"], batch["label_step"]
        if clock is not None:
            step = clock.shorten(item, step)
        target = torch.zeros_like(spikes)
        step = step.clamp_max(len(target) - 1)
        for crystal in (batch["label_a"], batch["label_b"]):
            target[step, item, crystal] = 1
        return target

    def objective(self, batch: Batch, traces: list[LIFTrace], clock: SilenceMap | None) -> dict[str, Tensor]:
        """Parts of the loss by name, weighted; their sum is the loss."""
        spikes = traces[-1].spikes
        target = self.target(batch, spikes, clock)
        parts = {"count": self.count_weight * COUNTS[self.count](spikes, target)}
        if self.timing != "none" and self.timing_weight:
            parts["timing"] = self.timing_weight * TIMINGS[self.timing](spikes, target, self.tau)
        if self.activity_weight:
            hidden = sum(trace.spikes.sum((0, 2)).mean() for trace in traces[:-1])
            parts["activity"] = self.activity_weight * hidden
        return parts

    # ------------------------------------------------------------------------------------------------------------ steps

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        events, clock = self.events(batch, self.aligned, self.silence)
        parts = self.objective(batch, self.net.layers(events), clock)
        loss = sum(parts.values())
        size = len(batch["sample"])
        for name, value in {"loss": loss, **parts}.items():
            self._add_to_epoch(name, value.detach() * size, size)
        return loss

    @override
    def find(self, batch: Batch, hits: Hits) -> Found:
        return self._find(self.net, batch, hits, self.aligned, self.silence, self.reach)

    def _find(self, net: nn.Module, batch: Batch, hits: Hits, aligned: bool, silence: int | None, reach: int) -> Found:
        with torch.no_grad():
            events, clock = self.events(batch, aligned, silence)
            traces = net.layers(events)
            loss = sum(self.objective(batch, traces, clock).values())
        step, item, crystal = traces[-1].spikes.nonzero(as_tuple=True)
        if clock is not None:
            step = clock.restore(item, step)
        spikes = Spikes(*(values.cpu().numpy() for values in (item, crystal, step)))
        pairs, when = decode_pairs(
            hits,
            spikes,
            self.scanner,
            reach=self.reach,
            window=self.pair_window,
            min_angle_degree=self.min_angle_degree,
        )
        score = (when >= 0).astype(float)
        neurons = sum(trace.spikes.shape[2] for trace in traces)
        activity = sum(float(trace.spikes.sum()) for trace in traces) / max(neurons * len(batch["sample"]), 1)
        operations = float(self.net.operations(events, traces))
        return Found(hits, pairs, when, score, spikes, loss, operations, activity)

    def _find_by_lines(self, batch: Batch, hits: Hits) -> Found:
        """What lines of response find, hit by hit (`networks.event_driven`)."""
        if self._lines is None:
            source = self.trainer.datamodule
            self._lines = EventDrivenLines(LORNetwork(source.layout.name, spread=source.toy.spread))
        item, step, crystal = self._lines(hits.sample, hits.step, hits.crystal)
        spikes = Spikes(item, crystal, step)
        pairs, when = decode_pairs(hits, spikes, self.scanner, reach=0, window=0)
        return Found(hits, pairs, when, np.ones(len(when)), spikes, torch.zeros(()))
