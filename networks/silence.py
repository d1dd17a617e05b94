"""A clock that runs only where something happens: silences longer than a limit are cut to it (section 2.8).

A sample of 1000 steps with six hits has a hundred steps that matter. What a network with a short memory does on this
clock is what it does on the full one, as long as its potentials have come to rest within the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SPAN = 1 << 40
"""More steps than any sample has: items lie one after the other on one line."""


@dataclass(frozen=True)
class SilenceMap:
    """Times of hits on both clocks, by item and time.

    Args:
        line: ``item * span + step`` of hits on the full clock, ascending.
        short_line: The same on the short clock.
        item: Item of every hit.
        step: Step on the full clock.
        short: Step on the short clock.
        limit: Longest silence on the short clock.
        num_steps: Steps of the short clock, for the longest item.
    """

    line: Tensor
    short_line: Tensor
    item: Tensor
    step: Tensor
    short: Tensor
    limit: int
    num_steps: int

    def shorten(self, item: Tensor, step: Tensor) -> Tensor:
        """Steps on the short clock of any times; those inside of a silence that was cut fall on its end."""
        return _carry(item, step, self.line, self.item, self.step, self.short, self.limit)

    def restore(self, item: Tensor, short: Tensor) -> Tensor:
        """Steps on the full clock of times on the short one."""
        return _carry(item, short, self.short_line, self.item, self.short, self.step, None)


def skip_silence(item: Tensor, step: Tensor, limit: int) -> SilenceMap:
    """Cut silences between hits to ``limit`` steps; the sample ends ``limit`` steps after its last hit.

    Args:
        item: Item of every hit, (hit,) int64.
        step: Its step, (hit,) int64.
        limit: Longest silence, at least 1 step.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: a silence keeps at least 1 step")
    line = (item * _SPAN + step).sort().values
    item, step = line // _SPAN, line % _SPAN
    if not len(line):
        return SilenceMap(line, line, item, step, step, limit, limit + 1)
    first = torch.ones_like(item, dtype=torch.bool)
    first[1:] = item[1:] != item[:-1]
    gap = step.clone()
    gap[1:] -= torch.where(first[1:], 0, step[:-1])
    gap = gap.clamp_max(limit)
    total = gap.cumsum(0)
    begin = torch.where(first, total - gap, -1).cummax(0).values
    short = total - begin
    return SilenceMap(line, item * _SPAN + short, item, step, short, limit, int(short.max()) + limit + 1)


def _carry(
    item: Tensor, at: Tensor, line: Tensor, items: Tensor, here: Tensor, there: Tensor, limit: int | None
) -> Tensor:
    """Times next to hits, carried from the clock on which hits are ``here`` to that on which they are ``there``."""
    if not len(line):
        return at if limit is None else at.clamp_max(limit)
    before = torch.searchsorted(line, item * _SPAN + at, right=True) - 1
    behind = before.clamp_min(0)
    follows = (before >= 0) & (items[behind] == item)
    away = at - here[behind]
    after = (before + 1).clamp_max(len(line) - 1)
    precedes = items[after] == item
    early = (there[after] - (here[after] - at)).clamp_min(0)
    alone = at
    if limit is not None:
        away, alone = away.clamp_max(limit), at.clamp_max(limit)
    return torch.where(follows, there[behind] + away, torch.where(precedes, early, alone))
