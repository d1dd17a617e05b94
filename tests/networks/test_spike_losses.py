"""Losses of spike trains: closed forms, gradients, and which have none."""

from __future__ import annotations

import math

import pytest
import torch

from networks.spike_losses import (
    LEGACY,
    TIMINGS,
    chamfer,
    exponential_filter,
    l1_count,
    legacy_timing,
    mse_count,
    soft_timing,
    van_rossum,
)


def train(*at, steps=60, items=1, channels=2):
    x = torch.zeros(steps, items, channels, dtype=torch.float64)
    for step, item, channel in at:
        x[step, item, channel] = 1
    return x


def test_filter_is_a_convolution():
    x = torch.rand(30, 2, 3, dtype=torch.float64, requires_grad=True)
    y = exponential_filter(x, 4.0)
    k = torch.exp(-torch.arange(30, dtype=torch.float64) / 4)
    by_hand = torch.stack([sum(k[t - i] * x[i] for i in range(t + 1)) for t in range(30)])
    assert torch.allclose(y, by_hand)
    assert torch.autograd.gradcheck(lambda z: exponential_filter(z, 4.0), (x.detach()[:8].requires_grad_(),))
    with pytest.raises(ValueError, match="tau=0"):
        exponential_filter(x, 0.0)


@pytest.mark.parametrize("distance", [0, 1, 3, 10, 40])
def test_van_rossum_distance_of_two_spikes(distance):
    tau = 3.0
    found = van_rossum(train((10, 0, 0), steps=400), train((10 + distance, 0, 0), steps=400), tau)
    # Two exponentials: 2 (1 - exp(-d / tau)) times the square norm of one.
    expected = 2 * (1 - math.exp(-distance / tau)) / (1 - math.exp(-2 / tau)) / tau
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_van_rossum_is_a_mean_over_items():
    a, b = train((5, 0, 0), items=1), train((9, 0, 0), items=1)
    twice = [torch.cat([x, x], 1) for x in (a, b)]
    assert torch.isclose(van_rossum(a, b), van_rossum(*twice))


def test_van_rossum_sees_a_step_and_points_to_the_target():
    target = train((20, 0, 0))
    on, off = train((20, 0, 0)), train((21, 0, 0))
    assert van_rossum(on, target) == 0 < van_rossum(off, target)
    spikes = train((23, 0, 0)).requires_grad_()
    van_rossum(spikes, target).backward()
    # Less than nothing is asked for at the target, more than enough stands where the spike is.
    assert spikes.grad[20, 0, 0] < 0 < spikes.grad[23, 0, 0]


def test_counts():
    a, b = train((3, 0, 0), (5, 0, 0), (7, 0, 1)), train((40, 0, 0))
    assert mse_count(a, b) == 1 and l1_count(a, b) == 2
    assert mse_count(b, train((1, 0, 0))) == 0  # time does not count


def test_soft_timing_measures_and_moves_the_time():
    target = train((20, 0, 0), (40, 0, 1))
    assert soft_timing(target, target) == 0
    late = train((23, 0, 0)).requires_grad_()
    loss = soft_timing(late, target, tau=3.0)
    assert loss.item() == pytest.approx(1.0)  # the other target has no spike near it
    loss.backward()
    assert late.grad[24, 0, 0] > 0 > late.grad[21, 0, 0]  # later makes it worse, earlier better
    assert soft_timing(late, torch.zeros_like(late)) == 0


def test_the_references_timings_have_no_gradient():
    spikes, target = train((23, 0, 0), (50, 0, 1)).requires_grad_(), train((20, 0, 0))
    assert legacy_timing(spikes, target).item() == pytest.approx((3**2 + 60**2) / 60**2)
    assert chamfer(spikes, target).item() == pytest.approx(((3 + 60) / 2 + 3) / 60)
    for name, loss in TIMINGS.items():
        assert loss(spikes, target, 3.0).requires_grad == (name not in LEGACY), name
