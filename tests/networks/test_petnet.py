"""PETNet's encoding, the network of lines of response, and the network of pairs."""

from __future__ import annotations

import pytest
import torch

from networks.event_driven import EventDrivenLines
from networks.petnet import LORNetwork, PairNetwork, PETNet, coincidence_beta, strongest_rivals, unique_events
from networks.spiking import Events, lif_scan
from physics.pet.scanner import make_scanner


def events(rows, steps=40, items=1):
    step, item, channel = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Events(step, item, channel, torch.ones(len(step)), steps, items)


def test_window_encoding():
    net = PETNet("toy24", [8], geometry="window", spread=2)
    dense = net.encode(events([(5, 0, 3), (5, 0, 4)])).dense(48)[5, 0]
    assert dense[3] == dense[4] == 1 and dense[:24].sum() == 2
    facing = dense[24:]
    # Crystal 3 faces 13 to 17, crystal 4 faces 14 to 18.
    assert torch.allclose(
        facing[13:19], torch.tensor([0.1, 0.2, 0.2, 0.2, 0.2, 0.1])
    ) and facing.sum() == pytest.approx(1)


@pytest.mark.parametrize("geometry", ["none", "window"])
def test_petnet_gives_a_train_for_every_crystal(geometry):
    net = PETNet("toy24", None, geometry)
    e = events([(5, 0, 3), (7, 1, 4)], items=2)
    assert net(e).shape == (40, 2, 24)
    traces = net.layers(e)
    inputs = 2 if geometry == "none" else 12
    assert net.operations(e, traces) == 24 * (inputs + traces[0].spikes.sum())
    with pytest.raises(ValueError, match="geometry"):
        PETNet("toy24", geometry="dirichlet")


@pytest.mark.parametrize("window", [0, 1, 2, 5])
def test_decays_that_detect_coincidences(window):
    beta = coincidence_beta(window)
    for gap in range(9):
        x = torch.zeros(12, 1)
        x[0] += 0.6
        x[gap] += 0.6
        assert lif_scan(x, beta).spikes.sum() == (1 if gap <= window else 0), gap


@pytest.mark.parametrize("window", [0, 2])
def test_lines_fire_for_pairs_that_face_each_other(window):
    net = LORNetwork("toy24", window=window)
    e = events([(5, 0, 3), (5, 0, 15), (20, 0, 3), (20 + window, 0, 14), (32, 0, 3), (32, 0, 4), (36, 0, 9)])
    spikes = {tuple(row) for row in net(e)[:, 0].nonzero().tolist()}
    assert spikes == {(5, 3), (5, 15), (20 + window, 3), (20 + window, 14)}


def test_a_crystal_that_is_hit_twice_in_a_step_is_no_coincidence():
    net = LORNetwork("toy24")
    assert net(events([(5, 0, 3), (5, 0, 3)])).sum() == 0
    assert len(unique_events(events([(5, 0, 3), (5, 0, 3), (5, 0, 4)])).step) == 2


def test_lines_against_all_pairs():
    """Output spikes of random hits are those of all pairs of hits in a step that are lines."""
    torch.manual_seed(0)
    scanner = make_scanner("toy24")
    rows = [(int(s), int(i), int(c)) for s, i, c in zip(*(torch.randint(n, (300,)) for n in (30, 4, 24)), strict=True)]
    found = {tuple(r) for r in LORNetwork("toy24")(events(rows, 30, 4)).nonzero().tolist()}
    hits = set(rows)
    wanted = set()
    for s, i, c in hits:
        for s2, i2, c2 in hits:
            if (s, i) == (s2, i2) and c < c2 and scanner.steps_apart(c, c2) >= 10:
                wanted |= {(s, i, c), (s, i, c2)}
    # A line that fired is reset: its next spike may need more than two inputs, if it comes at once.
    assert len(wanted - found) <= 0.05 * len(wanted) and len(found - wanted) <= 0.05 * len(wanted) and wanted


def test_event_driven_lines_forget_slowly_where_the_decay_is_slow():
    net = LORNetwork("toy24", weight=0.92)
    with torch.no_grad():
        net.beta.fill_(0.97)
    for gap in (60, 100):  # 0.92 (1 + 0.97^gap) is above and below the threshold
        e = events([(5, 0, 3), (5 + gap, 0, 15)], steps=120)
        found = EventDrivenLines(net)(e.item.numpy(), e.step.numpy(), e.channel.numpy())
        dense = {(t, c) for t, _, c in net(e).nonzero().tolist()}
        assert set(zip(found.step.tolist(), found.crystal.tolist(), strict=True)) == dense
        assert bool(dense) == (gap == 60)


def test_operations_of_lines():
    net = LORNetwork("toy24")
    e = events([(5, 0, 3), (5, 0, 15)])
    assert net.operations(e, net.layers(e)) == 2 * 5 + 2  # five lines of each crystal; one of them fires


def test_wrong_values():
    with pytest.raises(ValueError, match=r"weight=0\.4"):
        LORNetwork("toy24", weight=0.4)
    with pytest.raises(ValueError, match="window=-1"):
        coincidence_beta(-1)
    with pytest.raises(ValueError, match="stages"):
        PairNetwork(stages=0)


def test_strongest_rivals():
    first, second = torch.tensor([0, 0, 1, 5]), torch.tensor([2, 3, 3, 6])
    logits = torch.tensor([1.0, 4.0, 2.0, 0.0])
    a, b = strongest_rivals(first, second, logits)
    assert a.tolist() == [4, 1, -12, -12] and b.tolist() == [-12, 2, 4, -12]
    equal = strongest_rivals(first[:2], second[:2], torch.tensor([3.0, 3.0]))[0]
    assert equal.tolist() == [3, 3]


def test_pair_network_learns_that_a_hit_has_one_partner():
    """The truth is the strongest pair of each first hit: the first stage cannot see that, the second can."""
    torch.manual_seed(0)
    first = torch.arange(200).repeat_interleave(2)
    second = 200 + torch.arange(400)
    x = torch.randn(400, 3)
    best = (x[:, 0].view(-1, 2) == x[:, 0].view(-1, 2).amax(1, keepdim=True)).flatten().float()
    net = PairNetwork(3, [16], stages=2)
    net.fit_scale(x)
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(100):
        stages = net(x, first, second)
        loss = sum(torch.nn.functional.binary_cross_entropy_with_logits(s, best) for s in stages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = [((s > 0) == (best > 0)).float().mean().item() for s in net(x, first, second)]
    assert right[1] > 0.93 > right[0] + 0.1
    assert all(len(s) == 0 for s in net(x[:0], first[:0], second[:0]))
