"""Scores of samples against closed forms and other code."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_modules.forecasting import TargetUnits
from lightning_modules.metrics.classification import ClassificationScores
from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.metrics.uncertainty import (
    COVERAGES,
    SampleScores,
    UncertaintyScores,
    entropy,
    fair_crps,
    sample_quantile,
)

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------- classes


def test_entropy_is_that_of_torch_distributions():
    logits = torch.randn(50, 6, generator=generator(), dtype=F64)
    torch.testing.assert_close(entropy(logits.log_softmax(1)), Categorical(logits=logits).entropy())
    assert entropy(torch.tensor([0.0, -math.inf])) == 0  # a probability of 0
    torch.testing.assert_close(entropy(torch.full((10,), 0.1).log()), torch.tensor(10.0).log())


def classes(items=300, samples=7):
    """Log of mean probabilities, mean entropies of samples, labels, and the probabilities of samples."""
    logits = 2 * torch.randn(samples, items, 4, generator=generator(), dtype=F64)
    label = torch.randint(0, 4, (items,), generator=generator(1))
    p = (logits + 1.5 * torch.nn.functional.one_hot(label, 4)).softmax(2)
    return p.mean(0).log(), entropy(p.log()).mean(0), label, p


@pytest.mark.parametrize("batch", [1, 64, 1000])
def test_scores_of_classes(batch):
    log_p, expected_entropy, label, p = classes()
    scores = UncertaintyScores(10)
    for part in zip(*(t.split(batch) for t in (log_p, expected_entropy, label)), strict=True):
        scores.update(*part)
    found = {name: value.item() for name, value in scores.compute().items()}
    mean = p.mean(0)
    assert found["entropy"] == pytest.approx(Categorical(mean).entropy().mean().item())
    # Mutual information as the mean divergence of the samples from their mean.
    information = (p * (p.log() - mean.log())).sum(2).mean()
    assert found["mutual_information"] == pytest.approx(information.item()) and information > 0
    confidence, prediction = mean.max(1)
    gaps = []
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        if inside.any():
            gaps.append(((prediction == label)[inside].double().mean() - confidence[inside].mean()).abs().item())
    assert len(gaps) > 4
    assert found["mace"] == pytest.approx(sum(gaps) / len(gaps))


def test_bins_of_equal_weight_are_another_score_than_bins_of_equal_images():
    """A single image in a bin counts as much as ninety-nine in another: 0.5 (|1 - 0.95| + |0 - 0.55|)."""
    p = torch.tensor([[0.95, 0.05]] * 99 + [[0.45, 0.55]], dtype=F64)
    label = torch.zeros(100, dtype=torch.int64)
    scores = UncertaintyScores(10)
    scores.update(p.log(), torch.zeros(100), label)
    assert scores.compute()["mace"] == pytest.approx(0.5 * (0.05 + 0.55))
    assert multiclass_calibration_error(p, label, 2, n_bins=10).item() == pytest.approx(
        0.01 * (99 * 0.05 + 0.55), rel=1e-4
    )


def test_calibration_of_eight_items_by_hand():
    """Lottery, acceptance 15: confidences by tenths, four empty bins of ten among them, and exactly 1.

    confidence  0.55 0.55 | 0.65 | 0.75 0.75 | 0.95 0.95 | 1      right: 1 0 | 0 | 1 1 | 1 0 | 1
    """
    confidence = torch.tensor([0.55, 0.55, 0.65, 0.75, 0.75, 0.95, 0.95, 1.0], dtype=F64)
    right = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    p = torch.stack([confidence, 1 - confidence], 1)
    label = (~right).long()
    scores = UncertaintyScores(10)
    scores.update(p.log(), torch.zeros(8), label)
    # Bins (0.5, 0.6], (0.6, 0.7], (0.7, 0.8], (0.9, 1]: in the last, three items of mean confidence 2.9 / 3, two right.
    gaps = [abs(0.5 - 0.55), abs(0 - 0.65), abs(1 - 0.75), abs(2 / 3 - 2.9 / 3)]
    assert scores.compute()["mace"].item() == pytest.approx(sum(gaps) / 4, abs=1e-12)
    expected = (2 * gaps[0] + gaps[1] + 2 * gaps[2] + 3 * gaps[3]) / 8
    for bins in (10, 15):
        weighted = ClassificationScores(2, top_k=None, num_bins=bins)
        weighted.update(p.log(), label)
        theirs = multiclass_calibration_error(p, label, 2, n_bins=bins, norm="l1").item()
        assert weighted.compute()["ece"].item() == pytest.approx(theirs, abs=1e-6)
        if bins == 10:
            assert weighted.compute()["ece"].item() == pytest.approx(expected, abs=1e-12)


def test_bins_hold_their_upper_edge():
    scores = UncertaintyScores(10)
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=F64)
    scores.update(p.log(), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert scores.items.nonzero().flatten().tolist() == [4, 9]
    assert scores.compute()["entropy"].isfinite()


# ------------------------------------------------------------------------------------------------------------- samples


def test_crps_is_its_definition():
    samples, target = torch.randn(9, 40, generator=generator(), dtype=F64), torch.randn(40, dtype=F64)
    pairs = (samples[:, None] - samples[None]).abs().sum((0, 1)) / (2 * 9 * 8)
    torch.testing.assert_close(fair_crps(samples, target), (samples - target).abs().mean(0) - pairs)
    shifted = fair_crps(3 * samples + 1, 3 * target + 1)
    torch.testing.assert_close(shifted, 3 * fair_crps(samples, target))
    with pytest.raises(ValueError, match=r"model\.num_eval_samples=1: the CRPS needs 2 samples or more"):
        fair_crps(samples[:1], target)


def gaussian_crps(y, mean=0.0, std=1.0):
    """Gneiting and Raftery (2007), equation 21."""
    z = (torch.as_tensor(y, dtype=F64) - mean) / std
    density = (-0.5 * z**2).exp() / math.sqrt(2 * math.pi)
    return std * (z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))


@pytest.mark.parametrize("number", [2, 5, 50])
@pytest.mark.parametrize("y", [0.0, 0.7, -2.5])
def test_crps_of_a_gaussian_ensemble_is_the_closed_form(number, y):
    """Acceptance 14: without bias for any size of the ensemble, within 3 standard errors."""
    ensembles = 1.7 * torch.randn(number, 20_000, generator=generator(), dtype=F64) + 0.3
    found = fair_crps(ensembles, torch.full((20_000,), y, dtype=F64))
    error = found.std().item() / math.sqrt(20_000)
    assert abs(found.mean().item() - gaussian_crps(y, 0.3, 1.7).item()) < 3 * error
    if number <= 5:  # which is what the usual form is not
        plain = (ensembles - y).abs().mean(0) - (ensembles[:, None] - ensembles[None]).abs().mean((0, 1)) / 2
        assert plain.mean().item() - gaussian_crps(y, 0.3, 1.7).item() > 5 * error


def test_quantiles_of_samples():
    """A new sample lies below the quantile with the probability of its level, also for few samples."""
    ordered = torch.rand(9, 40_000, generator=generator(), dtype=F64).sort(0).values
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        below = sample_quantile(ordered, level).mean().item()  # P(u < q) = q
        assert abs(below - level) < 4 * 0.15 / math.sqrt(40_000)
    assert torch.equal(sample_quantile(ordered, 0.01), ordered[0])
    assert torch.equal(sample_quantile(ordered, 0.99), ordered[-1])
    torch.testing.assert_close(sample_quantile(ordered, 0.5), ordered[4])
    torch.testing.assert_close(sample_quantile(ordered[:2], 0.5), ordered[:2].mean(0))


SCALE = torch.tensor([10.0, 0.5])


def windows(items=500, samples=19, spread=1.0):
    """Scaled samples (S, B, T, C), log-densities and targets of a calibrated Gaussian, and which windows count."""
    g = generator(3)
    center = torch.randn(items, 4, 2, generator=g, dtype=F64)
    target = center + torch.randn(items, 4, 2, generator=g, dtype=F64)
    drawn = center + spread * torch.randn(samples, items, 4, 2, generator=g, dtype=F64)
    log_density = torch.distributions.Normal(center, spread).log_prob(target)
    return drawn, log_density, target, torch.rand(items, 2, generator=g) > 0.2


def scored(batch, *arrays):
    scores = SampleScores(SCALE)
    samples, *rest = arrays
    for i in range(0, samples.shape[1], batch):
        scores.update(samples[:, i : i + batch], *(t[i : i + batch] for t in rest))
    return {name: value.item() for name, value in scores.compute().items()}


@pytest.mark.parametrize("batch", [7, 500])
def test_scores_of_samples(batch):
    samples, log_density, target, valid = windows()
    with_gaps = target.masked_fill(~valid[:, None], math.nan)
    found = scored(batch, samples, log_density.masked_fill(~valid[:, None], math.nan), with_gaps, valid)
    counts = valid[:, None].expand_as(target)
    crps = fair_crps(samples, target)
    assert found["crps_scaled"] == pytest.approx(crps[counts].mean().item())
    assert found["crps"] == pytest.approx((crps * SCALE)[counts].mean().item())
    assert found["nll_scaled"] == pytest.approx(-log_density[counts].mean().item())
    ordered = samples.sort(0).values
    for percent in COVERAGES:
        lower, upper = (sample_quantile(ordered, 0.5 + sign * percent / 200) for sign in (-1, 1))
        inside = ((lower <= target) & (target <= upper))[counts].double().mean().item()
        assert found[f"coverage_{percent}"] == pytest.approx(inside)
        assert found[f"width_{percent}"] == pytest.approx(((upper - lower) * SCALE)[counts].mean().item())
        assert found[f"width_{percent}_scaled"] == pytest.approx((upper - lower)[counts].mean().item())


def test_calibrated_samples_cover_what_they_promise():
    found = scored(500, *windows(4000))
    for percent in COVERAGES:  # windows of 4 independent values
        assert abs(found[f"coverage_{percent}"] - percent / 100) < 4 * math.sqrt(0.25 / (4000 * 8 * 0.8))
    narrow = scored(500, *windows(4000, spread=0.5))
    assert narrow["coverage_90"] < 0.65 and narrow["crps_scaled"] > found["crps_scaled"] + 0.02
    # The CRPS of the right Gaussian is 1 / sqrt(pi).
    assert abs(found["crps_scaled"] - 1 / math.sqrt(math.pi)) < 0.01
    assert abs(found["nll_scaled"] - 0.5 * math.log(2 * math.pi * math.e)) < 0.02


# ------------------------------------------------------------------------------------------------- sums of all metrics


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu")])
def test_sums_keep_their_type_in_a_network_of_16_bits(change):
    holder = torch.nn.Module()
    holder.scores, holder.ratio, holder.samples = UncertaintyScores(), SumRatio(), SampleScores(SCALE)
    holder.units, holder.layer = TargetUnits(), torch.nn.Linear(2, 2)
    change(holder)
    holder.ratio.update(287, 360)
    assert holder.ratio.compute().item() == 287 / 360
    holder.ratio.reset()
    holder.ratio.update(257, 360)
    assert holder.ratio.compute().item() == 257 / 360
    kinds = {t.dtype for m in (holder.scores, holder.samples) for t in m.metric_state.values()}
    assert kinds == {torch.float64} and holder.samples.scale.dtype == torch.float64
    assert holder.units.scale.dtype == torch.float32
