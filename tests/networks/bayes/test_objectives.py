"""Data terms by their definitions, the order between them, chunks of samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Normal

from networks.bayes import (
    Init,
    Prior,
    SampleContext,
    data_term,
    elbo,
    gaussian_log_density,
    in_chunks,
    kl_divergence,
    l2_divergence,
    moment_term,
    predictive,
    to_bayesian,
)
from networks.bayes.objectives import check_objective
from networks.mlp import MLP
from parallel.sample_layout import SampleShare

F64, ALONE = torch.float64, SampleShare()


def likelihoods(samples=6, items=5):
    return (2 * torch.randn(samples, items, generator=torch.Generator().manual_seed(0), dtype=F64)).requires_grad_()


def test_objectives_are_their_definitions():
    values = likelihoods()
    torch.testing.assert_close(elbo(values, 6, ALONE), -values.mean())
    torch.testing.assert_close(predictive(values, 6, ALONE), -values.exp().mean(0).log().mean())
    for sync in ("exact", "local"):  # one process holds all samples
        torch.testing.assert_close(data_term(values, 6, ALONE, "elbo", sync), elbo(values, 6, ALONE))
        torch.testing.assert_close(data_term(values, 6, ALONE, "predictive", sync), predictive(values, 6, ALONE))


def test_the_predictive_bound_is_the_tighter_the_more_samples():
    values = likelihoods(64, 400)
    terms = [predictive(values[:s], s, ALONE).item() for s in (1, 4, 16, 64)]
    assert terms == sorted(terms, reverse=True) and terms[0] - terms[-1] > 0.5
    assert predictive(values, 64, ALONE) < elbo(values, 64, ALONE)
    torch.testing.assert_close(predictive(values[:1], 1, ALONE), elbo(values[:1], 1, ALONE))


def test_gradients_of_the_predictive_objective_are_responsibilities():
    values = likelihoods()
    (found,) = torch.autograd.grad(predictive(values, 6, ALONE), values)
    torch.testing.assert_close(found, -values.detach().softmax(0) / 5)


def test_for_classes_it_is_the_cross_entropy_of_the_mean_probabilities():
    logits, label = torch.randn(7, 5, 3, dtype=F64), torch.tensor([0, 2, 1, 1, 0])
    likelihood = logits.log_softmax(2).gather(2, label.expand(7, -1)[..., None])[..., 0]
    expected = nn.functional.nll_loss(logits.softmax(2).mean(0).log(), label)
    torch.testing.assert_close(predictive(likelihood, 7, ALONE), expected)


def test_log_density_of_a_gaussian():
    target, mean, log_variance = torch.randn(3, 40, dtype=F64)
    expected = Normal(mean, (0.5 * log_variance).exp()).log_prob(target)
    torch.testing.assert_close(gaussian_log_density(target, mean, log_variance), expected)


@pytest.mark.parametrize("sync", ["exact", "local"])
def test_moments_fit_one_gaussian_to_all_samples(sync):
    output = torch.randn(6, 4, 3, dtype=F64, requires_grad=True)
    target, noise = torch.randn(4, 3, dtype=F64), torch.tensor(0.3, dtype=F64, requires_grad=True)
    expected = -Normal(output.mean(0), (output.var(0) + noise).sqrt()).log_prob(target)
    found = moment_term(output, target, noise, 6, ALONE, sync)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.sum(), (output, noise))
    for one, other in zip(torch.autograd.grad(found.sum(), (output, noise)), wanted, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"model\.num_samples=1: a variance over samples needs 2 or more"):
        moment_term(output[:1], target, noise, 1, ALONE, sync)


def test_divergence_of_a_network_is_that_of_its_layers():
    net = to_bayesian(MLP(hidden=[4, 4]))
    torch.testing.assert_close(kl_divergence(net), sum(layer.kl() for layer in net.layers))
    assert kl_divergence(MLP(hidden=[4])) == 0


def test_divergence_of_dropout_is_the_prior_of_its_weights():
    """The negative log-density of all weights and biases under the prior of their layer, but for its constant."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double()
    for prior in (Prior(), Prior(0.1, 2.0), Prior(0.5, 0.7, rescale=True)):
        expected = 0.0
        for layer in (net[0], net[3]):
            mean, std = prior.of_layer(layer.weight[0].numel())
            for tensor in (layer.weight, layer.bias):
                law = Normal(torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64))
                expected += (law.log_prob(torch.tensor(mean, dtype=F64)) - law.log_prob(tensor)).sum()
        torch.testing.assert_close(l2_divergence(net, prior), expected, rtol=1e-12, atol=0)


def test_unknown_objectives():
    check_objective("predictive", "local")
    check_objective("moments", "exact", ("moments",))
    with pytest.raises(ValueError, match=r"model\.objective='moments' is unknown; choose one of elbo, predictive"):
        check_objective("moments", "exact")
    with pytest.raises(ValueError, match=r"model\.sync='none' is unknown; choose exact or local"):
        check_objective("elbo", "none")


# ------------------------------------------------------------------------------------------------------------ chunks

SAMPLES = 12


def network(dtype=F64, hidden=(16, 16)):
    torch.manual_seed(0)
    return to_bayesian(MLP(hidden=hidden), init=Init(sigma_scale=1.0)).to(dtype)


def chunked(net, x, samples, size, estimator="weight"):
    """Logits (sample, item, class)."""

    def some(part):
        ids = range(samples)[part]
        with SampleContext(ids, samples, batch=len(x), estimator=estimator):
            return net(x).unflatten(0, (len(ids), len(x)))

    return in_chunks(samples, size, some)


@pytest.mark.parametrize("estimator", ["weight", "flipout", "lrt"])
@pytest.mark.parametrize("objective", ["elbo", "predictive"])
def test_chunks_have_the_gradient_of_all_samples(objective, estimator):
    """Acceptance 5: for 1, 3, 5 (a rest is left) and all samples in a chunk, to 1e-12."""
    net, x, label = network(), torch.randn(9, 1, 8, 8, dtype=F64), torch.arange(9)

    def gradient(size):
        logits = chunked(net, x, SAMPLES, size, estimator)
        values = logits.log_softmax(2).gather(2, label.expand(SAMPLES, -1)[..., None])[..., 0]
        loss = data_term(values, SAMPLES, ALONE, objective, "exact")
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    whole = gradient(None)
    for size in (1, 3, 5, SAMPLES, 99):
        assert (gradient(size) - whole).norm() / whole.norm() <= 1e-12, size


def test_chunks_of_an_evaluation():
    net, x = network().eval(), torch.randn(9, 1, 8, 8, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(chunked(net, x, SAMPLES, 5), chunked(net, x, SAMPLES, None), rtol=1e-13, atol=1e-13)


def saved_bytes(run):
    """Bytes of the tensors that a forward pass keeps for the backward one, each once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


def test_nothing_but_outputs_is_kept_between_chunks():
    net, x = network(torch.float32, (128, 128)), torch.randn(64, 1, 8, 8)
    between = saved_bytes(lambda: chunked(net, x, 64, 4).square().sum())
    assert between <= 64 * 64 * 10 * 4 + math.prod(x.shape) * 4
