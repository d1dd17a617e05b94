"""Scores on six weights by hand, pruning against torch's own, correlation against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import prune as torch_prune

from networks.lottery.pruning import level_of, num_pruned, prune, remaining, sign_agreement
from networks.lottery.scores import NEEDS_SIGMA, SCORES, Posterior, known, rank_correlation, score
from networks.masks import density, install_masks, masks_of
from networks.mlp import MLP

# Six weights by hand: (mu, sigma).
SIX = [(1.0, 2.0), (-0.9, 0.1), (0.5, 0.5), (-0.3, 0.01), (0.2, 3.0), (0.0, 0.05)]
MU, SIGMA = (torch.tensor(column) for column in zip(*SIX, strict=True))
# mean squared gradients
G2 = torch.tensor([0.1, 0.1, 4.0, 0.1, 100.0, 100.0])

# Indices from the lowest score (removed first) to the highest. Worked out on paper:
# snr 0.5, 9, 1, 30, 0.067, 0; square 5, .82, .5, .09, 9.04, .0025; mu^2 g^2 .1, .081, 1, .009, 4, 0;
# log p(0) - log q(0) = log sigma + snr^2 / 2: .818, 38.2, -.193, 445, 1.1, -3.0.
ORDERS = {
    "magnitude": [5, 4, 3, 2, 1, 0],
    "mu": [5, 4, 3, 2, 1, 0],
    "mu_scaled": [5, 4, 3, 2, 1, 0],
    "snr": [5, 4, 0, 2, 1, 3],
    "square": [5, 3, 2, 1, 0, 4],
    "sigma": [3, 5, 1, 2, 0, 4],
    "mu_plus_sigma": [5, 3, 1, 2, 0, 4],
    "loss_change": [5, 3, 1, 0, 2, 4],
    "sign": [5, 4, 0, 2, 1, 3],
    "kl_gain": [5, 2, 0, 4, 1, 3],
}


def six() -> Posterior:
    return Posterior(MU, SIGMA.log(), fan_in=6, gradient_sq=G2)


@pytest.mark.parametrize("name", ORDERS)
def test_six_weights(name):
    (values,) = score(name, [six()])
    order = values.argsort(stable=True).tolist()
    expected = ORDERS[name]
    if name == "mu_plus_sigma":  # 1 + ... : weights 1 and 2 both sum to 1.0 and keep the order of their indices
        assert order == expected and values[1] == pytest.approx(values[2])
    assert order == expected


def test_every_score_has_its_example():
    assert set(ORDERS) | {"random"} == set(SCORES)


def test_values_of_the_closed_forms():
    (gain,) = score("kl_gain", [six()])
    prior, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(MU.double(), SIGMA.double())
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(gain, prior.log_prob(zero) - posterior.log_prob(zero), rtol=1e-6, atol=1e-6)
    (square,) = score("square", [six()])
    torch.testing.assert_close(square.exp(), (MU.double() ** 2 + SIGMA.double() ** 2).sqrt(), rtol=1e-6, atol=0)
    (sign,) = score("sign", [six()])
    probability = torch.distributions.Normal(0.0, 1.0).cdf(MU.abs().double() / SIGMA.double())
    torch.testing.assert_close((-(-sign).exp() + 1)[[0, 2, 4, 5]], probability[[0, 2, 4, 5]], rtol=1e-6, atol=0)


def test_snr_in_log_space():
    """A spread of 1e-30 does not overflow, in float32 neither, and a mean of zero has the lowest score."""
    posterior = Posterior(torch.tensor([1e-3, 0.0, 1.0]), torch.tensor([math.log(1e-30), -3.0, 0.0]))
    (values,) = score("snr", [posterior])
    assert values[0] == pytest.approx(math.log(1e27), rel=1e-6) and values[1] == -math.inf and values[2] == 0
    assert score("sign", [posterior])[0][0] > score("sign", [posterior])[0][2]  # does not saturate at 1


def test_frozen_sigma():
    """With one sigma for all weights snr and mu prune alike; per-layer constants make snr the scaled magnitude."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 64), "b": (10, 400)}
    mus = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}

    def pruned(name: str, common: bool) -> dict[str, torch.Tensor]:
        posteriors = []
        for mu in mus.values():
            fan_in = mu.shape[1]
            log_sigma = torch.full_like(mu, math.log(0.01 if common else 0.01 / math.sqrt(3 * fan_in)))
            posteriors.append(Posterior(mu, log_sigma, fan_in))
        return prune(masks, dict(zip(mus, score(name, posteriors), strict=True)), 0.3)

    def equal(one: str, other: str, common: bool) -> bool:
        a, b = pruned(one, common), pruned(other, common)
        return all(torch.equal(a[name], b[name]) for name in a)

    assert equal("snr", "mu", common=True)
    assert not equal("snr", "mu", common=False)
    assert equal("snr", "mu_scaled", common=False)


def test_mistakes():
    with pytest.raises(ValueError, match="score='snir' is unknown; choose one of"):
        known("snir")
    for name in NEEDS_SIGMA:
        with pytest.raises(ValueError, match=r"layers\.0 is deterministic"):
            score(name, [Posterior(MU)], ["layers.0"])
    with pytest.raises(ValueError, match="mean squared gradient"):
        score("loss_change", [Posterior(MU)])
    with pytest.raises(ValueError, match="has diverged"):
        score("mu", [Posterior(torch.tensor([math.nan]))])
    for rate in (0.0, 1.0, -0.1, 20):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            prune({"a": torch.ones(3, dtype=torch.bool)}, {"a": torch.ones(3)}, rate)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_equal_those_of_torch(seed):
    """Five rounds of 20 %, bit by bit (acceptance line 1)."""
    torch.manual_seed(seed)
    net, twin = MLP(hidden=[128, 64]), MLP(hidden=[128, 64])
    twin.load_state_dict(net.state_dict())
    weights = install_masks(net)
    theirs = [(twin.layers[i], "weight") for i in (0, 1)]
    for level in range(1, 6):
        with torch.no_grad():  # training moves weights between two prunings
            for weight, (layer, _) in zip(weights, theirs, strict=True):
                step = 0.02 * torch.randn(weight.mu.shape)
                weight.mu.add_(step)
                (layer.weight_orig if level > 1 else layer.weight).add_(step)
        for layer, _ in theirs:
            if level > 1:  # torch keeps the product of weight and mask, computed in the last forward pass
                layer.weight = layer.weight_orig * layer.weight_mask
        values = score("mu", [Posterior(w.mu) for w in weights])
        new = prune(masks_of(weights), {w.name: v for w, v in zip(weights, values, strict=True)}, 0.2)
        torch_prune.global_unstructured(theirs, torch_prune.L1Unstructured, amount=0.2)
        for weight, (layer, _) in zip(weights, theirs, strict=True):
            weight.set_mask(new[weight.name])
            assert torch.equal(layer.weight_mask.bool(), weight.mask), level
        assert density(new) == pytest.approx(0.8**level, abs=level / 16384)


def test_ties_go_by_index():
    masks = {"a": torch.ones(4, dtype=torch.bool), "b": torch.ones(4, dtype=torch.bool)}
    equal = {"a": torch.ones(4), "b": torch.ones(4)}
    new = prune(masks, equal, 0.75)
    assert new["a"].tolist() == [False] * 4 and new["b"].tolist() == [False, False, True, True]
    lowest = prune(masks, {"a": torch.ones(4), "b": torch.full((4,), -math.inf)}, 0.25)
    assert lowest["a"].all() and lowest["b"].tolist() == [False, False, True, True]


def test_dead_weights_do_not_come_back():
    masks = {"a": torch.tensor([True, False, True, True, False])}
    new = prune(masks, {"a": torch.tensor([3.0, -5.0, 2.0, 1.0, 9.0])}, 0.34)
    assert new["a"].tolist() == [True, False, True, False, False]


def test_counts():
    assert num_pruned(16384, 0.2) == 3277
    assert [round(remaining(n, 0.2), 4) for n in (3, 5, 10, 15, 20)] == [0.512, 0.3277, 0.1074, 0.0352, 0.0115]
    assert level_of(0.12, 0.2) == 10 and level_of(1.0, 0.2) == 0


def test_rank_correlation():
    a = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)
    b = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    squares = float(((a.argsort().argsort() - b.argsort().argsort()) ** 2).sum())
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * squares / (5 * 24))
    ties = torch.tensor([1.0, 1.0, 2.0, 3.0, -math.inf])  # mean ranks 2.5, 2.5, 4, 5, 1
    ranks = torch.tensor([2.5, 2.5, 4.0, 5.0, 1.0])
    expected = torch.corrcoef(torch.stack([ranks, b]))[0, 1]
    assert rank_correlation(ties, b) == pytest.approx(float(expected))
    assert math.isnan(rank_correlation(torch.ones(4), b[:4])) and math.isnan(rank_correlation(a[:1], b[:1]))


def test_sign_agreement():
    values, mask = torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.tensor([True, True, True, False])
    assert sign_agreement([values], [torch.tensor([1.0, 1.0, 1.0, -1.0])], [mask]) == pytest.approx(2 / 3)


def test_random_is_seeded():
    draws = [score("random", [Posterior(MU, generator=torch.Generator().manual_seed(s))])[0] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
