"""The network of lines of response without a clock: it computes where a hit is, and nothing between hits.

Between two hits a potential only decays, ``u beta^d``, so a line is brought up to date when one of its crystals is hit.
Spikes are those of the dense scan (`networks.petnet.LORNetwork`); the work is the synaptic operations alone.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from networks.petnet import LORNetwork


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
                    for _ in range(min(t - latest[line] - 1, 64)):
                        if u == 0:
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
def _kernel() -> Callable[..., int]:
    if importlib.util.find_spec("numba") is None:
        warnings.warn("numba is not installed: event-driven inference runs in Python (pip install numba)", stacklevel=3)
        return _run
    from numba import njit

    return njit(nogil=True)(_run)


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
        order = np.lexsort((crystal, step, item))
        item, step, crystal = (np.ascontiguousarray(v[order], dtype=np.int64) for v in (item, step, crystal))
        new = np.ones(len(item), dtype=bool)
        new[1:] = (np.diff(item) != 0) | (np.diff(step) != 0) | (np.diff(crystal) != 0)
        item, step, crystal = item[new], step[new], crystal[new]
        # A hit makes its own crystal spike, and at most one more for each of its lines.
        out = np.empty((len(item) * (self.table.shape[1] + 1), 3), dtype=np.int64)
        found = _kernel()(item, step, crystal, self.table, self.lines, self.weight, self.beta, out)
        return OutputSpikes(*out[:found].T)

    def operations(self, crystal: np.ndarray, num_spikes: int) -> int:
        """Synaptic operations of hits and of as many output spikes."""
        return int((self.table >= 0).sum(1)[crystal].sum()) + num_spikes
