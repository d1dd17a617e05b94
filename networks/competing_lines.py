"""Lines of response that compete for hits: learned weights, thresholds that fall, and winners that take their hits.

A neuron for every line, as in `networks.petnet.LORNetwork`, with three differences. What a crystal gives to a line
depends on the geometry of the line and is learned. A line that fires resets all lines of its two crystals, so that a
hit is in one coincidence, except where lines fire together. And who fires first is decided within a step: the threshold
starts high and falls, so that of several lines with a common hit the one with the highest potential comes first and
takes it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks.spiking import Events
from physics.pet.scanner import make_scanner

MAX_BETA = 0.9
"""Largest decay: beyond it, a line forgets a hit only after a crystal may have fired again."""
SILENT = -(1 << 40)
"""Step of the last hit of a crystal that had none."""


class LineSpikes(NamedTuple):
    """Spikes of lines in the order of item and step, (spike,) int64 each.

    Args:
        item: Item of the batch.
        step: When the line fires.
        a: Crystal at its one end.
        b: At the other, a < b.
        step_a: When that crystal has last passed on a hit.
        step_b: Likewise.
    """

    item: Tensor
    step: Tensor
    a: Tensor
    b: Tensor
    step_a: Tensor
    step_b: Tensor


class CompetingLines(nn.Module):
    """Relays of crystals -> lines of response with learned weights, which inhibit each other.

    - A crystal's relay passes a hit on, and is deaf for ``dead_steps`` after it.
    - A line of crystals a, b has ``u[t] = beta u[t-1] + w (x_a[t] + x_b[t])``. Its weight depends on how far the two
      are from facing each other around the axis, and if ``oblique`` also on how many rings they are apart:
      ``w = across[offset] + along[rings]``.
    - In every step the threshold falls from twice the largest weight, the highest potential that two hits can reach, to
      ``threshold`` in ``phases`` equal parts. A line above it fires, and resets all lines of its two crystals, itself
      included, to 0 before the threshold falls further. Lines above the same threshold fire together.

    The potential of a line at its second hit is known in closed form, ``w (1 + beta^gap)``: weights and decay are
    learned on pairs of hits (`logits`) without a scan. `forward` is the scan, step by step over all lines, and
    `networks.event_driven.EventDrivenCompetition` gives its spikes from hit to hit.

    Args:
        scanner: Preset whose crystals are the channels.
        spread: Lines are pairs of crystals at most so many positions around the ring from facing each other, in any two
            rings.
        oblique: Whether the weights also depend on how many rings the two crystals are apart.
        weight: Initial weight of all lines.
        beta: Initial decay of the potentials in a step.
        phases: Thresholds in a step.
        dead_steps: For which a crystal is deaf after a hit.
        slope: Of the logistic function that stands for the spike in training: steepness at the threshold of 1.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        scanner: str = "safir2880",
        spread: int = 20,
        oblique: bool = False,
        weight: float = 0.6,
        beta: float = 0.5,
        phases: int = 8,
        dead_steps: int = 20,
        slope: float = 10.0,
    ) -> None:
        super().__init__()
        self.layout = make_scanner(scanner)
        self.num_crystals, self.per_ring, self.rings = (
            self.layout.num_crystals, self.layout.crystals_per_ring, self.layout.num_rings,
        )  # fmt: skip
        if not 0 <= spread < self.per_ring // 2:
            raise ValueError(f"model.net.spread={spread}: use 0 to {self.per_ring // 2 - 1} crystals")
        if not 0 < weight <= 1:
            raise ValueError(f"model.net.weight={weight}: use a value above 0, at most 1: one hit must not fire a line")
        if not 0 < beta <= MAX_BETA:
            raise ValueError(f"model.net.beta={beta}: use a value above 0, at most {MAX_BETA}")
        for key, value in (("phases", phases), ("dead_steps", dead_steps)):
            if value < 1:
                raise ValueError(f"model.net.{key}={value}: must be at least 1")
        if not slope > 0:
            raise ValueError(f"model.net.slope={slope}: must be above 0")
        self.spread, self.phases, self.dead_steps, self.slope = spread, phases, dead_steps, slope
        self.across = nn.Parameter(torch.full((spread + 1,), float(weight)))
        self.along = nn.Parameter(torch.zeros(self.rings), requires_grad=oblique)
        self.beta = nn.Parameter(torch.tensor(float(beta)))
        self.register_buffer("threshold", torch.ones(()))

    # -------------------------------------------------------------------------------------------------- what is learned

    @property
    def decay(self) -> Tensor:
        """Beta as it is used, scalar."""
        return self.beta.clamp(1e-3, MAX_BETA)

    def offset(self, a: Tensor, b: Tensor) -> Tensor:
        """Positions around the ring by which crystals miss facing each other, 0 to half of the ring."""
        apart = (a % self.per_ring - b % self.per_ring).abs()
        return self.per_ring // 2 - torch.minimum(apart, self.per_ring - apart)

    def rings_apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Rings between crystals."""
        return (a // self.per_ring - b // self.per_ring).abs()

    def is_line(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether there is a line between crystals."""
        return self.offset(a, b) <= self.spread

    def weights(self, a: Tensor, b: Tensor) -> Tensor:
        """Weights of the lines between crystals, shape of ``a``."""
        return self.across[self.offset(a, b)] + self.along[self.rings_apart(a, b)]

    def logits(self, a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
        """How far the line of a pair of hits comes above the threshold of 1 with the second one, times ``slope``.

        Args:
            a: Crystal of the first hit, (pair,) int64.
            b: Of the second one.
            gap: Steps between them.
        """
        return self.slope * (self.weights(a, b) * (1 + self.decay**gap) - 1)

    @property
    def table(self) -> Tensor:
        """Weights by offset and rings apart, (spread + 1, rings)."""
        return self.across[:, None] + self.along

    @property
    def kernel(self) -> Tensor:
        """Weights of a crystal's lines by rings and positions to the other crystal, (2 rings - 1, positions)."""
        position = torch.arange(self.per_ring, device=self.across.device)
        offset = self.offset(torch.zeros_like(position), position)
        ring = torch.arange(1 - self.rings, self.rings, device=position.device).abs()
        table = self.table[offset.clamp_max(self.spread)][:, ring].T
        return torch.where(offset <= self.spread, table, 0)

    def thresholds(self) -> Tensor:
        """Thresholds of a step, falling, (phases,) float32.

        The last one is at least what hits of one crystal alone can do to a line.
        """
        with torch.no_grad():
            largest = self.table.max().float()
            alone = largest / (1 - self.decay ** (self.dead_steps + 1))
            last = torch.maximum(self.threshold.float(), 1.001 * alone)
            top = torch.maximum(2 * largest, last)
            return top + (last - top) * torch.arange(1, self.phases + 1, device=last.device) / self.phases

    # ------------------------------------------------------------------------------------------------------------ scan

    @property
    def reach_mm(self) -> float:
        """Distance from the axis up to which all decays have a line, about."""
        return self.layout.radius_mm * math.sin(math.pi * self.spread / self.per_ring)

    @property
    def num_lines(self) -> int:
        """Neurons."""
        return self.num_crystals * (2 * self.spread + 1) * self.rings // 2

    @functools.cached_property
    def lines(self) -> Tensor:
        """Crystals of all lines, a < b, (line, 2) int64."""
        return torch.from_numpy(self.layout.lines_of_response(self.spread, self.rings - 1))

    @torch.no_grad()
    def forward(self, events: Events) -> LineSpikes:
        """Spikes of all lines, one step after the other.

        Args:
            events: Hits; several of a crystal in a step count once, whatever their values.
        """
        a, b = self.lines.to(events.step.device).T
        weight, beta, thresholds = self.weights(a, b).float(), self.decay.float(), self.thresholds()
        shape = events.num_items, self.num_crystals
        hits = torch.zeros(events.num_steps, *shape, dtype=torch.bool, device=a.device)
        hits[events.step, events.item, events.channel] = True
        latest = torch.full(shape, SILENT, device=a.device)
        u = weight.new_zeros(events.num_items, len(a))
        found = []
        for t, hit in enumerate(hits):
            relayed = hit & (t - latest > self.dead_steps)
            latest[relayed] = t
            u.mul_(beta)
            if relayed.any():
                inputs = relayed.to(weight)
                u.add_(weight * (inputs[:, a] + inputs[:, b]))
            if not (u > thresholds[-1]).any():
                continue
            for threshold in thresholds:
                item, line = (u > threshold).nonzero(as_tuple=True)
                if not len(item):
                    continue
                ends = a[line], b[line]
                when = torch.full_like(item, t)
                found.append(torch.stack([item, when, *ends, *(latest[item, c] for c in ends)]))
                taken = torch.zeros(shape, dtype=torch.bool, device=a.device)
                for crystal in ends:
                    taken[item, crystal] = True
                u[taken[:, a] | taken[:, b]] = 0
        rows = torch.cat(found, 1) if found else events.step.new_empty(6, 0)
        order = (rows[0] * events.num_steps + rows[1]).argsort(stable=True)
        return LineSpikes(*rows[:, order])

    def operations(self, num_hits: int, num_spikes: int) -> int:
        """Synaptic operations, at most: a hit reaches all lines of its crystal, a spike those of both its crystals."""
        return (2 * self.spread + 1) * self.rings * (num_hits + 2 * num_spikes)
