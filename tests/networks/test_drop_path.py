from __future__ import annotations

import pytest
import torch

from networks.drop_path import DropPath, rates


def test_whole_samples_are_left_out_and_the_mean_stays():
    drop, ones = DropPath(0.25), torch.ones(4000, 3, 2)
    out = drop(ones)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    per_sample = out.flatten(1)
    assert (per_sample.min(1).values == per_sample.max(1).values).all()
    assert out.mean().item() == pytest.approx(1, abs=0.05)


def test_nothing_is_left_out_in_evaluation_or_at_zero():
    ones = torch.ones(50, 3)
    state = torch.get_rng_state()
    assert torch.equal(DropPath(0.9).eval()(ones), ones) and torch.equal(DropPath(0.0)(ones), ones)
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_grow_from_zero_to_the_last():
    assert rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3]) and rates(0.3, 1) == [0]
    with pytest.raises(ValueError, match=r"model\.net\.drop_path=1\.0"):
        DropPath(1.0)
