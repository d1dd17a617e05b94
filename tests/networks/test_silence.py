"""The clock without silences: short gaps stay, long ones are cut, and every time comes back."""

from __future__ import annotations

import pytest
import torch

from networks.silence import skip_silence
from networks.spiking import Events, SpikingMLP


def t(*values):
    return torch.tensor(values)


def test_by_hand():
    clock = skip_silence(t(0, 0, 0, 1), t(3, 500, 502, 40), 10)
    assert clock.shorten(t(0, 0, 0, 1), t(3, 500, 502, 40)).tolist() == [3, 13, 15, 10]
    assert clock.num_steps == 26
    assert clock.restore(t(0, 0, 0, 1, 0), t(3, 13, 15, 10, 14)).tolist() == [3, 500, 502, 40, 501]
    # Between hits: near the one before, or at the end of what is left of the silence; before the first: near it.
    assert clock.shorten(t(0, 0, 0, 1, 1), t(7, 400, 0, 38, 0)).tolist() == [7, 13, 0, 8, 0]
    assert clock.shorten(t(2), t(700)).tolist() == [10]  # an item without hits


@pytest.mark.parametrize("seed", range(5))
def test_times_near_hits_come_back(seed):
    generator = torch.Generator().manual_seed(seed)
    item, step = (torch.randint(n, (60,), generator=generator) for n in (5, 1000))
    clock = skip_silence(item, step, 7)
    assert torch.equal(clock.restore(item, clock.shorten(item, step)), step)
    assert int(clock.short.max()) < clock.num_steps
    order = (item * 1000 + step).argsort()
    gaps = clock.short.diff()[item[order].diff() == 0]
    wanted = step[order].diff()[item[order].diff() == 0].clamp_max(7)
    assert torch.equal(gaps, wanted)


def test_a_network_that_comes_to_rest_does_the_same_on_both_clocks():
    torch.manual_seed(0)
    item, step, channel = torch.randint(4, (40,)), torch.randint(2000, (40,)), torch.randint(6, (40,))
    net = SpikingMLP(6, [12], 6, beta=0.4)
    for linear in net.linear:
        linear.bias.detach().clamp_(-0.1, 0.1)
        linear.weight.detach().mul_(6)
    clock = skip_silence(item, step, 40)
    ones = torch.ones(40)
    full = net(Events(step, item, channel, ones, 2041, 4)).nonzero()
    short = net(Events(clock.shorten(item, step), item, channel, ones, clock.num_steps, 4)).nonzero()
    # The start from rest, before the first hit, is shorter: potentials differ in the last digits.
    back = torch.stack([clock.restore(short[:, 1], short[:, 0]), short[:, 1], short[:, 2]], -1)
    assert len(full) > 10 and set(map(tuple, back.tolist())) == set(map(tuple, full.tolist()))


def test_without_hits():
    clock = skip_silence(t().long(), t().long(), 3)
    assert clock.num_steps == 4 and clock.shorten(t(0), t(9)).tolist() == [3]
    with pytest.raises(ValueError, match="limit=0"):
        skip_silence(t(0), t(0), 0)
