"""Networks of lines of response without a clock: they compute where a hit is, and nothing between hits.

Between two hits a potential only decays, ``u beta^d``, so a line is brought up to date when one of its crystals is hit.
Spikes are those of the dense scans (`networks.petnet.LORNetwork`, `networks.competing_lines.CompetingLines`): products
and sums are done in their order, in 32 bits. `EventDrivenLines` visits all lines of a crystal that is hit;
`EventDrivenCompetition` only those whose other crystal has been hit lately, which alone can fire.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from networks.competing_lines import CompetingLines, LineSpikes
from networks.petnet import LORNetwork

FORGOTTEN = 1e-12
"""A potential that an input changes to what it would be without it, in 32 bits."""


class OutputSpikes(NamedTuple):
    """Spikes of the output by item and step, (spike,) int64 each."""

    item: np.ndarray
    step: np.ndarray
    crystal: np.ndarray


def _run(
    item: np.ndarray,
    step: np.ndarray,
    crystal: np.ndarray,
    table: np.ndarray,
    lines: np.ndarray,
    weight: np.ndarray,
    beta: np.float32,
    out: np.ndarray,
) -> int:
    """Scan hits in the order of (item, step); rows of ``out`` become item, step, crystal. Returns how many."""
    count, size = len(lines), len(table)
    potential = np.zeros(count, dtype=np.float32)
    latest = np.zeros(count, dtype=np.int64)
    owner = np.full(count, -1, dtype=np.int64)
    fired = np.zeros(count, dtype=np.bool_)
    told = np.full(size, -1, dtype=np.int64)  # the group in which a crystal has spiked
    touched = np.empty(count, dtype=np.int64)
    one = np.float32(1)
    found = begin = 0
    total = len(item)
    while begin < total:
        end, num_touched = begin, 0
        i, t = item[begin], step[begin]
        while end < total and item[end] == i and step[end] == t:
            c = crystal[end]
            for k in range(table.shape[1]):
                line = table[c, k]
                if line < 0:
                    break
                if owner[line] != i:
                    owner[line], latest[line], fired[line], potential[line] = i, t, False, np.float32(0)
                    touched[num_touched] = line
                    num_touched += 1
                elif latest[line] != t:
                    u = beta * potential[line]
                    if fired[line]:
                        u = u - one
                    for _ in range(t - latest[line] - 1):
                        if abs(u) < FORGOTTEN:
                            break
                        u = beta * u
                    potential[line], latest[line], fired[line] = u, t, False
                    touched[num_touched] = line
                    num_touched += 1
                potential[line] += weight[line, 0] if lines[line, 0] == c else weight[line, 1]
            end += 1
        for k in range(num_touched):
            line = touched[k]
            if potential[line] > one:
                fired[line] = True
                for side in range(2):
                    c = lines[line, side]
                    if told[c] != begin:
                        told[c] = begin
                        out[found, 0], out[found, 1], out[found, 2] = i, t, c
                        found += 1
        begin = end
    return found


@functools.cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    if importlib.util.find_spec("numba") is None:
        warnings.warn("numba is not installed: event-driven inference runs in Python (pip install numba)", stacklevel=3)
        return kernel
    from numba import njit

    return njit(nogil=True)(kernel)


def _inputs(item: np.ndarray, step: np.ndarray, crystal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits in the order of item, step and crystal, each once, int64."""
    order = np.lexsort((crystal, step, item))
    item, step, crystal = (np.ascontiguousarray(v[order], dtype=np.int64) for v in (item, step, crystal))
    new = np.ones(len(item), dtype=bool)
    new[1:] = (np.diff(item) != 0) | (np.diff(step) != 0) | (np.diff(crystal) != 0)
    return item[new], step[new], crystal[new]


class EventDrivenLines:
    """Runs a `LORNetwork` hit by hit.

    Args:
        net: Whose weights and decay are taken, as they are now.
    """

    def __init__(self, net: LORNetwork) -> None:
        self.table, self.lines = net.lines_of_crystal.cpu().numpy(), net.lines.cpu().numpy()
        self.weight = net.weight.detach().cpu().float().numpy()
        self.beta = np.float32(net.beta.detach().clamp(0, 1).item())

    def __call__(self, item: np.ndarray, step: np.ndarray, crystal: np.ndarray) -> OutputSpikes:
        """Output spikes of hits, (hit,) int64 each, in any order; several of a crystal in a step count once."""
        if not len(item):
            return OutputSpikes(*(np.empty(0, dtype=np.int64) for _ in range(3)))
        item, step, crystal = _inputs(item, step, crystal)
        # A hit makes its own crystal spike, and at most one more for each of its lines.
        out = np.empty((len(item) * (self.table.shape[1] + 1), 3), dtype=np.int64)
        found = _compiled(_run)(item, step, crystal, self.table, self.lines, self.weight, self.beta, out)
        return OutputSpikes(*out[:found].T)

    def operations(self, crystal: np.ndarray, num_spikes: int) -> int:
        """Synaptic operations of hits and of as many output spikes."""
        return int((self.table >= 0).sum(1)[crystal].sum()) + num_spikes


# ------------------------------------------------------------------------------------------------ lines that compete


def _compete(
    item: np.ndarray,
    step: np.ndarray,
    crystal: np.ndarray,
    num_crystals: int,
    per_ring: int,
    table: np.ndarray,
    beta: np.float32,
    thresholds: np.ndarray,
    memory: int,
    dead_steps: int,
) -> np.ndarray:
    """Scan hits in the order of (item, step); rows of the result are the fields of `LineSpikes`."""
    total, half, spread = len(item), per_ring // 2, len(table) - 1
    # Hits that relays have passed on: step, crystal, and the one before it in the same crystal.
    at, where, before = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    latest = np.full(num_crystals, -1, np.int64)  # of these the latest of each crystal
    spent = np.zeros(num_crystals, np.int64)  # those before it are gone from all lines of a crystal
    taken = np.full(num_crystals, -1, np.int64)  # phase in which a crystal's hits were taken, counted over all steps
    chain = np.empty(total, np.int64)
    above_u, above = np.empty(64, np.float32), np.empty((64, 2), np.int64)
    out = np.empty((total + 64, 6), np.int64)
    zero = np.float32(0)
    found = count = first = phase = begin = 0
    while begin < total:
        i, t = item[begin], step[begin]
        if begin == 0 or item[begin - 1] != i:
            first = count  # hits before it are of another item
        group, end = count, begin
        while end < total and item[end] == i and step[end] == t:
            c = crystal[end]
            k = latest[c]
            if k < first or t - at[k] > dead_steps:
                at[count], where[count], before[count], latest[c] = t, c, k, count
                count += 1
            end += 1
        begin = end
        # Lines of crystals that are hit now and crystals that were lately.
        above_count = 0
        for new in range(group, count):
            a = where[new]
            for k in range(new - 1, first - 1, -1):
                b = where[k]
                if t - at[k] > memory:
                    break
                if b == a or latest[b] != k:
                    continue
                apart = abs(a % per_ring - b % per_ring)
                offset = half - min(apart, per_ring - apart)
                if offset > spread:
                    continue
                w = table[offset, abs(a // per_ring - b // per_ring)]
                # The hits that the potential of this line is made of, back to a silence that it forgets everything in.
                limit = max(first, spent[a], spent[b])
                x, y, length, later = new, k, 0, t
                while True:
                    z = max(x, y)
                    if z < limit or later - at[z] > memory:
                        break
                    chain[length], later = z, at[z]
                    length += 1
                    if z == x:
                        x = before[x]
                    else:
                        y = before[y]
                u, now, m = zero, t, length - 1
                while m >= 0:
                    s = at[chain[m]]
                    for _ in range(s - now):
                        u = beta * u
                    current = w
                    if m > 0 and at[chain[m - 1]] == s:
                        current = w + w
                        m -= 1
                    u, now, m = u + current, s, m - 1
                if u > thresholds[-1]:
                    if above_count == len(above):
                        wider, longer = np.empty((2 * above_count, 2), np.int64), np.empty(2 * above_count, np.float32)
                        wider[:above_count], longer[:above_count] = above, above_u
                        above, above_u = wider, longer
                    above[above_count, 0], above[above_count, 1], above_u[above_count] = min(a, b), max(a, b), u
                    above_count += 1
        if above_count == 0:
            continue
        # The threshold falls; a line that fires takes the hits of its crystals.
        before_step = phase
        for threshold in thresholds:
            phase += 1
            for k in range(above_count):
                a, b = above[k, 0], above[k, 1]
                if above_u[k] > threshold and not (before_step < taken[a] < phase or before_step < taken[b] < phase):
                    taken[a] = taken[b] = phase
                    spent[a] = spent[b] = count
                    if found == len(out):
                        rows = np.empty((2 * found, 6), np.int64)
                        rows[:found] = out
                        out = rows
                    out[found, 0], out[found, 1], out[found, 2], out[found, 3] = i, t, a, b
                    out[found, 4], out[found, 5] = at[latest[a]], at[latest[b]]
                    found += 1
    return out[:found]


class EventDrivenCompetition:
    """Runs `CompetingLines` hit by hit.

    A hit looks at the hits before it for as long as a line remembers them, finds the line with each, and follows its
    potential; all other lines of its crystal have one input, and one input never fires a line.

    Args:
        net: Whose weights, decay and thresholds are taken, as they are now.
    """

    def __init__(self, net: CompetingLines) -> None:
        self.table = np.ascontiguousarray(net.table.detach().cpu().float().numpy())
        self.beta = np.float32(net.decay.detach().item())
        self.thresholds = net.thresholds().cpu().numpy()
        self.num_crystals, self.per_ring, self.dead_steps = net.num_crystals, net.per_ring, net.dead_steps
        # After so many steps what is left of a potential is below half of the last digit of a weight.
        decay = float(self.beta)
        self.memory = math.ceil(math.log(2.0**-26 * (1 - decay) / 2) / math.log(decay))

    def __call__(self, item: np.ndarray, step: np.ndarray, crystal: np.ndarray) -> LineSpikes:
        """Spikes of lines, as arrays, of hits, (hit,) int64 each, in any order; two of a crystal in a step are one."""
        if not len(item):
            return LineSpikes(*np.empty((6, 0), dtype=np.int64))
        rows = _compiled(_compete)(
            *_inputs(item, step, crystal), self.num_crystals, self.per_ring, self.table, self.beta, self.thresholds,
            self.memory, self.dead_steps,
        )  # fmt: skip
        return LineSpikes(*rows.T)
