from __future__ import annotations

import math

import pytest
import torch

from physics.advected_fields import AdvectedFields


def error(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Root mean square over the sphere, members and records, by channel."""
    weights = weights / weights.sum()
    return (((a - b) ** 2).mean((0, 1, 4)) * weights).sum(-1).sqrt()


@pytest.fixture(scope="module")
def weather():
    generator = AdvectedFields(16, 32, channels=3, truncation=6, diffusion=1e-3, noise=0.02)
    return generator, torch.stack(list(generator.trajectories(range(8), 60)), 1).double()


def test_statistics_are_those_asked_for_and_stand_still(weather):
    generator, fields = weather
    weights = generator.transform.weights
    zero = torch.zeros_like(fields)
    assert error(fields, zero, weights).tolist() == pytest.approx([1.0] * 3, rel=0.25)
    early, late = (error(part, zero[:, :20], weights) for part in (fields[:, :20], fields[:, -20:]))
    assert (early / late).tolist() == pytest.approx([1.0] * 3, rel=0.25)
    assert abs(float((fields.mean((0, 1, 4)) * weights).sum()) / weights.sum()) < 0.02  # no mean


@pytest.mark.parametrize("steps", [1, 3])
def test_the_exact_propagator_errs_as_predicted(weather, steps):
    generator, fields = weather
    states = generator.transform.analysis(fields[:, :-steps])
    forecast = generator.transform.synthesis(generator.propagate(states, steps))
    found = error(forecast, fields[:, steps:], generator.transform.weights)
    # The state is known but for the noise that passes the truncation.
    known = generator.least_error(steps)
    assert found.tolist() == pytest.approx([known] * 3, rel=0.1)
    assert (found < 0.65 * error(fields[:, :-steps], fields[:, steps:], generator.transform.weights)).all()


def test_a_rotation_is_a_shift_of_columns():
    """15 degrees are two columns of 48; without decay and noise a record is the one before, shifted."""
    generator = AdvectedFields(16, 48, 1, 6, slowest_deg=15.0, fastest_deg=15.0, diffusion=0.0, noise=0.0)
    first, second = generator.trajectories([0], 2)
    torch.testing.assert_close(second, first.roll(2, -1), atol=1e-5, rtol=0)
    assert generator.least_error(5) == 0.0


def test_members_differ_and_repeat():
    generator = AdvectedFields(16, 32, 2, 6)
    one, two = (next(generator.trajectories([member], 1)) for member in (0, 1))
    assert not torch.allclose(one, two)
    torch.testing.assert_close(one, next(AdvectedFields(16, 32, 2, 6).trajectories([0, 1], 1))[:1])
    assert math.isfinite(generator.least_error(0))
    with pytest.raises(ValueError, match="noise=-1"):
        AdvectedFields(noise=-1)
