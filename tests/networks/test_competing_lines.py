"""Lines of response that compete: by hand, and event-driven against the scan of all lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from networks import event_driven
from networks.competing_lines import CompetingLines, LineSpikes
from networks.event_driven import EventDrivenCompetition
from networks.spiking import Events, lif_scan
from physics.pet.scanner import make_scanner


def events(rows, steps=80, items=1):
    step, item, channel = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Events(step, item, channel, torch.ones(len(step)), steps, items)


def fired(net, rows, **shape):
    """Lines that fire: (step, a, b)."""
    spikes = net(events(rows, **shape))
    return list(zip(spikes.step.tolist(), spikes.a.tolist(), spikes.b.tolist(), strict=True))


def ring(**changes):
    """Lines of a ring of 24 crystals, heavier the better they face each other."""
    net = CompetingLines("toy24", **({"spread": 2, "weight": 0.7, "beta": 0.5, "phases": 20} | changes))
    with torch.no_grad():
        net.across -= 0.02 * torch.arange(len(net.across))
    return net


def test_two_hits_make_their_line_fire():
    net = ring()
    assert len(net.lines) == net.num_lines == 24 * 5 // 2
    assert fired(net, [(5, 0, 3), (5, 0, 15)]) == [(5, 3, 15)]
    assert fired(net, [(5, 0, 3), (6, 0, 15)]) == [(6, 3, 15)]  # 0.7 (1 + 0.5)
    assert fired(net, [(5, 0, 3), (7, 0, 15)]) == []
    assert fired(net, [(5, 0, 3), (5, 0, 12)]) == []  # no line
    spikes = net(events([(5, 0, 15), (6, 0, 3)]))
    assert (spikes.step_a.tolist(), spikes.step_b.tolist()) == ([6], [5])


def test_the_better_line_takes_the_hit():
    net = ring()
    # Crystal 3 faces 15; 14 and 13 have lines with it too.
    assert fired(net, [(5, 0, 3), (5, 0, 14), (5, 0, 15), (5, 0, 13)]) == [(5, 3, 15)]
    assert fired(net, [(5, 0, 3), (5, 0, 15), (6, 0, 16)]) == [(5, 3, 15)]  # taken: nothing is left for the next step
    assert fired(net, [(5, 0, 3), (6, 0, 14), (6, 0, 2)]) == [(6, 2, 14)]  # two hits in a step beat one before
    assert fired(ring(phases=1), [(5, 0, 3), (5, 0, 14), (5, 0, 15)]) == [(5, 3, 14), (5, 3, 15)]  # nobody comes first


def test_samples_do_not_meet():
    assert fired(ring(), [(5, 0, 3), (5, 1, 15)], items=2) == []


def test_one_crystal_alone_fires_no_line():
    net = ring(weight=0.9, beta=0.9, dead_steps=1)
    assert fired(net, [(t, 0, 3) for t in range(40)]) == []
    assert float(net.thresholds()[-1]) > 0.9 / (1 - 0.9**2)
    deaf = ring(dead_steps=10)
    # The second hit of crystal 3 is not passed on, the third one is.
    assert fired(deaf, [(5, 0, 3), (15, 0, 3), (15, 0, 15)]) == []
    assert fired(deaf, [(5, 0, 3), (16, 0, 3), (16, 0, 15)]) == [(16, 3, 15)]


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_logits_are_potentials(gap):
    net = ring()
    currents = torch.zeros(6, 1)
    currents[0] += net.across[1].item()
    currents[gap] += net.across[1].item()
    u = lif_scan(currents, net.decay.item()).potentials[gap]
    a, b = torch.tensor([3]), torch.tensor([14])
    if u <= 1:  # without a reset in between
        assert net.logits(a, b, torch.tensor([gap])).item() == pytest.approx(10 * (u.item() - 1), abs=1e-5)
    assert (net.logits(a, b, torch.tensor([gap])).item() > 0) == (fired(net, [(5, 0, 3), (5 + gap, 0, 14)]) != [])


def test_weights_decay_and_obliqueness_are_learned():
    """True pairs face each other at once or a step later; the others are further off in any of three ways."""
    torch.manual_seed(0)
    net = CompetingLines("safir2880", spread=20, oblique=True)
    position, rings = torch.randint(0, 21, (4000,)), torch.randint(0, 16, (4000,))
    gap = torch.randint(0, 4, (4000,))
    a, b = torch.zeros(4000, dtype=torch.long), rings * 180 + 90 - position
    true = ((position < 10) & (rings < 8) & (gap < 2)).float()
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(300):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net.logits(a, b, gap), true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((net.logits(a, b, gap) > 0) == (true > 0)).float().mean() > 0.95
    assert net.along.requires_grad and not CompetingLines("safir2880").along.requires_grad
    assert net.across[:10].min() > net.across[10:].max() and net.along[:8].min() > net.along[8:].max()


def test_the_kernel_has_the_weights_of_all_lines():
    net = CompetingLines("safir2880", spread=3, oblique=True)
    with torch.no_grad():
        net.across -= 0.01 * torch.arange(4)
        net.along -= 0.001 * torch.arange(16)
    kernel, layout = net.kernel, make_scanner("safir2880")
    assert net.num_lines == len(net.lines)
    assert kernel.shape == (31, 180) and (kernel > 0).sum() == 31 * 7
    a, b = net.lines[::997].T
    place = layout.position(b.numpy()) - layout.position(a.numpy())
    from_kernel = kernel[layout.ring(b.numpy()) - layout.ring(a.numpy()) + 15, place % 180]
    assert torch.equal(from_kernel, net.weights(a, b))


def random_hits(net, count, steps, seed):
    """Hits of a few crystals and what faces them, so that lines compete and repeat."""
    rng = np.random.default_rng(seed)
    near = (rng.integers(0, 6, count) + rng.integers(0, 2, count) * (net.per_ring // 2)) % net.num_crystals
    crystal = np.where(rng.random(count) < 0.6, near, rng.integers(0, net.num_crystals, count))
    return rng.integers(0, 3, count), rng.integers(0, steps, count), crystal


SETTINGS = [
    {"beta": 0.5, "weight": 0.6},
    {"beta": 0.8, "weight": 0.55, "dead_steps": 3, "phases": 4},
    {"beta": 0.9, "weight": 0.55, "dead_steps": 1, "phases": 2},
    {"beta": 0.3, "weight": 0.9, "dead_steps": 5, "phases": 1},
]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("scanner", "spread", "count"), [("toy24", 5, 600), ("clinical240", 20, 2500)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_event_driven_spikes_are_those_of_the_scan(settings, scanner, spread, count, compiled, monkeypatch):
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(event_driven, "_compiled", lambda kernel: kernel)
    torch.manual_seed(0)
    net = CompetingLines(scanner, spread, **settings)
    with torch.no_grad():  # equal weights would make equal potentials
        net.across -= torch.linspace(0, 0.15, spread + 1) + 0.02 * torch.rand(spread + 1)
        net.threshold.fill_(0.97)
    item, step, crystal = random_hits(net, count, 250, seed=1)
    dense = net(Events(*(torch.from_numpy(v) for v in (step, item, crystal)), torch.ones(count), 250, 3))
    found = EventDrivenCompetition(net)(item, step, crystal)
    rows = sorted(zip(*(values.tolist() for values in dense), strict=True))
    assert rows == sorted(zip(*(values.tolist() for values in found), strict=True))
    assert len(rows) > 10 or settings["dead_steps"] == 1


def test_no_hits():
    empty = np.empty(0, dtype=np.int64)
    assert all(len(values) == 0 for values in EventDrivenCompetition(ring())(empty, empty, empty))
    spikes = ring()(Events(*(torch.empty(0, dtype=torch.long) for _ in range(3)), torch.empty(0), 4, 1))
    assert isinstance(spikes, LineSpikes) and len(spikes.item) == 0


def test_operations():
    assert ring().operations(10, 2) == 5 * (10 + 4)


@pytest.mark.parametrize(
    "changes",
    [{"spread": 12}, {"weight": 1.5}, {"beta": 0.0}, {"beta": 0.95}, {"phases": 0}, {"dead_steps": 0}, {"slope": 0.0}],
)
def test_wrong_values(changes):
    with pytest.raises(ValueError, match=f"model.net.{next(iter(changes))}="):
        CompetingLines("toy24", **({"spread": 2} | changes))
